"""A run that was killed goes on as if it had not been; half-written checkpoints and changed runs are recognised."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from processes import CONTEXT
from resume_jobs import STEPS, build, run
from safetensors.torch import load_file, save_file
from tiny import tiny_model
from tiny_training import dataset, example, losses_of, tiny_trainer

from uground.training.adapters import lora_config, with_adapter
from uground.training.checkpoints import (
    BASELINE_SETTINGS,
    COMPLETE_FILE,
    RUN_FILE,
    last_complete_checkpoint,
    mark_complete,
    what_is_missing,
)
from uground.training.objectives.reward_baseline import BASELINE_FILE


def run_until_killed(folder, baseline: str, **moment) -> None:
    """A run in a process of its own that kills itself at a moment; see `resume_jobs.run`."""
    worker = CONTEXT.Process(target=run, args=(folder, baseline), kwargs=moment)
    worker.start()
    worker.join(240)
    code = worker.exitcode
    worker.kill()
    assert code == -signal.SIGKILL, "the run must not have ended by itself"


def assert_ends_alike(whole, resumed, killed) -> None:
    """Weights, steps and state of the optimizer of a run that was resumed are those of one that was not killed."""
    expected = whole.model.state_dict()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert resumed.state.global_step == STEPS
    theirs, ours = (
        torch.load(Path(folder) / f"checkpoint-{STEPS}" / "optimizer.pt") for folder in (whole.args.output_dir, killed)
    )
    final = [trainer.baseline_training.baseline.state_dict() for trainer in (whole, resumed)]
    assert all(torch.equal(value, final[1][name]) for name, value in final[0].items())
    for number, state in theirs["state"].items():
        assert all(torch.equal(value, ours["state"][number][name]) for name, value in state.items())


@pytest.mark.parametrize("baseline", ["ema", "critic"])
def test_killed_anywhere_a_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, baseline):
    whole = build(tmp_path / "whole", baseline)
    whole.train()
    killed = tmp_path / "killed"
    # Another one each time the test runs: two batches make a step, and every second step is kept.
    batch = random.randint(2, 2 * STEPS)
    run_until_killed(killed, baseline, last_batch=batch)
    resumed = build(killed, baseline)
    last = resumed.resumable_checkpoint()
    assert (last is None) == (batch <= 4), f"killed at batch {batch}"
    resumed.train(resume_from_checkpoint=last)
    assert_ends_alike(whole, resumed, killed)


def test_killed_while_a_checkpoint_is_written(tmp_path):
    whole = build(tmp_path / "whole", "critic")
    whole.train()
    killed, step = tmp_path / "killed", 6
    run_until_killed(killed, "critic", last_save=step)
    assert (killed / f"checkpoint-{step}" / "model.safetensors").is_file()
    last = last_complete_checkpoint(killed)
    assert last.name == f"checkpoint-{step - 2}"
    # A kill between two writes of a later checkpoint.
    later = killed / f"checkpoint-{step + 1}"
    shutil.copytree(last, later)
    weights = later / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert last_complete_checkpoint(killed) == last
    resumed = build(killed, "critic")
    assert resumed.resumable_checkpoint() == str(last)
    resumed.train(resume_from_checkpoint=str(last))
    assert_ends_alike(whole, resumed, killed)


def test_incomplete_checkpoints_say_what_they_lack(tmp_path):
    trainer = build(tmp_path, "ema", max_steps=2)
    trainer.train()
    checkpoint = tmp_path / "checkpoint-2"
    assert what_is_missing(checkpoint) is None
    assert set(json.loads((checkpoint / COMPLETE_FILE).read_text())) >= {"model.safetensors", "trainer_state.json"}
    assert BASELINE_FILE in json.loads((checkpoint / COMPLETE_FILE).read_text())
    (checkpoint / "optimizer.pt").unlink()
    assert what_is_missing(checkpoint) == f"optimizer.pt has no bytes, expected {expected_size(checkpoint)}"
    (checkpoint / COMPLETE_FILE).unlink()
    assert "was not written to its end" in what_is_missing(checkpoint)
    assert last_complete_checkpoint(tmp_path) is None
    assert last_complete_checkpoint(tmp_path / "nothing") is None


def expected_size(checkpoint) -> int:
    return json.loads((checkpoint / COMPLETE_FILE).read_text())["optimizer.pt"]


def test_a_changed_run_is_not_resumed(tmp_path):
    build(tmp_path, "ema", max_steps=2).train()
    changed = build(tmp_path, "ema", max_steps=2, learning_rate=5e-4, mask_bce_weight=1.0)
    with pytest.raises(ValueError, match=r"learning_rate was 0.001 and is 0.0005; mask_bce_weight was 2.0 and is 1.0"):
        changed.resumable_checkpoint()
    with pytest.raises(ValueError, match="batch size of a step was 2 and is 4"):
        build(tmp_path, "ema", max_steps=2, per_device_train_batch_size=2).resumable_checkpoint()
    # The same batch in another layout, and what only tells or saves.
    other = build(tmp_path, "ema", max_steps=2, gradient_accumulation_steps=1, per_device_train_batch_size=2)
    assert other.resumable_checkpoint() is not None
    told = build(tmp_path, "ema", max_steps=2, logging_steps=5, save_steps=1)
    assert told.resumable_checkpoint() is not None
    told.run_record["data"] = [{"jsonl": "other.jsonl"}]
    with pytest.raises(ValueError, match="data was None and is"):
        told.resumable_checkpoint()


def test_old_checkpoints_go_only_when_the_new_one_is_whole(tmp_path, monkeypatch):
    trainer = build(tmp_path, "ema", max_steps=4, save_total_limit=1)
    seen = []

    def look(checkpoint, record):
        seen.append(sorted(path.name for path in tmp_path.glob("checkpoint-*")))
        (checkpoint / COMPLETE_FILE).write_text("{}")

    monkeypatch.setattr("uground.training.trainer.mark_complete", look)
    trainer.train()
    assert seen == [["checkpoint-2"], ["checkpoint-2", "checkpoint-4"]]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def test_adapters_resume_as_well(tmp_path):
    def adapted(folder, steps):
        trainer = build(folder, "ema")
        model = tiny_model().train()
        model = with_adapter(model, lora_config(model, trainer.processing_class, 4, dropout=0.0))
        settings = {"max_steps": steps, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "constant"}
        return tiny_trainer(folder, model=model, **settings)

    whole = adapted(tmp_path / "whole", 4)
    whole.train()
    adapted(tmp_path / "parts", 2).train()
    resumed = adapted(tmp_path / "parts", 4)
    resumed.train(resume_from_checkpoint=resumed.resumable_checkpoint())
    for file in ("adapter_model.safetensors", BASELINE_FILE):
        states = [load_file(tmp_path / name / "checkpoint-4" / file) for name in ("whole", "parts")]
        assert all(torch.equal(states[1][name], value) for name, value in states[0].items())
    # One step of these holds no segment.
    assert states[0]["reward_updates"] == 3


def test_a_run_goes_on_after_a_finished_epoch(tmp_path):
    settings = {"save_strategy": "epoch", "max_steps": -1, "lr_scheduler_type": "constant"}
    whole = build(tmp_path / "whole", "ema", **settings, num_train_epochs=3)
    whole.train()
    build(tmp_path / "parts", "ema", **settings, num_train_epochs=1).train()
    parts = build(tmp_path / "parts", "ema", **settings, num_train_epochs=3)
    parts.train(resume_from_checkpoint=True)
    assert parts.state.global_step == whole.state.global_step == 9
    assert losses_of(parts) == losses_of(whole)
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in parts.model.state_dict().items())


def test_an_average_beside_weights_in_bfloat16_is_resumed_to_the_last_bit(tmp_path):
    def trainer(folder, steps: int):
        model = tiny_model().to(torch.bfloat16).train()
        settings = {"save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
        return tiny_trainer(folder, model=model, max_steps=steps, policy_samples=2, **settings)

    trainer(tmp_path / "whole", 3).train()
    trainer(tmp_path / "parts", 1).train()
    trainer(tmp_path / "parts", 3).train(resume_from_checkpoint=True)
    for file in ("model.safetensors", BASELINE_FILE):
        whole, parts = (load_file(tmp_path / name / "checkpoint-3" / file) for name in ("whole", "parts"))
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert whole["reward_ema"].dtype == torch.float32 and whole["reward_updates"] == 2


def as_of_release_0_1_0(checkpoint: Path) -> None:
    """Move a checkpoint's baseline and its settings to where that release kept them."""
    baseline = load_file(checkpoint / BASELINE_FILE)
    weights = load_file(checkpoint / "model.safetensors")
    weights |= {f"layer_policy.{name}": value for name, value in baseline.items()}
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    (checkpoint / BASELINE_FILE).unlink()
    record = json.loads((checkpoint / RUN_FILE).read_text())
    del record["presence_weight"]
    settings = {name: record.pop(name) for name in BASELINE_SETTINGS}
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | settings))
    mark_complete(checkpoint, record)


def test_a_checkpoint_of_the_first_release_resumes_its_average(tmp_path):
    whole = build(tmp_path / "whole", "ema")
    whole.train()
    parts, step = tmp_path / "parts", 4
    run_until_killed(parts, "ema", last_save=step + 2)
    as_of_release_0_1_0(parts / f"checkpoint-{step}")
    resumed = build(parts, "ema")
    last = resumed.resumable_checkpoint()
    assert last == str(parts / f"checkpoint-{step}")
    resumed.train(resume_from_checkpoint=last)
    assert_ends_alike(whole, resumed, parts)


def test_a_baseline_of_another_kind_is_refused(tmp_path):
    build(tmp_path, "ema", max_steps=2).train()
    with pytest.raises(ValueError, match="policy_baseline was 'ema' and is 'critic'"):
        build(tmp_path, "critic", max_steps=2).resumable_checkpoint()
    with pytest.raises(ValueError, match=r"the reward baseline in .* must hold \{'critic.0.bias': \[128\], .*, got"):
        build(tmp_path, "critic").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_at_the_end_is_loaded_and_not_trained_further(tmp_path):
    whole = build(tmp_path, "ema", save_total_limit=1)
    whole.train()
    before = sorted(path.name for path in tmp_path.iterdir())
    again = build(tmp_path, "ema", save_total_limit=1)
    assert again.train(resume_from_checkpoint=again.resumable_checkpoint()).global_step == STEPS
    assert again.state.global_step == STEPS
    assert all(torch.equal(value, whole.model.state_dict()[name]) for name, value in again.model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    empty = build(tmp_path / "empty", "ema")
    with pytest.raises(ValueError, match="holds no whole checkpoint to resume from"):
        empty.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_is_kept_and_loaded_at_the_end(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    settings |= {"save_strategy": "steps", "save_steps": 2, "max_steps": STEPS, "learning_rate": 0.3}
    evaluated = {"eval_dataset": dataset([example(number) for number in range(4)])}
    trainer = tiny_trainer(tmp_path, trainer=evaluated, **settings)
    trainer.train()
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = min(losses, key=losses.get)
    assert sorted(losses) == [2, 4, 6, 8] and best < STEPS, "the steps must be too long, so that the last is not best"
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{best}"]
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(trainer.model.layer_policy.gates, kept["layer_policy.gates"])
    assert trainer.evaluate()["eval_loss"] == pytest.approx(losses[best], abs=1e-6)
