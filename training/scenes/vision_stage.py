"""A CLIP tower that learns to tell kind, colour, texture and size of what Scenes show, by patch and by object."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from uground.modeling_uground.lmm_llava import LlavaAdapter, vision_key_mask
from uground.training.scenes.scene_store import FRAME, PROPERTIES, DrawnBatch
from uground.training.scenes.tiny_model import LMM_PATCH, LMM_SIZE, vision_config

# Of a patch, what an object must cover to be what the patch shows, and what it may cover of background.
MOST, LEAST = 0.25, 0.02
SEEN_PATCHES = 0.25  # patches that an object must fill to be asked for


def frame_pixels(batch: DrawnBatch, side: int) -> torch.Tensor:
    """Scenes as a letterbox of `side` pixels: `(B, 3, side, side)`, normalised, padded with 0."""
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    pixels = (batch.images.permute(0, 3, 1, 2).float() / 255 - mean) / std * batch.inside()[:, None]
    if side == FRAME:
        return pixels
    return F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)


def grid_coverage(masks: torch.Tensor, cells: int) -> torch.Tensor:
    """Masks `(…, F, F)` on a grid of `cells` rows and columns: the share of each cell that is mask, in 0..1."""
    edges = torch.linspace(0, FRAME, cells + 1)
    places = torch.arange(FRAME)
    shares = (torch.minimum(edges[1:, None], places + 1) - torch.maximum(edges[:-1, None], places)).clamp_min(0)
    shares = shares * cells / FRAME
    return shares @ masks.float() @ shares.T


def pooled(states: torch.Tensor, coverage: torch.Tensor) -> torch.Tensor:
    """States `(B, t, D)` of patches, averaged over each object by what it covers `(B, n, t)`: `(B, n, D)`."""
    return coverage / coverage.sum(-1, keepdim=True).clamp_min(1e-6) @ states


class VisionStage(nn.Module):
    """The CLIP tower with linear heads on the layer that LLaVA reads; the heads are thrown away."""

    def __init__(self):
        super().__init__()
        config = vision_config()
        self.adapter = LlavaAdapter(LlavaConfig(vision_config=config), "letterbox")
        self.model = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(values) + 1) for name, values in PROPERTIES.items()}
        )
        self.object_heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(values)) for name, values in PROPERTIES.items()}
        )

    def forward(self, batch: DrawnBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss, and the share of objects whose property is told, by name."""
        states = self.norm(patch_states(self.model, self.adapter, batch))
        coverage = grid_coverage(batch.masks(), LMM_SIZE // LMM_PATCH).flatten(2)
        properties = batch.properties[:, : coverage.shape[1]]
        seen = (properties[..., 0] >= 0) & (coverage.sum(-1) > SEEN_PATCHES)
        most, thing = coverage.max(1)
        objects, loss, figures = pooled(states, coverage)[seen], states.new_zeros(()), {}
        for number, name in enumerate(PROPERTIES):
            labels = properties[..., number].gather(1, thing) + 1
            labels = torch.where(most > MOST, labels, torch.where(most > LEAST, -100, 0))
            loss = loss + F.cross_entropy(self.patch_heads[name](states).flatten(0, 1), labels.flatten())
            logits, classes = self.object_heads[name](objects), properties[..., number][seen]
            loss = loss + F.cross_entropy(logits, classes)
            figures[name] = (logits.argmax(-1) == classes).float().mean().item()
        return loss, figures


def patch_states(tower: CLIPVisionModel, adapter: LlavaAdapter, batch: DrawnBatch) -> torch.Tensor:
    """`(B, t, D)` states of the patches of a tower at the layer that LLaVA reads."""
    # Sizes of the scenes are those in a frame of 256 pixels.
    valid_sizes = (batch.sizes * adapter.frame.side / FRAME).round().long()
    mask = vision_key_mask(adapter.token_validity(valid_sizes), torch.float32)
    pixels = frame_pixels(batch, adapter.frame.side)
    states = tower(pixels, attention_mask=mask, output_hidden_states=True).hidden_states
    return states[adapter.config.vision_feature_layer][:, 1:]
