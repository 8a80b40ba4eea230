"""Two processes on the CPU do what one does: gradients, losses, baseline; also where one has nothing to segment."""

import pytest
import torch
from distributed_jobs import CASES, EVALUATIONS, MIXED, all_cases, evaluate, policy_model, skipped, train
from processes import run_in_processes
from safetensors.torch import load_file

from uground.training.objectives.reward_baseline import BASELINE_FILE

TIMES = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pair")
    return folder, run_in_processes(all_cases, 2, folder / "results", folder)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_gradients_of_one(tmp_path, pair, case):
    items, baseline, more = CASES[case]
    alone = train(tmp_path, items, baseline, 4, **more)
    first, second = (result["plain"][case] for result in pair[1])
    assert first["losses"] == pytest.approx(alone["losses"], abs=1e-5)
    for step, gradients in enumerate(alone["gradients"]):
        both = first["gradients"][step]
        assert set(gradients) <= set(both)
        for name, gradient in both.items():
            assert torch.equal(gradient, second["gradients"][step][name]), name
            expected = gradients.get(name, torch.zeros_like(gradient))
            torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4, msg=name)
        gates = both["layer_policy.gates"].abs().max()
        assert (gates > 1e-5) == (case != "no segment at all")
    assert first["average"] == second["average"] == pytest.approx(alone["average"], abs=1e-5)
    for name, value in alone["baseline"].items():
        assert torch.equal(first["baseline"][name], second["baseline"][name]), name
        torch.testing.assert_close(first["baseline"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    means = {name: value for name, value in alone["log"].items() if "/" in name}
    assert {name: first["log"][name] for name in means} == pytest.approx(means, abs=1e-5)


@pytest.mark.parametrize("number", range(len(EVALUATIONS)))
def test_two_processes_evaluate_each_item_once(tmp_path, pair, number):
    count, batch, drop_last = EVALUATIONS[number]
    first, second = (result["evaluated"][number] for result in pair[1])
    names = {name for name in first if name.startswith("eval_") and name not in TIMES}
    assert {"eval_loss", "eval_loss/text", "eval_loss/mask_dice", "eval_policy/entropy", "eval_giou"} <= names
    for items_per_batch in (1, count):
        alone = evaluate(tmp_path, count, items_per_batch, drop_last)
        expected = pytest.approx({name: alone[name] for name in names}, abs=1e-5)
        assert {name: first[name] for name in names} == expected
        assert {name: second[name] for name in names} == expected


def test_what_was_skipped_is_counted_over_all_processes(tmp_path, pair):
    assert pair[1][0]["skipped"] == pair[1][1]["skipped"] == skipped(tmp_path, 4) == 4


def test_sharded_processes_train_evaluate_and_save_as_one_does(tmp_path, pair):
    folder, results = pair
    alone = train(tmp_path, MIXED, "critic", 4, max_steps=3)
    sharded = results[0]["sharded"]
    assert sharded["kinds"] == {"DTensor"}
    assert sharded["losses"] == results[1]["sharded"]["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert any("eval_segment_rate" in entry for entry in sharded["log"])
    saved = folder / "sharded" / "checkpoint-3"
    assert not list(saved.glob("_fsdp*")), "the checkpoint must hold the model's own code"
    model = type(policy_model()).from_pretrained(saved)
    assert not torch.equal(model.layer_policy.gates, policy_model().layer_policy.gates)
    baseline = load_file(saved / BASELINE_FILE)
    assert baseline["reward_updates"] == 3
    for name, value in alone["baseline"].items():
        torch.testing.assert_close(baseline[name], value, atol=1e-4, rtol=1e-3, msg=name)
    assert list((folder / "sharded" / "cache").rglob("*.safetensors"))
