"""What the mask decoder is told of a segment: its projected state, and its similarity map as a mask prompt (MasP)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

# Outside of the image a true logit says "surely nothing"; a min-max map is padded with its lowest value, as the
# official code does.
PADDING_VALUE = {"minmax": 0.0, "scaled": -10.0}


class SegmentProjection(nn.Module):
    """Segment state `(N, D)` to one sparse prompt embedding `(N, C)`: Linear(D, D), ReLU, Linear(D, C)."""

    def __init__(self, hidden_size: int, prompt_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, prompt_size)

    def forward(self, segment_states: torch.Tensor) -> torch.Tensor:
        # Beside a frozen language model in bfloat16 this may be trained in float32.
        return self.linear_2(F.relu(self.linear_1(segment_states.to(self.linear_1.weight.dtype))))


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

    def forward(self, similarity: torch.Tensor, layer_index: torch.Tensor) -> torch.Tensor:
        """`(N, h, w)` products and `(N,)` layers to `(N, h, w)` float32 maps."""
        if self.scaling == "minmax":
            low = similarity.amin((-2, -1), keepdim=True)
            span = similarity.amax((-2, -1), keepdim=True) - low
            # A constant map has no span: dividing by 1 instead gives zeros, and no NaN in values or gradients.
            return (similarity - low) / torch.where(span > 0, span, torch.ones_like(span))
        bias = self.bias.float()[layer_index.to(self.bias.device)].to(similarity.device)
        return similarity / math.sqrt(self.hidden_size) + bias[:, None, None]


def map_to_image(
    similarity_map: torch.Tensor, valid_hw: tuple[int, int], lmm_size: int, original_hw: tuple[int, int]
) -> torch.Tensor:
    """
    Maps of one image from the token grid to image pixels: up to the LMM frame, crop the padding, to the image size.

    Args:
        similarity_map (`(n, h, w)`): maps of segments of one image.
        valid_hw: rows and columns of the LMM frame that are image.
        lmm_size: side of the LMM frame in pixels.
        original_hw: height and width of the image.

    Returns:
        `(n, H, W)`.
    """
    maps = F.interpolate(similarity_map[:, None], size=(lmm_size, lmm_size), mode="bilinear", align_corners=False)
    maps = maps[..., : valid_hw[0], : valid_hw[1]]
    return F.interpolate(maps, size=original_hw, mode="bilinear", align_corners=False)[:, 0]


def map_to_mask_prompt(image_map: torch.Tensor, low_resolution: int, padding_value: float) -> torch.Tensor:
    """
    Maps in image pixels to SAM's mask prompt: longest side to `low_resolution`, padded below and to the right.

    Args:
        image_map (`(n, H, W)`).
        low_resolution: side of the prompt, 1/4 of the SAM frame.
        padding_value: value of the padding.

    Returns:
        `(n, low_resolution, low_resolution)`.
    """
    height, width = image_map.shape[-2:]
    scale = low_resolution / max(height, width)
    size = (max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5)))
    maps = F.interpolate(image_map[:, None], size=size, mode="bilinear", align_corners=False, antialias=True)
    padding = (0, low_resolution - size[1], 0, low_resolution - size[0])
    return F.pad(maps, padding, value=padding_value)[:, 0]


def build_mask_prompts(
    similarity_map: torch.Tensor,
    segment_image: torch.Tensor,
    valid_sizes: torch.Tensor,
    original_sizes: torch.Tensor,
    lmm_size: int,
    low_resolution: int,
    padding_value: float,
) -> torch.Tensor:
    """
    Mask prompts of N segments over any number of images.

    Args:
        similarity_map (`(N, h, w)`).
        segment_image (`(N,)`): which image each segment belongs to.
        valid_sizes, original_sizes (`(I, 2)`): as the processor returns them.
        lmm_size, low_resolution: sides of the LMM frame and of the prompt.
        padding_value: see [`map_to_mask_prompt`].

    Returns:
        `(N, low_resolution, low_resolution)`.
    """
    prompts = similarity_map.new_empty(len(similarity_map), low_resolution, low_resolution)
    valid_list, original_list = valid_sizes.tolist(), original_sizes.tolist()
    for image in segment_image.unique().tolist():
        chosen = (segment_image == image).nonzero().squeeze(-1)
        maps = map_to_image(similarity_map[chosen], valid_list[image], lmm_size, original_list[image])
        prompts = prompts.index_copy(0, chosen, map_to_mask_prompt(maps, low_resolution, padding_value))
    return prompts
