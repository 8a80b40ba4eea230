"""LLaVA: a CLIP tower at one square size, a projector, and a decoder with positions that count tokens."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .image_frames import ImageFrame
from .lmm_access import LmmAdapter, ModuleNames, TokenLayout


class LlavaAdapter(LmmAdapter):
    """
    LLaVA-1.5 and its like.

    Under `letterbox`, padded patches are masked as keys in the tower and in the language model, as UGround was
    trained; under `centre_crop` (LISA, SESAME, READ) and `stretch` there is no padding.
    """

    frames = ("letterbox", "centre_crop", "stretch")
    names = ModuleNames(
        language_model="model.language_model",
        encoders=("model.vision_tower",),
        never_quantized=("model.vision_tower", "model.multi_modal_projector", "lm_head"),
    )

    @property
    def frame(self) -> ImageFrame:
        return ImageFrame(self.image_frame, self.config.vision_config.image_size)

    @property
    def token_grid_hw(self) -> tuple[int, int]:
        vision = self.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def token_validity(self, valid_sizes: torch.Tensor) -> torch.Tensor:
        """
        Image tokens that see image and not padding only: `(I, 2)` rows and columns of the frame that are image to
        `(I, h, w)` bool.

        A patch is valid when its first pixel lies inside the image: the nearest-neighbour down-sampling of the pixel
        mask that the official code uses.
        """
        patch_size = self.config.vision_config.patch_size
        inside = [
            torch.arange(count, device=valid_sizes.device) * patch_size < valid_sizes[:, axis : axis + 1]
            for axis, count in enumerate(self.token_grid_hw)
        ]
        return inside[0][:, :, None] & inside[1][:, None, :]

    def frame_of(self, grid_hw: tuple[int, int]) -> ImageFrame:
        return self.frame

    def layout(self, valid_sizes: torch.Tensor, image_inputs: Mapping[str, torch.Tensor]) -> TokenLayout:
        return TokenLayout.full(self.token_validity(valid_sizes))

    def encode(
        self, lmm: nn.Module, pixel_values: torch.Tensor, layout: TokenLayout, image_inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, None]:
        dtype = lmm.get_input_embeddings().weight.dtype
        if dtype not in (torch.float16, torch.bfloat16):
            dtype = torch.float32
        mask = vision_key_mask(layout.valid, dtype)
        arguments = {} if mask is None else {"attention_mask": mask}
        features = lmm.get_image_features(pixel_values.to(dtype), return_dict=True, **arguments).pooler_output
        return torch.stack(list(features)), None

    def image_outputs(self, features: torch.Tensor, further: None, counts: torch.Tensor) -> BaseModelOutputWithPooling:
        return BaseModelOutputWithPooling(pooler_output=list(features))

    def unused(self) -> tuple[str, ...]:
        depth, layer = self.config.vision_config.num_hidden_layers, self.config.vision_feature_layer
        chosen = [layer] if isinstance(layer, int) else layer
        last_used = max(number if number >= 0 else depth + 1 + number for number in chosen)
        tower = "model.vision_tower"
        return (f"{tower}.post_layernorm", *(f"{tower}.encoder.layers.{n}" for n in range(last_used, depth)))


def vision_key_mask(token_valid: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """
    Additive attention mask `(I, 1, 1, 1 + h*w)` of a CLIP tower that hides padded patches, `None` if there are none.

    The class token, in front of the patches, is always valid.
    """
    if token_valid.all():
        return None
    keys = nn.functional.pad(token_valid.flatten(1), (1, 0), value=True)
    mask = torch.zeros(keys.shape, dtype=dtype, device=token_valid.device)
    return mask.masked_fill(~keys, torch.finfo(dtype).min)[:, None, None, :]
