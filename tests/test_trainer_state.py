"""What a trainer leaves behind: the model as it came, however training ends, and a finished run as it is."""

import copy

import pytest
import torch
from tiny import SEGMENT_TOKEN, tiny_inputs, tiny_model
from tiny_processor import tiny_processor
from tiny_training import dataset, example, losses_of, tiny_trainer
from transformers import TrainerCallback

from uground.training.adapters import lora_config, with_adapter

# The tags name the trainer on the model's card; transformers installs hooks at a first forward pass and keeps them.
KEPT = ("model_tags", "_output_capturing_hooks_installed")
MIXED_PRECISION = {"bf16": True, "gradient_checkpointing": True}


def outputs_of(model):
    """What a model makes of two segments in two rows."""
    return model(**tiny_inputs([[5, SEGMENT_TOKEN, 6], [7, 8, SEGMENT_TOKEN]]), layer_selection="argmax")


def state_of(model) -> dict:
    """All that is set on the modules of a model but weights, buffers and `requires_grad`."""
    state = {"config": model.config.to_json_string(use_diff=False)}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_parameters", "_buffers", "_modules", *KEPT):
                continue
            if attribute.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                value = len(value or ())
            if value != 0:
                state[name, attribute] = value
    state |= {(name, "dtype"): buffer.dtype for name, buffer in model.named_buffers()}
    return state


class Break(TrainerCallback):
    """Ends the run within its second step."""

    def __init__(self, error: BaseException):
        self.error = error

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 1:
            raise self.error


@pytest.mark.parametrize(
    ("error", "settings", "is_training"),
    [
        (None, {}, False),
        (None, MIXED_PRECISION, True),
        (RuntimeError("no memory"), MIXED_PRECISION, False),
        (KeyboardInterrupt(), {}, True),
    ],
    ids=["float32", "bfloat16", "error", "stop"],
)
def test_the_model_is_as_it_came(tmp_path, error, settings, is_training):
    model = tiny_model().train(is_training)
    outputs_of(model)
    before = state_of(model)
    callbacks = [] if error is None else [Break(error)]
    more = {"callbacks": callbacks, "eval_dataset": dataset([example(0)])}
    cached = {"cache_sam_embeddings": str(tmp_path / "cache"), "neftune_noise_alpha": 5.0}
    trainer = tiny_trainer(tmp_path, model=model, trainer=more, **cached, **settings)
    assert state_of(model) == before
    trainer.evaluate()
    assert state_of(model) == before
    if error is None:
        trainer.train()
    else:
        with pytest.raises(type(error)):
            trainer.train()
    assert state_of(model) == before
    first = trainer.evaluate()["eval_loss"]
    assert state_of(model) == before and trainer.evaluate()["eval_loss"] == first


def test_after_mixed_precision_a_model_computes_as_its_weights_say(tmp_path):
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model=model, **MIXED_PRECISION)
    trainer.train()
    fresh = tiny_model(seed=1)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, expected = outputs_of(model), outputs_of(fresh)
    assert torch.equal(found.mask_logits, expected.mask_logits) and torch.equal(found.logits, expected.logits)
    double = copy.deepcopy(model)
    with torch.no_grad():
        double.segment_projection.linear_2.bias.add_(1.0)
        assert not torch.equal(outputs_of(double).mask_logits, expected.mask_logits), (
            "a copy must have its own forward"
        )


def test_encoders_that_are_unfrozen_after_training_learn(tmp_path):
    model = tiny_model()
    trainer = tiny_trainer(tmp_path, model=model)
    trainer.train()
    encoders = {"tower": model.lmm.model.vision_tower, "sam": model.mask_decoder.sam.vision_encoder}
    assert not any(parameter.requires_grad for part in encoders.values() for parameter in part.parameters())
    for part in encoders.values():
        part.requires_grad_(True)
    outputs_of(model).mask_logits.square().mean().backward()
    assert float(encoders["tower"].embeddings.patch_embedding.weight.grad.abs().sum()) > 0
    assert float(encoders["sam"].patch_embed.projection.weight.grad.abs().sum()) > 0
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    tiny_trainer(tmp_path, model=model, trainable=["vision_tower", "vision_encoder"]).train()
    changed = {name for name, value in before.items() if not torch.equal(model.get_parameter(name), value)}
    assert {name.split(".")[0] for name in changed} == {"lmm", "mask_decoder"}
    assert all("vision_tower" in name or "vision_encoder" in name for name in changed)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_adapters_train_with_checkpointing_and_frozen_encoders_keep_no_graph(tmp_path, use_reentrant):
    base = tiny_model().train()
    model = with_adapter(base, lora_config(base, tiny_processor(), 4, dropout=0.0))
    outputs_of(model)
    before, seen = state_of(model), []
    encoders = (base.lmm.model.vision_tower, base.mask_decoder.sam.vision_encoder)
    hooks = [part.register_forward_hook(lambda *args: seen.append(args[-1][0].requires_grad)) for part in encoders]
    kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": use_reentrant}}
    trainer = tiny_trainer(tmp_path, model=model, gradient_checkpointing=True, **kwargs)
    for _ in range(2):
        trained = {name: value.detach().clone() for name, value in model.named_parameters() if "lora_B" in name}
        trainer.train()
        assert all(not torch.equal(model.get_parameter(name), value) for name, value in trained.items())
    for hook in hooks:
        hook.remove()
    assert seen and not any(seen)
    assert state_of(model) == before


def test_a_broken_off_run_adds_nothing_to_the_next(tmp_path):
    items = [example(number) for number in range(4)]
    whole = tiny_trainer(tmp_path / "whole", items, tiny_model().train(), policy_samples=2)
    whole.train()
    model, broken = tiny_model().train(), Break(RuntimeError("no memory"))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    more = {"callbacks": [broken]}
    again = tiny_trainer(tmp_path / "again", items, model, trainer=more, policy_samples=2, logging_steps=5)
    with pytest.raises(RuntimeError, match="no memory"):
        again.train()
    model.load_state_dict(start)
    again.remove_callback(broken)
    again.args.logging_steps = 1
    again.optimizer = again.lr_scheduler = None
    again.train()
    assert losses_of(again) == losses_of(whole)
    names = [name for name in whole.state.log_history[0] if "/" in name]
    assert {name: again.state.log_history[0][name] for name in names} == {
        name: whole.state.log_history[0][name] for name in names
    }
    averages = [one.baseline_training.baseline.moving_average() for one in (again, whole)]
    assert averages[0] != 0 and torch.equal(*averages)


def test_evaluating_changes_nothing_of_what_is_trained(tmp_path):
    states = []
    for steps in (1, 4):
        torch.manual_seed(0)
        model = tiny_model().train()
        model.lmm.model.language_model.config.attention_dropout = 0.3
        more = {"eval_dataset": dataset([example(number) for number in range(3)])}
        settings = {"eval_strategy": "steps", "eval_steps": steps, "eval_generate_count": 2, "eval_max_new_tokens": 3}
        trainer = tiny_trainer(tmp_path, model=model, trainer=more, max_steps=4, **settings)
        trainer.train()
        states.append((losses_of(trainer), model.state_dict()))
    assert states[0][0] == states[1][0]
    assert all(torch.equal(value, states[1][1][name]) for name, value in states[0][1].items())


@pytest.mark.parametrize("rule", ["sample", "mc"])
def test_evaluation_reads_the_likeliest_layer_where_the_rule_draws_one(tmp_path, rule):
    figures = []
    for selection in ("argmax", rule):
        model = tiny_model(layer_selection=selection)
        with torch.no_grad():
            model.layer_policy.gates.mul_(0.02)
        more = {"eval_dataset": dataset([example(number) for number in range(6)])}
        figures.append(tiny_trainer(tmp_path, model=model, trainer=more, eval_generate_count=3).evaluate())
    for name in ("eval_loss", "eval_loss/mask_dice", "eval_giou"):
        assert figures[0][name] == figures[1][name]
