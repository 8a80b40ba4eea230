"""What rewards are held against in training: the moving average, the critic, and how both are saved."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_training import tiny_trainer
from torch import nn

from uground.training.objectives.reward_baseline import BASELINE_FILE, BaselineTraining, RewardBaseline

LAYERS = 5


def logits(count: int = 4) -> torch.Tensor:
    return torch.randn(count, LAYERS, generator=torch.Generator().manual_seed(1))


def test_the_moving_average_is_freed_of_the_zero_it_began_with():
    made = RewardBaseline(LAYERS, ema_decay=0.9)
    assert made.moving_average() == 0.0
    made.update(torch.tensor(-2.0))
    # One reward is its own average, however slow the decay.
    torch.testing.assert_close(made.moving_average(), torch.tensor(-2.0))
    made.update(torch.tensor(4.0))
    # b = 0.9 * (0.1 * -2) + 0.1 * 4 = 0.22; the weights of both rewards sum to 1 - 0.81.
    torch.testing.assert_close(made.reward_ema, torch.tensor(0.22))
    torch.testing.assert_close(made.moving_average(), torch.tensor(0.22 / 0.19))
    assert made.reward_updates == 2


def test_a_decay_of_zero_keeps_the_last_reward_only():
    made = RewardBaseline(LAYERS, ema_decay=0.0)
    for reward in (5.0, 1.0):
        made.update(torch.tensor(reward))
    assert made.moving_average() == 1.0


def test_updating_the_baseline_keeps_no_graph():
    made, reward = RewardBaseline(LAYERS), torch.tensor(1.0, requires_grad=True)
    made.update(reward * 2)
    assert not made.moving_average().requires_grad


def guessed(made: RewardBaseline, probabilities: torch.Tensor) -> torch.Tensor:
    """What the critic says by hand of `(n, L+1)` probabilities."""
    first, last = made.critic[0], made.critic[2]
    return ((probabilities @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias)[:, 0]


def test_the_critic_guesses_from_probabilities_and_leaves_the_gates_alone():
    made = RewardBaseline(LAYERS, "critic", critic_hidden_size=7)
    assert [type(layer) for layer in made.critic] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(made.critic[place].weight.shape) for place in (0, 2)] == [(7, LAYERS), (1, 7)]
    inputs = logits().requires_grad_()
    probabilities = inputs.detach().softmax(-1)
    value, values = made.batch_value(inputs), made.segment_values(inputs)
    torch.testing.assert_close(value, guessed(made, probabilities.mean(0, keepdim=True))[0])
    torch.testing.assert_close(values, guessed(made, probabilities))
    assert made.segment_values(inputs[:0]).shape == (0,)
    (value + values.sum()).backward()
    assert inputs.grad is None
    assert made.critic[0].weight.grad.abs().sum() > 0


def test_guesses_are_never_of_lower_precision():
    made = RewardBaseline(LAYERS, "critic")
    with torch.autocast("cpu", torch.bfloat16):
        values = made.segment_values(logits())
    assert values.dtype == torch.float32 and torch.equal(values, made.segment_values(logits()))


def test_a_moving_average_needs_no_critic(tmp_path):
    made = RewardBaseline(LAYERS)
    assert made.critic is None and made.segment_values(logits()) is None
    made.update(torch.tensor(3.0))
    training = BaselineTraining(made)
    training.step(1.0, lambda gradient: gradient)
    training.save(tmp_path)
    assert {"reward_ema", "reward_updates"} == set(load_file(tmp_path / BASELINE_FILE))
    again = BaselineTraining(RewardBaseline(LAYERS))
    assert not again.load(tmp_path / "elsewhere") and again.load(tmp_path)
    torch.testing.assert_close(again.baseline.moving_average(), torch.tensor(3.0))


def critic_step(training: BaselineTraining, target: float, rate: float = 0.01, reduce=lambda gradient: gradient):
    (training.baseline.segment_values(logits()) - target).square().sum().backward()
    training.step(rate, reduce)


def test_the_critic_takes_the_steps_of_adamw_at_the_rate_it_is_told(tmp_path):
    torch.manual_seed(0)
    training, plain = BaselineTraining(RewardBaseline(LAYERS, "critic")), RewardBaseline(LAYERS, "critic")
    plain.load_state_dict(training.baseline.state_dict())
    optimizer = torch.optim.AdamW(plain.critic.parameters(), lr=0.01, weight_decay=0.0)
    for step, rate in enumerate((0.01, 0.005, 0.002)):
        # The mean over processes is of half of this one's gradient.
        critic_step(training, -2.0, rate, reduce=lambda gradient: gradient / 2)
        optimizer.zero_grad()
        ((plain.segment_values(logits()) + 2.0).square().sum() / 2).backward()
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        for name, value in training.baseline.state_dict().items():
            torch.testing.assert_close(value, plain.state_dict()[name], msg=f"{step} {name}")


def test_a_critic_goes_on_from_a_file_to_the_last_bit(tmp_path):
    torch.manual_seed(0)
    whole = BaselineTraining(RewardBaseline(LAYERS, "critic"))
    critic_step(whole, -2.0)
    whole.save(tmp_path)
    parts = BaselineTraining(RewardBaseline(LAYERS, "critic"))
    critic_step(parts, 5.0)
    assert parts.load(tmp_path)
    for training in (whole, parts):
        critic_step(training, -1.0)
        critic_step(training, -3.0)
    for name, value in whole.baseline.state_dict().items():
        assert torch.equal(parts.baseline.state_dict()[name], value), name


def test_a_step_without_finite_gradients_is_left_out():
    training = BaselineTraining(RewardBaseline(LAYERS, "critic"))
    before = {name: value.clone() for name, value in training.baseline.state_dict().items()}
    critic_step(training, float("inf"))
    assert all(torch.equal(value, before[name]) for name, value in training.baseline.state_dict().items())
    assert all(parameter.grad is None for parameter in training.baseline.critic.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "mean"}, r"policy_baseline must be one of \('ema', 'critic'\), got 'mean'"),
        ({"ema_decay": 1.0}, r"policy_ema_decay must lie in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RewardBaseline(LAYERS, **settings)


def test_a_new_run_begins_with_the_critic_beside_its_model(tmp_path):
    """As a converter leaves it; the average of that run's rewards stays behind."""
    model = tiny_model().train()
    model.save_pretrained(tmp_path / "start")
    left = RewardBaseline(model.config.num_layers, "critic", critic_hidden_size=6)
    left.update(torch.tensor(3.0))
    BaselineTraining(left).save(tmp_path / "start")
    model = type(model).from_pretrained(tmp_path / "start")
    settings = {"policy_baseline": "critic", "critic_hidden_size": 6, "learning_rate": 0.0, "max_steps": 1}
    trainer = tiny_trainer(tmp_path / "run", model=model, **settings)
    trainer.train()
    begun = trainer.baseline_training.baseline
    assert all(torch.equal(value, begun.critic.state_dict()[name]) for name, value in left.critic.state_dict().items())
    assert begun.reward_updates == 1
    average = tiny_trainer(tmp_path / "other", model=model, **{**settings, "policy_baseline": "ema"})
    average.train()
    assert average.baseline_training.baseline.critic is None


def test_a_critic_of_another_width_is_refused(tmp_path):
    BaselineTraining(RewardBaseline(LAYERS, "critic", critic_hidden_size=6)).save(tmp_path)
    with pytest.raises(ValueError, match=r"^the critic in .* must hold .*7, 5.*, got .*6, 5"):
        BaselineTraining(RewardBaseline(LAYERS, "critic", critic_hidden_size=7)).load_critic(tmp_path)
