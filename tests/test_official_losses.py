"""The official preset of the losses: what its parts are, with either baseline of the policy."""

import pytest
import torch
from torch.testing import assert_close

from uground.modeling_uground import UGroundOutput
from uground.modeling_uground.image_frames import ImageFrame
from uground.training.objectives.grounding_terms import Geometry
from uground.training.objectives.official import TRAINING_SETTINGS, official_losses
from uground.training.objectives.reward_baseline import RewardBaseline
from uground.training.trainer import UGroundTrainingConfig

GEOMETRY = Geometry(ImageFrame("letterbox", 32), ImageFrame("letterbox", 64), ((24, 32),))


def batch(count: int):
    """Outputs and targets of one 24 x 32 image with `count` segments, all read at layer 1."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(count, 5, generator=generator).requires_grad_()
    outputs = UGroundOutput(
        loss=torch.tensor(2.0),
        segment_row=torch.zeros(count, dtype=torch.long),
        layer_logits=logits,
        log_probs=logits.log_softmax(-1)[:, 1],
        mask_logits=torch.randn(count, 16, 16, generator=generator),
        iou_scores=torch.rand(count, generator=generator),
        similarity_map=torch.rand(count, 4, 4, generator=generator),
    )
    masks = torch.zeros(count, 24, 32)
    for index in range(count):
        masks[index, 4 : 12 + 3 * index, 8:20] = 1.0
    group = {
        "segments": torch.arange(count),
        "masks": masks,
        "valid": torch.ones_like(masks, dtype=torch.bool),
        "images": torch.zeros(count, dtype=torch.long),
        "in_frame": False,
    }
    return outputs, [group]


def test_total_is_the_weighted_sum():
    outputs, groups = batch(3)
    losses = official_losses(outputs, groups, GEOMETRY, RewardBaseline(5))
    assert_close(losses.mask_loss, losses.mask_bce_loss + losses.mask_dice_loss)
    assert_close(losses.loss, 2.0 + losses.mask_loss + 0.4 * losses.policy_loss)


def test_moving_average_of_two_batches_by_hand():
    """b becomes 0.1 R, then 0.19 R, and is subtracted only then; the loss is a mean over the three segments."""
    baseline = RewardBaseline(5)
    outputs, groups = batch(3)
    for share in (0.1, 0.19):
        losses = official_losses(outputs, groups, GEOMETRY, baseline)
        expected = -(losses.reward * (1 - share) * outputs.log_probs).mean()
        assert_close(losses.policy_loss, expected)
    assert_close(baseline.reward_ema, 0.19 * losses.reward)


def test_critic_by_hand():
    torch.manual_seed(0)
    baseline = RewardBaseline(5, "critic", critic_hidden_size=6)
    outputs, groups = batch(3)
    losses = official_losses(outputs, groups, GEOMETRY, baseline)
    guess = baseline.critic(outputs.layer_logits.detach().softmax(-1).mean(0)).squeeze()
    advantage = (losses.reward - guess).detach()
    assert_close(losses.policy_loss, -(advantage * outputs.log_probs).mean() + (guess - losses.reward) ** 2)
    assert baseline.reward_ema == 0.0
    losses.policy_loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in baseline.critic.parameters())


def test_reward_is_the_sum_over_segments():
    """Two segments weigh together in one positive weight, so the reward of both is not that of each alone."""
    outputs, groups = batch(2)
    losses = official_losses(outputs, groups, GEOMETRY, None)
    assert losses.policy_loss == 0.0
    bce, dice = losses.mask_bce_loss / 2.0, losses.mask_dice_loss / 4.0
    map_only = batch(2)[0]
    map_only.mask_logits = torch.full((2, 16, 16), -100.0)
    far = official_losses(map_only, groups, GEOMETRY, None)
    assert_close(far.reward, losses.reward)
    assert (far.mask_bce_loss / 2.0 > bce).item() and (far.mask_dice_loss / 4.0 > dice).item()


def test_no_segment_is_text_alone():
    outputs, _ = batch(0)
    baseline = RewardBaseline(5)
    losses = official_losses(outputs, [], GEOMETRY, baseline)
    assert (losses.loss, losses.mask_loss, losses.policy_loss, losses.reward) == (2.0, 0.0, 0.0, 0.0)
    assert baseline.reward_updates == 0


def test_settings_are_arguments_of_the_trainer(tmp_path):
    config = UGroundTrainingConfig(output_dir=str(tmp_path), **{**TRAINING_SETTINGS, "bf16": False})
    assert config.loss_weights().policy == pytest.approx(0.4)
    assert (config.adam_beta2, config.loss_size, config.pos_weight_cap) == (0.95, None, None)
