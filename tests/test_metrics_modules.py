"""The metrics as modules of `evaluate`: loaded by path, fed in any form, joined over processes."""

import threading

import evaluate
import numpy as np
import pytest
from test_metrics_protocols import CORNER, DOT, LEFT, TOP, masks, random_queries

from uground.training.data.masks import encode_mask
from uground.training.evaluation.counts import count_query
from uground.training.evaluation.protocols import reduce_counts
from uground.training.metric_modules import METRICS, load_metric, metric_path


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "metrics")


def test_by_path_and_through_uground(cache):
    by_path = evaluate.load(metric_path("grounding_iou"), "rela", cache_dir=cache)
    through = load_metric("grounding_iou", "rela", cache_dir=cache)
    batch = {"predictions": [masks(CORNER), masks(), masks(DOT)], "references": [masks(LEFT), masks(), masks()]}
    expected = {"queries": 3, "giou": pytest.approx(1.5 / 3), "ciou": 4 / 9, "pr@0.5": 1, "pr@0.6": 0}
    for metric in (by_path, through):
        result = metric.compute(**batch)
        assert {name: result[name] for name in expected} == expected
    assert "box" in by_path.description and "reject token" in by_path.inputs_description


def test_default_protocols_and_figures(cache):
    results = {}
    for name in METRICS:
        metric = load_metric(name, cache_dir=cache)
        metric.add_batch(predictions=[masks(DOT, LEFT)], references=[masks(LEFT, DOT)])
        metric.add(prediction=masks(CORNER), reference=masks())
        results[name] = metric.compute()
    assert results["grounding_iou"]["giou"] == 0.5
    assert results["grounding_presence"] == {"queries": 2, "n_acc": 0, "t_acc": 1}
    assert results["grounding_sets"] == {"queries": 2, "giou": 2 / 3, "giou_per_query": 0.5, "ciou": 9 / 13}
    presence = load_metric("grounding_presence", "sesame", cache_dir=cache)
    result = presence.compute(predictions=[masks(LEFT), masks(DOT)], references=[masks(LEFT), masks()])
    assert result == {
        "queries": 2,
        "see": 0.5,
        "segment": 8 / 9,
        "precision": 0.5,
        "recall": 1,
        "n_acc": 0,
        "t_acc": 1,
    }


def test_masks_in_any_form(cache):
    rles = [encode_mask(mask) for mask in masks(CORNER, DOT)]
    forms = [rles, list(masks(CORNER, DOT)), masks(CORNER, DOT), masks(CORNER, DOT).tolist()]
    for found in forms:
        for wanted in forms[:2]:
            metric = load_metric("grounding_sets", cache_dir=cache)
            assert metric.compute(predictions=[found], references=[wanted])["ciou"] == 1
    bundle = {"masks": rles[:1], "rejected": [True], "scores": [0.5]}
    metric = load_metric("grounding_iou", "gsva", cache_dir=cache)
    assert metric.compute(predictions=[bundle, []], references=[[], masks(LEFT)])["giou"] == 0.5
    metric = load_metric("grounding_iou", cache_dir=cache)
    reference = {"masks": masks(TOP), "ignore": rles[0]}
    assert metric.compute(predictions=[masks(LEFT)], references=[reference])["ciou"] == 0
    assert metric.compute(predictions=[[]], references=[[]])["giou"] == 1


def test_processes_join_their_counts(cache):
    queries = random_queries(3, 30)
    expected = reduce_counts([count_query(p, t) for p, t, _, _ in queries], "lisa")
    metrics = [
        load_metric("grounding_iou", cache_dir=cache, num_process=2, process_id=i, experiment_id="joined")
        for i in range(2)
    ]
    results = [None, None]

    def work(i):
        mine = queries[i::2]
        metrics[i].add_batch(predictions=[q[0] for q in mine], references=[q[1] for q in mine])
        results[i] = metrics[i].compute()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[1] is None
    assert results[0] == {name: expected[name] for name in results[0]}


def test_refusals(cache):
    with pytest.raises(ValueError, match="there is no metric 'giou'; there are: grounding_iou, "):
        load_metric("giou")
    with pytest.raises(ValueError, match="GroundingIoU has the protocols lisa, rela, gsva, got 'muse'"):
        load_metric("grounding_iou", "muse", cache_dir=cache)
    metric = load_metric("grounding_iou", cache_dir=cache)
    with pytest.raises(ValueError, match=r"one entry per query, got \[1, 2\]"):
        metric.add_batch(predictions=[masks(DOT)], references=[masks(DOT)] * 2)
    with pytest.raises(ValueError, match="prediction must be boolean, got float64"):
        metric.add(prediction=masks(DOT).astype(float), reference=masks(DOT))
    with pytest.raises(ValueError, match=r"of one size, got \(1, 4, 4\) and \(1, 4, 3\)"):
        metric.add(prediction=masks(DOT), reference=np.ones((1, 4, 3), dtype=bool))
    with pytest.raises(ValueError, match="a query has masks, rejected, scores and ignore, got ignored"):
        metric.add(prediction=masks(DOT), reference={"masks": masks(DOT), "ignored": None})
