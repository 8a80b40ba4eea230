"""The grounding terms of a training step: model outputs and target masks in, named loss terms and statistics out.

Formulas lie in `training.objectives.losses`; this file brings outputs and targets to the same pixels and adds up over
groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from uground.modeling_uground import UGroundConfig, UGroundOutput
from uground.modeling_uground.image_frames import (
    ImageFrame,
    ImageFrames,
    apply_matrices,
    grid_to_grid,
    grid_to_image,
    resize_rows,
)
from uground.training.objectives.losses import (
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

GROUNDING_TERMS = ("mask_bce", "mask_dice", "map_bce", "map_dice", "iou", "presence", "entropy")


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
        terms: scalars by the names of [`GROUNDING_TERMS`], sums over segments divided by `num_masks`; 0 for those
            whose part the model has not.
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
        geometry: what ties token grid, frames and images together.
        other_maps (`(k - 1, N, h, w)`): similarity maps of further draws, which are rewarded too.
    """
    count = sum(len(group["segments"]) for group in groups)
    draws = 1 if other_maps is None else 1 + len(other_maps)
    terms = dict.fromkeys(GROUNDING_TERMS, outputs.similarity_map.new_zeros(()))
    rewards = outputs.similarity_map.new_zeros(draws, count)
    for group in groups:
        segments, masks, valid = group["segments"], group["masks"], group["valid"]
        soft = gaussian_target(masks, map_target.kernel_size, map_target.sigma)
        seen = valid & geometry.seen(group)
        weight = positive_weight(soft, group["images"], map_target.pos_weight_cap, seen)
        maps = geometry.align_maps(outputs.similarity_map[segments], group)
        per_mask = {
            "map_bce": map_bce_loss(maps, soft, weight, None, seen),
            "map_dice": map_dice_loss(maps, soft, weight, None, seen),
        }
        if outputs.mask_logits is not None:
            logits = geometry.align_logits(outputs.mask_logits[segments], group)
            per_mask["mask_bce"] = mask_bce_loss(logits, masks, None, valid)
            per_mask["mask_dice"] = mask_dice_loss(logits, masks, None, valid)
            per_mask["iou"] = _iou_error(outputs.iou_scores[segments], logits, masks, valid)
        if outputs.presence_logits is not None:
            per_mask["presence"] = presence_loss(outputs.presence_logits[segments], masks, valid)
        if outputs.layer_logits is not None:
            per_mask["entropy"] = entropy_bonus(outputs.layer_logits[segments], None)
        terms |= {name: terms[name] + values.sum() / num_masks for name, values in per_mask.items()}
        rewards[0, segments] = policy_reward(per_mask["map_bce"], per_mask["map_dice"])
        for draw in range(1, draws):
            maps = geometry.align_maps(other_maps[draw - 1, segments], group)
            rewards[draw, segments] = policy_reward(
                map_bce_loss(maps, soft, weight, None, seen), map_dice_loss(maps, soft, weight, None, seen)
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
    if weights.presence:
        parts.append(outputs.presence_logits)
    if weights.policy or weights.entropy:
        parts.append(outputs.layer_logits)
    return sum(0.0 * part.sum() for part in parts if part is not None)


def _iou_error(iou_scores, logits, masks, valid) -> torch.Tensor:
    """Squared error of SAM's IoU estimates against the IoU of the masks they go with, `(n,)`."""
    found, wanted = (logits > 0) & valid, (masks > 0.5) & valid
    union = (found | wanted).sum((1, 2))
    iou = (found & wanted).sum((1, 2)) / union.clamp_min(1)
    return (iou_scores - iou.detach()) ** 2


def presence_loss(logits: torch.Tensor, masks: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """
    Binary cross-entropy of presence: a thing is there if its mask is not empty.

    Args:
        logits (`(n,)`): that the thing is there.
        masks, valid (`(n, H, W)`): targets in 0..1, and pixels that count. Of a thing of which none counts it is not
            known whether it is there.

    Returns:
        `(n,)` float32; 0 where it is not known.
    """
    there = ((masks > 0.5) & valid).flatten(1).any(1)
    known = there | valid.flatten(1).any(1)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), there.float(), reduction="none")
    return losses * known


@dataclass(frozen=True)
class Geometry:
    """
    What ties the token grid, the two frames and the images together.

    Attributes:
        lmm_frame: what the LMM sees of an image, in pixels; similarity maps cover it.
        head_frame: the same of the mask head, whose logits cover it; `None` for a model without one.
        image_sizes: height and width of each image.
    """

    lmm_frame: ImageFrame | ImageFrames
    head_frame: ImageFrame | None
    image_sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, config: UGroundConfig, inputs: Mapping[str, torch.Tensor]) -> "Geometry":
        """For a model of this configuration, and images as the processor returned them."""
        adapter, sizes = config.adapter, inputs["original_sizes"].tolist()
        layout = adapter.layout(inputs["valid_sizes"], inputs)
        return cls(adapter.frames_of(layout.grid_sizes), config.head_frame, tuple(map(tuple, sizes)))

    def align_logits(self, logits: torch.Tensor, group: dict) -> torch.Tensor:
        """Mask logits `(n, S/4, S/4)` of a group's segments in the pixels of its targets, `(n, H, W)`."""
        return self._align(logits, group, self.head_frame)

    def align_maps(self, maps: torch.Tensor, group: dict) -> torch.Tensor:
        """Similarity maps `(n, h, w)` of a group's segments in the pixels of its targets, `(n, H, W)`."""
        frame = self.lmm_frame
        if isinstance(frame, ImageFrame):
            return self._align(maps, group, frame)
        aligned = []
        for number, image in enumerate(group["images"].tolist()):
            one = slice(number, number + 1)
            alone = {**group, "masks": group["masks"][one], "images": group["images"][one]}
            aligned.append(self._align(frame.own_grid(maps[one], image), alone, frame.of_image(image)))
        return torch.cat(aligned)

    def seen(self, group: dict) -> torch.Tensor:
        """Pixels of a group's targets that the LMM's frame shows, `(n, H, W)` bool; of the others no map tells."""
        # Frames of their own show all of their images.
        rows, columns = self._matrices((1, 1), group, self.lmm_frame.of_image(int(group["images"][0])))
        return ((rows @ columns.mT) > 0.5).expand(group["masks"].shape).to(group["masks"].device)

    def _align(self, values: torch.Tensor, group: dict, frame: ImageFrame) -> torch.Tensor:
        matrices = self._matrices(tuple(values.shape[1:]), group, frame)
        return apply_matrices(values, *(matrix.to(values.device) for matrix in matrices))

    def _matrices(self, grid_hw: tuple[int, int], group: dict, frame: ImageFrame) -> list[torch.Tensor]:
        """From a grid over a frame to image pixels, or to the letterbox that all targets of the group lie in."""
        target_hw = tuple(group["masks"].shape[1:])
        if not group["in_frame"]:
            # The images of a group are of one size.
            return list(grid_to_image(grid_hw, frame, target_hw))
        if frame.kind == "letterbox":
            # One letterbox lies over another as a whole, padding on padding.
            return [resize_rows(torch.eye(cells), side) for cells, side in zip(grid_hw, target_hw, strict=True)]
        target = ImageFrame("letterbox", target_hw[0])
        sizes = [self.image_sizes[image] for image in group["images"].tolist()]
        pairs = [grid_to_grid(grid_hw, frame, image_hw, target) for image_hw in sizes]
        return [torch.stack(axis) for axis in zip(*pairs, strict=True)]
