"""Evaluation counts on 4x4 masks, worked out by hand, and shards against the whole."""

import json
import pickle
import random

import numpy as np
import pytest
import torch

from uground.training.evaluation.counts import GroundingCounts, count_query, intersection_union
from uground.training.evaluation.protocols import query_iou

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


def figures(*queries):
    """Overall figures of (prediction, target) queries."""
    counts = GroundingCounts()
    counts.process([prediction for prediction, _ in queries], [target for _, target in queries])
    return counts.evaluate()["overall"]


def test_intersection_union():
    left, top = masks(LEFT)[0], masks(TOP)[0]
    assert intersection_union(left, top) == (4, 12)
    assert intersection_union(left, left) == (8, 8)
    assert intersection_union(masks(NOTHING)[0], masks(NOTHING)[0]) == (0, 0)
    assert intersection_union(torch.from_numpy(left), torch.from_numpy(top)) == (4, 12)
    # ignoring the upper left quarter takes all of I and 4 of U
    assert intersection_union(left, top, masks(CORNER)[0]) == (0, 8)


def test_single_segments():
    result = figures((masks(LEFT), masks(TOP)), (masks(CORNER), masks(LEFT)))
    assert result["ciou"] == result["union_ciou"] == (4 + 4) / (12 + 8)
    assert result["giou"] == result["union_giou"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["t_acc"] == 1
    assert result["n_acc"] is None
    assert (result["queries"], result["segments"], result["target_segments"]) == (2, 2, 2)


@pytest.mark.parametrize("prediction", [masks(), masks(NOTHING), masks(NOTHING, NOTHING)])
@pytest.mark.parametrize("target", [masks(), masks(NOTHING)])
def test_true_empty_counts_one_and_adds_no_pixels(prediction, target):
    result = figures((prediction, target), (masks(LEFT), masks(TOP)))
    assert result["giou"] == result["union_giou"] == pytest.approx((1 + 1 / 3) / 2)
    assert result["ciou"] == result["union_ciou"] == 4 / 12
    assert result["n_acc"] == result["t_acc"] == 1


def test_missed_empty_adds_its_prediction_to_the_union():
    result = figures((masks(DOT), masks()), (masks(), masks()), (masks(LEFT), masks(TOP)))
    assert result["giou"] == pytest.approx((0 + 1 + 1 / 3) / 3)
    assert result["ciou"] == result["union_ciou"] == 4 / 13
    assert result["n_acc"] == 1 / 2
    assert result["t_acc"] == 1


def test_target_predicted_empty_has_no_intersection():
    result = figures((masks(), masks(LEFT)), (masks(NOTHING), masks(LEFT)), (masks(LEFT), masks(LEFT)))
    assert result["giou"] == result["union_giou"] == pytest.approx(1 / 3)
    assert result["ciou"] == result["union_ciou"] == 8 / 24
    assert result["t_acc"] == pytest.approx(1 / 3)
    assert result["n_acc"] is None


def test_several_segments_are_compared_in_order():
    target = masks(CORNER, DOT)
    right, swapped = count_query(target, target), count_query(target[::-1], target)
    assert query_iou(right) == 1
    assert query_iou(swapped) == 0
    assert swapped.pairs == ((0, 5), (0, 5))
    assert swapped.union_pair == (5, 5)
    result = figures((target[::-1], target))
    assert (result["ciou"], result["giou"]) == (0, 0)
    assert (result["union_ciou"], result["union_giou"]) == (1, 1)


def test_missing_and_superfluous_segments():
    missing = count_query(masks(LEFT), masks(CORNER, DOT))
    assert missing.pairs == ((4, 8), (0, 1))
    assert query_iou(missing) == 0.25
    assert missing.union_pair == (4, 9)
    superfluous = count_query(masks(CORNER, NOTHING, DOT), masks(LEFT))
    assert superfluous.pairs == ((4, 8), (0, 0), (0, 1))
    assert query_iou(superfluous) == pytest.approx(0.5 / 3)
    assert superfluous.union_pair == (4, 9)


def test_ignored_pixels_are_on_neither_side():
    ignore = masks(CORNER)[0]
    query = count_query(masks(LEFT), masks(TOP), ignore=ignore)
    assert query.pairs == ((0, 8),)
    hidden = count_query(masks(CORNER), masks(), ignore=ignore)
    assert hidden.prediction_empty
    assert query_iou(hidden) == 1
    assert count_query(masks(DOT), masks(CORNER), ignore=ignore).target_empty


def test_attributes_are_reported_apart():
    counts = GroundingCounts()
    counts.process([masks(LEFT), masks()], [masks(LEFT), masks(TOP)], attributes=["rs", "res"])
    result = counts.evaluate()
    assert list(result) == ["overall", "res", "rs"]
    assert (result["rs"]["giou"], result["res"]["giou"], result["overall"]["giou"]) == (1, 0, 0.5)
    assert result["overall"]["ciou"] == 0.5


def test_rank_correlation_of_score_and_iou():
    # IoUs 1, 1/2, 1/3 and 0 for the superfluous segment
    predictions = [masks(LEFT), masks(CORNER), masks(TOP, DOT)]
    targets = [masks(LEFT)] * 3

    def correlation(scores):
        counts = GroundingCounts()
        counts.process(predictions, targets, scores=scores)
        return counts.evaluate()["overall"]["score_rank_correlation"]

    assert correlation([[0.9], [0.8], [0.7, 0.6]]) == pytest.approx(1)
    assert correlation([[0.1], [0.2], [0.3, 0.4]]) == pytest.approx(-1)
    # ranks 4 3 2 1 against 3 4 2 1: 1 - 6 * 2 / (4 * 15)
    assert correlation([[0.8], [0.9], [0.7, 0.6]]) == pytest.approx(0.8)
    assert correlation([[0.5], [0.5], [0.5, 0.5]]) is None
    assert correlation(None) is None


def random_batch(rng, size):
    """`size` queries of random masks, sizes, attributes and scores."""
    shapes = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(size)]
    noise = np.random.default_rng(rng.randint(0, 1000))
    predictions = [noise.random((rng.randint(0, 3), *shape)) > 0.6 for shape in shapes]
    targets = [noise.random((rng.randint(0, 3), *shape)) > 0.6 for shape in shapes]
    attributes = [rng.choice(["res", "gres", "multi_rs"]) for _ in range(size)]
    scores = [[rng.random() for _ in prediction] for prediction in predictions]
    return predictions, targets, attributes, [None] * size, scores


def test_shards_equal_the_whole_exactly():
    batch = random_batch(random.Random(0), 200)
    whole = GroundingCounts()
    whole.process(*batch)
    order = random.Random(1).sample(range(200), 200)
    shards = []
    for start in range(0, 200, 67):
        shard = GroundingCounts()
        chosen = order[start : start + 67]
        shard.process(*[[entries[i] for i in chosen] for entries in batch])
        shards.append(pickle.loads(pickle.dumps(shard)))
    merged = GroundingCounts()
    for shard in shards:
        merged.merge(shard)
    assert merged.evaluate() == whole.evaluate()
    assert 0 < whole.evaluate()["overall"]["giou"] < 1


def test_reset_and_nothing_processed():
    counts = GroundingCounts()
    fresh = counts.evaluate()
    assert fresh["overall"]["queries"] == 0
    assert fresh["overall"]["ciou"] is None
    counts.process([masks(LEFT)], [masks(TOP)])
    assert json.loads(json.dumps(counts.evaluate())) == counts.evaluate()
    assert counts.evaluate()["overall"].keys() == fresh["overall"].keys()
    counts.reset()
    assert counts.evaluate() == fresh


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((masks(LEFT).astype(float), masks(LEFT)), "prediction must be boolean, got float64"),
        ((masks(LEFT), masks(LEFT)[:, :3]), r"of one size, got \(1, 4, 4\) and \(1, 3, 4\)"),
        ((masks(LEFT)[0], masks(LEFT)[0]), r"must be \(n, H, W\)"),
        ((masks(LEFT), masks(LEFT), "overall"), "cannot be an attribute"),
        ((masks(LEFT), masks(LEFT), "res", masks(LEFT)), r"ignore must be \(4, 4\) like the masks, got \(1, 4, 4\)"),
        ((masks(LEFT), masks(LEFT), "res", None, [0.5, 0.5]), "scores must be 1 finite numbers"),
        ((masks(LEFT), masks(LEFT), "res", None, [float("nan")]), "scores must be 1 finite numbers"),
    ],
)
def test_count_query_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        count_query(*arguments)


def test_process_refuses_uneven_lists_and_adds_nothing():
    counts = GroundingCounts()
    with pytest.raises(ValueError, match=r"one entry per query, got \[2, 1, 2, 2, 2\]"):
        counts.process([masks(LEFT)] * 2, [masks(LEFT)])
    with pytest.raises(ValueError, match="boolean"):
        counts.process([masks(LEFT)] * 2, [masks(LEFT), masks(LEFT).astype(int)])
    assert counts.queries == []


def test_intersection_union_refuses():
    with pytest.raises(ValueError, match=r"one shape, got \(4, 4\) and \(2, 4\)"):
        intersection_union(masks(LEFT)[0], masks(LEFT)[0][:2])
    with pytest.raises(ValueError, match=r"ignore must have the shape of the target"):
        intersection_union(masks(LEFT)[0], masks(LEFT)[0], masks(LEFT))
