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

from uground.processing.image_reading import opened_picture
from uground.training.data.files import checked_root
from uground.training.data.masks import encode_mask, is_empty, read_mask, shown
from uground.training.data.prepared import open_parquet, parquet_rows
from uground.training.data.records import Record, checked_list
from uground.training.data.samples import NO_AREA, NO_WORDS, Sample, Skipped

COLUMNS = {
    "hub-reasonseg": ("image", "text", "mask"),
    "hub-refcoco": ("image", "text", "mask"),
    "hub-refcoco-lmms": ("image", "answer", "segmentation"),
    "refcoco-m": ("image", "samples"),
}


def read_hub(dataset: str, root: str | Path | None, split: str) -> Iterator[Sample | Skipped]:
    """
    Samples of a downloaded Hub dataset; `root` is its folder. A query without words, and a mask without a pixel, is
    skipped.

    Raises:
        OSError: there are no parquet files of the split, or a file or picture cannot be read.
        ValueError: a column is missing or of another type, or a mask does not fit its picture.
    """
    root = checked_root(root, dataset)
    found = sorted(root.rglob("*.parquet"))
    files = [path for path in found if path.name.split("-")[0].split(".")[0] == split]
    if not files:
        names = sorted({path.name.split("-")[0].split(".")[0] for path in found})
        held = f"it holds: {', '.join(names)}" if names else "it holds no parquet files"
        raise FileNotFoundError(f"{dataset} has no parquet files of split {split!r} under {root}; {held}")
    rows = 0
    for path in files:
        file = open_parquet(path)
        rows += file.metadata.num_rows
        absent = [name for name in COLUMNS[dataset] if name not in file.schema_arrow.names]
        if absent:
            raise ValueError(
                f"{path} must have the columns {', '.join(COLUMNS[dataset])} of {dataset}, got none called {absent[0]}"
            )
    if not rows:
        raise ValueError(f"{dataset} has no rows in split {split!r} under {root}")
    return _samples(dataset, split, files)


def _samples(dataset: str, split: str, files: list[Path]) -> Iterator[Sample | Skipped]:
    index = 0
    for path in files:
        for place, row in enumerate(parquet_rows(path, COLUMNS[dataset])):
            row = Record(row, f"{path} row {place}, {dataset}-{split}-{index}")
            content = row.record("image").take("bytes")
            size = _picture_size(content, row.name)
            asked = list(_asked(dataset, row, size))
            if not asked:
                yield Skipped(row.name, NO_WORDS)
            for number, (phrase, mask) in enumerate(asked):
                if not phrase or is_empty(mask):
                    yield Skipped(row.name, NO_AREA if phrase else NO_WORDS)
                    continue
                yield Sample(
                    id=f"{dataset}-{split}-{index}-{number}",
                    image={"bytes": content, "path": None},
                    size=size,
                    attribute="rs" if dataset == "hub-reasonseg" else "res",
                    phrases=(phrase,),
                    masks=(mask,),
                    question=phrase if _is_sentence(dataset, phrase) else None,
                )
            index += 1


def _picture_size(content, name: str) -> tuple[int, int]:
    """Height and width of a picture as it is stored; masks of these copies were drawn on that."""
    if not isinstance(content, bytes):
        raise ValueError(f"{name}: its image must hold the bytes of a picture, got {shown(content)}")
    with opened_picture(io.BytesIO(content), f"{name}: its image") as picture:
        return picture.height, picture.width


def _is_sentence(dataset: str, text: str) -> bool:
    """These copies of ReasonSeg do not say which queries are sentences; theirs end in a mark."""
    return dataset == "hub-reasonseg" and text.endswith((".", "?", "!"))


def _asked(dataset: str, row: Record, size: tuple[int, int]) -> Iterator[tuple[str, dict]]:
    """What a row asks for and its mask, both possibly empty."""
    if dataset == "refcoco-m":
        for sample in row.records("samples", "sample"):
            mask = read_mask(sample.take("mask"), size, sample.name)
            yield from ((sentence, mask) for sentence in sample.texts("sentences"))
    elif dataset == "hub-refcoco-lmms":
        mask = read_mask(row.take("segmentation"), size, row.name)
        phrases = [row.text("answer")] if isinstance(row.take("answer"), str) else row.texts("answer")
        yield from ((phrase, mask) for phrase in phrases)
    else:
        yield row.text("text"), encode_mask(_dense_mask(row, size))


def _dense_mask(row: Record, size: tuple[int, int]) -> np.ndarray:
    """`(H, W)` boolean mask of the rows of booleans, or of 0 and 1, that a row holds."""
    lines = [checked_list(line, f"{row.name}: mask {number}") for number, line in enumerate(row.items("mask"))]
    shape = (len(lines), len(lines[0]) if lines else 0)
    if shape != size or any(len(line) != size[1] for line in lines):
        raise ValueError(f"{row.name}: its mask has size {shape}, expected that of the image, {size}")
    kinds = {type(value) for line in lines for value in line}
    mask = np.array(lines) if kinds <= {bool, int, float} else None
    if mask is None or not np.isin(mask, (0, 1)).all():
        raise ValueError(f"{row.name}: its mask must hold true and false, or 1 and 0, got other values")
    return mask.astype(bool)
