"""Loss terms against values and gradients worked out by hand."""

import math

import numpy as np
import pytest
import torch

from uground.training.objectives.losses import (
    LossWeights,
    batch_policy_loss,
    critic_loss,
    ema_update,
    entropy_bonus,
    gaussian_target,
    leave_one_out_baseline,
    map_bce_loss,
    map_dice_loss,
    mask_bce_loss,
    mask_dice_loss,
    policy_reward,
    positive_weight,
    reinforce_loss,
)

LN2 = math.log(2)
HALVING_SIGMA = 1 / math.sqrt(2 * LN2)  # one pixel away the Gaussian is 1/2, so a 3-pixel kernel is [1/4, 1/2, 1/4]


def leaf(*rows):
    """One (1, H, W) float tensor that takes a gradient."""
    return torch.tensor([rows], dtype=torch.float32, requires_grad=True)


def test_mask_bce_value_and_gradient():
    logits = leaf([0.0, 0.0], [math.log(3), -math.log(3)])
    targets = torch.tensor([[[1, 0], [1, 1]]], dtype=torch.bool)
    # -log of 1/2, 1/2, 3/4, 1/4
    expected = (LN2 + LN2 + math.log(4 / 3) + math.log(4)) / 4
    loss = mask_bce_loss(logits, targets, 2.0)
    assert loss.item() == pytest.approx(expected / 2)
    loss.backward()
    # (sigmoid - target) / (4 pixels * 2 masks)
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.5, 0.5], [-0.25, -0.75]]]) / 8)


def test_mask_dice_value_and_gradient():
    logits = leaf([0.0, 0.0])
    loss = mask_dice_loss(logits, torch.tensor([[[1.0, 0.0]]]), 1)
    assert loss.item() == pytest.approx(1 - 0.001001 / 0.002001, abs=1e-6)
    loss.backward()
    # d/dp = -(2 t D - N) / (1000 D^2) with N = 0.001001, D = 0.002001; times p (1 - p) = 1/4
    torch.testing.assert_close(logits.grad, torch.tensor([[[-0.187375, 0.0625]]]), atol=1e-5, rtol=0)


def test_dice_of_nothing_predicted_where_nothing_is():
    logits = torch.full((1, 2, 2), -100.0)
    assert mask_dice_loss(logits, torch.zeros(1, 2, 2), 1).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("loss_function", [mask_bce_loss, mask_dice_loss])
def test_mask_losses_add_up_over_parts(loss_function):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 4, generator=generator)
    targets = torch.rand(5, 3, 4, generator=generator) > 0.5
    whole = loss_function(logits, targets, 5)
    parts = loss_function(logits[:2], targets[:2], 5) + loss_function(logits[2:], targets[2:], torch.tensor(5))
    torch.testing.assert_close(parts, whole)
    per_mask = loss_function(logits, targets)
    assert per_mask.shape == (5,)
    torch.testing.assert_close(per_mask.mean(), whole)
    torch.testing.assert_close(loss_function(logits, targets, 0.5), whole * 10)


@pytest.mark.parametrize("loss_function", [mask_bce_loss, mask_dice_loss])
def test_no_masks_cost_nothing_and_keep_the_graph(loss_function):
    logits = torch.zeros(0, 4, 4, requires_grad=True)
    loss = loss_function(logits, torch.zeros(0, 4, 4), 0)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.shape == (0, 4, 4)


@pytest.mark.parametrize("loss_function", [mask_bce_loss, mask_dice_loss])
def test_invalid_pixels_count_as_if_cut_off(loss_function):
    logits = torch.tensor([[[1.0, -2.0, 50.0], [0.5, 3.0, -50.0]]], requires_grad=True)
    targets = torch.tensor([[[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    valid = torch.tensor([[[True, True, False], [True, True, False]]])
    loss = loss_function(logits, targets, 1, valid)
    torch.testing.assert_close(loss, loss_function(logits[:, :, :2], targets[:, :, :2], 1))
    loss.backward()
    assert (logits.grad[:, :, 2] == 0).all()
    assert (logits.grad[:, :, :2] != 0).all()


def test_no_valid_pixel_costs_nothing():
    nothing = torch.zeros(1, 2, 2, dtype=torch.bool)
    logits, targets = torch.ones(1, 2, 2), torch.ones(1, 2, 2)
    assert mask_bce_loss(logits, targets, 1, nothing).item() == 0
    assert mask_dice_loss(logits, targets, 1, nothing).item() == 0
    assert map_bce_loss(logits, targets, torch.ones(1), 1, nothing).item() == 0


def test_losses_are_float32_for_bfloat16_inputs():
    logits = torch.zeros(1, 2, 2, dtype=torch.bfloat16)
    loss = mask_bce_loss(logits, torch.ones(1, 2, 2, dtype=torch.bool), 1)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(LN2)


@pytest.mark.parametrize(
    ("row", "expected"),
    [([1, 0, 0, 0], [1, 0.5, 0, 0]), ([0, 1, 0, 0], [1, 1, 0.5, 0]), ([0, 0, 0, 0], [0, 0, 0, 0])],
)
def test_gaussian_target_of_a_row(row, expected):
    masks = torch.tensor([[row]], dtype=torch.bool)
    result = gaussian_target(masks, kernel_size=3, sigma=HALVING_SIGMA)
    torch.testing.assert_close(result, torch.tensor([[expected]], dtype=torch.float32))


@pytest.mark.parametrize("size", [(40, 35), (5, 7), (2, 20), (1, 1)])
def test_gaussian_target_equals_numpy_reflection(size):
    masks = np.zeros((2, *size), dtype=bool)
    masks[0, : max(1, size[0] // 3), size[1] // 2 :] = True
    offsets = np.arange(-15, 16)
    kernel = np.exp(-0.5 * (offsets / 7.0) ** 2)
    kernel = np.outer(kernel, kernel) / kernel.sum() ** 2
    padded = np.pad(masks[0].astype(float), 15, mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (31, 31))
    blurred = (windows * kernel).sum((-1, -2))
    result = gaussian_target(torch.from_numpy(masks)).numpy()
    np.testing.assert_allclose(result[0], blurred / blurred.max(), atol=1e-5)
    assert result[0].max() == 1
    assert (result[1] == 0).all()


def test_gaussian_target_of_no_masks():
    assert gaussian_target(torch.zeros(0, 4, 4, dtype=torch.bool)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": torch.zeros(4, 4)}, r"\(N, H, W\), got shape \(4, 4\)"),
        ({"masks": torch.zeros(1, 4, 4), "kernel_size": 4}, "odd and positive, got 4"),
        ({"masks": torch.zeros(1, 4, 4), "sigma": 0.0}, "sigma must be positive, got 0.0"),
    ],
)
def test_gaussian_target_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        gaussian_target(**arguments)


def test_positive_weight_is_shared_within_an_image():
    targets = torch.tensor([[[1.0, 0, 0, 0]], [[1, 1, 1, 0]], [[0.5, 0, 0, 0]], [[0, 0, 0, 0]]])
    groups = torch.tensor([7, 2, 7, 5])
    # image 7: positives 1.5 of 8; image 2: 3 of 4; image 5 has none
    expected = torch.tensor([6.5 / 1.5, 1 / 3, 6.5 / 1.5, 1.0])
    torch.testing.assert_close(positive_weight(targets, groups), expected)
    torch.testing.assert_close(positive_weight(targets, groups, cap=2.0), expected.clamp(max=2.0))
    valid = torch.ones(4, 1, 4, dtype=torch.bool)
    valid[..., 3] = False
    torch.testing.assert_close(positive_weight(targets, groups, valid=valid)[:2], torch.tensor([4.5 / 1.5, 0.0]))
    assert positive_weight(targets[:0], groups[:0]).shape == (0,)


def test_map_losses_value_and_gradient():
    targets = torch.tensor([[[1.0, 0.5]]])
    weight = positive_weight(targets, torch.zeros(1, dtype=torch.long))
    assert weight.item() == pytest.approx(1 / 3)
    similarity_map = leaf([0.0, 0.0])
    bce = map_bce_loss(similarity_map, targets, weight)
    # pixel 0: w ln2; pixel 1: (w / 2 + 1 / 2) ln2
    torch.testing.assert_close(bce.detach(), torch.tensor([LN2 / 2]))
    bce.sum().backward()
    torch.testing.assert_close(similarity_map.grad, torch.tensor([[[-1 / 12, 1 / 12]]]))

    similarity_map = leaf([0.0, 0.0])
    dice = map_dice_loss(similarity_map, targets, weight)
    # w t = [1/3, 1/6]: 1 - 2 (1/4) / (1 + 1/2)
    torch.testing.assert_close(dice.detach(), torch.tensor([2 / 3]))
    dice.sum().backward()
    # d/dp = -(2 w t D - N) / D^2 with N = 1/2, D = 3/2; times 1/4
    torch.testing.assert_close(similarity_map.grad, torch.tensor([[[-(1 - 0.5) / 9, 0.0]]]), atol=1e-6, rtol=0)


def test_map_losses_reduce_and_mask():
    generator = torch.Generator().manual_seed(1)
    similarity_map = torch.rand(3, 4, 4, generator=generator)
    targets = torch.rand(3, 4, 4, generator=generator)
    weight = torch.tensor([1.0, 2.0, 3.0])
    valid = torch.ones(3, 4, 4, dtype=torch.bool)
    valid[:, 3:] = False
    for loss_function in (map_bce_loss, map_dice_loss):
        per_mask = loss_function(similarity_map, targets, weight)
        torch.testing.assert_close(loss_function(similarity_map, targets, weight, 6), per_mask.sum() / 6)
        torch.testing.assert_close(
            loss_function(similarity_map, targets, weight, valid=valid),
            loss_function(similarity_map[:, :3], targets[:, :3], weight),
        )


def test_losses_refuse_shapes_that_do_not_fit():
    masks = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"logits must be \(N, H, W\), got shape \(3, 4\)"):
        mask_bce_loss(masks[0], masks[0], 1)
    with pytest.raises(ValueError, match=r"targets must have the shape of logits \(2, 3, 4\), got \(1, 3, 4\)"):
        mask_dice_loss(masks, masks[:1], 1)
    with pytest.raises(ValueError, match=r"valid must have the shape"):
        mask_dice_loss(masks, masks, 1, masks[:1])
    with pytest.raises(ValueError, match=r"pos_weight must be \(2,\), one per map, got \(1,\)"):
        map_bce_loss(masks, masks, torch.ones(1))
    with pytest.raises(ValueError, match=r"groups must be \(2,\)"):
        positive_weight(masks, torch.zeros(3))


def test_reward_is_minus_both_terms_and_detached():
    bce = torch.tensor([1.0, 2.0], requires_grad=True)
    reward = policy_reward(bce, torch.tensor([0.5, -0.25]))
    assert reward.tolist() == [-1.5, -1.75]
    assert not reward.requires_grad


def test_reinforce_value_and_gradient():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    rewards = torch.tensor([-3.0, -1.0], requires_grad=True)
    loss = reinforce_loss(log_probs, rewards, -2.0, 4)
    # -((-1)(-1) + (1)(-2)) / 4
    assert loss.item() == pytest.approx(0.25)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([0.25, -0.25]))
    assert rewards.grad is None
    with pytest.raises(ValueError, match=r"shape of log_probs \(2,\), got \(1,\)"):
        reinforce_loss(log_probs, rewards[:1], 0.0, 1)


def test_reinforce_with_samples_and_their_baseline():
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]])
    baseline = leave_one_out_baseline(rewards)
    assert baseline.tolist() == [[4.0, 6.5], [3.0, 5.5], [2.0, 3.0]]
    log_probs = torch.zeros(3, 2, requires_grad=True)
    reinforce_loss(log_probs, rewards, baseline, 6).backward()
    torch.testing.assert_close(log_probs.grad, -(rewards - baseline) / 6)
    with pytest.raises(ValueError, match=r"k of at least 2, got shape \(1, 2\)"):
        leave_one_out_baseline(rewards[:1])


def test_ema_update():
    baseline = ema_update(torch.tensor(-2.0), -4.0, decay=0.9)
    assert baseline.item() == pytest.approx(-2.2)
    with pytest.raises(ValueError, match="decay must lie in 0..1, got 9"):
        ema_update(baseline, 0.0, decay=9)


def test_critic_loss_pulls_the_guess_only():
    values = torch.tensor([1.0, 0.0], requires_grad=True)
    rewards = torch.tensor([3.0, -1.0], requires_grad=True)
    loss = critic_loss(values, rewards, beta=0.5, num_segments=2)
    assert loss.item() == pytest.approx(0.5 * (4 + 1) / 2)
    loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([-1.0, 0.5]))
    assert rewards.grad is None
    with pytest.raises(ValueError, match="shape of rewards"):
        critic_loss(values, rewards[:1])


def test_entropy_values_and_gradient():
    logits = torch.tensor([[0.0, 0, 0, 0], [math.log(3), 0, -math.inf, -math.inf]], requires_grad=True)
    entropy = entropy_bonus(logits)
    expected = [math.log(4), 0.75 * math.log(4 / 3) + 0.25 * math.log(4)]
    assert entropy.tolist() == pytest.approx(expected)
    entropy_bonus(logits, 2).backward()
    # dH/dlogit_i = -p_i (log p_i + H), halved by the mean over segments
    slope = -0.75 * (math.log(0.75) + expected[1]) / 2
    torch.testing.assert_close(logits.grad, torch.tensor([[0.0, 0, 0, 0], [slope, -slope, 0, 0]]))


def test_batch_policy_loss_updates_the_baseline_before_using_it():
    log_probs = torch.tensor([-1.0, -2.0], requires_grad=True)
    step = batch_policy_loss(log_probs, torch.tensor([-1.0, -3.0]), torch.tensor(-2.0), decay=0.9)
    assert step.reward.item() == -4
    assert step.baseline.item() == pytest.approx(-2.2)
    assert step.advantage.item() == pytest.approx(-1.8)
    assert step.loss.item() == pytest.approx(-2.7)
    step.loss.backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([0.9, 0.9]))


def test_batch_policy_loss_with_a_critic_and_with_no_segment():
    guess = torch.tensor(-3.0, requires_grad=True)
    step = batch_policy_loss(torch.tensor([-1.0]), torch.tensor([-4.0]), guess, decay=None)
    assert step.loss.item() == pytest.approx(-1.0)
    assert not step.loss.requires_grad
    empty = batch_policy_loss(torch.zeros(0, requires_grad=True), torch.zeros(0), torch.tensor(-2.0))
    assert empty.loss.item() == 0
    assert empty.loss.requires_grad
    assert empty.baseline.item() == -2


def test_weights_put_the_terms_together():
    terms = {"text": 1.0, "mask_bce": 2.0, "mask_dice": 3.0, "map_bce": 4.0, "map_dice": 5.0, "policy": 6.0}
    terms = {name: torch.tensor(value) for name, value in terms.items()}
    assert LossWeights.official().total(terms).item() == pytest.approx(1 + 2 * 2 + 4 * 3 + 2 * 4 + 4 * 5 + 0.4 * 6)
    weights = LossWeights(policy=0.0, entropy=0.5)
    spoiled = {"text": torch.tensor(1.0), "policy": torch.tensor(math.nan), "entropy": torch.tensor(4.0)}
    assert weights.total(spoiled).item() == pytest.approx(-1.0)
    with pytest.raises(ValueError, match=r"unknown loss terms \['dice'\]"):
        weights.total({"dice": torch.tensor(1.0)})
    with pytest.raises(ValueError, match="no loss term has a weight"):
        weights.total({"policy": torch.tensor(1.0)})
