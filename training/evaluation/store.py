"""What an evaluation leaves behind: finished blocks while it runs, so that it can be resumed; then its results."""

import io
import json
import os
import shutil
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from PIL import Image

from uground.modeling_uground.checkpoint_files import read_json_object
from uground.processing.drawing import draw_result
from uground.training.data.masks import decode_mask
from uground.whole_files import write_whole

PARTIAL = "partial"
RESULTS = "results.json"
# Settings that results have always named.
LASTING = ("dataset", "root", "split", "style", "seed", "batch_size", "max_new_tokens", "dtype", "count", "layers")
RLE = pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])
PREDICTIONS = pa.schema(
    [
        ("index", pa.int64()),
        ("id", pa.string()),
        ("attribute", pa.string()),
        ("layer_selection", pa.string()),
        ("query", pa.string()),
        ("expected", pa.string()),
        ("answer", pa.string()),
        ("masks", pa.list_(RLE)),
        ("scores", pa.list_(pa.float64())),
        ("boxes", pa.list_(pa.list_(pa.float64()))),
        ("labels", pa.list_(pa.string())),
        ("layers", pa.list_(pa.int32())),
        ("rejected", pa.list_(pa.bool_())),
        ("iou", pa.float64()),
    ]
)


class BlockStore:
    """
    Finished blocks of a running evaluation, one JSON line each, in `folder/partial`.

    Every process appends to a file of its own; a line cut off by a crash is passed over when the blocks are read
    again.

    Args:
        folder: of the results; None keeps nothing.
        settings: everything that the figures depend on. An interrupted evaluation is taken up only with the same.

    Raises:
        ValueError: the folder holds an evaluation with other settings, interrupted or finished.
    """

    def __init__(self, folder: str | os.PathLike | None, settings: dict):
        self.folder = None if folder is None else Path(folder) / PARTIAL
        self.file = None
        if self.folder is None:
            return
        # As it comes back from the file.
        settings = json.loads(json.dumps(settings))
        self._refuse_other_results(self.folder.parent / RESULTS, settings)
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = self.folder / "settings.json"
        if kept.exists():
            before = json.loads(kept.read_text(encoding="utf-8"))
            if changed := _first_change(before, settings):
                raise ValueError(
                    f"{folder} holds an interrupted evaluation with {changed}; finish it with its settings, or delete "
                    f"{self.folder}"
                )
        else:
            _write_text(kept, json.dumps(settings, indent=2))
        self.file = self.folder / f"blocks-{uuid.uuid4().hex}.jsonl"

    @staticmethod
    def _refuse_other_results(path: Path, settings: dict) -> None:
        if not path.is_file():
            return
        results = read_json_object(path)
        # Results of earlier versions hold the settings among the rest, the name of the model as it was typed.
        before = results.get("settings") or {name: results[name] for name in LASTING if name in results}
        if changed := _first_change(before, {name: settings.get(name) for name in before}):
            raise ValueError(
                f"{path.parent} holds a finished evaluation with {changed}; name another folder, or delete {path}"
            )

    def finished(self) -> dict[int, dict]:
        """The blocks that are done, by number."""
        blocks = {}
        for path in sorted(self.folder.glob("blocks-*.jsonl")) if self.folder else ():
            for line in io.StringIO(path.read_text(encoding="utf-8", errors="replace")):
                try:
                    block = json.loads(line)
                except json.JSONDecodeError:
                    continue
                blocks[block["block"]] = block
        return blocks

    def add(self, block: dict) -> None:
        """Keep a finished block."""
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(block) + "\n")

    def clear(self) -> None:
        """Forget all blocks: the results are written."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def _first_change(before: dict, settings: dict) -> str | None:
    """The first setting that differs, with both values; `None` where all are the same."""
    for name in sorted({*before, *settings}):
        if before.get(name) != settings.get(name):
            return f"{name}={before.get(name)!r}, got {settings.get(name)!r}"
    return None


def _write_text(path: Path, text: str) -> None:
    """Write a file that is whole whenever it exists."""
    write_whole(path, lambda place: place.write_text(text, encoding="utf-8"))


def write_results(folder: str | os.PathLike, results: dict, predictions: list[dict]) -> None:
    """Write `results.json` and `predictions.parquet`, one row per example and choice of layer."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(predictions, schema=PREDICTIONS)
    write_whole(folder / "predictions.parquet", lambda place: parquet.write_table(table, place))
    _write_text(folder / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")


def write_overlays(folder: str | os.PathLike, predictions: list[dict], count: int, example: dict) -> None:
    """
    Draw the predictions with the least and the greatest IoU: above what was predicted, below what was wanted.

    Args:
        folder: pictures go to `overlays/worst-01-….png` and `overlays/best-01-….png` in it.
        predictions: rows of one choice of layer.
        count: so many of each.
        example: fetches an example by its number.
    """
    target = Path(folder) / "overlays"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    ranked = sorted(predictions, key=lambda row: (row["iou"], row["index"]))
    chosen = {"worst": ranked[:count], "best": ranked[::-1][:count]}
    for kind, rows in chosen.items():
        for place, row in enumerate(rows, start=1):
            wanted = example(row["index"])
            name = "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in row["id"])[:80]
            picture = draw_result(
                wanted["image"],
                [
                    {
                        "answer": f"IoU {row['iou']:.2f} | {row['query']} | {row['answer']}",
                        "segments": _segments(row["masks"], row["labels"], row["scores"]),
                    },
                    {
                        "answer": f"wanted: {wanted['answer']}",
                        "segments": _segments(wanted["masks"], wanted["phrases"], [1.0] * len(wanted["masks"])),
                    },
                ],
            )
            picture.save(target / f"{kind}-{place:02d}-{name}.png")


def _segments(masks: list[dict], labels: list[str], scores: list[float]) -> list[dict]:
    return [
        {"mask": Image.fromarray(decode_mask(mask).astype("uint8") * 255), "label": label, "score": score}
        for mask, label, score in zip(masks, labels, scores, strict=True)
    ]
