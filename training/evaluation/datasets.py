"""What the evaluate command measures on, behind one face: Scenes, a user's own file, original or prepared data."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from uground.training.data.files import open_image
from uground.training.data.jsonl import JsonlSource, asks_for_masks, named_file
from uground.training.data.prepared import is_prepared, prepared_dataset
from uground.training.data.registry import DATASETS, PREMISE, SEVERAL, read_samples
from uground.training.data.samples import SkipCount
from uground.training.data.wording import Wording
from uground.training.evaluation.predictions import last_turn
from uground.training.evaluation.protocols import PROTOCOLS
from uground.training.scenes import SPLITS as SCENE_SPLITS
from uground.training.scenes import scene_examples

SCENES = "scenes"
DEFAULT_SCENES = 1000
HOUSE_PROTOCOLS = ("ordered", *(name for name in PROTOCOLS if name != "ordered"))


@dataclass(frozen=True)
class EvaluationData:
    """
    Examples that can be fetched by their number, in any order and by any process.

    Attributes:
        size: number of examples.
        example: fetches example number i in the common schema, its image opened, with `subset`.
        protocols: those that make sense, the usual one first.
        split: what the results call it.
        neutral_answer: the answer that is forced where the wanted one says in words that nothing is there.
        left_out: what of the original files was left out, in words; empty if nothing was.
        is_answer_known: whether a model can have learnt the very words that are wanted, so that comparing tells
            something; templates stand in for the answers of most datasets.
        content: changes with what a user's own file says.
        turns: the first example with earlier turns, by its line; None where there is none.
    """

    size: int
    example: Callable[[int], dict]
    protocols: tuple[str, ...]
    split: str
    neutral_answer: str = "[SEG]."
    left_out: str = ""
    is_answer_known: bool = False
    content: str | None = None
    turns: str | None = None


def evaluation_data(dataset: str, root: str | Path, split: str, count: int | None, seed: int) -> EvaluationData:
    """
    The examples to measure on.

    Args:
        dataset: `"scenes"`, a JSONL file as for training, a name in `DATASETS`, the folder of a prepared dataset, or
            the id of one on the Hub; a split that is named behind a colon takes the place of `split`.
        root: folder of the original files; for datasets read from them.
        split: name of the split; a JSONL file whose lines name none is one, whatever it is called.
        count: at most so many, from the first; all by default, 1,000 of Scenes.
        seed: of Scenes.

    Raises:
        ValueError: no such dataset or split, or it has no masks. OSError: files are missing.
    """
    name, colon, named = dataset.rpartition(":")
    if colon and not Path(dataset).exists():
        dataset, split = name, named
    if named_file(dataset):
        return _own_file(dataset, split, count)
    if dataset == SCENES:
        if split not in SCENE_SPLITS:
            raise ValueError(f"scenes has no split {split!r}; it has: {', '.join(SCENE_SPLITS)}")
        return EvaluationData(
            DEFAULT_SCENES if count is None else count,
            lambda index: {**scene_examples(split, seed, index)[0], "subset": None},
            HOUSE_PROTOCOLS,
            split,
            "It is [SEG].",
            is_answer_known=True,
        )
    if dataset in DATASETS:
        entry = DATASETS[dataset]
        if not entry.protocols:
            raise ValueError(f"{dataset} has no masks to measure; it is for training only")
        skips = SkipCount()
        samples = [sample for sample in read_samples(dataset, root, split, skips) if sample.attribute != "vqa"]
        return _limited(len(samples), count, _SampleReader(samples), entry.protocols, split, left_out=str(skips))
    if is_prepared(dataset):
        data = prepared_dataset(dataset, split)
        rows = [row for row, attribute in enumerate(data.with_format(None)["attribute"]) if attribute != "vqa"]
        protocols = tuple(dict.fromkeys(("lisa", *PREMISE, *SEVERAL)))
        return _limited(len(rows), count, lambda index: data[rows[index]], protocols, split)
    if Path(dataset).exists():
        raise ValueError(f"{dataset} holds no prepared dataset, as uground.training.data.prepare writes it")
    raise ValueError(
        f"there is no dataset {dataset!r}; there are: {SCENES}, {', '.join(DATASETS)}, JSONL files, folders of "
        "prepared data, and ids of the Hub"
    )


def _limited(size: int, count: int | None, example, protocols: tuple[str, ...], split: str, **more) -> EvaluationData:
    if not size:
        raise ValueError("; ".join(filter(None, ("the split holds no query about a mask", more.get("left_out")))))
    return EvaluationData(size if count is None else min(size, count), example, protocols, split, **more)


def _own_file(path: str, split: str, count: int | None) -> EvaluationData:
    """The lines of a JSONL file that ask for masks."""
    source = JsonlSource(path, split)
    rows, turns = [], None
    for index in range(len(source)):
        line = source.line(index)
        if asks_for_masks(line):
            rows.append(index)
            if turns is None and isinstance(line.get("turns"), list) and len(line["turns"]) > 1:
                turns = source.name_of(index)

    def example(number: int) -> dict:
        read = last_turn(source[rows[number]]["examples"][0])
        # Phrases label the targets in overlays, and a line may have none.
        count = len(read["masks"])
        phrases = read["phrases"] if len(read["phrases"]) == count else [read["query"]] * count
        return {**read, "phrases": phrases, "subset": None}

    more = {
        "turns": turns,
        "content": source.record()["content"],
        "neutral_answer": "It is [SEG].",
        "is_answer_known": True,
    }
    return _limited(len(rows), count, example, HOUSE_PROTOCOLS, split, **more)


class _SampleReader:
    """Words a sample for evaluation and opens its image."""

    def __init__(self, samples: list):
        self.samples = samples
        self.wording = Wording("evaluation")

    def __call__(self, index: int) -> dict:
        sample = self.samples[index]
        return {**self.wording.example(sample), "image": open_image(sample.image, sample.size, sample.id)}
