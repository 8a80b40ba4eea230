"""Evaluation counts of grounding: what was hit, what was missed, as integers.

`count_query` turns the masks of one query into a `QueryCounts`, plain numbers that are cheap to store and to send
between processes. `GroundingCounts` collects them (`reset`, `process`, `merge`) and reduces them once (`evaluate`)
under a named protocol of `uground.training.evaluation.protocols`. Shards merged in any order give exactly the figures
of the whole.

Pixels that are ignored are removed from prediction and target before all else. I and U are the intersection and the
union of two masks in pixels; IoU = I / U, and 1 where U = 0. A prediction is *empty* when no segment was written or
every mask is empty; a target likewise. A segment may be *rejected*: its mask was decoded, but the model would have
written the reject token in its place.

These are pixel counts of masks: torchmetrics' `GeneralizedIntersectionOverUnion` and `CompleteIntersectionOverUnion`
share the abbreviations gIoU and cIoU but compare boxes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from uground.training.data.samples import OVERALL
from uground.training.evaluation.protocols import iou, reduce_counts

# The loss of a wrong pixel in a binary cross-entropy whose logarithm is cut at -100, as PyTorch's is.
WRONG_PIXEL = 100.0
Pair = tuple[int, int]


class QueryCounts(NamedTuple):
    """Counts of one query. A pair is (I, U) in pixels; rejected segments are empty masks but in `decoded_pair`."""

    attribute: str
    pairs: tuple[Pair, ...]
    """Of each segment with the target in the same place, missing and superfluous segments included."""
    num_predicted: int
    num_target: int
    union_pair: Pair
    """Of the union of the predicted masks with the union of the target masks."""
    prediction_empty: bool
    target_empty: bool
    scores: tuple[float, ...] | None
    matched_pairs: tuple[Pair, ...] = ()
    """Of the best assignment of segments to targets: first each segment in order (I = 0 without a partner), then each
    target left over."""
    decoded_pair: Pair = (0, 0)
    """`union_pair` of the masks as they were decoded, rejected or not."""
    rejected: bool = False
    """No segment was written, or each was rejected."""
    box_pair: Pair | None = None
    """(I, U) of the boxes around the two unions; None where there is nothing to find."""
    subset: str | None = None
    """Part of the data that is reported apart as well."""


def restore_counts(fields: Mapping) -> QueryCounts:
    """Counts out of a mapping whose tuples came back as lists, from JSON or Arrow."""
    return QueryCounts(**{name: _tuples(value) for name, value in fields.items()})


def _tuples(value):
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple, np.ndarray)) else value


def _masks(name: str, masks: ArrayLike) -> np.ndarray:
    masks = np.asarray(masks)
    if masks.dtype != bool:
        raise ValueError(f"{name} must be boolean, got {masks.dtype}")
    return masks


def intersection_union(prediction: ArrayLike, target: ArrayLike, ignore: ArrayLike | None = None) -> Pair:
    """Pixels in both masks and pixels in either.

    Args:
        prediction: (H, W) boolean.
        target: (H, W) boolean.
        ignore: (H, W) boolean, pixels that count neither way; None ignores none.

    Raises:
        ValueError: masks that are not boolean or differ in shape.
    """
    prediction, target = _masks("prediction", prediction), _masks("target", target)
    if prediction.shape != target.shape:
        raise ValueError(f"prediction and target must have one shape, got {prediction.shape} and {target.shape}")
    if ignore is not None:
        ignore = _masks("ignore", ignore)
        if ignore.shape != target.shape:
            raise ValueError(f"ignore must have the shape of the target {target.shape}, got {ignore.shape}")
        prediction, target = prediction & ~ignore, target & ~ignore
    return _pair(np.count_nonzero(prediction & target), np.count_nonzero(prediction), np.count_nonzero(target))


def _pair(intersection: int, area: int, other_area: int) -> Pair:
    return int(intersection), int(area + other_area - intersection)


def count_query(
    prediction: ArrayLike,
    target: ArrayLike,
    attribute: str = "res",
    ignore: ArrayLike | None = None,
    scores: Sequence[float] | None = None,
    rejected: Sequence[bool] | None = None,
    subset: str | None = None,
) -> QueryCounts:
    """Counts of one query.

    Args:
        prediction: (n, H, W) boolean, the masks in the order they were written; n = 0 for none.
        target: (m, H, W) boolean, the masks wanted, in order; m = 0 for an absent object.
        attribute: what kind of query it is; figures are reported for each attribute and overall.
        ignore: (H, W) boolean, pixels that count neither way.
        scores: (n,) one per predicted mask, higher is surer; None leaves the query out of what ranks by score.
        rejected: (n,) whether the model would have written the reject token instead; None for none.
        subset: part of the attribute that is reported apart as well, such as "long".

    Raises:
        ValueError: masks that are not boolean, of another shape, or of different sizes; not one score or rejection per
            mask; a score that is not finite; an attribute called "overall".
    """
    prediction, target = _masks("prediction", prediction), _masks("target", target)
    if prediction.ndim != 3 or target.ndim != 3 or prediction.shape[1:] != target.shape[1:]:
        shapes = f"{prediction.shape} and {target.shape}"
        raise ValueError(f"prediction must be (n, H, W) and target (m, H, W) of one size, got {shapes}")
    if attribute == OVERALL:
        raise ValueError(f"{OVERALL!r} is the name of the total and cannot be an attribute")
    if scores is not None:
        scores = tuple(float(score) for score in scores)
        if len(scores) != len(prediction) or not all(map(math.isfinite, scores)):
            raise ValueError(f"scores must be {len(prediction)} finite numbers, one per prediction, got {scores}")
    rejected = np.zeros(len(prediction), dtype=bool) if rejected is None else np.asarray(rejected, dtype=bool)
    if rejected.shape != (len(prediction),):
        raise ValueError(f"rejected must be {len(prediction)} truth values, one per prediction, got {rejected.shape}")
    if ignore is not None:
        ignore = _masks("ignore", ignore)
        if ignore.shape != target.shape[1:]:
            raise ValueError(f"ignore must be {target.shape[1:]} like the masks, got {ignore.shape}")
        prediction, target = prediction & ~ignore, target & ~ignore
    decoded = prediction
    if rejected.any():
        prediction = prediction & ~rejected[:, None, None]
    wanted, found = _union(target), _union(prediction)
    union_pair = intersection_union(found, wanted)
    decoded_pair = intersection_union(_union(decoded), wanted) if rejected.any() else union_pair
    ordered, matched = _pairs(prediction, target, union_pair, target.shape[1] * target.shape[2])
    return QueryCounts(
        attribute=attribute,
        pairs=ordered,
        num_predicted=len(prediction),
        num_target=len(target),
        union_pair=union_pair,
        prediction_empty=not found.any(),
        target_empty=not wanted.any(),
        scores=scores,
        matched_pairs=matched,
        decoded_pair=decoded_pair,
        rejected=bool(rejected.all()),
        box_pair=_box_pair(found, wanted) if wanted.any() else None,
        subset=subset,
    )


def _union(masks: np.ndarray) -> np.ndarray:
    """(n, H, W) to (H, W): pixels in any of the masks."""
    return masks[0] if len(masks) == 1 else masks.any(0)


def _pairs(prediction: np.ndarray, target: np.ndarray, union_pair: Pair, pixels: int) -> tuple[tuple, tuple]:
    """Pairs in order, and pairs of the best assignment."""
    if len(prediction) <= 1 and len(target) <= 1:
        pairs = (union_pair,) if len(prediction) or len(target) else ()
        return pairs, pairs
    areas = [int(np.count_nonzero(mask)) for mask in prediction]
    wanted = [int(np.count_nonzero(mask)) for mask in target]
    shared = np.array(
        [[np.count_nonzero(mask & other) for other in target] for mask in prediction], dtype=np.int64
    ).reshape(len(areas), len(wanted))
    ordered = tuple(
        _pair(shared[i, i], areas[i], wanted[i])
        if i < min(len(areas), len(wanted))
        else (0, areas[i] if i < len(areas) else wanted[i])
        for i in range(max(len(areas), len(wanted)))
    )
    partners = assign(shared, areas, wanted, pixels)
    matched = [
        _pair(shared[i, partners[i]], area, wanted[partners[i]]) if i in partners else (0, area)
        for i, area in enumerate(areas)
    ]
    taken = set(partners.values())
    return ordered, (*matched, *((0, area) for j, area in enumerate(wanted) if j not in taken))


def assign(shared: np.ndarray, areas: Sequence[int], wanted: Sequence[int], pixels: int) -> dict[int, int]:
    """
    The Hungarian assignment of MUSE on hard masks: least sum of binary cross-entropy and dice loss.

    On hard masks the cross-entropy, with its logarithm cut at -100, is 100 times the share of wrong pixels; dice is
    1 - (2I + 1) / (A + B + 1). The official code takes both of mask logits at 12,544 random points; the assignments
    differ where targets are nearly equally good.

    Args:
        shared: (n, m) pixels that segment and target share.
        areas, wanted: (n,) and (m,) pixels of segments and of targets.
        pixels: of the image.

    Returns:
        Target of each segment that has one.
    """
    if not shared.size:
        return {}
    both = np.asarray(areas, dtype=np.int64)[:, None] + np.asarray(wanted, dtype=np.int64)[None]
    cost = WRONG_PIXEL * (both - 2 * shared) / max(pixels, 1) + 1 - (2 * shared + 1) / (both + 1)
    rows, columns = linear_sum_assignment(cost)
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """First and one past the last row, first and one past the last column of a mask."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1) if len(rows) else None


def _box_pair(found: np.ndarray, wanted: np.ndarray) -> Pair:
    """(I, U) in pixels of the boxes around two masks, of which the second is not empty."""
    box, target = _box(found), _box(wanted)
    target_area = (target[1] - target[0]) * (target[3] - target[2])
    if box is None:
        return 0, target_area
    height = min(box[1], target[1]) - max(box[0], target[0])
    width = min(box[3], target[3]) - max(box[2], target[2])
    return _pair(max(0, height) * max(0, width), (box[1] - box[0]) * (box[3] - box[2]), target_area)


class GroundingCounts:
    """Counts of many queries, collected one batch after another, on one process or several.

    Typical use: `process` on each process, `merge` what the others collected, `evaluate` once. The state is the list
    `queries`, which pickles and gathers as it is.
    """

    def __init__(self) -> None:
        self.queries: list[QueryCounts] = []

    def reset(self) -> None:
        """Forget everything."""
        self.queries = []

    def process(
        self,
        predictions: Sequence[ArrayLike],
        targets: Sequence[ArrayLike],
        attributes: Sequence[str] | None = None,
        ignores: Sequence[ArrayLike | None] | None = None,
        scores: Sequence[Sequence[float]] | None = None,
    ) -> None:
        """Add a batch of B queries: predictions (n, H, W) and targets (m, H, W), sizes free to differ between queries.

        `attributes`, `ignores` and `scores` have B entries where given; every entry is as in `count_query`.

        Raises:
            ValueError: lists of different lengths, or an entry `count_query` refuses; then nothing is added.
        """
        size = len(predictions)
        attributes = ["res"] * size if attributes is None else attributes
        ignores = [None] * size if ignores is None else ignores
        scores = [None] * size if scores is None else scores
        lengths = [len(entries) for entries in (predictions, targets, attributes, ignores, scores)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"predictions, targets, attributes, ignores and scores must have one entry per query, got {lengths}"
            )
        entries = zip(predictions, targets, attributes, ignores, scores, strict=True)
        self.queries += [count_query(*entry) for entry in entries]

    def merge(self, other: "GroundingCounts") -> None:
        """Add what another process collected."""
        self.queries += other.queries

    def evaluate(self, protocol: str = "ordered") -> dict[str, dict[str, float | int | None]]:
        """Figures under "overall" and, below, under each attribute met, in alphabetical order, and each of its
        subsets.

        Args:
            protocol: a name in `metric_protocols.PROTOCOLS`; see there for the figures.

        Raises:
            ValueError: there is no such protocol.
        """
        figures = {OVERALL: reduce_counts(self.queries, protocol)}
        groups: dict[str, list[QueryCounts]] = {}
        for query in self.queries:
            groups.setdefault(query.attribute, []).append(query)
            if query.subset is not None:
                groups.setdefault(f"{query.attribute}/{query.subset}", []).append(query)
        return figures | {name: reduce_counts(groups[name], protocol) for name in sorted(groups)}


__all__ = [
    "OVERALL",
    "GroundingCounts",
    "Pair",
    "QueryCounts",
    "assign",
    "count_query",
    "intersection_union",
    "iou",
    "restore_counts",
]
