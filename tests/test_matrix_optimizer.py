"""Muon and AdamW as one optimizer, alone and in the trainer."""

import pytest
import torch
from tiny_training import tiny_trainer
from torch import nn
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from uground.matrix_optimizer import MuonWithAdamW, hidden_matrices
from uground.training.trainer import UGroundTrainer


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"hidden": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "lm_head": nn.Linear(6, 3)})


def set_gradients(model: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def optimizer_of(model: nn.Module) -> MuonWithAdamW:
    matrices = hidden_matrices(model, "lm_head")
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    groups = [{"params": rest, "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    return MuonWithAdamW(list(matrices.values()), groups, lr=0.01, weight_decay=0.1, betas=(0.9, 0.98), eps=1e-8)


def trained(model: nn.Module, optimizers: list, steps: range) -> dict:
    schedules = [LambdaLR(one, lambda step: 1 / (step + 1)) for one in optimizers]
    for step in steps:
        set_gradients(model, step)
        for one, schedule in zip(optimizers, schedules, strict=True):
            one.step()
            schedule.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_matrices_are_those_of_hidden_layers():
    model = network()
    model["hidden"].bias.requires_grad_(False)
    assert list(hidden_matrices(model, "lm_head")) == ["hidden.weight"]
    model["hidden"].weight.requires_grad_(False)
    assert hidden_matrices(model, "lm_head") == {}


def test_same_steps_as_both_alone():
    model = network()
    rest = [p for name, p in model.named_parameters() if name != "hidden.weight"]
    apart = [
        Muon([model["hidden"].weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        AdamW(rest, lr=0.01, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.1),
    ]
    expected = trained(model, apart, range(4))
    other = network()
    got = trained(other, [optimizer_of(other)], range(4))
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_state_goes_on_where_it_was():
    whole, first = network(), network()
    expected = trained(whole, [optimizer_of(whole)], range(4))
    kept = optimizer_of(first)
    for step in range(2):
        set_gradients(first, step)
        for group in kept.param_groups:
            group["lr"] = 0.01 / (step + 1)
        kept.step()
    second = network()
    second.load_state_dict(first.state_dict())
    resumed = optimizer_of(second)
    resumed.load_state_dict(kept.state_dict())
    for step in range(2, 4):
        set_gradients(second, step)
        for group in resumed.param_groups:
            group["lr"] = 0.01 / (step + 1)
        resumed.step()
    assert all(torch.equal(parameter, expected[name]) for name, parameter in second.named_parameters())


def test_state_of_another_optimizer_is_refused():
    model = network()
    state = AdamW(model.parameters()).state_dict()
    with pytest.raises(ValueError, match="^the optimizer's state must be of muon, adamw, got param_groups, state$"):
        optimizer_of(model).load_state_dict(state)


def test_trainer_takes_it_and_resumes(tmp_path):
    settings = {"muon": True, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = tiny_trainer(tmp_path, **settings)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, MuonWithAdamW)
    expected = whole.bare_model.state_dict()
    again = tiny_trainer(tmp_path, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert all(torch.equal(value, expected[name]) for name, value in again.bare_model.state_dict().items())


def test_sharded_matrices_are_refused(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, muon=True)
    monkeypatch.setattr(UGroundTrainer, "is_sharded", True)
    with pytest.raises(ValueError, match="^muon needs whole matrices, and this run shards them; expected muon false$"):
        trainer.create_optimizer()
