"""Data sets in columns: of the Hub or a folder, with image, text and mask; and what `uground.apps.annotate` wrote."""

import hashlib
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from uground.processing.image_reading import opened_picture
from uground.training.data.importers.annotated import (
    NO_AREA,
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Question,
    Reading,
    number_of,
)
from uground.training.data.mask_pictures import mask_in_picture
from uground.training.data.masks import is_empty, shown
from uground.training.data.prepared import SEGMENT, loaded_dataset, parquet_rows
from uground.training.data.records import Record

SAVED = ("state.json", "dataset_dict.json")
NO_TEXT = "a row without text"
WHITE = 255


def read_columns(reading: Reading) -> Iterator[Entry]:
    """
    Rows of a data set with columns of image, text and mask. A text is a query, as it stands; a list of them asks for
    the same mask in several ways. A mask is a picture, rows of true and false, an RLE or polygons.

    `datasets` turns pictures as EXIF says, so masks refer to that unless only the stored picture has their size.

    Raises:
        OSError: there is no such data set. ValueError: it has no such split or column.
    """
    name = str(reading.source)
    for split, data in _splits(name, reading).items():
        missing = [column for column in reading.columns if column not in (data.column_names or ())]
        if missing:
            held = ", ".join(data.column_names or ())
            raise ValueError(f"split {split!r} of {name} has no column {missing[0]!r}, it has: {held}")
        for column in reading.columns:
            if isinstance(data.features[column], ImageFeature):
                data = data.cast_column(column, ImageFeature(decode=False))
        if not _holds_pictures(data.features[reading.columns[0]]):
            raise ValueError(f"the column {reading.columns[0]!r} of {name} must hold pictures")
        for number, row in enumerate(data.select_columns(list(reading.columns))):
            yield lambda at=(row, split, f"{name}, {split} row {number}"): _row(*at, reading)


def _holds_pictures(feature) -> bool:
    """Whether a column holds pictures, perhaps without saying so, as files that other libraries wrote."""
    stored = isinstance(feature, dict) and {"bytes", "path"} >= set(feature) and feature
    return bool(stored) or isinstance(feature, ImageFeature) or feature == Value("binary")


def _splits(name: str, reading: Reading) -> dict[str, Dataset | IterableDataset]:
    folder = Path(name)
    if any((folder / file).is_file() for file in SAVED):
        try:
            data = load_from_disk(name)
        except (pa.ArrowException, TypeError, KeyError) as error:
            raise ValueError(f"{name} cannot be read as a data set that was saved: {error}") from error
    else:
        repo_id, _, revision = (name, "", "") if folder.exists() else name.partition("@")
        data = loaded_dataset(name, repo_id, revision=revision or None, streaming=True)
    if not isinstance(data, (DatasetDict, IterableDatasetDict)):
        data = {reading.split or "train": data}
    if reading.split is None:
        return dict(data)
    if reading.split not in data:
        raise ValueError(f"{name} has no split {reading.split!r}; it has: {', '.join(data)}")
    return {reading.split: data[reading.split]}


def _row(row: dict, split: str, place: str, reading: Reading) -> AnnotatedPicture:
    image, text, mask = (row[column] for column in reading.columns)
    picture = _picture(image, place, reading)
    found = AnnotatedPicture(picture.path.name, picture, split)
    texts = [text] if isinstance(text, str) else text if isinstance(text, list) else [None]
    texts = [one.strip() for one in texts if isinstance(one, str) and one.strip()]
    if not texts:
        reading.tally.leave(NO_TEXT, place)
        return found
    if mask is None:
        reading.tally.leave("a row without a mask", place)
        return found
    rle = _mask(mask, picture, reading, place)
    if is_empty(rle):
        reading.tally.leave(NO_AREA, place)
        return found
    for one in texts:
        reading.tally.take("a text with its mask", place)
        found.questions.append(Question(one, (rle,)))
    return found


def _picture(image, place: str, reading: Reading) -> Picture:
    """A picture as a file of its own, or to become one, called after its content: many rows may be about one."""
    held = image if isinstance(image, dict) else {"bytes": image}
    if held.get("bytes") is None:
        if not held.get("path"):
            raise ValueError(f"{place}: there is no image")
        return Picture.of(reading.pictures.find(held["path"], place), place)
    content = held["bytes"]
    with opened_picture(io.BytesIO(content), f"{place}: its image") as picture:
        ending = next(end for end, kind in Image.registered_extensions().items() if kind == picture.format)
        ending = {"JPEG": ".jpg", "TIFF": ".tif"}.get(picture.format, ending)
    return Picture.inside(content, hashlib.sha256(content).hexdigest()[:16] + ending, place)


def _mask(mask, picture: Picture, reading: Reading, place: str) -> dict:
    if isinstance(mask, dict) and set(mask) == {"bytes", "path"}:
        file = io.BytesIO(mask["bytes"]) if mask["bytes"] is not None else reading.pictures.find(mask["path"], place)
        name = f"{place}: its mask"
        with opened_picture(file, name) as opened:
            size = opened.size[::-1]
        canvas = picture.drawn_on(size, reading.tally, place)
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return canvas.upright(mask_in_picture(file, size, name))
    if isinstance(mask, dict):
        size = mask.get("size")
        is_pair = isinstance(size, (list, tuple)) and len(size) == 2
        canvas = picture.drawn_on(tuple(size) if is_pair else None, reading.tally, place)
        return canvas.mask(mask, place)
    if _is_dense(mask):
        array = np.asarray(mask)
        values = set(np.unique(array).tolist()) if array.dtype.kind in "biuf" else {None}
        if not values <= {0, 1} and not values <= {0, WHITE}:
            raise ValueError(f"{place}: its mask must hold true and false, 1 and 0, or 255 and 0, got other values")
        return picture.drawn_on(array.shape, reading.tally, place).pixels(array > 0)
    if isinstance(mask, list):
        return picture.drawn_on(None, reading.tally, place).mask(mask, place)
    raise ValueError(
        f"{place}: a mask must be a picture, rows of true and false, an RLE or polygons, got {shown(mask)}"
    )


def _is_dense(mask) -> bool:
    """Whether these are rows of pixels and not polygons: the first two are as long, and hold 0, 1 and 255 alone."""
    if not isinstance(mask, list) or len(mask) < 2 or not all(isinstance(line, list) for line in mask):
        return False
    first = [*mask[0], *mask[1]]
    is_flat = not any(isinstance(value, (list, dict, str)) for value in first)
    return (
        is_flat and len({len(line) for line in mask}) == 1 and (set(first) <= {0, 1, WHITE} or len(mask[0]) % 2 == 1)
    )


def read_annotated(reading: Reading) -> Iterator[Entry]:
    """
    What `uground.apps.annotate` wrote: answers and masks of a model as if a person had drawn them.

    Raises:
        OSError: there are no parquet files. ValueError: a row does not make sense.
    """
    for path in reading.files(".parquet"):
        for number, row in enumerate(parquet_rows(path, ("image", "query", "answer", "segments", "error"))):
            record = Record(row, f"{path} row {number}")
            if "error" in record:
                reading.tally.leave("a query that was not answered", record.name)
                continue
            yield lambda record=record, path=path: _answered(record, path, reading)


def _answered(row: Record, path: Path, reading: Reading) -> AnnotatedPicture:
    file = row.filled_text("image")
    picture = Picture.of(reading.pictures.find(file, row.name), row.name)
    canvas = Canvas(picture, picture.size, False)
    found = AnnotatedPicture(file, picture, reading.split_of(path))
    segments = row.records("segments", "segment")
    scores = [number_of(segment.take("score"), f"{segment.name}: score") for segment in segments]
    if scores and min(scores) < reading.least_score:
        reading.tally.leave(f"an answer with a score below {reading.least_score:g}", row.name)
        return found
    masks = tuple(canvas.mask(segment.take("mask"), segment.name) for segment in segments)
    answer = row.text("answer")
    if any(map(is_empty, masks)) or answer.count(SEGMENT) != len(masks):
        reading.tally.leave("an answer of which a mask has no pixel", row.name)
        return found
    labels = tuple(segment.optional_text("label") for segment in segments)
    reading.tally.take("an answer of a model", row.name)
    found.questions.append(Question(row.filled_text("query"), masks, labels if all(labels) else None, answer or None))
    return found


__all__ = ["read_annotated", "read_columns"]
