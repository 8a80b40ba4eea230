"""SAM as a mask head: an image encoder, and a decoder for any number of segments over a batch of images."""

from typing import Any

import torch
from transformers import PreTrainedModel, SamConfig, SamModel

from .image_frames import ImageFrame

# SAM's mask prompts and mask logits live at a quarter of its frame.
FRAME_SCALE = 4


class SamHead(PreTrainedModel):
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
    # Modules that see images only, by their names below this one.
    encoders = ("sam.vision_encoder",)
    # Trained whole beside an adapter.
    trained_in_full = ("sam.mask_decoder", "sam.prompt_encoder")
    # Where SAM's pixels lie is no matter of training; both names are of one tensor.
    frozen = ("sam.shared_image_embedding", "sam.prompt_encoder.shared_embedding")

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
    def frame(self) -> ImageFrame:
        """What the encoder sees of an image, in pixels."""
        return self.frame_of(self.sam.config)

    @property
    def side(self) -> int:
        """Side of mask prompts and mask logits, S/4."""
        return self.frame.side // FRAME_SCALE

    def unused(self, prompts: tuple[str, ...], scores: bool = True) -> tuple[str, ...]:
        """
        Names below this module of what never gets a gradient.

        Args:
            prompts: that segments come with.
            scores: whether the estimates of the IoU are trained.
        """
        # SAM draws four masks of a prompt; the first is the only one asked for.
        names = [f"sam.mask_decoder.output_hypernetworks_mlps.{number}" for number in range(1, 4)]
        if not scores:
            names.append("sam.mask_decoder.iou_prediction_head")
        names.append("sam.prompt_encoder." + ("no_mask_embed" if "mask" in prompts else "mask_embed"))
        if "points" not in prompts:
            names += ["sam.prompt_encoder.point_embed", "sam.prompt_encoder.not_a_point_embed"]
        else:
            # Of the corners of boxes.
            names += ["sam.prompt_encoder.point_embed.2", "sam.prompt_encoder.point_embed.3"]
        return tuple(names)

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
        point_prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Decode one mask per segment.

        Args:
            image_embeddings (`(I, C, S/16, S/16)`): of [`SamHead.encode`].
            segment_image (`(N,)`, int64): image of each segment.
            embedding_prompts (`(N, C)`, *optional*): one sparse prompt per segment.
            mask_prompts (`(N, S/4, S/4)`, *optional*): one dense prompt per segment.
            point_prompts (`(N, K, 2)` and `(N, K)`, *optional*): x and y in pixels of the frame, and labels: 1 inside,
                0 outside, -1 that there is a point somewhere, -10 none.

        Returns:
            mask logits `(N, S/4, S/4)` in the SAM frame and SAM's estimates of their IoU `(N,)`, both float32.
        """
        count, side = segment_image.shape[0], self.side
        if count == 0:
            return image_embeddings.new_zeros((0, side, side)).float(), image_embeddings.new_zeros((0,)).float()
        # The parts may differ in dtype: what is trained beside frozen weights in bfloat16 is held in float32.
        dtype = self.sam.mask_decoder.iou_token.weight.dtype
        embeddings = image_embeddings[segment_image].to(dtype)
        if mask_prompts is not None:
            mask_prompts = mask_prompts[:, None].to(self.sam.prompt_encoder.no_mask_embed.weight.dtype)
        points = labels = None
        if point_prompts is not None:
            points, labels = point_prompts[0][:, None], point_prompts[1][:, None]
        sparse, dense = self.sam.prompt_encoder(points, labels, None, mask_prompts)
        sparse = [] if sparse is None else [sparse.to(dtype)]
        if embedding_prompts is not None:
            sparse.append(embedding_prompts[:, None, None].to(dtype))
        positions = self.sam.get_image_wide_positional_embeddings().to(dtype)
        masks, iou_scores = self.sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=positions.expand(count, -1, -1, -1),
            sparse_prompt_embeddings=torch.cat(sparse, 2) if sparse else None,
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=False,
        )
        return masks[:, 0, 0].float(), iou_scores[:, 0, 0].float()


def mask_overlap(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU of N pairs of boolean masks `(N, h, w)`: `(N,)` float32, 1 where both are empty."""
    both = (masks & others).flatten(1).sum(1).float()
    either = (masks | others).flatten(1).sum(1).float()
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
