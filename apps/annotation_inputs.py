"""What the annotate command reads: images of a folder or dataset, and what is asked about each."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from datasets import Image as ImageFeature
from PIL import Image

from uground.command_line import one_line
from uground.processing.image_reading import picture_errors
from uground.processing.text_lines import read_lines

# What tells the name of a file, or a pattern of them, from a Hub id.
FILE_ENDINGS = (".parquet", ".jsonl", ".tar", ".png", ".jpg", ".jpeg", ".webp")
PATTERN_CHARACTERS = "*?["


class ImageSource:
    """
    Numbered images, read one by one.

    Attributes:
        ids: what each is called in the output.
        read: fetches what the pipeline takes as an image; raises `OSError` or `ValueError` for a bad one.
    """

    def __init__(self, ids: Sequence[str], read: Callable[[int], object]):
        self.ids, self.read = list(ids), read

    def __len__(self) -> int:
        return len(self.ids)


def open_source(path: str, split: str | None = None, image_column: str = "image") -> ImageSource:
    """
    Images of a folder, a file, a saved dataset or the Hub.

    Raises:
        OSError: there is no such thing.
        ValueError: it holds no images.
    """
    place = Path(path)
    if place.is_file():
        return ImageSource([place.name], lambda _: path)
    if place.is_dir():
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return _dataset_source(_loaded(load_from_disk, path), path, split, image_column)
        endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
        files = sorted(file for file in place.rglob("*") if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise ValueError(f"--input {path} holds no images")
        return ImageSource([file.relative_to(place).as_posix() for file in files], lambda number: str(files[number]))
    refuse_paths(path)
    return _dataset_source(_loaded(load_dataset, path, split=split), path, split, image_column)


def refuse_paths(path: str) -> None:
    """Raise a `FileNotFoundError` unless what is no file here may be a Hub id."""
    is_path = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if is_path or Path(path).suffix.lower() in FILE_ENDINGS or set(path) & set(PATTERN_CHARACTERS):
        raise FileNotFoundError(f"--input {path} does not exist")


def _loaded(load: Callable, path: str, **settings):
    try:
        return load(path, **settings)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged dataset leads `datasets` to errors of many kinds of its own
        raise ValueError(f"--input {path} cannot be read as a dataset: {one_line(error)}") from error


def _dataset_source(data: Dataset | DatasetDict, name: str, split: str | None, column: str) -> ImageSource:
    if isinstance(data, DatasetDict):
        if split is None or split not in data:
            raise ValueError(f"--split must be one of {', '.join(data)} for {name}, got {split!r}")
        data = data[split]
    if column not in data.column_names:
        raise ValueError(f"--image-column must be one of {', '.join(data.column_names)}, got {column!r}")
    # Undecoded, so that a broken image shows when it is its turn, and in the thread that reads it.
    try:
        data = data.cast_column(column, ImageFeature(decode=False))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(f"the column {column} of {name} must hold images, got {data.features[column]}") from error
    ids = [str(value) for value in data["id"]] if "id" in data.column_names else [str(i) for i in range(len(data))]

    return ImageSource(ids, lambda number: read_entry(data[number][column]))


def read_entry(entry: object) -> Any:
    """
    What the pipeline takes as an image, of an undecoded entry of `datasets`.

    Raises:
        OSError, ValueError: there is none, or it is broken.
    """
    if entry is None:
        raise ValueError("there is no image")
    if not isinstance(entry, dict) or not {"bytes", "path"} <= set(entry):
        raise ValueError(f'an image must be a path or {{"bytes": …, "path": …}}, got {entry!r:.100}')
    if entry["bytes"] is None and entry["path"] is None:
        raise ValueError("there is no image")
    if entry["bytes"] is None:
        return entry["path"]
    with picture_errors("the image"):
        picture = Image.open(io.BytesIO(entry["bytes"]))
        picture.load()
    return picture


def read_queries(path: str, ids: Sequence[str]) -> list[list[str]]:
    """
    Queries per image, in the order of `ids`; an empty list where nothing is asked.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no UTF-8, holds no queries, a line is none, or it names an image that is not there.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--queries {path} {'is a folder' if Path(path).is_dir() else 'does not exist'}")
    lines = read_lines(path)
    if Path(path).suffix.lower() != ".jsonl":
        queries = [line.strip() for line in lines if line.strip()]
        if not queries:
            raise ValueError(f"--queries {path} holds no queries")
        return [queries] * len(ids)
    asked: dict[str, list[str]] = {image: [] for image in ids}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        image, queries = read_query_line(line, f"{path}:{number}")
        if image not in asked:
            raise ValueError(f"{path}:{number}: the line asks about the image {image!r}, which is not in --input")
        asked[image] += queries
    if not any(asked.values()):
        raise ValueError(f"--queries {path} holds no queries")
    return [asked[image] for image in ids]


def read_query_line(line: str, place: str) -> tuple[str, list[str]]:
    """
    Image and queries of a line of a .jsonl file.

    Raises:
        ValueError: it holds something else; the sentence begins with `place`.
    """
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}: the line must be JSON, but {one_line(error)}") from error
    image = entry.get("image") if isinstance(entry, dict) else None
    queries = entry.get("queries", [entry.get("query")]) if isinstance(entry, dict) else None
    is_listed = isinstance(queries, list) and all(isinstance(query, str) and query.strip() for query in queries)
    is_both = isinstance(entry, dict) and {"query", "queries"} <= set(entry)
    if is_both or not is_listed or not isinstance(image, (str, int)) or isinstance(image, bool):
        raise ValueError(
            f'{place}: the line must hold "image" and either "query" or "queries", got {line.strip()[:100]}'
        )
    return str(image), queries


__all__ = ["ImageSource", "open_source", "read_entry", "read_queries", "read_query_line", "refuse_paths"]
