"""Loss terms of grounding: masks, similarity maps and the layer policy.

Pure functions of tensors. Every mask-shaped input is (N, H, W): N masks of one size, rows then columns; N = 0 is
allowed and gives zero. Images of different sizes are handled by calling once per size and adding up: each term is a
sum over masks divided by a number the caller gives, so the parts add to the whole. Everything is computed in float32,
whatever comes in.

The text cross-entropy belongs to the model and is not here. `LossWeights` says how the terms are put together.
"""

from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DICE_SCALE = 1000.0
"""Sums of the mask dice are divided by this, as in LISA; it changes the result only through `DICE_EPSILON`."""
DICE_EPSILON = 1e-6
"""Added to numerator and denominator of every dice: an empty prediction of an empty target then costs 0."""
GAUSSIAN_KERNEL_SIZE = 31
"""Official side of the kernel that softens map targets, in pixels of the image."""
GAUSSIAN_SIGMA = 7.0
"""Official standard deviation of that kernel, in pixels of the image."""
OFFICIAL_EMA_DECAY = 0.9
"""What the official running reward keeps of its past at each step."""


@dataclass(frozen=True)
class LossWeights:
    """How the terms are added: `loss = Σ weight · term`, entropy with a minus sign because more of it is better.

    The defaults are the official weights: BCE 2.0 and dice 4.0, the same for mask and map, policy 0.4, no entropy
    bonus; the official code has no head that estimates presence. A recipe that needs another balance sets its own;
    `official()` names the preset of the released scripts.
    """

    text: float = 1.0
    mask_bce: float = 2.0
    mask_dice: float = 4.0
    map_bce: float = 2.0
    map_dice: float = 4.0
    policy: float = 0.4
    entropy: float = 0.0
    iou: float = 0.0
    presence: float = 1.0

    @classmethod
    def official(cls) -> "LossWeights":
        """Weights of the official training scripts."""
        return cls(text=1.0, mask_bce=2.0, mask_dice=4.0, map_bce=2.0, map_dice=4.0, policy=0.4, entropy=0.0, iou=0.0)

    def total(self, terms: dict[str, Tensor]) -> Tensor:
        """Weighted sum of the scalar `terms`, a subset of the fields by name; a term of weight 0 is left out entirely,
        so that its not-a-number cannot spoil the loss. `terms["entropy"]` is the entropy itself.

        Raises:
            ValueError: a term that is no field, or no term of non-zero weight.
        """
        weights = asdict(self) | {"entropy": -self.entropy}
        unknown = sorted(set(terms) - set(weights))
        if unknown:
            raise ValueError(f"unknown loss terms {unknown}, expected some of {list(weights)}")
        weighted = [weights[name] * term for name, term in terms.items() if weights[name] != 0]
        if not weighted:
            raise ValueError(f"no loss term has a weight other than 0, got the terms {list(terms)}")
        return sum(weighted)


def _check_masks(name: str, values: Tensor, targets: Tensor, valid: Tensor | None) -> None:
    if values.ndim != 3:
        raise ValueError(f"{name} must be (N, H, W), got shape {tuple(values.shape)}")
    if targets.shape != values.shape:
        raise ValueError(f"targets must have the shape of {name} {tuple(values.shape)}, got {tuple(targets.shape)}")
    if valid is not None and valid.shape != values.shape:
        raise ValueError(f"valid must have the shape of {name} {tuple(values.shape)}, got {tuple(valid.shape)}")


def _over_masks(per_mask: Tensor, num_masks: float | Tensor | None) -> Tensor:
    """Sum of `per_mask` (N,) divided by `num_masks`, or the values themselves where it is None."""
    if num_masks is None:
        return per_mask
    count = torch.as_tensor(num_masks, dtype=per_mask.dtype, device=per_mask.device)
    # The share of one process may lie below 1, so the count is not clamped; only a batch without any mask is special.
    return per_mask.sum() / torch.where(count > 0, count, torch.ones_like(count))


def _pixel_mean(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid pixels of each (H, W); 0 where there are none. Returns (N,)."""
    if valid is None:
        return values.flatten(1).mean(1)
    valid = valid.to(values.dtype)
    return (values * valid).flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)


def _dice(probabilities: Tensor, targets: Tensor, scale: float, valid: Tensor | None) -> Tensor:
    """1 − (2 Σ p t / c + ε) / (Σ p / c + Σ t / c + ε) over the valid pixels, (N,)."""
    if valid is not None:
        probabilities, targets = probabilities * valid, targets * valid
    probabilities, targets = probabilities.flatten(1), targets.flatten(1)
    overlap = (probabilities / scale * targets).sum(1)
    areas = (probabilities / scale).sum(1) + (targets / scale).sum(1)
    return 1 - (2 * overlap + DICE_EPSILON) / (areas + DICE_EPSILON)


def mask_bce_loss(
    logits: Tensor, targets: Tensor, num_masks: float | Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Binary cross-entropy of mask logits: mean over the pixels of each mask, summed over masks, over `num_masks`.

    Args:
        logits: (N, H, W) mask logits, any real.
        targets: (N, H, W) boolean, or float in 0..1.
        num_masks: number of masks to normalise by, usually that of the whole batch over all processes and accumulation
            steps (divided by the number of processes where gradients are averaged over them). 0 counts as 1. None
            returns the value of each mask instead.
        valid: (N, H, W) boolean, pixels that count; None means all. A mask with no valid pixel costs 0.

    Returns:
        Scalar, or (N,) with `num_masks=None`; float32.

    Raises:
        ValueError: shapes that differ or are not (N, H, W).
    """
    _check_masks("logits", logits, targets, valid)
    loss = F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return _over_masks(_pixel_mean(loss, valid), num_masks)


def mask_dice_loss(
    logits: Tensor, targets: Tensor, num_masks: float | Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """Dice loss of mask logits, per mask 1 − (2 Σ (p/c) t + ε) / (Σ p/c + Σ t/c + ε), p = σ(logit), c = `DICE_SCALE`,
    ε = `DICE_EPSILON`; in 0..1. Arguments, reduction and errors as in `mask_bce_loss`.
    """
    _check_masks("logits", logits, targets, valid)
    return _over_masks(_dice(logits.float().sigmoid(), targets.float(), DICE_SCALE, valid), num_masks)


def _reflected(size: int, pad: int, device: torch.device) -> Tensor:
    """Indices of an axis of `size` padded by `pad` on both sides by reflection, the border pixel not repeated.

    Where the pad is not smaller than the axis the reflection goes on to and fro, as in `numpy.pad(mode="reflect")`;
    torch's own reflect padding refuses that case.
    """
    period = max(2 * (size - 1), 1)
    positions = torch.arange(-pad, size + pad, device=device).remainder(period)
    return torch.minimum(positions, period - positions)


def gaussian_target(masks: Tensor, kernel_size: int = GAUSSIAN_KERNEL_SIZE, sigma: float = GAUSSIAN_SIGMA) -> Tensor:
    """Soft target of a similarity map: the mask blurred by a Gaussian and divided by its maximum.

    The kernel is in pixels of the mask; a caller who works at another scale than the image scales it. Borders are
    padded by reflection, over and over where the mask is smaller than the kernel, so every size ≥ 1 works.

    Args:
        masks: (N, H, W) boolean, or float in 0..1.
        kernel_size: odd side of the kernel, in pixels.
        sigma: standard deviation, in pixels.

    Returns:
        (N, H, W) float32 in 0..1 with maximum 1; an empty mask gives zeros.

    Raises:
        ValueError: `masks` is not (N, H, W), `kernel_size` not odd and positive, or `sigma` not positive.
    """
    if masks.ndim != 3:
        raise ValueError(f"masks must be (N, H, W), got shape {tuple(masks.shape)}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")
    if sigma <= 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if masks.numel() == 0:
        return masks.float()
    radius = kernel_size // 2
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float32, device=masks.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    # The Gaussian is separable: two passes of one row instead of one of a square.
    height, width = masks.shape[1:]
    blurred = masks.float()[:, None]
    blurred = blurred[:, :, _reflected(height, radius, masks.device)]
    blurred = F.conv2d(blurred, kernel.view(1, 1, -1, 1))
    blurred = blurred[..., _reflected(width, radius, masks.device)]
    blurred = F.conv2d(blurred, kernel.view(1, 1, 1, -1))[:, 0]
    peak = blurred.amax((1, 2), keepdim=True)
    return blurred / torch.where(peak > 0, peak, torch.ones_like(peak))


def positive_weight(targets: Tensor, groups: Tensor, cap: float | None = None, valid: Tensor | None = None) -> Tensor:
    """Weight of positive pixels, w = Σ(1 − t) / Σt over all masks of the same group, usually one image.

    Args:
        targets: (N, H, W) map targets in 0..1, as from `gaussian_target`.
        groups: (N,) integer group of each mask, any values.
        cap: upper bound of the weight; None leaves it unbounded, as the official code does. Small objects give weights
            in the hundreds.
        valid: (N, H, W) boolean, pixels that count; None means all.

    Returns:
        (N,) float32, equal within a group; 1 for a group without positive pixels, where it has no effect.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_masks("targets", targets, targets, valid)
    if groups.shape != targets.shape[:1]:
        raise ValueError(f"groups must be ({len(targets)},), one per target, got shape {tuple(groups.shape)}")
    counted = torch.ones_like(targets, dtype=torch.float32) if valid is None else valid.float()
    targets = targets.float()
    per_mask = torch.stack([((1 - targets) * counted).flatten(1).sum(1), (targets * counted).flatten(1).sum(1)])
    names, index = torch.unique(groups, return_inverse=True)
    negative, positive = per_mask.new_zeros(2, len(names)).index_add_(1, index, per_mask)
    has_positive = positive > 0
    weight = torch.where(has_positive, negative / positive.where(has_positive, torch.ones_like(positive)), 1.0)
    return weight.clamp(max=cap)[index] if cap is not None else weight[index]


def _check_weight(similarity_map: Tensor, pos_weight: Tensor) -> None:
    if pos_weight.shape != similarity_map.shape[:1]:
        raise ValueError(f"pos_weight must be ({len(similarity_map)},), one per map, got {tuple(pos_weight.shape)}")


def map_bce_loss(
    similarity_map: Tensor,
    targets: Tensor,
    pos_weight: Tensor,
    num_masks: float | Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Weighted binary cross-entropy of similarity maps taken as logits.

    Per pixel −[w t log σ(s) + (1 − t) log(1 − σ(s))], averaged over the pixels of each map.

    Args:
        similarity_map: (N, H, W) maps s, already at the size of the targets.
        targets: (N, H, W) soft targets t in 0..1.
        pos_weight: (N,) weight w of each mask, as from `positive_weight`.
        num_masks: as in `mask_bce_loss`; None returns the value of each mask, which the policy reward needs.
        valid: (N, H, W) boolean, pixels that count; None means all.

    Returns:
        (N,) or a scalar, float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check_masks("similarity_map", similarity_map, targets, valid)
    _check_weight(similarity_map, pos_weight)
    loss = F.binary_cross_entropy_with_logits(
        similarity_map.float(), targets.float(), pos_weight=pos_weight.float()[:, None, None], reduction="none"
    )
    return _over_masks(_pixel_mean(loss, valid), num_masks)


def map_dice_loss(
    similarity_map: Tensor,
    targets: Tensor,
    pos_weight: Tensor,
    num_masks: float | Tensor | None = None,
    valid: Tensor | None = None,
) -> Tensor:
    """Dice of similarity maps against weighted targets, per mask 1 − (2 Σ σ(s) w t + ε) / (Σ σ(s) + Σ w t + ε).

    Because w t may exceed 1 this may be negative: that is the official formula. Arguments and errors as in
    `map_bce_loss`.
    """
    _check_masks("similarity_map", similarity_map, targets, valid)
    _check_weight(similarity_map, pos_weight)
    weighted = targets.float() * pos_weight.float()[:, None, None]
    return _over_masks(_dice(similarity_map.float().sigmoid(), weighted, 1.0, valid), num_masks)


def policy_reward(bce_per_mask: Tensor, dice_per_mask: Tensor) -> Tensor:
    """Reward of each chosen layer, −(BCE + dice) of the similarity map it gave; (N,), detached."""
    return -(bce_per_mask + dice_per_mask).detach()


def reinforce_loss(
    log_probs: Tensor, rewards: Tensor, baseline: float | Tensor, num_segments: float | Tensor | None = None
) -> Tensor:
    """REINFORCE, −(r − b) log π summed over segments and divided by `num_segments`.

    Args:
        log_probs: (N,) or (k, N) log-probability of the chosen layer; the only input that receives a gradient.
        rewards: rewards r, of the shape of `log_probs`.
        baseline: b, a number or a tensor that broadcasts against `rewards`.
        num_segments: as `num_masks` in `mask_bce_loss`; with k samples give k times the number of segments.

    Raises:
        ValueError: rewards of another shape than `log_probs`.
    """
    if rewards.shape != log_probs.shape:
        raise ValueError(
            f"rewards must have the shape of log_probs {tuple(log_probs.shape)}, got {tuple(rewards.shape)}"
        )
    baseline = torch.as_tensor(baseline, dtype=torch.float32, device=rewards.device)
    advantage = (rewards.float() - baseline).detach()
    return _over_masks(-advantage * log_probs.float(), num_segments)


def ema_update(baseline: Tensor, reward_mean: float | Tensor, decay: float = OFFICIAL_EMA_DECAY) -> Tensor:
    """Next running reward, decay · b + (1 − decay) · r, detached and in the dtype of `baseline`.

    Raises:
        ValueError: `decay` outside 0..1.
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must lie in 0..1, got {decay}")
    reward_mean = torch.as_tensor(reward_mean, dtype=baseline.dtype, device=baseline.device)
    return (decay * baseline + (1 - decay) * reward_mean).detach()


def critic_loss(
    values: Tensor, rewards: Tensor, beta: float = 1.0, num_segments: float | Tensor | None = None
) -> Tensor:
    """β (b − r)² of the critic's guesses b (N,) against the detached rewards r (N,), reduced as in `reinforce_loss`.

    Raises:
        ValueError: values of another shape than `rewards`.
    """
    if values.shape != rewards.shape:
        raise ValueError(f"values must have the shape of rewards {tuple(rewards.shape)}, got {tuple(values.shape)}")
    return _over_masks(beta * (values.float() - rewards.float().detach()) ** 2, num_segments)


def entropy_bonus(layer_logits: Tensor, num_segments: float | Tensor | None = None) -> Tensor:
    """Entropy of the layer policy in nats, 0..log(L + 1), to be *raised*: `LossWeights.total` subtracts it.

    Args:
        layer_logits: (N, L + 1); a layer that is ruled out may be −inf.
        num_segments: as in `reinforce_loss`; None returns (N,).
    """
    log_probs = layer_logits.float().log_softmax(-1)
    # 0 · log 0 is 0; the −inf is replaced before the product so that the gradient stays finite as well.
    return _over_masks(-(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(-1), num_segments)


def leave_one_out_baseline(rewards: Tensor) -> Tensor:
    """Baseline of each of k samples: the mean reward of the other k − 1 samples of the same segment; (k, N) → (k, N).

    Raises:
        ValueError: `rewards` is not (k, N) with k ≥ 2.
    """
    if rewards.ndim != 2 or rewards.shape[0] < 2:
        raise ValueError(f"rewards must be (k, N) with k of at least 2, got shape {tuple(rewards.shape)}")
    rewards = rewards.detach()
    return (rewards.sum(0, keepdim=True) - rewards) / (rewards.shape[0] - 1)


class BatchPolicy(NamedTuple):
    """What `batch_policy_loss` returns; all scalars, only `loss` carries a gradient."""

    loss: Tensor
    reward: Tensor
    baseline: Tensor
    advantage: Tensor


def batch_policy_loss(
    log_probs: Tensor, rewards: Tensor, baseline: Tensor, decay: float | None = OFFICIAL_EMA_DECAY
) -> BatchPolicy:
    """Policy loss as the official code has it: one reward for the whole micro-batch.

    R = Σ rewards; the running baseline takes R in *before* it is subtracted; the loss is the mean over segments of
    −(R − b) log π. Our own training uses `reinforce_loss` on rewards per segment instead, which tells a good choice
    from a bad one in the same batch.

    Args:
        log_probs: (N,) log-probability of the chosen layers.
        rewards: (N,) from `policy_reward`.
        baseline: scalar, the running reward before this batch or a critic's guess.
        decay: of the running reward; None uses `baseline` as it is, for a critic.

    Returns:
        `BatchPolicy`; with N = 0 the loss is 0 and the baseline as it was.
    """
    reward = rewards.detach().float().sum()
    baseline = baseline.detach()
    if len(rewards) > 0 and decay is not None:
        baseline = ema_update(baseline, reward, decay)
    advantage = reward - baseline
    loss = -(advantage * log_probs.float()).sum() / max(len(rewards), 1)
    return BatchPolicy(loss, reward, baseline, advantage)
