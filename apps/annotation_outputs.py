"""What the annotate command writes: shards of rows in one of several formats, each whole or not at all."""

import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from uground.processing import FoundSegment
from uground.whole_files import write_whole

SEGMENT = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float32()),
        ("box", pa.list_(pa.int32())),
        ("layer", pa.int32()),
        ("mask", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
    ]
)
ROW = pa.schema(
    [
        ("image", pa.string()),
        ("query_index", pa.int32()),
        ("query", pa.string()),
        ("answer", pa.string()),
        ("segments", pa.list_(SEGMENT)),
        ("error", pa.string()),
    ]
)
# Failures in the closing line, and characters of each.
FAILURES_SHOWN, REASON_SHOWN = 5, 200


def encode_segment(segment: FoundSegment) -> dict:
    """A segment as the rows hold it."""
    written = segment.to_dict()
    return {name: written[name] for name in ("label", "score", "box", "layer", "mask")}


def _write_parquet(path: Path, rows: list[dict]) -> None:
    rows = [{name: row[name] for name in ROW.names} for row in rows]
    parquet.write_table(pa.Table.from_pylist(rows, schema=ROW), path)


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text(
        "".join(json.dumps({name: row[name] for name in ROW.names}) + "\n" for row in rows), encoding="utf-8"
    )


def _write_coco(path: Path, rows: list[dict]) -> None:
    """A COCO file: its categories are the queries of the shard; `rows` has answers, and why there are none."""
    # By their numbers: two images may have one name, as members of several tars do.
    numbers = {image: number for number, image in enumerate(dict.fromkeys(row["number"] for row in rows), start=1)}
    categories = {query: number for number, query in enumerate(dict.fromkeys(row["query"] for row in rows), start=1)}
    annotations = []
    for row in rows:
        for segment, area in zip(row["segments"], row["areas"], strict=True):
            x0, y0, x1, y1 = segment["box"]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": numbers[row["number"]],
                    "category_id": categories[row["query"]],
                    "segmentation": segment["mask"],
                    "area": area,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "iscrowd": 0,
                    "score": segment["score"],
                }
            )
    images = [{"id": number, **_name_and_size(image, rows)} for image, number in numbers.items()]
    content = {
        "images": images,
        "categories": [{"id": number, "name": query} for query, number in categories.items()],
        "annotations": annotations,
        "rows": [{name: row[name] for name in ("image", "query_index", "query", "answer", "error")} for row in rows],
    }
    path.write_text(json.dumps(content), encoding="utf-8")


def _name_and_size(image: int, rows: list[dict]) -> dict:
    """Name, width and height of the image of a number; of one that could not be read, its name."""
    own = [row for row in rows if row["number"] == image]
    size = next((row["size"] for row in own if row["size"] is not None), None)
    return {"file_name": own[0]["image"], **({} if size is None else {"width": size[0], "height": size[1]})}


def _read_parquet(path: Path) -> Iterator[dict]:
    yield from parquet.read_table(path, columns=["image", "query_index", "error"]).to_pylist()


def _read_jsonl(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _read_coco(path: Path) -> Iterator[dict]:
    yield from json.loads(path.read_text(encoding="utf-8"))["rows"]


@dataclass(frozen=True)
class OutputFormat:
    """
    How shards are written.

    Attributes:
        ending: of their files.
        write: rows to a file.
        read: of each row of a file at least image, query_index and error.
    """

    ending: str
    write: Callable[[Path, list[dict]], None]
    read: Callable[[Path], Iterator[dict]]


FORMATS = {
    "parquet": OutputFormat(".parquet", _write_parquet, _read_parquet),
    "coco": OutputFormat(".json", _write_coco, _read_coco),
    "jsonl": OutputFormat(".jsonl", _write_jsonl, _read_jsonl),
}


class OutputFolder:
    """
    The folder that shards go to.

    Args:
        path: of the folder.
        format: a key of `FORMATS`.
        overlays (*optional*): folder for a picture of every answer; a shard's are in a folder of its name.
    """

    def __init__(self, path: Path, format: str = "parquet", overlays: Path | None = None):
        self.path, self.format, self.overlays = path, FORMATS[format], overlays

    def shard(self, name: str) -> Path:
        """File of a shard."""
        return self.path / f"part-{name}{self.format.ending}"

    def has(self, name: str) -> bool:
        """Whether a shard is there, with its overlays if there are to be some."""
        return self.shard(name).is_file() and (self.overlays is None or self._pictures(name).is_dir())

    def _pictures(self, name: str) -> Path:
        return self.overlays / f"part-{name}"

    def begin_pictures(self) -> Path | None:
        """A new folder for the overlays of a shard, unless there are to be none."""
        if self.overlays is None:
            return None
        partial = self.overlays / f".{uuid.uuid4().hex}.partial"
        partial.mkdir(parents=True)
        return partial

    def finish(self, name: str, rows: list[dict], pictures: Path | None) -> None:
        """Put the overlays of a shard, and then its file, into their places."""
        if pictures is not None:
            place = self._pictures(name)
            shutil.rmtree(place, ignore_errors=True)
            pictures.replace(place)
        write_whole(self.shard(name), lambda place: self.format.write(place, rows))

    def clear(self) -> None:
        """Remove what an interrupted run left behind."""
        for partial in self.path.glob(".*.partial*"):
            partial.unlink()
        for partial in self.overlays.glob(".*.partial") if self.overlays is not None else ():
            shutil.rmtree(partial)

    def closing_line(self) -> str:
        """How many rows there are, and which of them failed and why: the first few."""
        files, rows, failed = sorted(self.path.glob(f"part-*{self.format.ending}")), 0, 0
        places: dict[tuple[str, str], list[int]] = {}
        for path in files:
            for row in self.format.read(path):
                rows += 1
                if row["error"] is not None:
                    failed += 1
                    places.setdefault((row["image"], row["error"]), []).append(row["query_index"])
        line = f"{rows} rows in {len(files)} files in {self.path}, {failed} of them failed"
        shown = [
            f"{image}{f' query_index {found[0]}' if len(found) == 1 else ''}: {error[:REASON_SHOWN]}"
            for (image, error), found in list(places.items())[:FAILURES_SHOWN]
        ]
        more = len(places) - len(shown)
        return f"{line}: {'; '.join(shown)}{f'; and {more} more' if more else ''}" if shown else line


__all__ = ["FORMATS", "ROW", "OutputFolder", "encode_segment"]
