"""A CLIP tower that learns to tell kind, colour, texture and size of what Scenes show, by patch and by object.

Some colours of each kind are never drawn in training, and a tower that sees them only as they are drawn learns which
kinds a colour excludes. So that a kind is told by its shape, most scenes are shown in other colours than they were
drawn in: these are asked for kinds, the others for colours, all for textures and sizes.
"""

from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPVisionModel, LlavaConfig
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from uground.modeling_uground.lmm_llava import LlavaAdapter, vision_key_mask
from uground.training.scenes.scene_store import FRAME, PROPERTIES, DrawnBatch
from uground.training.scenes.tiny_model import LMM_PATCH, LMM_SIZE, vision_config
from uground.training.scenes.world import held_out

COLOUR = [*PROPERTIES].index("colour")

# Of a patch, what an object must cover to be what the patch shows, and what it may cover of background.
MOST, LEAST = 0.25, 0.02
SEEN_PATCHES = 0.25  # patches that an object must fill to be asked for
RECOLOURED = 0.6  # share of the scenes in training
GREY, NEGATIVE = 0.2, 0.3  # shares of those without colours, and with light and dark exchanged
GAIN = (0.5, 1.0)


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


def recoloured(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Pictures `(B, F, F, 3)`, uint8, some of them in other colours: channels exchanged, each weakened by a factor of its
    own, light and dark exchanged, or without colours.

    Returns:
        The pictures, and `(B,)` bool: which have changed. Draws from PyTorch's generator.
    """
    changed, grey, negative = torch.rand(3, len(images)) < torch.tensor([[RECOLOURED], [GREY], [NEGATIVE]])
    order = torch.rand(len(images), 3).argsort(1)
    gains = torch.empty(len(images), 3).uniform_(*GAIN)
    exchange = F.one_hot(order, 3).float() * gains[:, :, None]
    exchange = torch.where(grey[:, None, None], torch.full((3, 3), 1 / 3), exchange)
    pixels = images.float()
    pixels = torch.where(negative[:, None, None, None], 255 - pixels, pixels)
    other = (pixels.flatten(1, 2) @ exchange.mT).view_as(pixels).round().to(torch.uint8)
    return torch.where(changed[:, None, None, None], other, images), changed


class VisionStage(nn.Module):
    """The CLIP tower with linear heads on the layer that LLaVA reads; the heads are thrown away."""

    def __init__(self):
        super().__init__()
        config = vision_config()
        self.adapter = LlavaAdapter(LlavaConfig(vision_config=config), "letterbox")
        self.model = CLIPVisionModel(config)
        self.norm = nn.LayerNorm(config.hidden_size)
        pairs = held_out("validation")
        table = [[(colour, kind) in pairs for colour in PROPERTIES["colour"]] for kind in PROPERTIES["kind"]]
        self.register_buffer("held_out", torch.tensor(table), persistent=False)
        self.patch_heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(values) + 1) for name, values in PROPERTIES.items()}
        )
        self.object_heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(values)) for name, values in PROPERTIES.items()}
        )

    def forward(self, batch: DrawnBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss, and the share of objects whose property is told, by name; of kinds also in colours never trained."""
        changed = torch.zeros(len(batch.sizes), dtype=torch.bool)
        if self.training:
            images, changed = recoloured(batch.images)
            batch = replace(batch, images=images)
        states = self.norm(patch_states(self.model, self.adapter, batch))
        coverage = grid_coverage(batch.masks(), LMM_SIZE // LMM_PATCH).flatten(2)
        properties = batch.properties[:, : coverage.shape[1]]
        seen = (properties[..., 0] >= 0) & (coverage.sum(-1) > SEEN_PATCHES)
        most, thing = coverage.max(1)
        objects, loss, figures = pooled(states, coverage)[seen], states.new_zeros(()), {}
        for number, name in enumerate(PROPERTIES):
            labels = properties[..., number].gather(1, thing) + 1
            labels = torch.where(most > MOST, labels, torch.where(most > LEAST, -100, 0))
            unasked = {"colour": changed, "kind": ~changed & self.training}.get(name, torch.zeros_like(changed))
            labels = torch.where(unasked[:, None], -100, labels)
            loss = loss + F.cross_entropy(self.patch_heads[name](states).flatten(0, 1), labels.flatten())
            logits, classes = self.object_heads[name](objects), properties[..., number][seen]
            asked = (~unasked[:, None]).expand_as(seen)[seen]
            loss = loss + F.cross_entropy(logits[asked], classes[asked])
            told = logits.argmax(-1) == classes
            figures[name] = told[asked].float().mean().item()
            if name == "kind" and not self.training:
                colours = properties[..., COLOUR][seen]
                figures["kind_in_new_colours"] = told[self.held_out[classes, colours]].float().mean().item()
        return loss, figures


def patch_states(tower: CLIPVisionModel, adapter: LlavaAdapter, batch: DrawnBatch) -> torch.Tensor:
    """`(B, t, D)` states of the patches of a tower at the layer that LLaVA reads."""
    # Sizes of the scenes are those in a frame of 256 pixels.
    valid_sizes = (batch.sizes * adapter.frame.side / FRAME).round().long()
    mask = vision_key_mask(adapter.token_validity(valid_sizes), torch.float32)
    pixels = frame_pixels(batch, adapter.frame.side)
    states = tower(pixels, attention_mask=mask, output_hidden_states=True).hidden_states
    return states[adapter.config.vision_feature_layer][:, 1:]
