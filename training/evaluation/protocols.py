"""Named protocols: how the counts of many queries become figures. Papers differ here, so every table says which.

| protocol | a query's masks | IoU of a query with an empty target | what U gets from it |
|---|---|---|---|
| `ordered` | segment i with target i | 1 if predicted empty, else 0 | the prediction |
| `lisa` | their union, rejected or not | 1 if U = 0, else 0 | the prediction |
| `rela` | their union | 1 if predicted empty, else 0 | the prediction |
| `gsva` | their union, rejected or not | 1 if rejected, else 0 | nothing if rejected, else the prediction |
| `sesame` | their union | as `lisa` | the prediction |
| `muse` | best assignment | none of its own: per pair | the prediction |

Figures, all in 0..1 unless said otherwise, None where undefined:

- `ciou` = ΣI / ΣU over all pairs of all queries, 1 where nothing was wanted and nothing predicted; `giou` = mean IoU.
- `ordered`: the house's own. `giou` of a query = Σ IoU of its pairs / max(segments predicted, segments wanted), a
  missing or superfluous segment being 0. `union_ciou`, `union_giou`: the same of the unions. With at most one
  segment on either side all equal those of `rela`.
- `lisa` (LISA; RefCOCO, ReasonSeg): knows no emptiness but U = 0.
- `rela` (ReLA; gRefCOCO): empty means that no mask was predicted, by `[REJ]` or by an empty mask. A target predicted
  empty has I = 0.
- `gsva` (GSVA): emptiness is what the token says. A rejected mask of a target that is there keeps its IoU; an accepted
  empty mask of an absent one is wrong.
- `n_acc` = TP / (TP + FN) over empty targets (TP: predicted empty), `t_acc` = TN / (TN + FP) over the others; in
  `gsva` by the token.
- `pr@0.5` … `pr@0.9`: share of the queries with a target whose IoU is at least that.
- `box_acc` = share of those whose boxes (around the unions) have IoU ≥ 0.5: REC's Acc@0.5.
- `sesame` (SESAME; FP-RefCOCO): `see` = accuracy of (a segment was written and its mask is not empty) against
  existence; `segment` = `ciou` over all queries, false premises having an empty target; `precision` and `recall` of
  existence.
- `muse` (MUSE): segments and targets matched by `metrics.assign`, those left over compared with an empty mask.
  `giou` = Σ IoU / Σ max(segments predicted, segments wanted) over all queries, each weighted by its size as the
  official meter does; `giou_per_query` weights queries equally.
- `score_rank_correlation` (-1..1): Spearman's, between the score of each predicted segment and the IoU of its pair in
  order (0 for a superfluous one).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import spearmanr

"""Name under which all queries are reported; no attribute may bear it."""

THRESHOLDS = ((5, "pr@0.5"), (6, "pr@0.6"), (7, "pr@0.7"), (8, "pr@0.8"), (9, "pr@0.9"))
BOX_THRESHOLD = 5
# Protocols in which a model says "not there" by its reject token.
REJECTING = ("rela", "gsva")

Figures = dict[str, float | int | None]


def iou(intersection: int, union: int) -> float:
    """I / U in 0..1, and 1 where there is nothing on either side."""
    return intersection / union if union else 1.0


def reduce_counts(queries: Sequence, protocol: str = "ordered") -> Figures:
    """Figures of a collection of `QueryCounts` under a protocol, as defined at the head of this file.

    Returns:
        `queries`, `segments` (predicted) and `target_segments`: numbers of them; then the figures of the protocol,
        None
        where undefined: everything without a query, `n_acc` without an empty target, `t_acc`, `pr@` and `box_acc`
        without another, a correlation with fewer than two different scores or IoUs.

    Raises:
        ValueError: there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; there are: {', '.join(PROTOCOLS)}")
    counts = {
        "queries": len(queries),
        "segments": sum(query.num_predicted for query in queries),
        "target_segments": sum(query.num_target for query in queries),
    }
    return counts | PROTOCOLS[protocol](queries)


def pair_ious(query: Any) -> list[float]:
    """IoU of each ordered pair; a missing or superfluous segment is 0 even where its counterpart is an empty mask."""
    both = min(query.num_predicted, query.num_target)
    return [iou(*pair) if i < both else 0.0 for i, pair in enumerate(query.pairs)]


def query_iou(query: Any) -> float:
    """IoU of a query by ordered segments, 0..1, as `ordered` has it."""
    if query.prediction_empty or query.target_empty:
        return float(query.prediction_empty and query.target_empty)
    return math.fsum(pair_ious(query)) / len(query.pairs)


def _ratio(part: float, whole: int) -> float | None:
    return part / whole if whole else None


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _cumulative(pairs: Sequence[tuple[int, int]], queries: Sequence) -> float | None:
    return iou(sum(i for i, _ in pairs), sum(u for _, u in pairs)) if queries else None


def _presence(queries: Sequence, said_empty: Callable) -> Figures:
    absent = [query for query in queries if query.target_empty]
    present = [query for query in queries if not query.target_empty]
    return {
        "n_acc": _ratio(sum(map(said_empty, absent)), len(absent)),
        "t_acc": _ratio(sum(not said_empty(query) for query in present), len(present)),
    }


def _predicted_empty(query) -> bool:
    return query.prediction_empty


def _rejected(query) -> bool:
    return query.rejected


def _precision_at(pairs: Sequence[tuple[int, int]], queries: Sequence) -> Figures:
    """Of the queries with a target; in whole numbers, so that 0.7 is not what a float makes of it."""
    present = [pair for pair, query in zip(pairs, queries, strict=True) if not query.target_empty]
    return {name: _ratio(sum(10 * i >= tenths * u for i, u in present), len(present)) for tenths, name in THRESHOLDS}


def _box_accuracy(queries: Sequence) -> Figures:
    pairs = [query.box_pair for query in queries if query.box_pair is not None]
    return {"box_acc": _ratio(sum(10 * i >= BOX_THRESHOLD * u for i, u in pairs), len(pairs))}


def _rank_correlation(queries: Sequence) -> float | None:
    """Spearman's correlation of score and IoU over predicted segments; None where it is undefined."""
    scored = sorted(
        (score, value)
        for query in queries
        if query.scores is not None
        for score, value in zip(query.scores, pair_ious(query), strict=False)
    )
    if len({score for score, _ in scored}) < 2 or len({value for _, value in scored}) < 2:
        return None
    return float(spearmanr(*zip(*scored, strict=True)).statistic)


def _ordered(queries: Sequence) -> Figures:
    pairs = [pair for query in queries for pair in query.pairs]
    unions = [query.union_pair for query in queries]
    return {
        "ciou": _cumulative(pairs, queries),
        "giou": _mean([query_iou(query) for query in queries]),
        "union_ciou": _cumulative(unions, queries),
        "union_giou": _mean([iou(*pair) for pair in unions]),
        **_presence(queries, _predicted_empty),
        **_box_accuracy(queries),
        "score_rank_correlation": _rank_correlation(queries),
    }


def _lisa(queries: Sequence) -> Figures:
    pairs = [query.decoded_pair for query in queries]
    return {
        "giou": _mean([iou(*pair) for pair in pairs]),
        "ciou": _cumulative(pairs, queries),
        **_precision_at(pairs, queries),
        **_box_accuracy(queries),
    }


def _rela(queries: Sequence) -> Figures:
    # A true empty has the pair (0, 0), a missed one (0, prediction), a target predicted empty (0, target).
    pairs = [query.union_pair for query in queries]
    return {
        "giou": _mean([iou(*pair) for pair in pairs]),
        "ciou": _cumulative(pairs, queries),
        **_presence(queries, _predicted_empty),
        **_precision_at(pairs, queries),
    }


def _gsva(queries: Sequence) -> Figures:
    pairs = [(0, 0) if query.target_empty and query.rejected else query.decoded_pair for query in queries]
    values = [
        float(query.rejected) if query.target_empty else iou(*pair) for pair, query in zip(pairs, queries, strict=True)
    ]
    return {
        "giou": _mean(values),
        "ciou": _cumulative(pairs, queries),
        **_presence(queries, _rejected),
        **_precision_at(pairs, queries),
    }


def _sesame(queries: Sequence) -> Figures:
    right = sum(query.prediction_empty == query.target_empty for query in queries)
    found = sum(not query.prediction_empty and not query.target_empty for query in queries)
    return {
        "see": _ratio(right, len(queries)),
        "segment": _cumulative([query.union_pair for query in queries], queries),
        "precision": _ratio(found, sum(not query.prediction_empty for query in queries)),
        "recall": _ratio(found, sum(not query.target_empty for query in queries)),
        **_presence(queries, _predicted_empty),
    }


def _muse(queries: Sequence) -> Figures:
    values = [[iou(*pair) for pair in query.matched_pairs] for query in queries]
    sizes = [max(query.num_predicted, query.num_target) for query in queries]
    return {
        "giou": _ratio(math.fsum(value for one in values for value in one), sum(sizes)),
        "giou_per_query": _mean(
            [math.fsum(one) / size if size else 1.0 for one, size in zip(values, sizes, strict=True)]
        ),
        "ciou": _cumulative([pair for query in queries for pair in query.matched_pairs], queries),
    }


PROTOCOLS: dict[str, Callable[[Sequence], Figures]] = {
    "ordered": _ordered,
    "lisa": _lisa,
    "rela": _rela,
    "gsva": _gsva,
    "sesame": _sesame,
    "muse": _muse,
}
