"""Whether scores mean something: average precision over the score, and reliability."""

import math
from collections.abc import Sequence

from uground.training.evaluation.counts import QueryCounts
from uground.training.evaluation.protocols import iou

# A segment is right when its IoU with the target it is matched to reaches this.
RIGHT = 0.5
BINS = 10


def calibration(queries: Sequence[QueryCounts]) -> dict:
    """
    Figures of the scores of predicted segments, each matched to at most one target of its query (`metrics.assign`).

    Returns:
        `segments` and `targets`: their numbers. `ap@0.5`: area under the precision envelope when segments are taken
        from the highest score down, right where the IoU reaches 0.5; None without a target. `ece`: expected
        calibration error, mean over segments of the distance between mean score and share right of its bin, in 0..1;
        None without a segment. `bins`: of ten bins of the score, lower end included, those that are not empty:
        `{"from", "to", "segments", "score", "right", "iou"}`, the last three being means.
    """
    scored = sorted(
        (score, iou(*pair) if pair[0] else 0.0)
        for query in queries
        for score, pair in zip(query.scores or (), query.matched_pairs, strict=False)
    )
    targets = sum(query.num_target for query in queries)
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for score, value in scored:
        bins[min(max(int(score * BINS), 0), BINS - 1)].append((score, value))
    rows = [_bin(number, entries) for number, entries in enumerate(bins) if entries]
    error = math.fsum(row["segments"] * abs(row["score"] - row["right"]) for row in rows)
    return {
        "segments": len(scored),
        "targets": targets,
        "ap@0.5": average_precision([(score, value >= RIGHT) for score, value in scored], targets),
        "ece": error / len(scored) if scored else None,
        "bins": rows,
    }


def _bin(number: int, entries: list[tuple[float, float]]) -> dict:
    size = len(entries)
    return {
        "from": number / BINS,
        "to": (number + 1) / BINS,
        "segments": size,
        "score": math.fsum(score for score, _ in entries) / size,
        "right": sum(value >= RIGHT for _, value in entries) / size,
        "iou": math.fsum(value for _, value in entries) / size,
    }


def average_precision(scored: Sequence[tuple[float, bool]], targets: int) -> float | None:
    """
    Area under the precision-recall envelope, all points.

    Args:
        scored: score and rightness of each prediction, in any order; equal scores are taken together.
        targets: how many there are to find.

    Returns:
        0..1; None without targets.
    """
    if not targets:
        return None
    points, right, taken = [], 0, 0
    ranked = sorted(scored, reverse=True)
    for place, (score, is_right) in enumerate(ranked, start=1):
        right, taken = right + is_right, taken + 1
        if place == len(ranked) or ranked[place][0] != score:
            points.append((right / targets, right / taken))
    area, best, recall_after = 0.0, 0.0, points[-1][0] if points else 0.0
    for recall, precision in reversed(points):
        area += (recall_after - recall) * best
        best, recall_after = max(best, precision), recall
    return area + recall_after * best
