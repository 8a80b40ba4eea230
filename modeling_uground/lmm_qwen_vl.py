"""Qwen-VL: images in their own proportions, positions of three axes; in Qwen3-VL image features for early layers too.

Layer states are what a decoder layer computes. Qwen3-VL adds further image features ("deepstack") to the image tokens
between its first layers; like the `hidden_states` of the LMM, state k of an image token is the output of layer k,
before what the next layer gets added. Similarity maps are read from these, written answers and teacher-forced alike.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from .image_frames import ImageFrame
from .lmm_access import LmmAdapter, ModuleNames, TokenLayout, counted_positions


class QwenVLAdapter(LmmAdapter):
    """
    Qwen2.5-VL.

    An image is scaled to multiples of the side of a token along both axes, so that its grid shows all of it. An image
    takes as many positions as the longer side of its grid has tokens; positions go in with a fourth axis in front that
    counts tokens, as the LMM's own `generate` makes them.
    """

    frames = ("stretch",)
    names = ModuleNames(
        language_model="model.language_model",
        encoders=("model.visual",),
        never_quantized=("model.visual", "lm_head"),
    )
    image_keys = ("image_grid_thw",)
    pixels_per_image = False

    @property
    def cell_side(self) -> int:
        """Side of an image token in pixels of the frame."""
        vision = self.config.vision_config
        return vision.patch_size * vision.spatial_merge_size

    def frame_of(self, grid_hw: tuple[int, int]) -> ImageFrame:
        return ImageFrame(self.image_frame, grid_hw[0] * self.cell_side, grid_hw[1] * self.cell_side)

    def layout(self, valid_sizes: torch.Tensor, image_inputs: Mapping[str, torch.Tensor]) -> TokenLayout:
        grids = image_inputs["image_grid_thw"]
        merge = self.config.vision_config.spatial_merge_size
        if grids.dim() != 2 or grids.shape[1] != 3 or (grids[:, 0] != 1).any() or (grids[:, 1:] % merge).any():
            raise ValueError(
                f"image_grid_thw must be (I, 3): 1 and two multiples of {merge} for each image, got {grids.tolist()}"
            )
        sizes = (grids[:, 1:] // merge).tolist()
        cells = [[(row, column) for row in range(rows) for column in range(columns)] for rows, columns in sizes]
        return TokenLayout.of_cells(cells, valid_sizes.device)

    def encode(
        self, lmm: nn.Module, pixel_values: torch.Tensor, layout: TokenLayout, image_inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        grids = image_inputs["image_grid_thw"]
        patches = int(grids.prod(-1).sum())
        if len(pixel_values) != patches:
            raise ValueError(
                f"pixel_values must hold the {patches} patches of image_grid_thw, got {len(pixel_values)}"
            )
        outputs = lmm.get_image_features(pixel_values, grids, return_dict=True)
        features = nn.utils.rnn.pad_sequence(list(outputs.pooler_output), batch_first=True)
        deepstack = getattr(outputs, "deepstack_features", None)
        if not deepstack:
            return features, None
        layers = [nn.utils.rnn.pad_sequence(list(layer), batch_first=True) for layer in deepstack]
        return features, torch.stack(layers, 1)

    def image_outputs(
        self, features: torch.Tensor, further: torch.Tensor | None, counts: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=_unpadded(features, counts))

    def position_ids(
        self, attention_mask: torch.Tensor, image_columns: torch.Tensor, grid_sizes: torch.Tensor
    ) -> torch.Tensor:
        return self.packed_position_ids(counted_positions(attention_mask), image_columns, grid_sizes)

    def packed_position_ids(
        self, position_ids: torch.Tensor, image_columns: torch.Tensor, grid_sizes: torch.Tensor
    ) -> torch.Tensor:
        first, last = image_columns[:, :1], image_columns[:, -1:]
        rows, columns = grid_sizes.unsqueeze(-1).unbind(1)
        start = position_ids.gather(1, first)
        # What stands behind an image goes on behind its longer side, not behind its tokens.
        saved = rows * columns - torch.maximum(rows, columns)
        number = torch.arange(position_ids.shape[1], device=position_ids.device) - first
        behind = torch.where(position_ids > position_ids.gather(1, last), position_ids - saved, position_ids)
        is_image = (number >= 0) & (number < rows * columns)
        axes = [torch.zeros_like(number), number // columns, number % columns]
        placed = [torch.where(is_image, start + axis, behind) for axis in axes]
        return torch.stack([position_ids, *placed])


class Qwen3VLAdapter(QwenVLAdapter):
    """Qwen3-VL: further image features are added to the image tokens between its first layers."""

    def image_outputs(
        self, features: torch.Tensor, further: torch.Tensor | None, counts: torch.Tensor
    ) -> BaseModelOutputWithDeepstackFeatures:
        layers = [] if further is None else further.unbind(1)
        return BaseModelOutputWithDeepstackFeatures(
            pooler_output=_unpadded(features, counts),
            deepstack_features=[_unpadded(layer, counts) for layer in layers],
        )


def _unpadded(features: torch.Tensor, counts: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(row[:count] for row, count in zip(features, counts.tolist(), strict=True))
