"""SAM as UGround uses it: an image encoder, and a decoder for any number of segments over a batch of images."""

import torch
from transformers import PreTrainedModel, SamConfig, SamModel


class MaskDecoder(PreTrainedModel):
    """
    A `SamModel` asked for one mask per segment.

    Batch contract: segments of all images are decoded in one call, each with its own prompts; `segment_image` says
    which image embedding a segment reads. Two images with one and three segments give what four single calls give.
    """

    config: SamConfig
    base_model_prefix = "sam"
    main_input_name = "image_embeddings"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: SamConfig):
        super().__init__(config)
        self.sam = SamModel(config)
        self.post_init()

    @property
    def low_resolution(self) -> int:
        """Side of mask prompts and mask logits, in pixels of the SAM frame divided by 4."""
        return self.sam.config.vision_config.image_size // 4

    def encode(self, sam_pixel_values: torch.Tensor) -> torch.Tensor:
        """SAM frames `(I, 3, S, S)` to image embeddings `(I, C, S/16, S/16)`."""
        encoder = self.sam.vision_encoder
        return encoder(sam_pixel_values.to(encoder.patch_embed.projection.weight.dtype))[0]

    def forward(
        self,
        image_embeddings: torch.Tensor,
        segment_image: torch.Tensor,
        embedding_prompts: torch.Tensor | None = None,
        mask_prompts: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode one mask per segment.

        Args:
            image_embeddings (`(I, C, S/16, S/16)`): of [`MaskDecoder.encode`].
            segment_image (`(N,)`, int64): image of each segment.
            embedding_prompts (`(N, C)`, *optional*): one sparse prompt per segment.
            mask_prompts (`(N, S/4, S/4)`, *optional*): one dense prompt per segment.

        Returns:
            mask logits `(N, S/4, S/4)` in the SAM frame and SAM's estimates of their IoU `(N,)`, both float32.
        """
        side = self.low_resolution
        # Not `len`, which would make a number of what an exported program leaves open.
        if segment_image.shape[0] == 0:
            return image_embeddings.new_zeros((0, side, side)).float(), image_embeddings.new_zeros((0,)).float()
        # The parts may differ in dtype: what is trained beside frozen weights in bfloat16 is held in float32.
        dtype = self.sam.mask_decoder.iou_token.weight.dtype
        embeddings = image_embeddings[segment_image].to(dtype)
        sparse = None if embedding_prompts is None else embedding_prompts[:, None, None].to(dtype)
        if mask_prompts is not None:
            mask_prompts = mask_prompts[:, None].to(self.sam.prompt_encoder.no_mask_embed.weight.dtype)
        _, dense = self.sam.prompt_encoder(None, None, None, mask_prompts)
        positions = self.sam.get_image_wide_positional_embeddings().to(dtype)
        masks, iou_scores = self.sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.expand(embeddings.shape[0], -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=False,
        )
        return masks[:, 0, 0].float(), iou_scores[:, 0, 0].float()


def mask_overlap(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU of N pairs of boolean masks `(N, h, w)`: `(N,)` float32, 1 where both are empty."""
    both = (masks & others).flatten(1).sum(1).float()
    either = (masks | others).flatten(1).sum(1).float()
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
