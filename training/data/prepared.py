"""The prepared form of a dataset: parquet in the common schema, masks as RLE, pictures by path or inside.

A prepared folder holds `data/{split}-00000-of-00001.parquet`, so `datasets.load_dataset(folder)` finds its splits,
here and on the Hub.
"""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, Features, Image, List, Value, load_dataset
from PIL import Image as PILImage

from uground.training.data.files import open_image

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
SUFFIX = "-00000-of-00001.parquet"


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
    schema = FEATURES.arrow_schema
    try:
        with parquet.ParquetWriter(partial, schema) as writer:
            for example in examples:
                rows.append({**example, "image": stored_image(example["image"], embed)})
                count += 1
                if len(rows) == ROWS_PER_GROUP:
                    writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                    rows = []
            if rows or not count:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return count


def stored_image(image, embed: bool) -> dict:
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


def prepared_dataset(folder: str | os.PathLike, split: str) -> Dataset:
    """
    A split of a prepared dataset, whose items are examples of the common schema with their image opened.

    Items fit [`GroundingCollator`](uground.training.collator). Opening an item raises an `OSError` when its picture is
    gone, and a `ValueError` when the picture does not fit its masks.

    Raises:
        OSError: the folder holds no prepared dataset. ValueError: it has no such split, or columns are missing.
    """
    splits = prepared_splits(folder)
    if not splits:
        raise FileNotFoundError(
            f"{folder} holds no prepared dataset (data/SPLIT-*.parquet, as uground.training.data.prepare writes it)"
        )
    if split not in splits:
        raise ValueError(f"the prepared dataset {folder} has no split {split!r}; it has: {', '.join(splits)}")
    absent = [name for name in FEATURES if name not in parquet.read_schema(splits[split][0]).names]
    if absent:
        raise ValueError(f"{splits[split][0]} lacks the columns {', '.join(absent)} of a prepared dataset")
    data = load_dataset("parquet", data_files={split: splits[split]}, split=split)
    return data.cast_column("image", Image(decode=False)).with_transform(_opened)


def _opened(rows: dict[str, list]) -> dict[str, list]:
    if "image" not in rows:
        return rows
    images = []
    for index, image in enumerate(rows["image"]):
        masks = rows.get("masks", [[]] * (index + 1))[index]
        name = rows["id"][index] if "id" in rows else f"item {index}"
        images.append(open_image(image, tuple(masks[0]["size"]) if masks else None, name))
    return {**rows, "image": images}
