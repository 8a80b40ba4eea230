"""What a reader yields: one thing asked about one image, before `uground.training.data.wording` puts it in words."""

from collections import Counter
from dataclasses import dataclass

# Name of the total in tables, which no attribute may bear.
OVERALL = "overall"


@dataclass(frozen=True)
class Sample:
    """
    One thing asked about one image.

    Attributes:
        id: names the sample within its dataset and split.
        image: path of the picture, or `{"bytes": …, "path": …}`.
        size: height and width of the picture in pixels.
        attribute: `"res"`, `"rs"`, `"fp_res"`, `"gres"`, `"multi_rs"` or `"vqa"`.
        phrases: what is asked for, one phrase per target, in order.
        masks: COCO RLE of each target, None for one that is not there.
        question: the query where it is a sentence of its own; otherwise templates ask for the phrases.
        answer: a ready answer with one segment token per mask; otherwise templates answer.
        explanation: text that explains the answer.
        correction: what the image holds instead of a thing that is not there.
        ignore: RLE of pixels that count neither way.
        subset: a part of the split that is reported apart, such as `"short"` and `"long"` queries.
    """

    id: str
    image: str | dict
    size: tuple[int, int]
    attribute: str
    phrases: tuple[str, ...]
    masks: tuple[dict | None, ...]
    question: str | None = None
    answer: str | None = None
    explanation: str | None = None
    correction: str | None = None
    ignore: dict | None = None
    subset: str | None = None

    def __post_init__(self):
        assert len(self.phrases) == len(self.masks), f"{self.id}: one phrase per mask"


NO_WORDS = "a query without words"
NO_ANSWER = "an answer without words"
NO_NAME = "a thing without a name"
NO_AREA = "a target without area"
NO_TARGET = "a query without a target"


@dataclass(frozen=True)
class Skipped:
    """
    What a reader yields for an annotation that says too little to be asked: it is neither a sample nor an error.

    Attributes:
        name: of the annotation, with its file.
        reason: one of the above.
    """

    name: str
    reason: str


class SkipCount:
    """How many annotations were left out, by reason, and which was the first of each."""

    def __init__(self):
        self.counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, skipped: Skipped) -> None:
        """Count one more."""
        self.counts[skipped.reason] += 1
        self._first.setdefault(skipped.reason, skipped.name)

    def __str__(self) -> str:
        """ "left out: 2 x a query without words (first: …)"; "" of none."""
        parts = [f"{count} x {reason} (first: {self._first[reason]})" for reason, count in self.counts.items()]
        return f"left out: {', '.join(parts)}" if parts else ""
