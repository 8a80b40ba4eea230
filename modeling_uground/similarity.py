"""The similarity map (MasP): each segment state against the image tokens of its row, at the segment's layer."""

import math

import torch
from torch import nn

from .layer_states import ImageStates
from .prompt_points import minmax

SIMILARITY_SCALINGS = ("minmax", "scaled")
# Outside of the image a true logit says "surely nothing"; a min-max map is padded with its lowest value, as the
# official code does.
PADDING_VALUE = {"minmax": 0.0, "scaled": -10.0}


def image_similarity(
    segment_states: torch.Tensor, image_states: ImageStates, rows: torch.Tensor, layer_index: torch.Tensor
) -> torch.Tensor:
    """
    Dot product of each segment state with the image tokens of its row, at its layer only, in float32.

    Segments that read the same tokens read them together: a copy for each would be most of the memory.

    Args:
        segment_states (`(N, D)`): each at its segment's layer.
        image_states: of the image tokens of G rows.
        rows, layer_index (`(N,)`): one of these rows, and the layer, of each segment.

    Returns:
        `(N, n)` raw dot products.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for segment, place in enumerate(zip(rows.tolist(), layer_index.tolist(), strict=True)):
        groups.setdefault(place, []).append(segment)
    products, order = [], []
    # Mixed precision would turn the products to bfloat16.
    with torch.autocast(segment_states.device.type, enabled=False):
        for (row, layer), segments in groups.items():
            tokens = image_states.at(layer, row).to(segment_states.device)
            products.append(segment_states[segments].float() @ tokens.float().T)
            order += segments
    if not products:
        return segment_states.new_zeros((0, image_states.num_tokens), dtype=torch.float32)
    places = torch.tensor(order, device=segment_states.device).argsort()
    return torch.cat(products)[places]


class SimilarityScaling(nn.Module):
    """
    Raw dot products to the similarity map.

    `"minmax"` maps every segment's products to [0, 1] over all tokens of the grid, padded ones included, as the
    official code does; a constant map becomes zeros. `"scaled"` is dot / sqrt(D) + b_l with a learned bias per layer
    (the form of UFO's masks), an unbounded logit.
    """

    def __init__(self, scaling: str, num_layers: int, hidden_size: int):
        super().__init__()
        self.scaling = scaling
        self.hidden_size = hidden_size
        self.bias = nn.Parameter(torch.zeros(num_layers)) if scaling == "scaled" else None

    def forward(
        self, similarity: torch.Tensor, layer_index: torch.Tensor, in_grid: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            similarity (`(N, h, w)`): products.
            layer_index (`(N,)`): layers.
            in_grid (`(N, h, w)`, bool, *optional*): cells of each image's own grid, where these are smaller.

        Returns:
            `(N, h, w)` float32 maps; outside of the own grid they are as outside of the image.
        """
        if in_grid is None or in_grid.all():
            return self._scale(similarity, layer_index)
        # Others take the value of a cell that counts, so that they change neither minimum nor maximum.
        flat = similarity.flatten(1)
        first = flat.gather(1, in_grid.flatten(1).int().argmax(1, keepdim=True))
        scaled = self._scale(torch.where(in_grid, similarity, first[..., None]), layer_index)
        return torch.where(in_grid, scaled, PADDING_VALUE[self.scaling])

    def _scale(self, similarity: torch.Tensor, layer_index: torch.Tensor) -> torch.Tensor:
        if self.scaling == "minmax":
            return minmax(similarity)
        bias = self.bias.float()[layer_index.to(self.bias.device)].to(similarity.device)
        return similarity / math.sqrt(self.hidden_size) + bias[:, None, None]
