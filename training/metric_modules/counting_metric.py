"""What the three metric modules share: masks become integer counts as they come in, figures come out once at the end.

`evaluate` stores what is added in Arrow files and joins those of several processes; here it stores counts, not
masks, so memory and time do not grow with the pixels kept.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from datasets import Features, List, Value
from numpy.typing import ArrayLike

from uground.training.data.masks import decode_mask
from uground.training.evaluation.counts import QueryCounts, count_query, restore_counts
from uground.training.evaluation.protocols import reduce_counts

METRICS = ("grounding_iou", "grounding_presence", "grounding_sets")
PAIR = List(Value("int64"))
# Of `QueryCounts`, all but the names it may be grouped by: a metric has one group.
COUNTS = {
    "pairs": List(PAIR),
    "num_predicted": Value("int64"),
    "num_target": Value("int64"),
    "union_pair": PAIR,
    "prediction_empty": Value("bool"),
    "target_empty": Value("bool"),
    "scores": List(Value("float64")),
    "matched_pairs": List(PAIR),
    "decoded_pair": PAIR,
    "rejected": Value("bool"),
    "box_pair": PAIR,
}
INPUTS = """
Args:
    predictions: of each query its masks in the order they were written: an (n, H, W) boolean array, a list of (H, W)
        ones, or a list of COCO RLEs; or a dict of "masks", "rejected" (n truth values: the model would have written
        the reject token instead) and "scores". A query without a segment has an empty array of shape (0, H, W), or
        an empty list.
    references: of each query the masks wanted, in one of the same forms; or a dict of "masks" and "ignore" (pixels
        that count neither way). An absent object has an empty list.
"""


class CountingMetric(evaluate.Metric):
    """
    A metric that keeps counts.

    `protocols` are the names `config_name` may have, the default first; `figures` those of the protocol's figures that
    `compute` returns; `description` says what they are.
    """

    protocols: tuple[str, ...] = ()
    figures: tuple[str, ...] = ()
    description: str = ""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name == "default":
            self.config_name = self.protocols[0]
        if self.config_name not in self.protocols:
            raise ValueError(
                f"{type(self).__name__} has the protocols {', '.join(self.protocols)}, got {self.config_name!r}"
            )
        return evaluate.MetricInfo(
            description=self.description,
            citation="",
            inputs_description=INPUTS,
            features=Features({"counts": COUNTS}),
        )

    def add_batch(self, *, predictions: list | None = None, references: list | None = None, **kwargs: Any) -> None:
        """Count a batch of queries."""
        if predictions is None or references is None or len(predictions) != len(references):
            lengths = [None if values is None else len(values) for values in (predictions, references)]
            raise ValueError(f"predictions and references must have one entry per query, got {lengths}")
        if kwargs:
            raise ValueError(f"a batch has predictions and references, got {', '.join(kwargs)} as well")
        counts = [_stored(_count(*pair)) for pair in zip(predictions, references, strict=True)]
        if counts:
            super().add_batch(counts=counts)

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Count one query."""
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(
        self, *, predictions: list | None = None, references: list | None = None, **kwargs: Any
    ) -> dict | None:
        """The figures of everything added, and of what is given here; None on all processes but the first."""
        if predictions is not None or references is not None:
            self.add_batch(predictions=predictions, references=references)
        return super().compute(**kwargs)

    def _compute(self, counts) -> dict[str, float | int | None]:
        figures = reduce_counts([restore_counts({"attribute": "res", **row}) for row in counts], self.config_name)
        return {name: value for name, value in figures.items() if name in ("queries", *self.figures)}


def _count(prediction, reference) -> QueryCounts:
    prediction = dict(prediction) if _is_bundle(prediction) else {"masks": prediction}
    reference = dict(reference) if _is_bundle(reference) else {"masks": reference}
    unknown = set(prediction) - {"masks", "rejected", "scores"} | set(reference) - {"masks", "ignore"}
    if unknown:
        raise ValueError(f"a query has masks, rejected, scores and ignore, got {', '.join(sorted(unknown))}")
    found, wanted = as_masks(prediction["masks"]), as_masks(reference["masks"])
    # An empty list has no size of its own.
    found = found if found.size else found.reshape(len(found), *wanted.shape[1:])
    wanted = wanted if wanted.size else wanted.reshape(len(wanted), *found.shape[1:])
    ignore = reference.get("ignore")
    return count_query(
        found,
        wanted,
        ignore=decode_mask(ignore) if isinstance(ignore, Mapping) else ignore,
        scores=prediction.get("scores"),
        rejected=prediction.get("rejected"),
    )


def _is_bundle(entry) -> bool:
    return isinstance(entry, Mapping) and "masks" in entry


def as_masks(masks: ArrayLike | list[dict]) -> np.ndarray:
    """`(n, H, W)` boolean masks of an array, a list of `(H, W)` arrays, or a list of COCO RLEs."""
    if not isinstance(masks, np.ndarray):
        masks = [decode_mask(mask) if isinstance(mask, Mapping) else np.asarray(mask) for mask in masks]
    return np.asarray(masks) if len(masks) else np.zeros(getattr(masks, "shape", (0, 0, 0)), dtype=bool)


def _stored(query: QueryCounts) -> dict:
    return {name: getattr(query, name) for name in COUNTS}


def metric_path(name: str) -> str:
    """
    Path of a metric's script, for `evaluate.load`.

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f"there is no metric {name!r}; there are: {', '.join(METRICS)}")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, protocol: str | None = None, **kwargs: Any) -> evaluate.Metric:
    """
    A metric module.

    Args:
        name: one of `METRICS`.
        protocol: by default the first of the metric.
        kwargs: as for `evaluate.load`: `num_process`, `process_id`, `experiment_id`, …

    Raises:
        ValueError: there is no such metric, or it has no such protocol.
    """
    return evaluate.load(metric_path(name), protocol, **kwargs)
