"""A SAM that learns to follow every prompt on Scenes: points, boxes, coarse masks, and embeddings.

An embedding stands for some properties ("red", "small fish"); what it asks for are all objects that have them. It is
what the language model's embeddings have to become, so that SAM can stay as it is from here on.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import SamModel

from uground.processing import masks_to_boxes
from uground.training.scenes.scene_store import FRAME, PROPERTIES, DrawnBatch
from uground.training.scenes.tiny_model import LMM_PATCH, LMM_SIZE, sam_config
from uground.training.scenes.vision_stage import frame_pixels, grid_coverage

MAX_POINTS = 3
TARGET_SIDE = FRAME // 2
OUTSIDE_POINTS = 0.2  # share of the steps whose last point says where the object is not
BOX_NOISE = 0.05  # of the sides of the box
SEVERAL_MASKS = 0.5  # share of the steps that ask for three masks of a point
UNIONS = 0.25  # share of the coarse masks that show several objects
WITH_MASK = 0.5  # share of the steps that give the embedding together with a coarse mask


@dataclass
class Prompted:
    """
    Targets of one form of prompt, and the prompt: for each of the B images one.

    Attributes:
        targets (`(B, F, F)`, bool).
        points (`(B, 1, k, 2)`), labels (`(B, 1, k)`), boxes (`(B, 1, 4)`): in pixels of the frame, or `None`.
        mask (`(B, 1, F/4, F/4)`): logits, or `None`.
        embedding (`(B, 1, 1, C)`): or `None`.
        several: whether three masks are asked for, of which the best counts.
    """

    targets: torch.Tensor
    points: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    boxes: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    embedding: torch.Tensor | None = None
    several: bool = False


class SamStage(nn.Module):
    """SAM from nothing: BCE, dice, and the squared error of its own IoU estimate, in every form of prompt."""

    def __init__(self):
        super().__init__()
        self.model = SamModel(sam_config())
        # transformers draws the Fourier features with a deviation of hidden_size / 2, far too fine for a small frame;
        # the original SAM draws them with 1.
        nn.init.normal_(self.model.shared_image_embedding.positional_embedding, std=1.0)
        nn.init.normal_(self.model.vision_encoder.pos_embed, std=0.02)
        width = self.model.config.prompt_encoder_config.hidden_size
        # A row for each value, and one for "whatever it is".
        self.words = nn.ModuleDict({name: nn.Embedding(len(values) + 1, width) for name, values in PROPERTIES.items()})

    def forward(self, batch: DrawnBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """Loss, and the mean IoU of each form of prompt, by name. Draws from PyTorch's generator."""
        images = self.model.vision_encoder(frame_pixels(batch, FRAME))[0]
        masks = batch.masks()
        forms = {
            "points": prompt_points(batch, masks),
            "box": prompt_boxes(batch, masks),
            "coarse": prompt_coarse(batch, masks),
            "words": self._prompt_words(batch, masks),
        }
        loss, figures = images.new_zeros(()), {}
        for name, prompted in forms.items():
            form_loss, figures[name] = mask_loss(*decode(self.model, images, prompted), prompted.targets)
            loss = loss + form_loss / len(forms)
        return loss, figures

    def _prompt_words(self, batch: DrawnBatch, masks: torch.Tensor) -> Prompted:
        """Some properties of an object, at least one of them, and the mask of all objects that have them."""
        chosen = random_objects(batch, masks)
        rows = torch.arange(len(chosen))
        asked = torch.rand(len(chosen), len(PROPERTIES)) < 0.5
        asked[rows, torch.randint(len(PROPERTIES), (len(chosen),))] = True
        properties = batch.properties[:, : masks.shape[1]]
        wanted = properties[rows, chosen]
        meant = ((properties == wanted[:, None]) | ~asked[:, None]).all(-1) & (properties[..., 0] >= 0)
        embedding = sum(
            table(torch.where(asked[:, number], wanted[:, number], len(PROPERTIES[name])))
            for number, (name, table) in enumerate(self.words.items())
        )
        targets = (masks & meant[..., None, None]).any(1)
        mask = coarse_logits(targets) if torch.rand(()) < WITH_MASK else None
        return Prompted(targets, mask=mask, embedding=embedding[:, None, None])


def random_objects(batch: DrawnBatch, masks: torch.Tensor) -> torch.Tensor:
    """`(B,)` number of an object of each scene, counted from 0, that a cut has not taken off."""
    there = masks.flatten(2).any(-1)
    # A scene whose objects are all cut off gives an empty target, which is no reason to stop.
    weights = there.float() + 1e-9 * (batch.properties[:, : masks.shape[1], 0] >= 0)
    return torch.multinomial(weights, 1)[:, 0]


def random_pixels(masks: torch.Tensor, count: int) -> torch.Tensor:
    """Centres `(B, count, 2)`, x and y, of random pixels of masks `(B, F, F)`; of any pixels where one is empty."""
    weights = masks.flatten(1).float()
    picked = torch.multinomial(torch.where(weights.any(1, keepdim=True), weights, 1.0), count, replacement=True)
    return torch.stack([picked % FRAME, picked // FRAME], -1) + 0.5


def prompt_points(batch: DrawnBatch, masks: torch.Tensor) -> Prompted:
    """One to three points in an object, the last of several perhaps outside of it."""
    targets = masks[torch.arange(len(masks)), random_objects(batch, masks)]
    count = int(torch.randint(1, MAX_POINTS + 1, ()))
    points = random_pixels(targets, count)
    labels = torch.ones(len(masks), count, dtype=torch.long)
    if count > 1 and torch.rand(()) < OUTSIDE_POINTS:
        points[:, -1:] = random_pixels(batch.inside() & ~targets, 1)
        labels[:, -1] = 0
    several = count == 1 and bool(torch.rand(()) < SEVERAL_MASKS)
    return Prompted(targets, points[:, None], labels[:, None], several=several)


def prompt_boxes(batch: DrawnBatch, masks: torch.Tensor) -> Prompted:
    """The box around an object, a little off."""
    targets = masks[torch.arange(len(masks)), random_objects(batch, masks)]
    boxes = masks_to_boxes(targets)
    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    boxes = boxes + BOX_NOISE * sides * torch.randn_like(boxes)
    return Prompted(targets, boxes=boxes.clamp(0, FRAME)[:, None])


def prompt_coarse(batch: DrawnBatch, masks: torch.Tensor) -> Prompted:
    """A coarse, noisy mask of an object, or of several together."""
    chosen = F.one_hot(random_objects(batch, masks), masks.shape[1]).bool()
    more = (torch.rand(len(masks), 1) < UNIONS) & (torch.rand(chosen.shape) < 0.5)
    targets = (masks & (chosen | more)[..., None, None]).any(1)
    return Prompted(targets, mask=coarse_logits(targets))


def coarse_logits(targets: torch.Tensor) -> torch.Tensor:
    """Mask prompts such as a similarity map gives: masks on the token grid as noisy logits, `(B, 1, F/4, F/4)`."""
    coverage = grid_coverage(targets, LMM_SIZE // LMM_PATCH)
    gain, deviation = torch.empty(2, len(targets), 1, 1)
    logits = gain.uniform_(2.0, 8.0) * (2 * coverage - 1)
    logits = logits + deviation.uniform_(0.2, 1.5) * torch.randn_like(coverage)
    return F.interpolate(logits[:, None], size=(FRAME // 4, FRAME // 4), mode="bilinear", align_corners=False)


def decode(sam: SamModel, images: torch.Tensor, prompted: Prompted) -> tuple[torch.Tensor, torch.Tensor]:
    """Mask logits `(B, m, F/4, F/4)` and estimates of their IoU `(B, m)`, m being 1 or 3."""
    sparse, dense = sam.prompt_encoder(prompted.points, prompted.labels, prompted.boxes, prompted.mask)
    if dense.shape[0] != len(images):
        dense = dense.expand(len(images), -1, -1, -1)
    if prompted.embedding is not None:
        sparse = prompted.embedding if sparse is None else torch.cat([sparse, prompted.embedding], 2)
    masks, iou = sam.mask_decoder(
        image_embeddings=images,
        image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand(len(images), -1, -1, -1),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=prompted.several,
    )[:2]
    return masks[:, 0], iou[:, 0]


def mask_loss(logits: torch.Tensor, iou_scores: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Loss of the best mask of each prompt, with the error of all IoU estimates; and the mean IoU of the best."""
    logits = F.interpolate(logits, size=(TARGET_SIDE, TARGET_SIDE), mode="bilinear", align_corners=False)
    targets = grid_coverage(targets, TARGET_SIDE)[:, None].expand_as(logits)
    probabilities = logits.sigmoid()
    dice = 1 - (2 * (probabilities * targets).sum((2, 3)) + 1) / ((probabilities + targets).sum((2, 3)) + 1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean((2, 3))
    found, wanted = logits > 0, targets > 0.5
    iou = (found & wanted).sum((2, 3)) / (found | wanted).sum((2, 3)).clamp_min(1)
    best = (5 * cross_entropy + dice).min(1).values.mean()
    return best + F.mse_loss(iou_scores, iou), iou.max(1).values.mean().item()
