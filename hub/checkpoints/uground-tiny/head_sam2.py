"""SAM 2, SAM 2.1 and the tracker of SAM 3 as a mask head: three maps of an image, and an estimate of presence."""

import torch
from transformers import PreTrainedConfig, Sam2Model, Sam3TrackerModel

from .image_frames import ImageFrame
from .mask_head import SOMEWHERE, MaskHead

MODELS = {"sam2": Sam2Model, "sam3_tracker": Sam3TrackerModel}
# Maps of an image by name, from fine to coarse, with their cells along an axis for one of the coarsest.
FINE, MIDDLE, COARSE = "fine", "middle", "embedding"
MAP_SCALES = {FINE: 4, MIDDLE: 2, COARSE: 1}


class Sam2Head(MaskHead):
    """
    A `Sam2Model` or `Sam3TrackerModel`, which sees an image stretched to a square.

    Two things differ from these models:

    - The decoder's `conv_s0` and `conv_s1` make the finer maps small, and `no_memory_embedding` is added to the
      coarsest. The models do so when they encode; here it is done when masks are drawn, so that what is kept of an
      image depends on the frozen encoder alone and these weights are trained, with kept embeddings too. The price is
      memory: the kept maps have C channels at every size, 88 MB of an image at C = 256, a frame of 1024 and float32.
    - The models exchange an unstable mask for another one in evaluation only
      (`dynamic_multimask_via_stability`). A mask here is the first of the decoder's always, in evaluation as in
      training: it is the one that the loss is taken of, and the others are not trained.
    """

    model_types = tuple(MODELS)
    has_presence = True

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.sam = MODELS[config.model_type](config)
        self.sam.mask_decoder.dynamic_multimask_via_stability = False
        self.post_init()

    @staticmethod
    def frame_of(config: PreTrainedConfig) -> ImageFrame:
        """
        The frame of the encoder, in pixels.

        Raises:
            ValueError: the maps of the encoder are not three squares, each half as fine as the one before, or the
                prompt encoder has another frame.
        """
        prompts, vision = config.prompt_encoder_config, config.vision_config
        frame, patch = _side(prompts.image_size), _side(prompts.patch_size)
        if frame is None or patch is None or frame % patch:
            raise ValueError(
                "the prompt encoder of a SAM 2 must have a square frame of whole patches, got image_size "
                f"{prompts.image_size} and patch_size {prompts.patch_size}"
            )
        seen = _side(vision.backbone_config.image_size)
        if seen != frame:
            raise ValueError(f"the encoders of a SAM 2 must have one frame, got {seen} and {frame} pixels")
        expected = [[scale * frame // patch] * 2 for scale in MAP_SCALES.values()]
        sizes = [[*size] for size in vision.backbone_feature_sizes]
        if sizes != expected:
            raise ValueError(f"backbone_feature_sizes of a SAM 2 with that frame must be {expected}, got {sizes}")
        return ImageFrame("stretch", frame)

    @property
    def side(self) -> int:
        """Side of mask prompts and mask logits: four cells for a cell of the coarsest map."""
        return self.sam.prompt_encoder.mask_input_size[0]

    def unused(self, prompts: tuple[str, ...], scores: bool = True, presence: bool = True) -> tuple[str, ...]:
        """As [`MaskHead.unused`]."""
        names = [*super().unused(prompts, scores)]
        if not presence:
            names.append("sam.mask_decoder.pred_obj_score_head")
        # SAM 3 makes a fourth map, which is of its detector.
        levels = len(getattr(self.sam.vision_encoder.neck, "fpn_layers", ()))
        names += [f"sam.vision_encoder.neck.fpn_layers.{level}" for level in range(len(MAP_SCALES), levels)]
        return tuple(names)

    def _unused_points(self, prompts):
        # One matrix, so that its rows for the corners of boxes go with those of points.
        names = [] if "points" in prompts else ["sam.prompt_encoder.point_embed"]
        # Behind points, and in place of a sparse prompt where there is none.
        return names if "embedding" not in prompts or not names else [*names, "sam.prompt_encoder.not_a_point_embed"]

    def encode(self, sam_pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        SAM frames `(I, 3, S, S)` to maps `(I, C, h, w)`: `fine`, `middle` and `embedding`, of which each is half as
        fine as the one before; 256, 128 and 64 cells at a frame of 1024.
        """
        encoder = self.sam.vision_encoder
        weight = next(encoder.parameters())
        maps = encoder(sam_pixel_values.to(weight.dtype)).fpn_hidden_states[: len(MAP_SCALES)]
        return dict(zip(MAP_SCALES, maps, strict=True))

    def _pad_sparse(self, count, like):
        # As `Sam2Model` does.
        points = torch.zeros(count, 1, 2, dtype=torch.float32, device=like.device)
        return points, torch.full((count, 1), SOMEWHERE, device=like.device)

    def _decode(self, image_embeddings, segment_image, sparse, dense):
        decoder = self.sam.mask_decoder
        maps = {name: values.to(dense.dtype) for name, values in image_embeddings.items()}
        fine = decoder.conv_s0(maps[FINE])[segment_image]
        middle = decoder.conv_s1(maps[MIDDLE])[segment_image]
        no_memory = self.sam.no_memory_embedding.to(dense.dtype).view(1, -1, 1, 1)
        coarse = (maps[COARSE] + no_memory)[segment_image]
        positions = self.sam.get_image_wide_positional_embeddings().to(dense.dtype)
        masks, iou_scores, _, presence = decoder(
            image_embeddings=coarse,
            image_positional_embeddings=positions.expand(coarse.shape[0], -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
            high_resolution_features=[fine, middle],
        )
        return masks, iou_scores, presence


def _side(size) -> int | None:
    """The side of a square, which is given as a number or as two; `None` if it is none."""
    sides = {size} if isinstance(size, int) else {*size}
    return sides.pop() if len(sides) == 1 else None
