"""The prepared form of a dataset: parquet in the common schema, masks as RLE, pictures by path or inside.

A prepared folder holds `data/{split}-00000-of-00001.parquet`, so `datasets.load_dataset(folder)` finds its splits,
here and on the Hub.
"""

import io
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, Features, Image, List, Value, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from PIL import Image as PILImage

from uground.command_line import one_line
from uground.training.data.files import open_image, upright_size
from uground.training.data.jsonl import JsonlSource
from uground.training.data.masks import check_size, is_empty, read_mask
from uground.training.data.records import Record

RLE = {"size": List(Value("int32")), "counts": Value("string")}
FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "query": Value("string"),
        "answer": Value("string"),
        "phrases": List(Value("string")),
        "masks": List(RLE),
        "ignore": RLE,
        "attribute": Value("string"),
        "subset": Value("string"),
    }
)
ROWS_PER_GROUP = 256
# Rows read at a time from files that are not ours; each may hold a picture.
ROWS_READ = 64
# Tells the transform which row it has before it, for messages; no item holds it.
ROW_NUMBER = "__row__"
SEGMENT = "[SEG]"
SUFFIX = "-00000-of-00001.parquet"
OPTIONAL_COLUMNS = ("ignore", "subset")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def write_prepared(examples: Iterable[dict], folder: str | os.PathLike, split: str, embed: bool = False) -> int:
    """
    Write a split of a prepared dataset.

    Args:
        examples: in the common schema; an image may be a path, `{"bytes", "path"}` or a `PIL.Image`, which is always
            stored inside.
        folder: of the prepared dataset; other splits in it stay.
        split: name of the split.
        embed: store the pictures' files inside the parquet, so that it needs nothing else.

    Returns:
        The number of examples. The file appears only when it is whole.
    """
    target = Path(folder) / "data" / f"{split}{SUFFIX}"
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(".partial")
    count, rows = 0, []
    try:
        with parquet.ParquetWriter(partial, FEATURES.arrow_schema) as writer:
            for example in examples:
                rows.append({**example, "image": stored_image(example["image"], embed)})
                count += 1
                if len(rows) == ROWS_PER_GROUP:
                    writer.write_table(_table(rows))
                    rows = []
            if rows or not count:
                writer.write_table(_table(rows))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def _table(rows: list[dict]) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)
    except (pa.ArrowException, UnicodeError) as error:
        ids = f"{ascii(rows[0]['id'])} to {ascii(rows[-1]['id'])}"
        raise ValueError(f"of the examples {ids} one cannot be stored: {one_line(error)}") from error


def open_parquet(path: str | os.PathLike) -> parquet.ParquetFile:
    """
    A parquet file, its footer read.

    Raises:
        OSError: it is missing or is none.
    """
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{path} cannot be read as a parquet file: {one_line(error)}") from error


def parquet_rows(path: str | os.PathLike, columns: Iterable[str]) -> Iterator[dict]:
    """
    Rows of a parquet file, a few in memory at a time.

    Raises:
        OSError: it is missing, is none, or is damaged.
    """
    batches = open_parquet(path).iter_batches(ROWS_READ, columns=list(columns))
    while True:
        try:
            batch = next(batches, None)
            rows = None if batch is None else batch.to_pylist()
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise OSError(f"{path} cannot be read as a parquet file: {one_line(error)}") from error
        if rows is None:
            return
        yield from rows


def stored_image(image: Any, embed: bool) -> dict:
    """`{"bytes", "path"}` of an image as `datasets` stores it."""
    if isinstance(image, PILImage.Image):
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}
    if isinstance(image, dict):
        return image
    path = Path(image).resolve()
    return {"bytes": path.read_bytes(), "path": path.name} if embed else {"bytes": None, "path": str(path)}


def prepared_splits(folder: str | os.PathLike) -> dict[str, list[str]]:
    """Files of each split of a prepared folder; empty where it is none."""
    splits: dict[str, list[str]] = {}
    for path in sorted((Path(folder) / "data").glob("*-of-*.parquet")):
        splits.setdefault(path.name.rsplit("-", 3)[0], []).append(str(path))
    return splits


def is_prepared(name: str | os.PathLike) -> bool:
    """Whether the name may be read by `prepared_dataset`: a prepared folder, or spelt like a dataset of the Hub."""
    return bool(prepared_splits(name)) if Path(name).exists() else bool(REPO_ID.fullmatch(os.fspath(name)))


def prepared_dataset(name: str | os.PathLike, split: str) -> Dataset:
    """
    A split of a dataset in the common schema, whose items are examples with their image opened.

    Items fit [`GroundingCollator`](uground.training.collator). Each is checked when it is opened: that raises an
    `OSError` when its picture is gone or unreadable, and a `ValueError`, which names file and row, when something of
    it is missing, of another type, or does not fit together.

    Args:
        name: a prepared folder, or the id of a dataset on the Hub, `USER/NAME` or `USER/NAME@REVISION`. There the
            columns `ignore` and `subset` may be missing.
        split: name of the split.

    Raises:
        OSError: there is no such dataset, or a file of it cannot be read.
        ValueError: it has no such split, no rows, or columns are missing or of another type.
    """
    splits = prepared_splits(name)
    if splits:
        if split not in splits:
            raise ValueError(f"the prepared dataset {name} has no split {split!r}; it has: {', '.join(splits)}")
        counts = {path: open_parquet(path).metadata.num_rows for path in splits[split]}
        # `datasets` stumbles over a file without rows.
        names = [path for path, count in counts.items() if count]
        starts = np.cumsum([0, *(counts[path] for path in names[:-1])]).tolist()
        data = loaded_dataset(name, "parquet", data_files={split: names}, split=split) if names else []
    elif is_prepared(name):
        data = _hub_dataset(os.fspath(name), split)
        names, starts = [f"{name}, split {split!r}"], [0]
    else:
        raise FileNotFoundError(
            f"{name} holds no prepared dataset (data/SPLIT-*.parquet, as uground.training.data.prepare writes it), "
            "and is no id of a dataset on the Hub (USER/NAME)"
        )
    if not len(data):
        raise ValueError(f"split {split!r} of {name} holds no rows")
    absent = [column for column in FEATURES if column not in data.column_names]
    if absent:
        raise ValueError(f"split {split!r} of {name} lacks the columns {', '.join(absent)} of the common schema")
    try:
        data = data.cast_column("image", Image(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"the column image of split {split!r} of {name} must hold pictures, got {data.features['image']}"
        ) from error
    data = data.add_column(ROW_NUMBER, np.arange(len(data)))
    return data.with_transform(partial(_opened, names=names, starts=starts))


def loaded_dataset(name: str | os.PathLike, *arguments: Any, **settings: Any) -> Any:
    """
    What `load_dataset` returns.

    Raises:
        OSError: there is no such dataset. ValueError: it cannot be read.
    """
    try:
        return load_dataset(*arguments, **settings)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"there is neither a folder nor a dataset on the Hub called {str(name)!r}") from error
    except (DatasetGenerationError, pa.ArrowException, ValueError) as error:
        raise ValueError(f"the dataset {str(name)!r} cannot be read: {one_line(error.__cause__ or error)}") from error


def _hub_dataset(name: str, split: str) -> Dataset:
    repo_id, _, revision = name.partition("@")
    data = loaded_dataset(name, repo_id, revision=revision or None, split=split)
    for column in OPTIONAL_COLUMNS:
        if column not in data.column_names:
            data = data.add_column(column, [None] * len(data), feature=FEATURES[column])
    return data


def _opened(rows: dict[str, list], names: Sequence[str], starts: Sequence[int]) -> dict[str, list]:
    """The examples of some rows, checked and with their images read; other selections of columns as they are."""
    numbers = rows.pop(ROW_NUMBER, None)
    if numbers is None or "image" not in rows:
        return rows
    examples = []
    for place, number in enumerate(numbers):
        file = bisect_right(starts, number) - 1
        row = {column: rows[column][place] for column in rows}
        examples.append(checked_example(row, f"{names[file]} row {number - starts[file]}"))
    return {column: [example[column] for example in examples] for column in rows}


def checked_example(row: dict, name: str) -> dict:
    """
    A stored row as an example, its image read.

    Args:
        row: in the common schema, image as `{"bytes", "path"}`.
        name: what to call the row in messages.

    Raises:
        OSError: its picture is missing or unreadable.
        ValueError: a field is missing or of another type, or answer, phrases, masks and picture do not fit together.
    """
    record = Record(row, name)
    record = Record(row, f"{name}, {record.filled_text('id')}")
    masks = checked_answer(record)
    sizes = {check_size(mask.take("size"), mask.name) for mask in masks}
    ignore = record.record("ignore") if "ignore" in record else None
    if ignore is not None and not any(ignore.value.values()):  # how some writers store null
        ignore = None
    sizes |= set() if ignore is None else {check_size(ignore.take("size"), ignore.name)}
    if len(sizes) > 1:
        raise ValueError(f"{record.name}: its masks must be of one size, got {sorted(sizes)} (height, width)")
    size = next(iter(sizes), None)
    read = [read_mask(mask.value, size, mask.name) for mask in masks]
    for mask, rle in zip(masks, read, strict=True):
        if is_empty(rle):
            raise ValueError(f"{mask.name} covers no pixel; a thing that is not there has no mask and no {SEGMENT}")
    picture = record.record("image").value
    if picture.get("bytes") is None and picture.get("path") is None:
        raise ValueError(f"{record.name}: its image must hold bytes or a path, got neither")
    try:
        image = open_image(picture, size, record.name)
    except (OSError, ValueError) as error:
        if str(error).startswith(record.name):
            raise
        # A picture that lies in a file of its own is called by its path only.
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise (kind if isinstance(error, OSError) else ValueError)(f"{record.name}: {error}") from error
    return {
        **row,
        "image": image,
        "masks": read,
        "ignore": None if ignore is None else read_mask(ignore.value, size, ignore.name),
    }


def file_rows(source: JsonlSource, embed: bool = False) -> Iterator[dict]:
    """
    The lines of a JSONL file in the common schema, each read and checked.

    Args:
        source: the file.
        embed: hold the bytes of the pictures, and of one that EXIF turns the turned pixels, which is what the masks
            are about; by default their paths.

    Raises:
        OSError, ValueError: a line is bad, or a conversation of several turns, for which there is no column.
    """
    for index in range(len(source)):
        (example,) = source[index]["examples"]
        if "history" in example:
            raise ValueError(f"{source.name_of(index)}: several turns cannot be stored, there is no column for them")
        path = source.path.parent / source.line(index)["image"]
        if not embed:
            stored = str(path)
        elif upright_size(path, f"{source.name_of(index)}: its image")[1] == 1:
            stored = {"bytes": path.read_bytes(), "path": path.name}
        else:
            stored = example["image"]
        yield {**example, "image": stored, "subset": None}


def checked_answer(record: Record) -> list[Record]:
    """
    The masks of a stored row, one for each segment token of its answer.

    Raises:
        ValueError: query, answer, attribute, phrases or masks are missing, of another type, or do not fit together.
    """
    for key in ("query", "answer", "attribute"):
        record.filled_text(key)
    masks = [Record(mask, f"{record.name}: mask {i}") for i, mask in enumerate(record.items("masks"), start=1)]
    phrases = record.texts("phrases")
    expected = record.value["answer"].count(SEGMENT)
    if len(masks) != expected:
        raise ValueError(f"{record.name} must have one mask per {SEGMENT}, got {len(masks)} for {expected}")
    if len(phrases) not in (0, len(masks)):
        raise ValueError(f"{record.name} must have one phrase per mask, {len(masks)}, got {len(phrases)}")
    return masks
