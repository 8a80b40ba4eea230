"""What a promptable mask head is told of a segment: one entry of `PROMPTS` per kind of prompt."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from .image_frames import ImageFrame, ImageFrames, apply_matrices, grid_to_grid, inside_windows
from .prompt_points import PointSettings, similarity_points


class SegmentProjection(nn.Module):
    """Segment state `(N, D)` to one sparse prompt embedding `(N, C)`: Linear(D, D), ReLU, Linear(D, C)."""

    def __init__(self, hidden_size: int, prompt_size: int):
        super().__init__()
        self.linear_1 = nn.Linear(hidden_size, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, prompt_size)

    def forward(self, segment_states: torch.Tensor) -> torch.Tensor:
        # Beside a frozen language model in bfloat16 this may be trained in float32.
        return self.linear_2(F.relu(self.linear_1(segment_states.to(self.linear_1.weight.dtype))))


@dataclass
class PromptSource:
    """
    What prompts are made of, for N segments over I images.

    Attributes:
        states (`(N, D)`): the segment states that are projected.
        similarity, similarity_map (`(N, h, w)`): raw, and scaled.
        image (`(N,)`): image of each segment.
        image_sizes: height and width of each image.
        lmm_frame, head_frame: of the LMM and of the mask head, in pixels.
        prompt_side: side of a mask prompt.
        padding_value: of a mask prompt, where the head's frame shows no image.
        projection: see [`SegmentProjection`].
        points: see [`PointSettings`].
    """

    states: torch.Tensor
    similarity: torch.Tensor
    similarity_map: torch.Tensor
    image: torch.Tensor
    image_sizes: list[tuple[int, int]]
    lmm_frame: ImageFrame | ImageFrames
    head_frame: ImageFrame
    prompt_side: int
    padding_value: float
    projection: SegmentProjection | None
    points: PointSettings


def embedding_prompt(source: PromptSource) -> torch.Tensor:
    """One sparse embedding per segment, `(N, C)`."""
    return source.projection(source.states)


def mask_prompt(source: PromptSource) -> torch.Tensor:
    """The similarity maps as mask prompts (MasP), `(N, side, side)`; see [`build_mask_prompts`]."""
    return build_mask_prompts(
        source.similarity_map,
        source.image,
        source.image_sizes,
        source.lmm_frame,
        source.head_frame.resized(source.prompt_side),
        source.padding_value,
    )


def point_prompt(source: PromptSource) -> tuple[torch.Tensor, torch.Tensor]:
    """The similarity as points (SasP): `(N, K, 2)` in pixels of the head's frame, and labels `(N, K)`."""
    return similarity_points(
        source.similarity, source.image, source.image_sizes, source.lmm_frame, source.points, source.head_frame
    )


# By the name in `config.prompts`: the argument of the mask head, and what makes it.
PROMPTS = {
    "embedding": ("embedding_prompts", embedding_prompt),
    "mask": ("mask_prompts", mask_prompt),
    "points": ("point_prompts", point_prompt),
}


def build_mask_prompts(
    similarity_map: torch.Tensor,
    segment_image: torch.Tensor,
    image_sizes: list[tuple[int, int]],
    lmm_frame: ImageFrame | ImageFrames,
    prompt_frame: ImageFrame,
    padding_value: float,
) -> torch.Tensor:
    """
    Mask prompts of N segments over any number of images.

    Each map goes to image pixels and from there to the prompt, as the official code does, by two small matrices per
    image: nothing of the size of an image is made.

    Args:
        similarity_map (`(N, h, w)`).
        segment_image (`(N,)`): which image each segment belongs to.
        image_sizes: height and width of each image.
        lmm_frame: of the LMM, in pixels.
        prompt_frame: of the mask head, in cells of the prompt.
        padding_value: what stands where the prompt shows no image.

    Returns:
        `(N, side, side)` float32.
    """
    side, device = prompt_frame.side, similarity_map.device
    prompts = similarity_map.new_full((similarity_map.shape[0], side, side), padding_value, dtype=torch.float32)
    for image in segment_image.unique().tolist():
        chosen = (segment_image == image).nonzero().squeeze(-1)
        maps = lmm_frame.own_grid(similarity_map[chosen], image)
        grid_hw = maps.shape[1], maps.shape[2]
        matrices = grid_to_grid(grid_hw, lmm_frame.of_image(image), image_sizes[image], prompt_frame)
        resized = apply_matrices(maps, *(matrix.to(device) for matrix in matrices))
        inside = inside_windows(prompt_frame, image_sizes[image]).to(device)
        prompts = prompts.index_copy(0, chosen, torch.where(inside, resized, padding_value))
    return prompts
