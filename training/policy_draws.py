"""Drawing layers in training: which ones, reproducibly, and what the policy is told of each.

A draw depends on the seed, the step and the segment's example only, never on how the step's examples were laid out in
batches and processes: that is what makes a run the same for any layout. The masks come from the first draw of a
segment; further draws only give similarity maps, hence rewards, from the states of the same forward pass.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from uground.modeling_uground.layer_policy import log_probs_of
from uground.modeling_uground.lmm_access import image_similarity
from uground.training.losses import critic_loss, leave_one_out_baseline, reinforce_loss

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


def draw_layers(layer_logits: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """
    Layers drawn from the policy by inverting its distribution function.

    Args:
        layer_logits (`(N, L+1)`), uniforms (`(k, N)`, in [0, 1)).

    Returns:
        `(k, N)` int64.
    """
    cumulated = layer_logits.detach().double().softmax(-1).cumsum(-1)
    layers = (uniforms[..., None].to(cumulated) >= cumulated).sum(-1)
    # Rounding may leave the last sum a little below 1.
    return layers.clamp_max(layer_logits.shape[-1] - 1)


@dataclass
class PolicyDraws:
    """
    What one forward pass drew for N segments.

    Attributes:
        layers (`(k, N)`, int64): the draws; masks were read at the first.
        log_probs (`(k, N)`): log π of them, differentiable with respect to the gates.
        other_maps (`(k - 1, N, h, w)`): similarity maps of the draws but the first, without a graph.
        values (`(N,)` or `None`): the critic's estimate of each segment's reward.
    """

    layers: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    other_maps: torch.Tensor | None = None
    values: torch.Tensor | None = None


@contextmanager
def drawn_layers(model, uniforms: torch.Tensor) -> Iterator[PolicyDraws]:
    """
    Draw the layers of the forward passes made inside, and keep what the policy loss needs.

    All of it is computed within the model's own forward pass: sharded parameters can be read only there.

    Args:
        model: the bare `UGroundForReferringSegmentation`, without wrappers.
        uniforms (`(k, N)`): of [`segment_uniforms`]; N may be 0 where the batch holds one lone segment token.

    Returns:
        A context whose [`PolicyDraws`] is filled by a forward pass.
    """
    draws, decode = PolicyDraws(), model.decode_segments

    def decode_drawn(states, hidden_states, rows, image_positions, images, image_index, **settings):
        logits = model.layer_policy(states).to(states.device)
        missing = len(states) - uniforms.shape[1]
        chances = torch.nn.functional.pad(uniforms, (0, missing)) if missing else uniforms
        draws.layers = draw_layers(logits, chances.to(logits.device))
        draws.log_probs = torch.stack([log_probs_of(logits, layers) for layers in draws.layers])
        policy = model.layer_policy
        if policy.critic is not None:
            probabilities = logits.detach().softmax(-1).to(policy.critic[0].weight.dtype)
            draws.values = policy.critic(probabilities).squeeze(-1).float()
        with torch.no_grad():
            draws.other_maps = _other_maps(model, draws.layers[1:], states, hidden_states, rows, image_positions)
        settings.update(layer_index=draws.layers[0], layer_selection=None)
        return decode(states, hidden_states, rows, image_positions, images, image_index, **settings)

    model.decode_segments = decode_drawn
    try:
        yield draws
    finally:
        del model.decode_segments


def _other_maps(model, layers, states, hidden_states, rows, image_positions) -> torch.Tensor:
    """Similarity maps `(k - 1, N, h, w)` at `layers` `(k - 1, N)`."""
    grid_hw, maps = model.config.token_grid_hw, []
    for layer_index in layers:
        chosen = states[torch.arange(len(states), device=states.device), layer_index]
        similarity = image_similarity(chosen, hidden_states, rows, layer_index, image_positions)
        maps.append(model.similarity_scaling(similarity.view(-1, *grid_hw), layer_index).to(states.device))
    return torch.stack(maps) if maps else states.new_zeros((0, len(states), *grid_hw), dtype=torch.float32)


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


def policy_loss(draws: PolicyDraws, rewards: torch.Tensor, moving_average: torch.Tensor) -> PolicyLoss:
    """
    REINFORCE on rewards per segment.

    The baseline is, in this order: with several draws the mean reward of a segment's other draws; the critic's
    estimate; the moving average as it stood before the step, so that a segment's own reward is not in it.

    Args:
        draws: of [`drawn_layers`], for N segments.
        rewards (`(k, N)`): of the draws.
        moving_average: a scalar.
    """
    samples = len(rewards)
    critic = rewards.new_zeros(())
    if draws.values is not None:
        mean_reward = rewards.mean(0)
        critic = critic_loss(draws.values, mean_reward, 1.0, None).sum()
    if samples > 1:
        baseline = leave_one_out_baseline(rewards)
    elif draws.values is not None:
        baseline = draws.values.detach().expand_as(rewards)
    else:
        baseline = moving_average.expand_as(rewards)
    reinforce = reinforce_loss(draws.log_probs, rewards, baseline, None).sum() / samples
    return PolicyLoss(reinforce, critic, baseline.detach())
