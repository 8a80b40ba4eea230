"""Images that stream by: Hub ids, parquet and JSON lines files, folders and WebDataset tars, without a local copy."""

import glob
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Image as ImageFeature
from datasets import IterableDataset, load_dataset
from datasets.distributed import split_dataset_by_node
from PIL import Image

from uground.apps.annotation_inputs import ImageSource, read_entry, read_query_line, refuse_paths
from uground.command_line import one_line
from uground.processing.text_lines import read_lines

# Ending of a file to the reader of `datasets`.
READERS = {".parquet": "parquet", ".jsonl": "json", ".tar": "webdataset"}
DEFAULT_SPLIT = "train"
# Columns that name an image, the best first; the second is WebDataset's.
ID_COLUMNS = ("id", "__key__")


@dataclass
class StreamQueries:
    """
    What is asked of images that are not known beforehand.

    Attributes:
        everywhere: of every image.
        by_image: of images by name.
    """

    everywhere: list[str] = field(default_factory=list)
    by_image: dict[str, list[str]] = field(default_factory=dict)

    def of(self, image: str) -> list[str]:
        """The queries about an image."""
        return [*self.everywhere, *self.by_image.get(image, ())]


@dataclass
class Stream:
    """
    The images of one process.

    Attributes:
        data: of `datasets`, images undecoded.
        column: that holds the images.
        folder: of the data, which paths of images that are no part of them are relative to; of a Hub id none.
        process: number of the process, for the names of images that have none.
    """

    data: IterableDataset
    column: str
    folder: Path | None
    process: int


def is_stream(path: str) -> bool:
    """Whether an input can only be streamed: a file, folder or pattern of parquet, JSON lines or tar files."""
    return bool(_stream_files(path))


def _stream_files(path: str) -> list[str]:
    place = Path(path)
    if place.is_file():
        return [path] if place.suffix.lower() in READERS else []
    if place.is_dir():
        if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
            return []
        files = [str(file) for file in sorted(place.iterdir()) if file.suffix.lower() in READERS]
        is_images = any(file.suffix.lower() in Image.registered_extensions() for file in place.iterdir())
        return [] if is_images else files
    return [file for file in sorted(glob.glob(path)) if Path(file).suffix.lower() in READERS]


def open_stream(path: str, split: str | None, column: str, process: int, processes: int) -> Stream:
    """
    One process's part of a stream.

    Args:
        path: file, folder or pattern of files, folder of images, or Hub id.
        split: of a dataset, `"train"` by default.
        column: that holds the images; of a WebDataset, whose columns are the endings of its files, the only one that
            holds images.
        process, processes: which part, of how many.

    Raises:
        OSError, ValueError: there is no such thing, it cannot be read, or it holds no images.
    """
    files, place = _stream_files(path), Path(path)
    kinds = {Path(file).suffix.lower() for file in files}
    if len(kinds) > 1:
        raise ValueError(f"--input {path} must hold files of one kind, got {', '.join(sorted(kinds))}")
    if not files and not place.is_dir():
        refuse_paths(path)
    settings = {"streaming": True, "split": split or DEFAULT_SPLIT}
    try:
        if files:
            data = load_dataset(READERS[kinds.pop()], data_files={settings["split"]: files}, **settings)
        elif place.is_dir():
            data = load_dataset("imagefolder", data_dir=path, **settings)
        else:
            data = load_dataset(path, **settings)
        # Of JSON lines nothing is known before one is read.
        features = data.features or dict.fromkeys(next(iter(data), {}))
    except Exception as error:  # damaged files lead `datasets` to errors of many kinds of its own
        reason = "it holds nothing" if isinstance(error, StopIteration) else one_line(error)
        raise ValueError(f"--input {path} cannot be read as a dataset: {reason}") from error
    images = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if column not in features and len(images) == 1:
        column = images[0]
    if column not in features:
        raise ValueError(f"--image-column must be one of {', '.join(features)}, got {column!r}")
    if column in images:
        data = data.cast_column(column, ImageFeature(decode=False))
    data = split_dataset_by_node(data, process, processes)
    folder = Path(files[0]).parent if files else place.resolve() if place.is_dir() else None
    return Stream(data, column, folder, process)


def read_chunks(stream: Stream, size: int, done: int) -> Iterator[ImageSource]:
    """
    The images of a stream, so many at a time.

    Args:
        stream: of this process.
        size: images of a chunk; the last one may have fewer.
        done: chunks at the beginning that are left out.

    Raises:
        ValueError: the stream breaks off.
    """
    position = done * size
    # By hand, as `skip` of `datasets` counts the examples of all processes where these take turns.
    rows = itertools.islice(stream.data, position, None)
    while True:
        try:
            chunk = list(itertools.islice(rows, size))
        except Exception as error:  # of whatever fetches and unpacks files
            raise ValueError(f"the stream broke off near image {position}: {one_line(error)}") from error
        if not chunk:
            return
        ids = [_name(row, stream, position + number) for number, row in enumerate(chunk)]
        yield ImageSource(ids, lambda number, chunk=chunk: _read(chunk[number][stream.column], stream.folder))
        position += len(chunk)


def _name(row: dict, stream: Stream, position: int) -> str:
    entry = row[stream.column]
    for name in ID_COLUMNS:
        if row.get(name) is not None:
            return str(row[name])
    path = entry.get("path") if isinstance(entry, dict) else entry
    if not isinstance(path, str) or not path:
        return f"{stream.process}:{position}"
    # Images of a folder are called as without a stream.
    is_below = stream.folder is not None and isinstance(entry, dict) and Path(path).is_relative_to(stream.folder)
    return Path(path).relative_to(stream.folder).as_posix() if is_below else path


def _read(entry, folder: Path | None):
    """What the pipeline takes as an image: of a column of images, or of paths."""
    if isinstance(entry, str):
        return entry if folder is None or "://" in entry else str(folder / entry)
    return read_entry(entry)


def read_stream_queries(path: str) -> StreamQueries:
    """
    What is asked: of all images, or of those that are named.

    Raises:
        OSError, ValueError: as for a known set of images; but that a named image comes by cannot be known.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--queries {path} {'is a folder' if Path(path).is_dir() else 'does not exist'}")
    found = StreamQueries()
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        if Path(path).suffix.lower() != ".jsonl":
            found.everywhere.append(line.strip())
            continue
        image, queries = read_query_line(line, f"{path}:{number}")
        found.by_image.setdefault(image, []).extend(queries)
    if not found.everywhere and not any(found.by_image.values()):
        raise ValueError(f"--queries {path} holds no queries")
    return found


__all__ = ["Stream", "StreamQueries", "is_stream", "open_stream", "read_chunks", "read_stream_queries"]
