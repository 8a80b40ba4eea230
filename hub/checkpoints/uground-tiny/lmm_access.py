"""What the package knows of a family of LMMs: one adapter per family, and nothing else reads the LMM's insides.

An adapter is made of a configuration and holds no weights; where it needs the trunk, it is handed it. `lmm_families`
finds the adapter of a `model_type`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .image_frames import ImageFrame


@dataclass(frozen=True)
class ModuleNames:
    """
    Names of an LMM's modules, from the LMM's root on.

    Attributes:
        language_model: what adapters of LoRA sit in.
        encoders: see images only; they stay frozen unless a run asks for them.
        never_quantized: small, or what becomes of their rounding shows in every mask.
        embeddings, head: the two sides of the vocabulary, by the last part of their names.
    """

    language_model: str
    encoders: tuple[str, ...]
    never_quantized: tuple[str, ...]
    embeddings: str = "embed_tokens"
    head: str = "lm_head"


class LmmAdapter:
    """
    One family of LMMs.

    Args:
        config: of the LMM, as `config.lmm_config` holds it.
        image_frame: what the LMM sees of an image, one of the adapter's `frames`.

    Attributes:
        frames: kinds of frames that the family's weights may have been trained with.
        names: of the family's modules.
        prefix_is_causal: whether nothing before the last image token sees what comes behind it, so that queries about
            an image can share it.
        cache_can_be_selected: whether rows of the cached keys and values can be picked.
        takes_4d_masks: whether a mask `(B, 1, T, T)` says which keys each token sees, as packed rows need.

    Raises:
        ValueError: the family has no such frame.
    """

    frames: tuple[str, ...] = ()
    names: ModuleNames
    prefix_is_causal = True
    cache_can_be_selected = True
    takes_4d_masks = True

    def __init__(self, config: PreTrainedConfig, image_frame: str):
        if image_frame not in self.frames:
            raise ValueError(f"image_frame of a {config.model_type} must be one of {self.frames}, got {image_frame!r}")
        self.config = config
        self.image_frame = image_frame

    @property
    def frame(self) -> ImageFrame:
        """What the vision tower sees of an image, in pixels."""
        raise NotImplementedError

    @property
    def token_grid_hw(self) -> tuple[int, int]:
        """Rows and columns of the image tokens."""
        raise NotImplementedError

    def token_validity(self, valid_sizes: torch.Tensor) -> torch.Tensor:
        """
        Image tokens that see image and not padding only: `(I, 2)` rows and columns of the frame that are image to
        `(I, h, w)` bool.
        """
        raise NotImplementedError

    def encode(self, lmm: nn.Module, pixel_values: torch.Tensor, token_valid: torch.Tensor) -> torch.Tensor:
        """Vision tower and projector: image inputs to features `(I, n, D)` in the LMM's embedding space."""
        raise NotImplementedError

    def image_outputs(self, row_features: torch.Tensor) -> Any:
        """Features `(B, n, D)` as the LMM's forward and `generate` take them of an image that was encoded before."""
        raise NotImplementedError

    def decoder_layers(self, lmm: nn.Module) -> list[nn.Module]:
        """The L decoder layers, whose outputs are layer states 1…L-1 (and L before its norm)."""
        raise NotImplementedError

    def final_norm(self, lmm: nn.Module) -> nn.Module:
        """The norm behind the last decoder layer; its output is layer state L."""
        raise NotImplementedError

    def unused(self) -> tuple[str, ...]:
        """Names, from the LMM's root on, of what the forward pass never runs through."""
        return ()

    def position_ids(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """`(B, T)` positions of rows that are not packed, from the mask `(B, T)` of what is not text padding."""
        # Padding behind a row counts on, as in the official code; only padding in front of it does not.
        in_front = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
        return (torch.arange(attention_mask.shape[1], device=attention_mask.device) - in_front).clamp_min(0)
