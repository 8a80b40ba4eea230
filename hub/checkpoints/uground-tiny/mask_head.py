"""What every mask head of the SAM family shares: segments with prompts of any kind in, one mask per segment out."""

from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from .image_frames import ImageFrame

# What an image encoder made of I images: one map, or several by name, whose first axis is I.
ImageMaps = torch.Tensor | dict[str, torch.Tensor]
# Fields of a model's output that a head gives, in this order; without estimates of presence, the first two.
HEAD_FIELDS = ("mask_logits", "iou_scores", "presence_logits")
# The name of the map of a head that makes one only.
SINGLE_MAP = "embedding"
# Labels of points: somewhere, and none at all.
SOMEWHERE, NO_POINT = -1, -10


class MaskHead(PreTrainedModel):
    """
    A SAM asked for one mask per segment.

    Batch contract: segments of all images are decoded in one call, each with its own prompts; `segment_image` says
    which image a segment reads. Two images with one and three segments give what four single calls give.

    A head names what it is made of: `sam`, its model in transformers with a `vision_encoder`, a `prompt_encoder` and a
    `mask_decoder`; `model_types`, of the configurations that it takes; `has_presence`, whether it estimates that there
    is anything at all.
    """

    base_model_prefix = "sam"
    main_input_name = "image_embeddings"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    model_types: ClassVar[tuple[str, ...]] = ()
    has_presence: ClassVar[bool] = False
    # Modules that see images only, by their names below this one.
    encoders = ("sam.vision_encoder",)
    # Trained whole beside an adapter.
    trained_in_full = ("sam.mask_decoder", "sam.prompt_encoder")
    # Where SAM's pixels lie is no matter of training; both names are of one tensor.
    frozen = ("sam.shared_image_embedding", "sam.prompt_encoder.shared_embedding")

    @staticmethod
    def frame_of(config: Any) -> ImageFrame:
        """
        The frame of the encoder, in pixels.

        Raises:
            ValueError: this head cannot be made of such a configuration.
        """
        raise NotImplementedError

    @property
    def frame(self) -> ImageFrame:
        """What the encoder sees of an image, in pixels."""
        return self.frame_of(self.sam.config)

    @property
    def side(self) -> int:
        """Side of mask prompts and mask logits; both cover the frame."""
        raise NotImplementedError

    def unused(self, prompts: tuple[str, ...], scores: bool = True, presence: bool = True) -> tuple[str, ...]:
        """
        Names below this module of what never gets a gradient.

        Args:
            prompts: that segments come with.
            scores: whether the estimates of the IoU are trained.
            presence: whether those of presence are trained.
        """
        # SAM draws several masks of a prompt; the first is the only one asked for.
        others = range(1, len(self.sam.mask_decoder.output_hypernetworks_mlps))
        names = [f"sam.mask_decoder.output_hypernetworks_mlps.{number}" for number in others]
        if not scores:
            names.append("sam.mask_decoder.iou_prediction_head")
        names.append("sam.prompt_encoder." + ("no_mask_embed" if "mask" in prompts else "mask_embed"))
        return (*names, *self._unused_points(prompts))

    def _unused_points(self, prompts: tuple[str, ...]) -> list[str]:
        """Of the embeddings of points, those without a gradient."""
        raise NotImplementedError

    def encode(self, sam_pixel_values: torch.Tensor) -> ImageMaps:
        """SAM frames `(I, 3, S, S)` to what [`forward`] takes of images."""
        raise NotImplementedError

    def _decode(
        self,
        image_embeddings: ImageMaps,
        segment_image: torch.Tensor,
        sparse: torch.Tensor | None,
        dense: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Mask logits `(N, 1, m, h, w)`, estimates of their IoU `(N, 1, m)` and, if any, of presence `(N, 1, 1)`."""
        raise NotImplementedError

    def _pad_sparse(self, count: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Points of segments that have no sparse prompt at all, where the model cannot do without."""
        return None

    def forward(
        self,
        image_embeddings: ImageMaps,
        segment_image: torch.Tensor,
        embedding_prompts: torch.Tensor | None = None,
        mask_prompts: torch.Tensor | None = None,
        point_prompts: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """
        Decode one mask per segment; with `p` the side of mask prompts, see [`MaskHead.side`].

        Args:
            image_embeddings: of [`MaskHead.encode`], of I images.
            segment_image (`(N,)`, int64): image of each segment.
            embedding_prompts (`(N, C)`, *optional*): one sparse prompt per segment.
            mask_prompts (`(N, p, p)`, *optional*): one dense prompt per segment.
            point_prompts (`(N, K, 2)` and `(N, K)`, *optional*): x and y in pixels of the frame, and labels: 1 inside,
                0 outside, -1 that there is a point somewhere, -10 none.

        Returns:
            mask logits `(N, p, p)` in the frame, SAM's estimates of their IoU `(N,)` and, of a head that has them,
            logits `(N,)` that there is anything: the fields of `HEAD_FIELDS`, all float32.
        """
        count, side = segment_image.shape[0], self.side
        if count == 0:
            nothing = next(iter(maps_of(image_embeddings).values())).new_zeros((0, side, side)).float()
            return (nothing, *[nothing.new_zeros((0,))] * (1 + self.has_presence))
        encoder = self.sam.prompt_encoder
        # The parts may differ in dtype: what is trained beside frozen weights in bfloat16 is held in float32.
        dtype = self.sam.mask_decoder.iou_token.weight.dtype
        if mask_prompts is not None:
            mask_prompts = mask_prompts[:, None].to(encoder.no_mask_embed.weight.dtype)
        if point_prompts is None and embedding_prompts is None:
            point_prompts = self._pad_sparse(count, encoder.no_mask_embed.weight)
        points = labels = None
        if point_prompts is not None:
            points, labels = point_prompts[0][:, None], point_prompts[1][:, None]
        sparse, dense = encoder(points, labels, None, mask_prompts)
        sparse = [] if sparse is None else [sparse.to(dtype)]
        if embedding_prompts is not None:
            sparse.append(embedding_prompts[:, None, None].to(dtype))
        sparse = torch.cat(sparse, 2) if sparse else None
        masks, *estimates = self._decode(image_embeddings, segment_image, sparse, dense.to(dtype))
        return (masks[:, 0, 0].float(), *(values[:, 0, 0].float() for values in estimates))


def maps_of(image_embeddings: ImageMaps) -> dict[str, torch.Tensor]:
    """The maps of an encoder by name; a single one is called `embedding`."""
    return image_embeddings if isinstance(image_embeddings, dict) else {SINGLE_MAP: image_embeddings}


def from_maps(maps: dict[str, torch.Tensor]) -> ImageMaps:
    """The inverse of [`maps_of`]."""
    return maps[SINGLE_MAP] if set(maps) == {SINGLE_MAP} else maps


def mask_overlap(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU of N pairs of boolean masks `(N, h, w)`: `(N,)` float32, 1 where both are empty."""
    both = (masks & others).flatten(1).sum(1).float()
    either = (masks | others).flatten(1).sum(1).float()
    return torch.where(either > 0, both / either.clamp_min(1), torch.ones_like(both))
