"""The grounding terms of a training step: model outputs and target masks in, named loss terms and statistics out.

Formulas lie in `training.losses`; this file brings outputs and targets to the same pixels and adds up over groups.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from uground.modeling_uground import UGroundOutput
from uground.modeling_uground.prompts import map_to_image
from uground.training.losses import (
    LossWeights,
    entropy_bonus,
    gaussian_target,
    map_bce_loss,
    map_dice_loss,
    mask_bce_loss,
    mask_dice_loss,
    policy_reward,
    positive_weight,
)

GROUNDING_TERMS = ("mask_bce", "mask_dice", "map_bce", "map_dice", "iou", "entropy")


@dataclass(frozen=True)
class MapTarget:
    """
    How a mask becomes the target of a similarity map.

    Attributes:
        kernel_size, sigma: of the Gaussian, in pixels of the frame in which losses are computed.
        pos_weight_cap: upper bound of the weight of positive pixels; `None` as in the official code.
    """

    kernel_size: int = 31
    sigma: float = 7.0
    pos_weight_cap: float | None = None


@dataclass
class GroundingTerms:
    """
    Terms of one micro-batch with N segments.

    Attributes:
        terms: scalars by the names of [`GROUNDING_TERMS`], sums over segments divided by `num_masks`.
        rewards (`(N,)`): of the chosen layers, detached.
        other_rewards (`(k - 1, N)`): of the layers of further draws, detached.
    """

    terms: dict[str, torch.Tensor]
    rewards: torch.Tensor
    other_rewards: torch.Tensor


def grounding_terms(
    outputs: UGroundOutput,
    groups: list[dict],
    num_masks: torch.Tensor | float,
    map_target: MapTarget,
    geometry: "Geometry",
    other_maps: torch.Tensor | None = None,
) -> GroundingTerms:
    """
    Mask, map, IoU and entropy terms, and the reward of each segment.

    Args:
        outputs: of the model, with N segments in reading order; or with one that no group names, where N = 0.
        groups: `target_groups` of the collator.
        num_masks: what sums over segments are divided by: the number of masks of the whole step.
        map_target: how masks are softened.
        geometry: sizes that tie token grid, frames and images together.
        other_maps (`(k - 1, N, h, w)`): similarity maps of further draws, which are rewarded too.
    """
    count = sum(len(group["segments"]) for group in groups)
    draws = 1 if other_maps is None else 1 + len(other_maps)
    terms = dict.fromkeys(GROUNDING_TERMS, outputs.similarity_map.new_zeros(()))
    rewards = outputs.similarity_map.new_zeros(draws, count)
    for group in groups:
        segments, masks, valid = group["segments"], group["masks"], group["valid"]
        logits = geometry.align_logits(outputs.mask_logits[segments], group)
        soft = gaussian_target(masks, map_target.kernel_size, map_target.sigma)
        weight = positive_weight(soft, group["images"], map_target.pos_weight_cap, valid)
        maps = geometry.align_maps(outputs.similarity_map[segments], group)
        per_mask = {
            "mask_bce": mask_bce_loss(logits, masks, None, valid),
            "mask_dice": mask_dice_loss(logits, masks, None, valid),
            "iou": _iou_error(outputs.iou_scores[segments], logits, masks, valid),
            "map_bce": map_bce_loss(maps, soft, weight, None, valid),
            "map_dice": map_dice_loss(maps, soft, weight, None, valid),
            "entropy": entropy_bonus(outputs.layer_logits[segments], None),
        }
        terms = {name: total + per_mask[name].sum() / num_masks for name, total in terms.items()}
        rewards[0, segments] = policy_reward(per_mask["map_bce"], per_mask["map_dice"])
        for draw in range(1, draws):
            maps = geometry.align_maps(other_maps[draw - 1, segments], group)
            rewards[draw, segments] = policy_reward(
                map_bce_loss(maps, soft, weight, None, valid), map_dice_loss(maps, soft, weight, None, valid)
            )
    return GroundingTerms(terms, rewards[0], rewards[1:])


def connected_zero(outputs: UGroundOutput, weights: LossWeights) -> torch.Tensor:
    """
    Zero that depends on every output of the model which some weight asks for.

    Added to the loss it gives every trained parameter a gradient in every batch, which distributed training waits for.
    """
    parts = [outputs.similarity_map]
    if weights.mask_bce or weights.mask_dice:
        parts.append(outputs.mask_logits)
    if weights.iou:
        parts.append(outputs.iou_scores)
    if weights.policy or weights.entropy:
        parts.append(outputs.layer_logits)
    return sum(0.0 * part.sum() for part in parts)


def _iou_error(iou_scores, logits, masks, valid) -> torch.Tensor:
    """Squared error of SAM's IoU estimates against the IoU of the masks they go with, `(n,)`."""
    found, wanted = (logits > 0) & valid, (masks > 0.5) & valid
    union = (found | wanted).sum((1, 2))
    iou = (found & wanted).sum((1, 2)) / union.clamp_min(1)
    return (iou_scores - iou.detach()) ** 2


@dataclass(frozen=True)
class Geometry:
    """
    Sizes that tie the token grid, the two frames and the images together.

    Attributes:
        lmm_size, frame_size: sides of the LMM image and of the SAM frame, in pixels.
        valid_sizes, sam_valid_sizes: `(I, 2)`, rows and columns of them that are image.
    """

    lmm_size: int
    frame_size: int
    valid_sizes: torch.Tensor
    sam_valid_sizes: torch.Tensor

    def align_logits(self, logits: torch.Tensor, group: dict) -> torch.Tensor:
        """Mask logits `(n, S/4, S/4)` of a group's segments in the pixels of its targets, `(n, H, W)`."""
        size = tuple(group["masks"].shape[1:])
        if group["in_frame"]:
            return _resize(logits, size)
        logits, aligned = _resize(logits, (self.frame_size, self.frame_size)), []
        for index, image in enumerate(group["images"].tolist()):
            rows, columns = self.sam_valid_sizes[image].tolist()
            aligned.append(_resize(logits[index : index + 1, :rows, :columns], size))
        return torch.cat(aligned)

    def align_maps(self, maps: torch.Tensor, group: dict) -> torch.Tensor:
        """Similarity maps `(n, h, w)` of a group's segments in the pixels of its targets, `(n, H, W)`."""
        size = tuple(group["masks"].shape[1:])
        if group["in_frame"]:
            return _resize(maps, size)
        aligned = []
        for index, image in enumerate(group["images"].tolist()):
            valid_hw = tuple(self.valid_sizes[image].tolist())
            aligned.append(map_to_image(maps[index : index + 1], valid_hw, self.lmm_size, size))
        return torch.cat(aligned)


def _resize(values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(values[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
