"""The named protocols on 4x4 masks worked out by hand, and against plain loops over pixels."""

import math
import pickle
import random
from itertools import permutations

import numpy as np
import pytest

from uground.training.evaluation.calibration import average_precision, calibration
from uground.training.evaluation.counts import GroundingCounts, assign, count_query, restore_counts
from uground.training.evaluation.protocols import PROTOCOLS, reduce_counts

NOTHING = ["....", "....", "....", "...."]
LEFT = ["##..", "##..", "##..", "##.."]  # 8 pixels
TOP = ["####", "####", "....", "...."]  # 8 pixels; with LEFT: I = 4, U = 12
CORNER = ["##..", "##..", "....", "...."]  # 4 pixels; with LEFT: I = 4, U = 8
DOT = ["....", "....", "....", "...#"]  # 1 pixel, apart from all others


def masks(*drawings):
    """(n, 4, 4) boolean from drawings; none gives (0, 4, 4)."""
    return np.array([[[c == "#" for c in row] for row in drawing] for drawing in drawings], dtype=bool).reshape(
        len(drawings), 4, 4
    )


def figures(protocol, *queries):
    """Figures of (prediction, target, rejected) queries."""
    return reduce_counts([count_query(p, t, rejected=r) for p, t, r in queries], protocol)


HIT = (masks(CORNER), masks(LEFT), None)  # I 4, U 8
TRUE_EMPTY = (masks(), masks(), None)
REJECTED_EMPTY = (masks(DOT), masks(), [True])
MISSED_EMPTY = (masks(DOT), masks(), None)  # prediction 1 pixel
ACCEPTED_EMPTY_MASK = (masks(NOTHING), masks(), [False])
FALSE_REJECT = (masks(CORNER), masks(LEFT), [True])  # the mask it would have drawn has I 4, U 8
NOT_WRITTEN = (masks(), masks(LEFT), None)  # target 8 pixels


def test_lisa_knows_no_emptiness_but_an_empty_union():
    result = figures("lisa", HIT, TRUE_EMPTY, MISSED_EMPTY, ACCEPTED_EMPTY_MASK, NOT_WRITTEN)
    assert result["giou"] == pytest.approx((1 / 2 + 1 + 0 + 1 + 0) / 5)
    assert result["ciou"] == 4 / (8 + 0 + 1 + 0 + 8)
    # the token is not looked at: rejected masks count as they were drawn
    result = figures("lisa", FALSE_REJECT, REJECTED_EMPTY)
    assert (result["giou"], result["ciou"]) == (1 / 4, 4 / 9)


def test_rela_empties_what_is_rejected():
    result = figures("rela", HIT, TRUE_EMPTY, REJECTED_EMPTY, MISSED_EMPTY, ACCEPTED_EMPTY_MASK)
    assert result["giou"] == pytest.approx((1 / 2 + 1 + 1 + 0 + 1) / 5)
    assert result["ciou"] == 4 / (8 + 1)
    assert (result["n_acc"], result["t_acc"]) == (3 / 4, 1)
    result = figures("rela", HIT, FALSE_REJECT, NOT_WRITTEN)
    assert result["giou"] == pytest.approx((1 / 2 + 0 + 0) / 3)
    assert result["ciou"] == 4 / (8 + 8 + 8)
    assert (result["n_acc"], result["t_acc"]) == (None, 1 / 3)


def test_gsva_lets_the_token_decide():
    result = figures("gsva", HIT, REJECTED_EMPTY, MISSED_EMPTY, ACCEPTED_EMPTY_MASK)
    assert result["giou"] == pytest.approx((1 / 2 + 1 + 0 + 0) / 4)
    assert result["ciou"] == 4 / (8 + 0 + 1 + 0)
    assert (result["n_acc"], result["t_acc"]) == (1 / 3, 1)
    # a false reject keeps the IoU of its mask; without a mask there is none to keep
    result = figures("gsva", FALSE_REJECT, NOT_WRITTEN)
    assert result["giou"] == pytest.approx((1 / 2 + 0) / 2)
    assert (result["ciou"], result["t_acc"]) == (4 / 16, 0)


def test_sesame_sees_and_segments():
    # right: HIT, TRUE_EMPTY, ACCEPTED_EMPTY_MASK (no pixel is no sighting); wrong: MISSED_EMPTY, NOT_WRITTEN
    result = figures("sesame", HIT, TRUE_EMPTY, MISSED_EMPTY, ACCEPTED_EMPTY_MASK, NOT_WRITTEN)
    assert result["see"] == 3 / 5
    assert result["segment"] == 4 / (8 + 1 + 8)
    assert (result["precision"], result["recall"]) == (1 / 2, 1 / 2)
    assert figures("sesame", TRUE_EMPTY)["precision"] is None


def test_muse_matches_whatever_the_order():
    swapped = (masks(DOT, LEFT), masks(LEFT, DOT), None)
    assert figures("muse", swapped)["giou"] == figures("muse", swapped)["ciou"] == 1
    assert figures("ordered", swapped)["giou"] == 0
    # one missing: CORNER goes with LEFT (1/2), DOT is left over (0 of 1)
    missing = (masks(CORNER), masks(DOT, LEFT), None)
    superfluous = (masks(DOT, CORNER, TOP), masks(LEFT), None)  # CORNER with LEFT; DOT and TOP left over
    result = figures("muse", missing, superfluous)
    assert result["giou"] == pytest.approx((1 / 2 + 1 / 2) / (2 + 3))
    assert result["giou_per_query"] == pytest.approx((1 / 4 + 1 / 6) / 2)
    assert result["ciou"] == (4 + 4) / (8 + 1 + 8 + 1 + 8)
    assert figures("muse", TRUE_EMPTY)["giou_per_query"] == 1
    assert figures("muse", TRUE_EMPTY)["giou"] is None


def test_assignment_is_the_cheapest():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n, m = rng.integers(1, 4, 2)
        found, wanted = rng.random((n, 6, 6)) > 0.6, rng.random((m, 6, 6)) > 0.6
        shared = (found[:, None] & wanted[None]).sum((2, 3))
        partners = assign(shared, found.sum((1, 2)), wanted.sum((1, 2)), 36)

        def cost(i, j, found=found, wanted=wanted):
            a, b = found[i].astype(float), wanted[j].astype(float)
            cross_entropy = -np.mean(
                b * np.maximum(np.log(a + 1e-300), -100) + (1 - b) * np.maximum(np.log(1 - a + 1e-300), -100)
            )
            return cross_entropy + 1 - (2 * (a * b).sum() + 1) / (a.sum() + b.sum() + 1)

        few, many = min(n, m), max(n, m)
        pairs = [
            [(i, j) if n <= m else (j, i) for i, j in enumerate(order[:few])] for order in permutations(range(many))
        ]
        best = min(sum(cost(i, j) for i, j in choice) for choice in pairs)
        assert len(partners) == few
        assert sum(cost(i, j) for i, j in partners.items()) == pytest.approx(best)


def test_precision_at_thresholds_counts_the_threshold_itself():
    seven = np.zeros((1, 1, 10), dtype=bool)
    seven[..., :7] = True
    result = reduce_counts([count_query(seven, np.ones((1, 1, 10), dtype=bool))], "lisa")
    # 7/10 reaches 0.7, though 0.7 * 10 is 7.000000000000001 in floats
    assert [result[f"pr@0.{t}"] for t in (5, 6, 7, 8, 9)] == [1, 1, 1, 0, 0]
    assert figures("lisa", TRUE_EMPTY)["pr@0.5"] is None


def test_boxes_from_masks():
    # box of CORNER 2x2, of LEFT 4x2: I 4, U 8; of a ring and of what fills it: equal boxes, unequal masks
    assert figures("lisa", HIT)["box_acc"] == 1
    ring = (masks(["####", "#..#", "#..#", "####"]), masks(["#...", "....", "....", "...#"]), None)
    assert figures("lisa", ring)["box_acc"] == 1 and figures("lisa", ring)["giou"] == pytest.approx(2 / 12)
    assert figures("lisa", (masks(DOT), masks(CORNER), None), NOT_WRITTEN)["box_acc"] == 0
    assert figures("lisa", MISSED_EMPTY)["box_acc"] is None


def test_ignored_pixels_and_subsets():
    counts = GroundingCounts()
    ignore = masks(CORNER)[0]
    counts.queries = [
        count_query(masks(LEFT), masks(TOP), "rs", ignore, subset="long"),  # I 0, U 8
        count_query(masks(LEFT), masks(LEFT), "rs", ignore, subset="short"),
        count_query(masks(CORNER), masks(), "res", ignore),
    ]
    result = counts.evaluate("lisa")
    assert list(result) == ["overall", "res", "rs", "rs/long", "rs/short"]
    assert (result["rs/long"]["ciou"], result["rs/short"]["ciou"]) == (0, 1)
    assert result["rs"]["ciou"] == 4 / 12
    assert result["res"]["giou"] == 1


def plain_figures(queries, protocol):
    """The same figures with nothing but loops over pixels."""
    total_i = total_u = 0
    values = []
    for prediction, target, ignore, rejected in queries:
        height, width = target.shape[1:]
        drop = rejected if protocol == "rela" else [False] * len(prediction)
        i = u = area = 0
        for y in range(height):
            for x in range(width):
                if ignore[y, x]:
                    continue
                a = any(mask[y, x] for mask, gone in zip(prediction, drop, strict=True) if not gone)
                b = any(mask[y, x] for mask in target)
                i, u, area = i + (a and b), u + (a or b), area + b
        if protocol == "gsva" and not area:
            values.append(1.0 if all(rejected) else 0.0)
            u = 0 if all(rejected) else u
        else:
            values.append(i / u if u else 1.0)
        total_i, total_u = total_i + i, total_u + u
    return math.fsum(values) / len(values), total_i / total_u if total_u else 1.0


def random_queries(seed, size):
    rng = np.random.default_rng(seed)
    queries = []
    for _ in range(size):
        n, m, h, w = rng.integers(0, 4), rng.integers(0, 4), *rng.integers(1, 8, 2)
        prediction, target = rng.random((n, h, w)) > 0.7, rng.random((m, h, w)) > 0.7
        queries.append((prediction, target, rng.random((h, w)) > 0.8, (rng.random(n) > 0.6).tolist()))
    return queries


@pytest.mark.parametrize("protocol", ["lisa", "rela", "gsva"])
@pytest.mark.parametrize("seed", range(3))
def test_against_plain_loops(protocol, seed):
    queries = random_queries(seed, 40)
    counts = [count_query(p, t, ignore=g, rejected=r) for p, t, g, r in queries]
    result = reduce_counts(counts, protocol)
    assert (result["giou"], result["ciou"]) == plain_figures(queries, protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_shards_equal_the_whole_exactly(protocol):
    counts = [count_query(p, t, ignore=g, rejected=r) for p, t, g, r in random_queries(7, 60)]
    whole, merged = GroundingCounts(), GroundingCounts()
    whole.queries = counts
    order = random.Random(1).sample(counts, len(counts))
    for start in range(0, 60, 23):
        shard = GroundingCounts()
        shard.queries = [restore_counts(pickle.loads(pickle.dumps(q))._asdict()) for q in order[start : start + 23]]
        merged.merge(shard)
    assert merged.evaluate(protocol) == whole.evaluate(protocol)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_nothing_measured(protocol):
    empty, full = reduce_counts([], protocol), figures(protocol, HIT, MISSED_EMPTY)
    assert empty.keys() == full.keys()
    assert {value for name, value in empty.items() if name not in ("queries", "segments", "target_segments")} == {None}


def test_unknown_protocol_and_rejections():
    with pytest.raises(
        ValueError, match="there is no protocol 'coco'; there are: ordered, lisa, rela, gsva, sesame, muse"
    ):
        reduce_counts([], "coco")
    with pytest.raises(ValueError, match=r"rejected must be 1 truth values, one per prediction, got \(2,\)"):
        count_query(masks(DOT), masks(), rejected=[True, False])


def test_average_precision():
    ranked = [(0.9, True), (0.8, False), (0.7, True), (0.6, False)]
    # recall 1/3 at precision 1, recall 2/3 at precision 2/3, the last target is never found
    assert average_precision(ranked, 3) == pytest.approx(1 / 3 + 1 / 3 * 2 / 3)
    assert average_precision(ranked[::-1], 3) == average_precision(ranked, 3)
    # equal scores are taken together: which of them is right does not matter
    assert (
        average_precision([(0.5, True), (0.5, False)], 1) == average_precision([(0.5, False), (0.5, True)], 1) == 0.5
    )
    assert average_precision([], 3) == 0
    assert average_precision(ranked, 0) is None


def test_calibration_of_matched_segments():
    queries = [
        count_query(masks(DOT, LEFT), masks(LEFT), scores=[0.15, 0.95]),  # superfluous; IoU 1
        count_query(masks(CORNER), masks(LEFT), scores=[0.97]),  # IoU 1/2
        count_query(masks(TOP), masks(LEFT), scores=[0.1]),  # IoU 1/3
        count_query(masks(), masks(LEFT)),
    ]
    result = calibration(queries)
    assert (result["segments"], result["targets"]) == (4, 4)
    assert result["ap@0.5"] == pytest.approx(2 / 4)
    low, high = result["bins"]
    assert (low["from"], low["segments"], low["right"]) == (0.1, 2, 0)
    assert (low["score"], low["iou"]) == (pytest.approx(0.125), pytest.approx(1 / 6))
    assert (high["to"], high["segments"], high["right"], high["iou"]) == (1.0, 2, 1, 0.75)
    assert result["ece"] == pytest.approx((2 * 0.125 + 2 * 0.04) / 4)
    assert calibration([])["ece"] is None
