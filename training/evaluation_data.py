"""What the evaluate command measures on, behind one face: Scenes, original files, a prepared dataset here or afar."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from uground.training.data.files import open_image
from uground.training.data.prepared import is_prepared, prepared_dataset
from uground.training.data.registry import DATASETS, PREMISE, SEVERAL, read_samples
from uground.training.data.samples import SkipCount
from uground.training.data.wording import Wording
from uground.training.metric_protocols import PROTOCOLS
from uground.training.scenes import SPLITS as SCENE_SPLITS
from uground.training.scenes import scene_examples

SCENES = "scenes"
DEFAULT_SCENES = 1000


@dataclass(frozen=True)
class EvaluationData:
    """
    Examples that can be fetched by their number, in any order and by any process.

    Attributes:
        size: number of examples.
        example: fetches example number i in the common schema, its image opened, with `subset`.
        protocols: those that make sense, the usual one first.
        neutral_answer: the answer that is forced where the wanted one says in words that nothing is there.
        left_out: what of the original files was left out, in words; empty if nothing was.
    """

    size: int
    example: Callable[[int], dict]
    protocols: tuple[str, ...]
    neutral_answer: str = "[SEG]."
    left_out: str = ""


def evaluation_data(dataset: str, root, split: str, count: int | None, seed: int) -> EvaluationData:
    """
    The examples to measure on.

    Args:
        dataset: `"scenes"`, a name in `DATASETS`, the folder of a prepared dataset, or the id of one on the Hub.
        root: folder of the original files; for datasets read from them.
        split: name of the split.
        count: at most so many, from the first; all by default, 1,000 of Scenes.
        seed: of Scenes.

    Raises:
        ValueError: no such dataset or split, or it has no masks. OSError: files are missing.
    """
    if dataset == SCENES:
        if split not in SCENE_SPLITS:
            raise ValueError(f"scenes has no split {split!r}; it has: {', '.join(SCENE_SPLITS)}")
        protocols = ("ordered", *(name for name in PROTOCOLS if name != "ordered"))
        return EvaluationData(
            DEFAULT_SCENES if count is None else count,
            lambda index: {**scene_examples(split, seed, index)[0], "subset": None},
            protocols,
            "It is [SEG].",
        )
    if dataset in DATASETS:
        entry = DATASETS[dataset]
        if not entry.protocols:
            raise ValueError(f"{dataset} has no masks to measure; it is for training only")
        skips = SkipCount()
        samples = [sample for sample in read_samples(dataset, root, split, skips) if sample.attribute != "vqa"]
        return _limited(len(samples), count, _SampleReader(samples), entry.protocols, str(skips))
    if is_prepared(dataset):
        data = prepared_dataset(dataset, split)
        rows = [row for row, attribute in enumerate(data.with_format(None)["attribute"]) if attribute != "vqa"]
        protocols = tuple(dict.fromkeys(("lisa", *PREMISE, *SEVERAL)))
        return _limited(len(rows), count, lambda index: data[rows[index]], protocols)
    if Path(dataset).exists():
        raise ValueError(f"{dataset} holds no prepared dataset, as uground.training.data.prepare writes it")
    raise ValueError(
        f"there is no dataset {dataset!r}; there are: {SCENES}, {', '.join(DATASETS)}, folders of prepared data, and "
        "ids of the Hub"
    )


def _limited(size: int, count: int | None, example, protocols: tuple[str, ...], left_out: str = "") -> EvaluationData:
    if not size:
        raise ValueError("; ".join(filter(None, ("the split holds no query about a mask", left_out))))
    return EvaluationData(size if count is None else min(size, count), example, protocols, left_out=left_out)


class _SampleReader:
    """Words a sample for evaluation and opens its image."""

    def __init__(self, samples: list):
        self.samples = samples
        self.wording = Wording("evaluation")

    def __call__(self, index: int) -> dict:
        sample = self.samples[index]
        return {**self.wording.example(sample), "image": open_image(sample.image, sample.size, sample.id)}
