"""SSC: the layer policy, the rules that pick a layer, and the baseline that is saved with the weights."""

import pytest
import torch
from torch import nn

from uground.modeling_uground.layer_policy import LayerPolicy, log_probs_of, select_layers

LAYERS, WIDTH = 5, 3


def policy(**settings) -> LayerPolicy:
    """A policy with gates of which no two are alike."""
    made = LayerPolicy(LAYERS, WIDTH, **settings)
    with torch.no_grad():
        made.gates.copy_(torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0)))
    return made


def states(count: int = 4) -> torch.Tensor:
    return torch.randn(count, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_an_untrained_policy_is_uniform():
    torch.testing.assert_close(LayerPolicy(LAYERS, WIDTH)(states()).softmax(-1), torch.full((4, LAYERS), 1 / LAYERS))


def test_logits_are_the_products_of_each_layer_with_its_own_gate():
    made = LayerPolicy(2, 2)
    with torch.no_grad():
        made.gates.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    # Layer 0: 1*5 + 2*6 = 17; layer 1: 3*7 - 1*8 = 13.
    logits = made(torch.tensor([[[5.0, 6.0], [7.0, 8.0]]]))
    assert logits.tolist() == [[17.0, 13.0]]


def test_probabilities_sum_to_one_and_log_probs_are_theirs():
    logits = policy()(states())
    probabilities = torch.stack([log_probs_of(logits, torch.full((4,), layer)) for layer in range(LAYERS)]).exp()
    torch.testing.assert_close(probabilities.sum(0), torch.ones(4))
    torch.testing.assert_close(probabilities.T, logits.softmax(-1))


def test_the_gradient_of_a_log_prob_is_the_one_derived_by_hand():
    made, inputs, index = policy(), states(), torch.tensor([0, 3, 4, 3])
    logits = made(inputs)
    log_probs_of(logits, index).sum().backward()
    # d log pi(k) / d w_l = ([l = k] - pi(l)) h_l, summed over segments.
    chosen = torch.eye(LAYERS)[index]
    expected = ((chosen - logits.detach().softmax(-1))[..., None] * inputs).sum(0)
    torch.testing.assert_close(made.gates.grad, expected)
    assert made.gates.grad.abs().min() > 0


def test_the_policy_reads_the_states_and_does_not_shape_them():
    inputs = states().requires_grad_()
    policy()(inputs).sum().backward()
    assert inputs.grad is None


def test_logits_are_float32_for_half_precision_states():
    assert policy().to(torch.bfloat16)(states().to(torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("selection, expected", [("last", [4, 4]), ("argmax", [1, 3]), (0, [0, 0]), (2, [2, 2])])
def test_fixed_rules(selection, expected):
    logits = torch.tensor([[0.0, 5.0, 1.0, 2.0, 3.0], [0.0, 1.0, 2.0, 9.0, 3.0]])
    choice = select_layers(logits, selection, num_layer_samples=8)
    assert choice.index.tolist() == expected
    assert choice.draws is None
    torch.testing.assert_close(choice.log_probs, logits.log_softmax(-1)[torch.arange(2), choice.index])


def test_sampling_follows_the_policy_and_the_seed():
    logits = torch.tensor([0.1, 0.2, 0.4, 0.25, 0.05]).log().expand(20000, -1)
    torch.manual_seed(0)
    index = select_layers(logits, "sample", 1).index
    shares = torch.bincount(index, minlength=LAYERS) / len(index)
    # Three standard deviations of a share of 0.4 among 20,000 are 0.0104.
    torch.testing.assert_close(shares, logits[0].exp(), atol=0.0104, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(select_layers(logits, "sample", 1).index, index)


def test_monte_carlo_counts_its_draws():
    logits = torch.tensor([[0.1, 0.2, 0.4, 0.25, 0.05], [0.0, 1.0, 0.0, 0.0, 0.0]]).log()
    torch.manual_seed(0)
    choice = select_layers(logits, "mc", num_layer_samples=2000)
    torch.testing.assert_close(choice.draws.sum(-1), torch.ones(2))
    torch.testing.assert_close(choice.draws, logits.exp(), atol=0.033, rtol=0)
    counts = choice.draws * 2000
    torch.testing.assert_close(counts, counts.round(), atol=1e-3, rtol=0)
    assert choice.index.tolist() == [2, 1]
    torch.testing.assert_close(choice.log_probs, torch.tensor([0.4, 1.0]).log())


def test_monte_carlo_with_one_draw_is_a_sample():
    choice = select_layers(policy()(states()), "mc", num_layer_samples=1)
    assert torch.equal(choice.draws, torch.eye(LAYERS)[choice.index])


@pytest.mark.parametrize("selection", ["sample", "argmax", "last", "mc", 3])
def test_no_segments_are_an_ordinary_case(selection):
    choice = select_layers(torch.zeros(0, LAYERS), selection, num_layer_samples=4)
    assert choice.index.shape == choice.log_probs.shape == (0,)
    assert choice.index.dtype == torch.long
    assert (choice.draws is not None) == (selection == "mc")


@pytest.mark.parametrize("selection", ["sample", "argmax", "last", "mc", 3])
def test_log_probs_train_the_gates_whatever_the_rule(selection):
    made = policy()
    select_layers(made(states()), selection, num_layer_samples=4).log_probs.sum().backward()
    assert made.gates.grad.abs().sum() > 0


def test_the_moving_average_is_freed_of_the_zero_it_began_with():
    made = policy(ema_decay=0.9)
    assert made.baseline() == 0.0
    made.update_baseline(torch.tensor(-2.0))
    # One reward is its own average, however slow the decay.
    torch.testing.assert_close(made.baseline(), torch.tensor(-2.0))
    made.update_baseline(torch.tensor(4.0))
    # b = 0.9 * (0.1 * -2) + 0.1 * 4 = 0.22; the weights of both rewards sum to 1 - 0.81.
    torch.testing.assert_close(made.reward_ema, torch.tensor(0.22))
    torch.testing.assert_close(made.baseline(), torch.tensor(0.22 / 0.19))
    assert made.reward_updates == 2


def test_a_decay_of_zero_keeps_the_last_reward_only():
    made = policy(ema_decay=0.0)
    for reward in (5.0, 1.0):
        made.update_baseline(torch.tensor(reward))
    assert made.baseline() == 1.0


def test_the_baseline_is_saved():
    made = policy()
    made.update_baseline(torch.tensor(3.0))
    fresh = LayerPolicy(LAYERS, WIDTH)
    fresh.load_state_dict(made.state_dict())
    assert {"gates", "reward_ema", "reward_updates"} == set(made.state_dict())
    torch.testing.assert_close(fresh.baseline(), torch.tensor(3.0))


def test_updating_the_baseline_keeps_no_graph():
    made, reward = policy(), torch.tensor(1.0, requires_grad=True)
    made.update_baseline(reward * 2)
    assert not made.baseline().requires_grad


def test_the_critic_reads_the_mean_probabilities_and_leaves_the_gates_alone():
    made = policy(baseline="critic", critic_hidden_size=7)
    assert [type(layer) for layer in made.critic] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [tuple(made.critic[place].weight.shape) for place in (0, 2)] == [(7, LAYERS), (1, 7)]
    logits = made(states())
    value = made.predict_reward(logits)
    first, last = made.critic[0], made.critic[2]
    mean = logits.detach().softmax(-1).mean(0)
    expected = last.weight @ (first.weight @ mean + first.bias).clamp_min(0) + last.bias
    torch.testing.assert_close(value, expected[0])
    value.backward()
    assert made.gates.grad is None
    assert made.critic[0].weight.grad.abs().sum() > 0


def test_a_moving_average_needs_no_critic():
    assert policy(baseline="ema").critic is None
