"""SSC: the layer policy, the rules that pick a layer, and layers drawn with given numbers."""

import pytest
import torch

from uground.modeling_uground.layer_policy import LayerPolicy, draw_layers, log_probs_of, select_layers

LAYERS, WIDTH = 5, 3


def policy() -> LayerPolicy:
    """A policy with gates of which no two are alike."""
    made = LayerPolicy(LAYERS, WIDTH)
    with torch.no_grad():
        made.gates.copy_(torch.randn(LAYERS, WIDTH, generator=torch.Generator().manual_seed(0)))
    return made


def states(count: int = 4, ids: int = 1) -> torch.Tensor:
    return torch.randn(count, ids, LAYERS, WIDTH, generator=torch.Generator().manual_seed(1))


def test_an_untrained_policy_is_uniform():
    torch.testing.assert_close(LayerPolicy(LAYERS, WIDTH)(states()).softmax(-1), torch.full((4, LAYERS), 1 / LAYERS))


def test_logits_are_the_products_of_each_layer_with_its_own_gate():
    made = LayerPolicy(2, 2)
    with torch.no_grad():
        made.gates.copy_(torch.tensor([[1.0, 2.0], [3.0, -1.0]]))
    # Layer 0: 1*5 + 2*6 = 17; layer 1: 3*7 - 1*8 = 13.
    logits = made(torch.tensor([[[[5.0, 6.0], [7.0, 8.0]]]]))
    assert logits.tolist() == [[17.0, 13.0]]


def test_of_a_segment_of_several_ids_the_mean_of_their_states_is_read():
    inputs = states(ids=3)
    torch.testing.assert_close(policy()(inputs), policy()(inputs.mean(1, keepdim=True)))


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
    expected = ((chosen - logits.detach().softmax(-1))[..., None] * inputs[:, 0]).sum(0)
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


def test_layers_are_drawn_by_inverting_the_distribution_function():
    logits = torch.tensor([[0.25, 0.5, 0.25], [0.0, 0.0, 1.0]]).log()
    uniforms = torch.tensor([[0.0, 0.0], [0.24, 0.3], [0.26, 0.9], [0.74, 0.5], [0.76, 1 - 2**-53]]).double()
    assert draw_layers(logits, uniforms).tolist() == [[0, 2], [0, 2], [1, 2], [1, 2], [2, 2]]
    assert draw_layers(logits[:0], uniforms[:, :0]).shape == (5, 0)
