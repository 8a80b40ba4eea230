"""The losses of the official UGround training, as one preset.

Purpose: to compute on a converted checkpoint what the official code computes on the original, losses and gradients
alike, and to be able to train that way. It differs from our own defaults where those have a reason to:

- the reward is one scalar for the micro-batch, so that every segment is praised or blamed for all of them; ours is per
  segment;
- its moving average begins at 0, without correction for that, and takes a reward in before the reward is held against
  it; ours is corrected and is moved afterwards;
- masks and maps are compared at image size, map targets are softened by 31 x 31 pixels with sigma 7 there, and the
  weight of positive pixels has no bound.

The similarity maps are min-max scaled, which is a setting of the model: `similarity_scaling="minmax"`.
"""

from dataclasses import dataclass

import torch

from uground.modeling_uground import UGroundOutput
from uground.training.objectives.grounding_terms import Geometry, MapTarget, grounding_terms
from uground.training.objectives.losses import LossWeights, batch_policy_loss, critic_loss
from uground.training.objectives.reward_baseline import RewardBaseline

WEIGHTS = LossWeights.official()
MAP_TARGET = MapTarget(kernel_size=31, sigma=7.0, pos_weight_cap=None)
CRITIC_BETA = 1.0
# What the released scripts set of the trainer, by the names of `UGroundTrainingConfig`; their LoRA is on q_proj and
# v_proj of the language model with alpha 16 and dropout 0.05, of rank 8 at 7B and 64 at 13B.
TRAINING_SETTINGS = {
    "learning_rate": 3e-4,
    "lr_scheduler_type": "linear",
    "warmup_steps": 100,
    "adam_beta1": 0.9,
    "adam_beta2": 0.95,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "bf16": True,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 10,
    "mask_bce_weight": WEIGHTS.mask_bce,
    "mask_dice_weight": WEIGHTS.mask_dice,
    "map_bce_weight": WEIGHTS.map_bce,
    "map_dice_weight": WEIGHTS.map_dice,
    "policy_weight": WEIGHTS.policy,
    "gaussian_kernel_size": MAP_TARGET.kernel_size,
    "gaussian_sigma": MAP_TARGET.sigma,
}


@dataclass
class OfficialLosses:
    """
    Losses by the names of the official code; scalars, float32.

    Attributes:
        loss: what is minimised, ce_loss + mask_loss + 0.4 policy_loss.
        ce_loss: text cross-entropy.
        mask_bce_loss, mask_dice_loss: of masks and similarity maps together, weights included.
        mask_loss: their sum.
        policy_loss: before its weight; the critic's own loss is in it, where there is one.
        reward: the scalar reward of the micro-batch, detached.
    """

    loss: torch.Tensor
    ce_loss: torch.Tensor
    mask_bce_loss: torch.Tensor
    mask_dice_loss: torch.Tensor
    mask_loss: torch.Tensor
    policy_loss: torch.Tensor
    reward: torch.Tensor


def official_losses(
    outputs: UGroundOutput,
    target_groups: list[dict],
    geometry: Geometry,
    baseline: RewardBaseline | None,
    critic_beta: float = CRITIC_BETA,
) -> OfficialLosses:
    """
    The official losses of one micro-batch.

    Args:
        outputs: of the model, called with labels.
        target_groups: of [`GroundingCollator`] with `loss_size=None`. The official code wants no empty target.
        geometry: what ties token grid, frames and images together.
        baseline: what the reward is held against; its moving average takes this batch's reward in. `None` for a batch
            at the last layer, which has no policy term.
        critic_beta: weight of the critic's own loss, `baseline_beta` of an official `config.json`.

    Returns:
        The losses; without any segment all but `ce_loss` are 0.
    """
    num_segments = len(outputs.segment_row)
    grounding = grounding_terms(outputs, target_groups, max(num_segments, 1), MAP_TARGET, geometry)
    terms = grounding.terms
    bce = WEIGHTS.mask_bce * terms["mask_bce"] + WEIGHTS.map_bce * terms["map_bce"]
    dice = WEIGHTS.mask_dice * terms["mask_dice"] + WEIGHTS.map_dice * terms["map_dice"]
    policy_loss = torch.zeros_like(bce)
    if baseline is not None and num_segments:
        policy_loss = _policy_loss(baseline, outputs, grounding.rewards, critic_beta)
    return OfficialLosses(
        loss=outputs.loss + bce + dice + WEIGHTS.policy * policy_loss,
        ce_loss=outputs.loss,
        mask_bce_loss=bce,
        mask_dice_loss=dice,
        mask_loss=bce + dice,
        policy_loss=policy_loss,
        reward=grounding.rewards.sum(),
    )


def _policy_loss(
    baseline: RewardBaseline, outputs: UGroundOutput, rewards: torch.Tensor, critic_beta: float
) -> torch.Tensor:
    """REINFORCE with the batch's reward, against the critic's guess or the moving average that already holds it."""
    if baseline.critic is None:
        batch = batch_policy_loss(outputs.log_probs, rewards, baseline.reward_ema, baseline.ema_decay)
        baseline.reward_ema.copy_(batch.baseline)
        baseline.reward_updates.add_(1)
        return batch.loss
    guess = baseline.batch_value(outputs.layer_logits)
    batch = batch_policy_loss(outputs.log_probs, rewards, guess, decay=None)
    return batch.loss + critic_loss(guess[None], batch.reward[None], critic_beta, num_segments=1)
