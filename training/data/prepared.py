"""The prepared form of a dataset: parquet in the common schema, masks as RLE, pictures by path or inside.

A prepared folder holds `data/{split}-00000-of-00001.parquet`, so `datasets.load_dataset(folder)` finds its splits,
here and on the Hub.
"""

import io
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import Dataset, Features, Image, List, Value, load_dataset
from datasets.exceptions import DatasetNotFoundError
from PIL import Image as PILImage

from uground.training.data.files import open_image
from uground.training.data.masks import read_runs, shown

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


def is_prepared(name: str | os.PathLike) -> bool:
    """Whether the name may be read by `prepared_dataset`: a prepared folder, or spelt like a dataset of the Hub."""
    return bool(prepared_splits(name)) if Path(name).exists() else bool(REPO_ID.fullmatch(os.fspath(name)))


def prepared_dataset(name: str | os.PathLike, split: str) -> Dataset:
    """
    A split of a dataset in the common schema, whose items are examples with their image opened.

    Items fit [`GroundingCollator`](uground.training.collator). Opening an item raises an `OSError` when its picture is
    gone, and a `ValueError` when the picture does not fit its masks.

    Args:
        name: a prepared folder, or the id of a dataset on the Hub, `USER/NAME` or `USER/NAME@REVISION`. There the
            columns `ignore` and `subset` may be missing.
        split: name of the split.

    Raises:
        OSError: there is no such dataset. ValueError: it has no such split, or columns are missing.
    """
    splits = prepared_splits(name)
    if splits:
        if split not in splits:
            raise ValueError(f"the prepared dataset {name} has no split {split!r}; it has: {', '.join(splits)}")
        data = load_dataset("parquet", data_files={split: splits[split]}, split=split)
    elif is_prepared(name):
        data = _hub_dataset(os.fspath(name), split)
    else:
        raise FileNotFoundError(
            f"{name} holds no prepared dataset (data/SPLIT-*.parquet, as uground.training.data.prepare writes it), "
            "and is no id of a dataset on the Hub (USER/NAME)"
        )
    absent = [column for column in FEATURES if column not in data.column_names]
    if absent:
        raise ValueError(f"split {split!r} of {name} lacks the columns {', '.join(absent)} of the common schema")
    return data.cast_column("image", Image(decode=False)).with_transform(_opened)


def _hub_dataset(name: str, split: str) -> Dataset:
    repo_id, _, revision = name.partition("@")
    try:
        data = load_dataset(repo_id, revision=revision or None, split=split)
    except DatasetNotFoundError as error:
        raise FileNotFoundError(f"there is neither a folder nor a dataset on the Hub called {name!r}") from error
    except ValueError as error:
        raise ValueError(f"the dataset {name!r} of the Hub cannot be read: {error}") from error
    for column in OPTIONAL_COLUMNS:
        if column not in data.column_names:
            data = data.add_column(column, [None] * len(data), feature=FEATURES[column])
    return data


def _opened(rows: dict[str, list]) -> dict[str, list]:
    if "image" not in rows:
        return rows
    images = []
    for index, image in enumerate(rows["image"]):
        name = rows["id"][index] if "id" in rows else f"item {index}"
        _check({column: values[index] for column, values in rows.items()}, name)
        masks = rows["masks"][index] if "masks" in rows else []
        images.append(open_image(image, tuple(masks[0]["size"]) if masks else None, name))
    return {**rows, "image": images}


def _check(row: dict, name: str) -> None:
    """Others write such columns too: texts must be there, and masks must be masks."""
    for column in ("query", "answer"):
        if column in row and not isinstance(row[column], str):
            raise ValueError(f"{name}: {column} must be a text, got {shown(row[column])}")
    if "masks" in row and not isinstance(row["masks"], list):
        raise ValueError(f"{name}: masks must be a list of RLEs, got {shown(row['masks'])}")
    for number, rle in enumerate(row.get("masks", []), start=1):
        read_runs(rle, f"{name}: mask {number}")
    if row.get("ignore") is not None:
        read_runs(row["ignore"], f"{name}: ignore")
