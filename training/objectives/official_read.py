"""The losses of the official READ training (and of SESAME and LISA, with other weights), as one preset.

Purpose: to compute on a converted checkpoint what the official code computes on the original, losses and gradients
alike, and to be able to train that way. There is text and there are masks, compared at image size; maps and layers
have no losses of their own.
"""

from dataclasses import dataclass

import torch

from uground.modeling_uground import UGroundOutput
from uground.processing import post_process_masks
from uground.training.objectives.losses import mask_bce_loss, mask_dice_loss

BCE_WEIGHT, DICE_WEIGHT = 2.0, 0.5


@dataclass
class ReadLosses:
    """
    Losses by the names of the official code; scalars, float32.

    Attributes:
        loss: what is minimised, ce_loss + mask_loss.
        ce_loss: text cross-entropy.
        mask_bce_loss, mask_dice_loss: weights included, divided by the number of masks.
        mask_loss: their sum.
    """

    loss: torch.Tensor
    ce_loss: torch.Tensor
    mask_bce_loss: torch.Tensor
    mask_dice_loss: torch.Tensor
    mask_loss: torch.Tensor


def read_losses(
    outputs: UGroundOutput,
    masks: list[torch.Tensor],
    segment_image: torch.Tensor,
    sam_valid_sizes: torch.Tensor,
    original_sizes: torch.Tensor,
    bce_weight: float = BCE_WEIGHT,
    dice_weight: float = DICE_WEIGHT,
) -> ReadLosses:
    """
    The losses of one micro-batch.

    Args:
        outputs: of the model, called with labels.
        masks: of each of I images, the targets `(n, H, W)` of its segments in their order.
        segment_image (`(N,)`): image of each segment.
        sam_valid_sizes, original_sizes (`(I, 2)`): as the processor returns them.
        bce_weight, dice_weight: of READ by default.

    Returns:
        The losses; without any segment all but `ce_loss` are 0.

    Raises:
        ValueError: an image has another number of targets than of segments.
    """
    count = max(len(segment_image), 1)
    # Of no segment too, so that what is backpropagated reaches the masks.
    bce = dice = outputs.mask_logits.sum() * 0.0
    chosen = [(segment_image == image).nonzero().squeeze(-1) for image in range(len(masks))]
    logits = post_process_masks([outputs.mask_logits[n] for n in chosen], sam_valid_sizes, original_sizes)
    for image, (found, wanted) in enumerate(zip(logits, masks, strict=True)):
        if len(found) != len(wanted):
            raise ValueError(
                f"image {image + 1} has {len(found)} segments, so it needs as many masks, got {len(wanted)}"
            )
        if len(found):
            target = wanted.to(found)
            bce = bce + mask_bce_loss(found, target, num_masks=count)
            dice = dice + mask_dice_loss(found, target, num_masks=count)
    bce, dice = bce_weight * bce, dice_weight * dice
    return ReadLosses(
        loss=outputs.loss + bce + dice,
        ce_loss=outputs.loss,
        mask_bce_loss=bce,
        mask_dice_loss=dice,
        mask_loss=bce + dice,
    )
