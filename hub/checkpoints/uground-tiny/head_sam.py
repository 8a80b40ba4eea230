"""SAM as a mask head."""

from typing import Any

import torch
from transformers import SamConfig, SamModel

from .image_frames import ImageFrame
from .mask_head import MaskHead

# SAM's mask prompts and mask logits live at a quarter of its frame.
FRAME_SCALE = 4


class SamHead(MaskHead):
    """A `SamModel`, which sees an image in a letterbox."""

    config: SamConfig
    model_types = ("sam",)

    def __init__(self, config: SamConfig):
        super().__init__(config)
        self.sam = SamModel(config)
        self.post_init()

    @staticmethod
    def frame_of(config: Any) -> ImageFrame:
        """
        The frame of the encoder, in pixels.

        Raises:
            ValueError: patches are not of 16 pixels, so that mask logits would not live at a quarter of the frame.
        """
        vision = config.vision_config
        if vision.patch_size != 16:
            raise ValueError(f"the SAM of UGround has patches of 16 pixels, got {vision.patch_size}")
        return ImageFrame("letterbox", vision.image_size)

    @property
    def side(self) -> int:
        """Side of mask prompts and mask logits, S/4."""
        return self.frame.side // FRAME_SCALE

    def _unused_points(self, prompts):
        embedding = "sam.prompt_encoder.point_embed"
        if "points" in prompts:
            # Of the corners of boxes.
            return [f"{embedding}.2", f"{embedding}.3"]
        return [embedding, "sam.prompt_encoder.not_a_point_embed"]

    def encode(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM frames `(I, 3, S, S)` to image embeddings `(I, C, S/16, S/16)`."""
        encoder = self.sam.vision_encoder
        return encoder(sam_pixel_values.to(encoder.patch_embed.projection.weight.dtype))[0]

    def _decode(self, image_embeddings, segment_image, sparse, dense):
        embeddings = image_embeddings[segment_image].to(dense.dtype)
        positions = self.sam.get_image_wide_positional_embeddings().to(dense.dtype)
        return self.sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.expand(embeddings.shape[0], -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
