"""What the benchmarks compute, on small cases worked out by hand."""

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_model
from tiny_processor import tiny_processor

from uground.checkpoint_loading import load_model
from uground.training.scenes.scene_store import PROPERTIES

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of `benchmarks/`."""
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    return __import__


def test_a_probe_finds_what_is_linear_and_names_held_out_pairs(benchmark):
    probe = benchmark("probe_kinds")
    torch.manual_seed(0)
    classes = torch.arange(90) % 3
    features = torch.randn(90, 5) + 6 * torch.nn.functional.one_hot(classes, 5)
    ask = probe.fit_probe(features, classes, 3)
    assert (ask(features) == classes).float().mean() > 0.98
    assert ask(1000 * torch.eye(3, 5)).tolist() == [0, 1, 2]
    colour, kind = next(iter(probe.held_out("test")))
    pair = PROPERTIES["kind"].index(kind), PROPERTIES["colour"].index(colour)
    other = (pair[0] + 2) % len(PROPERTIES["kind"]), pair[1]
    given = torch.tensor([[*pair, 0, 0], [*other, 0, 0]])
    assert probe.is_held_out(given, "test").tolist() == [True, False]
    assert probe.is_held_out(given, "train").tolist() == [False, False]


def test_masks_overlap_and_are_thinned(benchmark):
    prompts = benchmark("sam_prompts")
    masks = torch.zeros(4, 2, 4, dtype=torch.bool)
    masks[0, :, :2] = True
    masks[1, :, :3] = True
    masks[2, :, 3:] = True
    overlap = prompts.overlaps(masks, masks)
    assert overlap[0].tolist() == pytest.approx([1, 4 / 6, 0, 0])
    assert overlap[3].tolist() == [0, 0, 0, 0]
    assert prompts.thinned(overlap, 0.6) == [0, 2, 3] and prompts.thinned(overlap, 0.7) == [0, 1, 2, 3]
    assert prompts.thinned(overlap[:0, :0], 0.5) == []


def test_systems_of_the_claims_begin_with_the_same_weights(benchmark, tmp_path):
    claims = benchmark("paper_claims")
    start = tiny_model(3, similarity_scaling="scaled")
    start.save_pretrained(tmp_path / "start")
    tiny_processor().save_pretrained(tmp_path / "start")
    expected = start.state_dict()
    for number, (settings, _) in enumerate(claims.SYSTEMS.values()):
        if "points" in settings.get("prompts", ()):
            settings = {**settings, "point_downsample": 1}
        claims.variant(str(tmp_path / "start"), tmp_path / str(number), settings)
        model = load_model(str(tmp_path / str(number)))
        assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
        assert (model.layer_policy is None) == bool(settings)
        assert model.config.prompts == settings.get("prompts", ("embedding", "mask"))


def test_the_claims_are_told_with_their_spread(benchmark):
    claims = benchmark("paper_claims")
    rows = [
        {"ciou": 0.25, "giou": 0.5, "n_acc": None, "t_acc": 1.0},
        {"ciou": 0.75, "giou": 0.5, "n_acc": None, "t_acc": 0.5},
    ]
    assert (
        claims.table("system", {"a": rows}).splitlines()[-1]
        == "| a | 0.500 ± 0.500 | 0.500 ± 0.000 | – | 0.750 ± 0.500 |"
    )
