"""Drawing layers in training: with which numbers, reproducibly, and what the policy is told of each draw.

A draw depends on the seed, the step and the segment's example only, never on how the step's examples were laid out in
batches and processes: that is what makes a run the same for any layout. The model draws with these numbers
(`layer_uniforms=`) and reads masks at the first draw of a segment; further draws only give similarity maps, hence
rewards, from the states of the same forward pass.
"""

from dataclasses import dataclass

import numpy as np
import torch

from uground.training.objectives.losses import critic_loss, leave_one_out_baseline, reinforce_loss

# Of splitmix64, a hash of 64-bit numbers (Steele, Lea and Flood, 2014).
SPLITMIX_STEP = np.uint64(0x9E3779B97F4A7C15)
SPLITMIX_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def _mix(values: np.ndarray) -> np.ndarray:
    """Splitmix64 of uint64 numbers, which wrap around by design."""
    with np.errstate(over="ignore"):
        values = values + SPLITMIX_STEP
        values = (values ^ (values >> np.uint64(30))) * SPLITMIX_FACTORS[0]
        values = (values ^ (values >> np.uint64(27))) * SPLITMIX_FACTORS[1]
        return values ^ (values >> np.uint64(31))


def segment_uniforms(segment_keys: torch.Tensor, seed: int, step: int, samples: int = 1) -> torch.Tensor:
    """
    Random numbers in [0, 1) for the draws of N segments.

    Args:
        segment_keys (`(N,)`, int64): of the collator.
        seed, step: of the run, and the number of optimizer steps it has made.
        samples: draws per segment, k.

    Returns:
        `(k, N)` float64, on the device of `segment_keys`; a function of the arguments alone.
    """
    keys = segment_keys.cpu().numpy().astype(np.uint64)
    run = _mix(_mix(np.array([seed], np.uint64)) ^ np.array([step], np.uint64))
    streams = _mix(run ^ np.arange(samples, dtype=np.uint64))
    mixed = _mix(streams[:, None] ^ keys)
    return torch.from_numpy((mixed >> np.uint64(11)).astype(np.float64) / 2.0**53).to(segment_keys.device)


@dataclass
class PolicyLoss:
    """
    Sums over the N segments of a micro-batch, not yet divided by their number in the step.

    Attributes:
        reinforce: of −(r − b) log π, averaged over the k draws.
        critic: of the critic's squared errors, 0 without a critic.
        baseline (`(k, N)`): the baseline b of each draw, detached.
    """

    reinforce: torch.Tensor
    critic: torch.Tensor
    baseline: torch.Tensor


def policy_loss(
    log_probs: torch.Tensor,
    rewards: torch.Tensor,
    moving_average: torch.Tensor,
    values: torch.Tensor | None = None,
) -> PolicyLoss:
    """
    REINFORCE on rewards per segment.

    The baseline is, in this order: with several draws the mean reward of a segment's other draws; the critic's
    estimate; the moving average as it stood before the step, so that a segment's own reward is not in it.

    Args:
        log_probs (`(k, N)`): log π of the draws of N segments, differentiable with respect to the gates.
        rewards (`(k, N)`): of the draws.
        moving_average: a scalar.
        values (`(N,)`, *optional*): the critic's estimate of each segment's reward.
    """
    samples = len(rewards)
    critic = rewards.new_zeros(())
    if values is not None:
        critic = critic_loss(values, rewards.mean(0), 1.0, None).sum()
    if samples > 1:
        baseline = leave_one_out_baseline(rewards)
    elif values is not None:
        baseline = values.detach().expand_as(rewards)
    else:
        baseline = moving_average.expand_as(rewards)
    reinforce = reinforce_loss(log_probs, rewards, baseline, None).sum() / samples
    return PolicyLoss(reinforce, critic, baseline.detach())
