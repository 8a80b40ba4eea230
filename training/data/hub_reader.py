"""Datasets that lie on the Hub with their pixels, read from a downloaded copy: parquet files with pictures inside.

- `hub-reasonseg`, `hub-refcoco`: `Ricky06662/ReasonSeg_val|_test`, `Ricky06662/refcoco_*`: image, text, mask (rows of
  booleans).
- `hub-refcoco-lmms`: `lmms-lab/RefCOCO*`: image, answer (the phrases), segmentation (one flat polygon).
- `refcoco-m`: `moondream/refcoco-m`: image, samples [{sentences, mask as RLE}].
"""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
from PIL import Image

from uground.training.data.files import checked_root
from uground.training.data.masks import encode_mask, is_empty, read_mask
from uground.training.data.samples import Sample

# Rows read at a time; each holds a picture.
ROWS = 64
COLUMNS = {
    "hub-reasonseg": ("image", "text", "mask"),
    "hub-refcoco": ("image", "text", "mask"),
    "hub-refcoco-lmms": ("image", "answer", "segmentation"),
    "refcoco-m": ("image", "samples"),
}


def read_hub(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    Samples of a downloaded Hub dataset; `root` is its folder.

    Raises:
        OSError: there are no parquet files of the split.
        ValueError: a column is missing or a mask does not fit its picture.
    """
    root = checked_root(root, dataset)
    found = sorted(root.rglob("*.parquet"))
    files = [path for path in found if path.name.split("-")[0].split(".")[0] == split]
    if not files:
        names = sorted({path.name.split("-")[0].split(".")[0] for path in found})
        held = f"it holds: {', '.join(names)}" if names else "it holds no parquet files"
        raise FileNotFoundError(f"{dataset} has no parquet files of split {split!r} under {root}; {held}")
    for path in files:
        absent = [name for name in COLUMNS[dataset] if name not in parquet.read_schema(path).names]
        if absent:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS[dataset])} of {dataset}, got none called {absent[0]}"
            )
    return _samples(dataset, split, files)


def _samples(dataset: str, split: str, files: list[Path]) -> Iterator[Sample]:
    index = 0
    for path in files:
        for batch in parquet.ParquetFile(path).iter_batches(ROWS, columns=list(COLUMNS[dataset])):
            for row in batch.to_pylist():
                with Image.open(io.BytesIO(row["image"]["bytes"])) as picture:
                    size = (picture.height, picture.width)
                name = f"{dataset}-{split}-{index}"
                for number, (phrase, mask) in enumerate(_asked(dataset, row, size, name)):
                    yield Sample(
                        id=f"{name}-{number}",
                        image={"bytes": row["image"]["bytes"], "path": None},
                        size=size,
                        attribute="rs" if dataset == "hub-reasonseg" else "res",
                        phrases=(phrase,),
                        masks=(None if is_empty(mask) else mask,),
                        question=phrase if _is_sentence(dataset, phrase) else None,
                    )
                index += 1


def _is_sentence(dataset: str, text: str) -> bool:
    """These copies of ReasonSeg do not say which queries are sentences; theirs end in a mark."""
    return dataset == "hub-reasonseg" and text.endswith((".", "?", "!"))


def _asked(dataset: str, row: dict, size: tuple[int, int], name: str) -> Iterator[tuple[str, dict]]:
    if dataset == "refcoco-m":
        for sample in row["samples"]:
            mask = read_mask(sample["mask"], size, name)
            yield from ((sentence.strip(), mask) for sentence in sample["sentences"])
    elif dataset == "hub-refcoco-lmms":
        mask = read_mask(row["segmentation"], size, name)
        phrases = [row["answer"]] if isinstance(row["answer"], str) else row["answer"]
        yield from ((phrase.strip(), mask) for phrase in phrases)
    else:
        mask = np.asarray(row["mask"], dtype=bool)
        if mask.shape != size:
            raise ValueError(f"{name}: its mask has size {mask.shape}, expected that of the image, {size}")
        yield row["text"].strip(), encode_mask(mask)
