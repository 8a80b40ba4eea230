"""The trainer on tiny models: what it trains, what its losses are divided by, what it logs and what it refuses."""

import numpy as np
import pytest
import torch
from tiny import SEGMENT_TOKEN, say_only, tiny_model
from tiny_processor import tiny_processor
from tiny_training import dataset, example, losses_of, tiny_trainer, training_config
from transformers import TrainerCallback

from uground.modeling_uground.layer_policy import draw_layers
from uground.training.evaluation.during_training import WrittenCounts
from uground.training.objectives.losses import LossWeights
from uground.training.objectives.policy_draws import policy_loss, segment_uniforms
from uground.training.training_config import freeze


def spread_policy(seed: int = 0, **settings):
    """A tiny model whose policy gives every layer a fair chance."""
    model = tiny_model(seed, **settings).train()
    with torch.no_grad():
        model.layer_policy.gates.mul_(0.02)
    return model


def test_a_step_changes_every_trained_and_no_frozen_parameter(tmp_path):
    model = spread_policy()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = {"max_steps": 1, "policy_samples": 3, "iou_weight": 0.5, "learning_rate": 1e-2}
    trainer = tiny_trainer(tmp_path, model=model, policy_baseline="critic", **settings)
    untrained = trainer.baseline_training.baseline.critic.state_dict()
    untrained = {name: value.clone() for name, value in untrained.items()}
    trainer.train()
    critic = trainer.baseline_training.baseline.critic
    assert not any(torch.equal(untrained[name], value) for name, value in critic.state_dict().items())
    assert all(parameter.grad is None for parameter in critic.parameters())
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(before[name], parameter)}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert unchanged == frozen
    assert {name.split(".")[0] for name in before} == {name.split(".")[0] for name in set(before) - frozen}
    assert all("vision_tower" in name or "sam." in name for name in frozen)


def test_thirty_steps_lower_the_loss(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=30, learning_rate=3e-3)
    trainer.train()
    losses = losses_of(trainer)
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    text = [entry["loss/text"] for entry in trainer.state.log_history if "loss/text" in entry]
    masks = [entry["loss/mask_dice"] for entry in trainer.state.log_history if "loss/mask_dice" in entry]
    assert text[-1] < 0.7 * text[0] and masks[-1] < masks[0]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return layout(tmp_path_factory.mktemp("plain"), 8, 1)


def layout(folder, batch: int, accumulate: int, workers: int = 0):
    """Loss of each of 8 steps, and the weights after them, with batches of 8 laid out as told."""
    trainer = tiny_trainer(
        folder,
        [example(number) for number in range(32)],
        spread_policy(),
        max_steps=8,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        dataloader_num_workers=workers,
        policy_samples=2,
    )
    trainer.train()
    return losses_of(trainer), {name: value.clone() for name, value in trainer.model.state_dict().items()}


@pytest.mark.parametrize(("batch", "accumulate", "workers"), [(4, 2, 0), (2, 4, 0), (8, 1, 2)])
def test_losses_do_not_depend_on_how_a_step_is_laid_out(tmp_path, plain_run, batch, accumulate, workers):
    losses, _ = layout(tmp_path, batch, accumulate, workers)
    assert len(losses) == 8
    assert losses == pytest.approx(plain_run[0], abs=1e-4)


def test_the_same_seed_gives_the_same_bits(tmp_path, plain_run):
    losses, weights = layout(tmp_path, 8, 1)
    assert losses == plain_run[0]
    assert all(torch.equal(weights[name], value) for name, value in plain_run[1].items())


def test_logs_are_means_over_segments_and_layers_sum_to_one(tmp_path):
    # Micro-batches of one and of two masks: a mean of their means would be another number.
    items = [example(0, 0), example(1, 1)]
    figures = []
    for batch, accumulate in ((2, 1), (1, 2)):
        trainer = tiny_trainer(
            tmp_path / str(batch),
            items,
            spread_policy(),
            max_steps=1,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
        )
        trainer.train()
        figures.append(trainer.state.log_history[0])
    names = [name for name in figures[0] if name.startswith(("loss", "policy/", "layer/"))]
    assert {"loss/text", "loss/mask_bce", "policy/reward", "policy/entropy", "layer/4"} <= set(names)
    assert {name: figures[1][name] for name in names} == pytest.approx({name: figures[0][name] for name in names})
    assert sum(figures[0][f"layer/{layer}"] for layer in range(5)) == pytest.approx(1)


def test_evaluation_does_not_depend_on_the_batch_and_generates(tmp_path):
    items, figures = [example(number) for number in range(6)], []
    for batch in (4, 1):
        model = tiny_model()
        model.generation_config.suppress_tokens = say_only(SEGMENT_TOKEN)
        trainer = tiny_trainer(
            tmp_path / str(batch),
            items,
            model,
            per_device_eval_batch_size=batch,
            eval_generate_count=4,
            eval_max_new_tokens=4,
            trainer={"eval_dataset": dataset(items)},
        )
        figures.append(trainer.evaluate())
    assert {"eval_segment_rate", "eval_reject_rate", "eval_giou", "eval_loss/text"} <= set(figures[0])
    assert figures[0]["eval_segment_rate"] > 0
    for name in ("eval_loss", "eval_loss/text", "eval_loss/mask_dice", "eval_segment_rate", "eval_giou", "eval_ciou"):
        assert figures[1][name] == pytest.approx(figures[0][name], abs=1e-5), name


def test_the_segment_rate_counts_what_was_written():
    processor, counts = tiny_processor(), WrittenCounts()

    def written(answer: str, masks: int, size=(24, 48)) -> dict:
        return {"answer": answer, "masks": torch.zeros(masks, *size, dtype=torch.bool)}

    counts.add(processor, example(0, 0), written("it is [SEG] .", 1, (40, 40)))
    counts.add(processor, example(1, 0), written("it is .", 0))
    counts.add(processor, example(1, 2), written("it is [REJ] .", 0))
    counts.add(processor, example(1, 3), written("it is [SEG] .", 1))
    figures = counts.figures()
    assert (figures["segment_rate"], figures["false_segment_rate"], figures["reject_rate"]) == (0.5, 0.5, 1)
    assert figures["answers_as_expected"] == 0.5


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(tmp_path):
    model = tiny_model().train()
    with torch.no_grad():
        model.segment_projection.linear_2.bias.fill_(float("nan"))
    trainer = tiny_trainer(tmp_path, [example(0), example(1)], model, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"the loss is nan in step 1 \(text .*samples of the batch are example-"):
        trainer.train()


class CountSteps(TrainerCallback):
    trainer, updates = None, ()

    def on_step_end(self, args, state, control, **kwargs):
        self.updates += (int(self.trainer.baseline_training.baseline.reward_updates),)


def test_the_moving_average_moves_once_per_step_and_not_without_segments(tmp_path):
    model = spread_policy()
    count = CountSteps()
    items = [example(number, number % 2) for number in range(4)] + [example(number, 3) for number in range(4, 8)]
    settings = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, "max_steps": 2}
    trainer = tiny_trainer(
        tmp_path, items, model, gradient_accumulation_steps=2, trainer={"callbacks": [count]}, **settings
    )
    count.trainer = trainer
    trainer.train()
    assert count.updates == (1, 1)
    rewards = [entry["policy/reward"] for entry in trainer.state.log_history if "policy/reward" in entry]
    average = trainer.baseline_training.baseline.moving_average()
    assert float(average) == pytest.approx(rewards[0], rel=1e-5)


def test_read_and_lisa_leave_the_policy_alone(tmp_path):
    model = spread_policy()
    gates = model.layer_policy.gates.detach().clone()
    trainer = tiny_trainer(tmp_path, model=model, train_layer_selection="last", max_steps=1)
    trainer.train()
    assert torch.equal(model.layer_policy.gates, gates)
    assert not any(name.startswith("policy/reward") for name in trainer.state.log_history[0])


READ = {"layer_policy": False, "layer_selection": "last", "prompts": ("embedding", "points"), "num_points": 4}
LISA = {"layer_policy": False, "layer_selection": "last", "prompts": ("embedding",), "image_frame": "centre_crop"}
NO_HEAD = {"sam_config": None}


@pytest.mark.parametrize(
    ("parts", "settings"),
    [
        (READ, {"train_layer_selection": "last", "map_bce_weight": 0.0, "map_dice_weight": 0.0}),
        (LISA, {"train_layer_selection": "last", "loss_size": None}),
        (NO_HEAD, {"policy_samples": 2}),
        (NO_HEAD | {"layer_policy": False, "layer_selection": 2}, {"train_layer_selection": "last"}),
    ],
    ids=["read", "lisa", "no head", "no head, no policy"],
)
def test_models_without_some_parts_train_what_they_have(tmp_path, parts, settings):
    model = tiny_model(**parts).train()
    items = [example(number) for number in range(4)]
    more = {"eval_dataset": dataset(items)}
    trainer = tiny_trainer(tmp_path, items, model, trainer=more, max_steps=2, **settings)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer.train()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) == (not parameter.requires_grad), name
    logged, evaluated = trainer.state.log_history[0], trainer.evaluate()
    assert ("policy/reward" in logged) == (model.layer_policy is not None)
    assert (logged["loss/mask_dice"] > 0) == (model.mask_decoder is not None)
    assert logged["loss/map_dice"] > 0 and np.isfinite(evaluated["eval_loss"])


def test_parts_that_a_setting_needs_must_be_there(tmp_path):
    with pytest.raises(ValueError, match="'sample' needs a layer policy, which this model has not; expected 'last'"):
        tiny_trainer(tmp_path, model=tiny_model(**READ))
    with pytest.raises(ValueError, match="cache_sam_embeddings needs a mask head, which this model has not"):
        tiny_trainer(tmp_path, model=tiny_model(**NO_HEAD), cache_sam_embeddings=str(tmp_path / "cache"))


def test_freeze_leaves_out_what_gets_no_gradient():
    model = tiny_model()
    names = freeze(model)
    assert not any("vision_tower" in name or "vision_encoder" in name or "point_embed" in name for name in names)
    maps_only = freeze(model, weights=LossWeights(mask_bce=0.0, mask_dice=0.0))
    assert not any("mask_decoder" in name or "segment_projection" in name for name in maps_only)
    assert freeze(model, ["gates"]) == ["layer_policy.gates"]
    with pytest.raises(ValueError, match="matches no parameter"):
        freeze(model, ["nothing of the kind"])


def test_settings_out_of_range_are_refused(tmp_path):
    for settings, message in (
        ({"train_layer_selection": "best"}, "train_layer_selection must be one of"),
        ({"policy_samples": 0}, "policy_samples must be at least 1"),
        ({"policy_baseline": "mean"}, r"policy_baseline must be one of \('ema', 'critic'\), got 'mean'"),
        ({"policy_ema_decay": 1.0}, r"policy_ema_decay must lie in \[0, 1\), got 1.0"),
        ({"critic_hidden_size": 0}, "critic_hidden_size must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            training_config(tmp_path, **settings)


def test_draws_depend_on_segment_step_and_seed_only():
    keys = torch.tensor([5, 9, 2**62, 7])
    drawn = segment_uniforms(keys, seed=1, step=4, samples=3)
    assert drawn.shape == (3, 4) and drawn.dtype == torch.float64
    assert torch.equal(segment_uniforms(keys[2:], 1, 4, 3), drawn[:, 2:])
    assert not torch.equal(segment_uniforms(keys, 1, 5, 3), drawn)
    many = segment_uniforms(torch.arange(20000), 0, 0, 2)
    assert many.min() >= 0 and many.max() < 1
    assert many.mean(1) == pytest.approx([0.5, 0.5], abs=0.01)
    assert abs(float(torch.corrcoef(many)[0, 1])) < 0.03
    logits = torch.tensor([[0.0, 1.0, -1.0]]).expand(20000, 3)
    shares = torch.bincount(draw_layers(logits, many)[0], minlength=3) / 20000
    assert shares.tolist() == pytest.approx(logits[0].softmax(-1).tolist(), abs=0.02)


def bandit(samples: int, entropy_weight: float, steps: int = 150) -> torch.Tensor:
    """Layer probabilities of a policy trained on rewards that are best at layer 3."""
    torch.manual_seed(0)
    logits = torch.zeros(5, requires_grad=True)
    optimizer = torch.optim.Adam([logits], 0.05)
    payoff, average = torch.tensor([-2.0, -1.6, -1.8, -1.0, -1.4]), torch.tensor(-1.6)
    for step in range(steps):
        expanded = logits.expand(16, 5)
        layers = draw_layers(expanded, segment_uniforms(torch.arange(16), 0, step, samples))
        noise = torch.randn(layers.shape) * 0.3
        rewards = payoff[layers] + noise
        log_probs = expanded.log_softmax(-1)[torch.arange(16), layers]
        loss = policy_loss(log_probs, rewards, average).reinforce / 16
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        optimizer.zero_grad()
        (loss - entropy_weight * entropy).backward()
        optimizer.step()
        average = 0.9 * average + 0.1 * rewards.mean()
    return logits.detach().softmax(-1)


def test_the_policy_finds_the_best_layer_of_a_bandit():
    by_average, by_others = bandit(1, 0.0), bandit(4, 0.0)
    assert by_average.argmax() == by_others.argmax() == 3
    assert by_average[3] > 0.9 and by_others[3] > 0.9
    assert 0.3 < bandit(1, 0.5)[3] < by_average[3], "an entropy bonus must keep other layers alive"


def test_several_draws_are_judged_by_one_another_and_the_critic_by_its_error():
    log_probs = torch.tensor([[-1.0, -2.0], [-1.5, -0.5]], requires_grad=True)
    rewards = torch.tensor([[1.0, 4.0], [3.0, 2.0]])
    values = torch.tensor([2.0, 1.0], requires_grad=True)
    loss = policy_loss(log_probs, rewards, torch.tensor(7.0), values)
    assert loss.baseline.tolist() == [[3.0, 2.0], [1.0, 4.0]]
    # −(−2·−1 + 2·−2 + 2·−1.5 + −2·−0.5) / 2
    assert float(loss.reinforce) == pytest.approx(2.0)
    assert float(loss.critic) == pytest.approx((2 - 2) ** 2 + (1 - 3) ** 2)
    loss.reinforce.backward()
    assert log_probs.grad.tolist() == [[1.0, -1.0], [-1.0, 1.0]]
    alone = policy_loss(log_probs[:1], rewards[:1], torch.tensor(2.0))
    # −((1 − 2)·−1 + (4 − 2)·−2)
    assert float(alone.reinforce) == pytest.approx(3.0) and alone.baseline.tolist() == [[2.0, 2.0]]
