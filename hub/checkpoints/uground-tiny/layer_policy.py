"""SSC: a stochastic skip connection from each segment token to the mask decoder (UGround, section on PPM).

Purpose: say at which layer a segment leaves the LMM. The policy is trained by REINFORCE; what training holds its
rewards against is no part of the model.
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
        log_probs (`(N,)`, float32, *optional*): log π(index), differentiable with respect to the gates; `None` where
            no policy was asked.
        draws (`(N, L+1)`, float32 or `None`): under `"mc"`, how often each layer was drawn, divided by the number
            of draws; `None` otherwise.
    """

    index: torch.Tensor
    log_probs: torch.Tensor | None
    draws: torch.Tensor | None = None

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Segment and layer of all that is read, `(M,)` each: a layer drawn twice of a segment is read once."""
        if self.draws is None:
            return torch.arange(len(self.index), device=self.index.device), self.index
        segments, layers = self.draws.nonzero(as_tuple=True)
        return segments, layers


class LayerPolicy(nn.Module):
    """
    Categorical distribution over the L+1 layers: π(l) = softmax over l of ⟨detach(h_l), w_l⟩.

    The segment states are detached: the policy reads the trunk and does not shape it. Gates start at zero, so that
    an untrained policy is uniform. Of a segment of several ids the mean of their states is read.

    Args:
        num_layers: L+1.
        hidden_size: D.
    """

    def __init__(self, num_layers: int, hidden_size: int):
        super().__init__()
        self.gates = nn.Parameter(torch.zeros(num_layers, hidden_size))

    def forward(self, segment_states: torch.Tensor) -> torch.Tensor:
        """`(N, K, L+1, D)` segment states to `(N, L+1)` float32 logits."""
        return (segment_states.detach().float().mean(1) * self.gates.float()).sum(-1)


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
        layer = num_layers - 1 if layer_selection == "last" else int(layer_selection)
        index = torch.full((num_segments,), layer, dtype=torch.long, device=layer_logits.device)
    return LayerChoice(index, log_probs_of(layer_logits, index), draws)


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


def log_probs_of(layer_logits: torch.Tensor, layer_index: torch.Tensor) -> torch.Tensor:
    """log π of the given layers: `(N, L+1)` logits and `(N,)` layers to `(N,)`."""
    return layer_logits.log_softmax(-1).gather(1, layer_index[:, None]).squeeze(1)
