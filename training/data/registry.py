"""The datasets by name: who reads them, their splits, and the protocols their figures are published under."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.utils import logging

from uground.training.data.hub_reader import read_hub
from uground.training.data.muse_reader import read_muse
from uground.training.data.reason_reader import LISA_PLUS, read_lisa_plus, read_reasonseg
from uground.training.data.refer_reader import LAYOUTS, read_refer
from uground.training.data.samples import Sample, SkipCount, Skipped
from uground.training.data.semantic_reader import read_coco_parts, read_label_maps
from uground.training.data.vqa_reader import read_llava_instruct

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class DatasetEntry:
    """
    What there is to know of a dataset.

    Attributes:
        read: `read(name, root, split)` yields its samples, and what is skipped.
        splits: names of its splits.
        protocols: those its figures make sense under, the usual one first; none for data without masks.
        parts: splits that are part of another one.
    """

    read: Callable[..., Iterator[Sample | Skipped]]
    splits: tuple[str, ...]
    protocols: tuple[str, ...]
    parts: tuple[str, ...] = ()

    @property
    def whole_splits(self) -> tuple[str, ...]:
        """The splits that hold every sample once."""
        return tuple(split for split in self.splits if split not in self.parts)


UNC = ("train", "val", "testA", "testB")
UMD = ("train", "val", "test")
SINGLE = ("lisa", "ordered")
GENERAL = ("rela", "gsva", "lisa", "ordered")
PREMISE = ("sesame", "rela", "gsva", "lisa", "ordered")
SEVERAL = ("muse", "lisa", "ordered")

_REFER = {
    "refcoco": (UNC, SINGLE),
    "refcoco+": (UNC, SINGLE),
    "refcocog": (UMD, SINGLE),
    "refcocog-google": (("train", "val"), SINGLE),
    "refcoco-unified": (UNC, SINGLE),
    "refcoco+-unified": (UNC, SINGLE),
    "refcocog-unified": (UMD, SINGLE),
    "refclef": ((*UNC, "testC"), SINGLE),
    "grefcoco": (UNC, GENERAL),
    "refzom": (("train", "test"), GENERAL),
    "r-refcoco": (UNC, PREMISE),
    "r-refcoco+": (UNC, PREMISE),
    "r-refcocog": (UMD, PREMISE),
    "fprefcoco": (UNC, PREMISE),
    "fprefcoco+": (UNC, PREMISE),
    "fprefcocog": (UMD, PREMISE),
}
assert _REFER.keys() == LAYOUTS.keys()

DATASETS: dict[str, DatasetEntry] = {
    **{name: DatasetEntry(read_refer, splits, protocols) for name, (splits, protocols) in _REFER.items()},
    "reasonseg": DatasetEntry(read_reasonseg, ("train", "val", "test"), SINGLE),
    **{name: DatasetEntry(read_lisa_plus, ("train",), SEVERAL) for name in LISA_PLUS},
    "muse": DatasetEntry(
        read_muse, ("train", "val", "test", "test_less", "test_many"), SEVERAL, ("test_less", "test_many")
    ),
    "ade20k": DatasetEntry(read_label_maps, ("train", "val"), SINGLE),
    "cocostuff": DatasetEntry(read_label_maps, ("train", "val"), SINGLE),
    "mapillary": DatasetEntry(read_label_maps, ("train", "val"), SINGLE),
    "paco-lvis": DatasetEntry(read_coco_parts, ("train", "val", "test"), SINGLE),
    "pascal-part": DatasetEntry(read_coco_parts, ("train", "val"), SINGLE),
    "llava-instruct": DatasetEntry(read_llava_instruct, ("train",), ()),
    "hub-reasonseg": DatasetEntry(read_hub, ("train", "validation", "val", "test"), SINGLE),
    "hub-refcoco": DatasetEntry(read_hub, ("train", "validation", "val", "test", "testA", "testB"), SINGLE),
    "hub-refcoco-lmms": DatasetEntry(read_hub, ("val", "test", "testA", "testB"), SINGLE),
    "refcoco-m": DatasetEntry(read_hub, ("validation",), SINGLE),
}


def read_samples(dataset: str, root: str | Path, split: str, skips: SkipCount | None = None) -> Iterator[Sample]:
    """
    Samples of a dataset, read from its original files.

    An annotation that holds no words, or a target without a pixel, is left out: as a sample it would ask for nothing,
    or teach that a thing is not there which is.

    Args:
        dataset: a name in `DATASETS`.
        root: folder of the original files.
        split: name of the split.
        skips: counts what is left out; without it, a warning at the end says how much that was.

    Raises:
        ValueError: there is no such dataset or split, or an annotation does not make sense.
        OSError: files are missing; the sentence names up to ten.
    """
    if dataset not in DATASETS:
        raise ValueError(f"there is no dataset {dataset!r}; there are: {', '.join(DATASETS)}")
    entry = DATASETS[dataset]
    if split not in entry.splits:
        raise ValueError(f"{dataset} has no split {split!r}; it has: {', '.join(entry.splits)}")
    return _kept(entry.read(dataset, root, split), f"{dataset}, split {split!r}", skips)


def _kept(found: Iterator[Sample | Skipped], name: str, skips: SkipCount | None) -> Iterator[Sample]:
    counted = SkipCount() if skips is None else skips
    for one in found:
        if isinstance(one, Skipped):
            counted.add(one)
        else:
            yield one
    if skips is None and counted.counts:
        logger.warning(f"{name}: {counted}")
