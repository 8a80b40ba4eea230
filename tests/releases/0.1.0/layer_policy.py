"""SSC: a stochastic skip connection from each segment token to the mask decoder (UGround, section on PPM).

Purpose: say at which layer a segment leaves the LMM. The policy is trained by REINFORCE (`uground.training.losses`);
its reward baseline lives here because it must be saved with the weights.
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class LayerChoice:
    """
    Layers chosen for N segments.

    Attributes:
        index (`(N,)`, int64): the layer of each segment; under `"mc"` the one drawn most often.
        log_probs (`(N,)`, float32): log π(index), differentiable with respect to the gates.
        draws (`(N, L+1)`, float32 or `None`): under `"mc"`, how often each layer was drawn, divided by the number
            of draws; `None` otherwise.
    """

    index: torch.Tensor
    log_probs: torch.Tensor
    draws: torch.Tensor | None = None


class LayerPolicy(nn.Module):
    """
    Categorical distribution over the L+1 layers: π(l) = softmax over l of ⟨detach(h_l), w_l⟩.

    The segment states are detached: the policy reads the trunk and does not shape it. Gates start at zero, so that
    an untrained policy is uniform.

    Args:
        num_layers: L+1.
        hidden_size: D.
        baseline: `"ema"` or `"critic"`.
        ema_decay: share of the old value kept when the moving average of the reward is updated.
        critic_hidden_size: width of the critic.
    """

    def __init__(
        self,
        num_layers: int,
        hidden_size: int,
        baseline: str = "ema",
        ema_decay: float = 0.9,
        critic_hidden_size: int = 128,
    ):
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(num_layers, hidden_size))
        # Buffers: a resumed run must go on with the baseline it had.
        self.register_buffer("reward_ema", torch.zeros(()))
        self.register_buffer("reward_updates", torch.zeros((), dtype=torch.long))
        self.ema_decay = ema_decay
        self.critic = None
        if baseline == "critic":
            self.critic = nn.Sequential(
                nn.Linear(num_layers, critic_hidden_size), nn.ReLU(), nn.Linear(critic_hidden_size, 1)
            )

    def forward(self, segment_states: torch.Tensor) -> torch.Tensor:
        """`(N, L+1, D)` segment states to `(N, L+1)` float32 logits."""
        return (segment_states.detach().float() * self.gates.float()).sum(-1)

    def baseline(self) -> torch.Tensor:
        """The moving average of the reward, a float32 scalar, free of the pull of the zero it began with."""
        weight = 1.0 - self.ema_decay ** self.reward_updates.float()
        return self.reward_ema.float() / torch.where(weight > 0, weight, torch.ones_like(weight))

    @torch.no_grad()
    def update_baseline(self, reward: torch.Tensor) -> None:
        """Move the average towards a mean reward (a scalar): b ← decay · b + (1 − decay) · reward."""
        self.reward_ema.mul_(self.ema_decay).add_(reward.to(self.reward_ema), alpha=1.0 - self.ema_decay)
        self.reward_updates.add_(1)

    def predict_reward(self, layer_logits: torch.Tensor) -> torch.Tensor:
        """The critic's estimate of the reward, a scalar, from the detached mean layer probabilities of N segments."""
        probabilities = layer_logits.detach().softmax(-1).mean(0)
        return self.critic(probabilities.to(self.critic[0].weight.dtype)).squeeze(-1).float()


def select_layers(layer_logits: torch.Tensor, layer_selection: str | int, num_layer_samples: int) -> LayerChoice:
    """
    Choose a layer per segment.

    Args:
        layer_logits (`(N, L+1)`): of [`LayerPolicy`].
        layer_selection: `"sample"`, `"argmax"`, `"last"`, `"mc"` or a layer number.
        num_layer_samples: layers drawn per segment under `"mc"`.
    """
    num_segments, num_layers = layer_logits.shape
    probabilities = layer_logits.detach().softmax(-1)
    draws = None
    if layer_selection == "sample":
        index = probabilities.multinomial(1).squeeze(1)
    elif layer_selection == "argmax":
        index = layer_logits.argmax(-1)
    elif layer_selection == "mc":
        drawn = probabilities.multinomial(num_layer_samples, replacement=True)
        draws = torch.zeros_like(probabilities)
        draws = draws.scatter_add(1, drawn, torch.ones_like(drawn, dtype=draws.dtype)) / num_layer_samples
        index = draws.argmax(-1)
    else:
        layer = num_layers - 1 if layer_selection == "last" else layer_selection
        index = torch.full((num_segments,), layer, dtype=torch.long, device=layer_logits.device)
    return LayerChoice(index, log_probs_of(layer_logits, index), draws)


def log_probs_of(layer_logits: torch.Tensor, layer_index: torch.Tensor) -> torch.Tensor:
    """log π of the given layers: `(N, L+1)` logits and `(N,)` layers to `(N,)`."""
    return layer_logits.log_softmax(-1).gather(1, layer_index[:, None]).squeeze(1)
