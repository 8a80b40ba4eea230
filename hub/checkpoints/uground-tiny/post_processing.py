"""From what the model returns to what a user wants: masks in image pixels, scores, boxes, labels."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.nn import functional as F
from transformers import ProcessorMixin

from .answer_labels import decode_answer, label_segments, recover_query
from .argument_checks import check_number

# Where a call does not say the side of the SAM frame, mask logits live at 1/4 of it.
FRAME_SCALE = 4
# Masks whose logits are at image size at a time: of 12 megapixels each takes 48 MB there.
MASKS_AT_ONCE = 8
# Matrices kept: at 4,000 pixels and 256 cells one takes 4 MB.
REMEMBERED = 64
# Fields of the outputs that are read: of the batch, and of its N segments.
BATCH_FIELDS = ("sequences", "prompt_length", "image_index", "sam_valid_sizes", "original_sizes")
SEGMENT_FIELDS = ("segment_row", "layer_index", "mask_logits", "iou_scores", "token_scores")
# Of heads that have it.
PRESENCE = "presence_logits"


def post_process_masks(
    mask_logits: torch.Tensor | list[torch.Tensor],
    sam_valid_sizes: torch.Tensor | list[tuple[int, int]],
    original_sizes: torch.Tensor | list[tuple[int, int]],
    frame_side: int | None = None,
) -> list[torch.Tensor]:
    """
    Bring low-resolution mask logits to the size of their images, as SAM does: bilinear to the SAM frame, crop the
    padding away, bilinear to the image. Both steps are linear along each axis, and done as one matrix per axis.

    Args:
        mask_logits: I entries, one per image, of shape `(h, w)` or `(n, h, w)`, that cover the SAM frame. A list of
            tensors, or one tensor whose first axis is I.
        sam_valid_sizes (`(I, 2)`): rows, columns of each SAM frame that are image.
        original_sizes (`(I, 2)`): height, width of each image.
        frame_side: of the SAM frame in pixels; by default four times that of the logits, as it is with SAM and SAM 2.

    Returns:
        I float32 tensors `(H, W)` or `(n, H, W)`; a pixel is mask where the logit is above 0.

    Raises:
        ValueError: the three do not have the same length.
    """
    lengths = (len(mask_logits), len(sam_valid_sizes), len(original_sizes))
    if len(set(lengths)) != 1:
        raise ValueError(
            f"mask_logits, sam_valid_sizes and original_sizes must have one entry per image, got {lengths} entries"
        )
    results = []
    for logits, valid, original in zip(mask_logits, sam_valid_sizes, original_sizes, strict=True):
        stacked = logits.reshape(-1, *logits.shape[-2:])
        sizes = (_pair(valid), _pair(original), frame_side)
        parts = [_to_image_size(part, *sizes) for part in stacked.split(MASKS_AT_ONCE)]
        full = torch.cat(parts) if len(parts) > 1 else parts[0]
        results.append(full.reshape(*logits.shape[:-2], *full.shape[-2:]))
    return results


def segment_scores(
    mask_logits: torch.Tensor,
    iou_scores: torch.Tensor,
    token_scores: torch.Tensor,
    mask_threshold: float = 0.0,
    presence: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    One score per segment: how sure the model is that the thing is there and that the mask fits it.

    score = sqrt(t * p) * sqrt(u * c), with t the probability with which the segment token was written, p that with
    which a SAM 2 takes the thing for there, u SAM's estimate of the IoU, clamped to 0..1, and c the mean mask
    probability inside of the mask. Token and presence answer whether there is anything, and u and c are two opinions
    on the same fit, hence their geometric means. Without p the first root is t.

    Args:
        mask_logits (`(N, h, w)`): mask logits; minus infinity where there is no image.
        iou_scores, token_scores (`(N,)`): see above.
        mask_threshold: logit above which a pixel is mask.
        presence (`(N,)`, *optional*): p, in 0..1.

    Returns:
        `(N,)` float32 in 0..1; 0 for an empty mask.
    """
    logits = mask_logits.float()
    inside = (logits > mask_threshold).flatten(1)
    area = inside.sum(1)
    confidence = (logits.sigmoid().flatten(1) * inside).sum(1) / area.clamp(min=1)
    fit = (iou_scores.float().clamp(0, 1) * confidence).sqrt()
    there = token_scores.float().clamp(0, 1)
    if presence is not None:
        there = (there * presence.float()).sqrt()
    return torch.where(area > 0, there * fit, 0.0)


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """
    The tightest boxes around boolean masks.

    Args:
        masks (`(n, H, W)`, bool).

    Returns:
        `(n, 4)` float32 x0, y0, x1, y1 in pixels, where x1 and y1 lie just outside, so that x1 - x0 is the width;
        zeros for an empty mask.
    """
    boxes = []
    for axis in (1, 2):
        seen = masks.any(axis)
        length = seen.shape[1]
        first = seen.int().argmax(1)
        end = length - seen.flip(1).int().argmax(1)
        boxes.append((first, end))
    (x0, x1), (y0, y1) = boxes
    stacked = torch.stack([x0, y0, x1, y1], dim=1) * masks.flatten(1).any(1)[:, None]
    return stacked.float()


def post_process_segments(
    processor: ProcessorMixin,
    outputs: Mapping[str, Any],
    threshold: float = 0.0,
    mask_threshold: float = 0.0,
    target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
    queries: list[str] | None = None,
) -> list[dict]:
    """
    Answers and segments, query by query.

    Args:
        processor: the [`UGroundProcessor`] that made the inputs.
        outputs: what `model.segment` returned, or a mapping with its fields.
        threshold: segments with a lower score, in 0..1, are left out; 0 keeps all, empty masks included.
        mask_threshold: logit above which a pixel is mask; 0 is a probability of one half.
        target_sizes: height and width of the masks to return, I or B pairs, instead of the sizes of the images.
        queries: the B queries, for the labels of segments that the answer does not name; where `None`, they are
            read off the prompts.

    Returns:
        B dictionaries with

        - **answer** (`str`): what was written, segment tokens included.
        - **masks** (`(n, H, W)`, bool).
        - **scores** (`(n,)`, float32 in 0..1): see [`segment_scores`].
        - **boxes** (`(n, 4)`, float32): x0, y0, x1, y1 in pixels, see [`masks_to_boxes`].
        - **labels** (`list[str]`): the phrase of the answer that a segment belongs to, or the query.
        - **layers** (`(n,)`, int64): the layer each segment was read at.
        - **presences** (`(n,)`, float32 in 0..1, with a SAM 2): how sure it is that the thing is there.
        - **finished** (`bool`, where the outputs say it): whether the answer came to its end; one that was cut may
          lack segments.

    Raises:
        ValueError: `outputs` lacks fields or holds NaN, a threshold is none, or the numbers of sizes or queries do not
            fit.
    """
    check_thresholds(threshold, mask_threshold)
    fields = _read_outputs(outputs)
    sequences, prompt_length = fields["sequences"].tolist(), int(fields["prompt_length"])
    image_index = fields["image_index"].tolist()
    finished = _read(outputs, "finished")
    sizes = _sizes_per_query(fields["original_sizes"], target_sizes, image_index)
    if queries is not None and len(queries) != len(sequences):
        raise ValueError(f"queries must hold one query per row: expected {len(sequences)}, got {len(queries)}")
    results = []
    for row, ids in enumerate(sequences):
        answer = decode_answer(processor, ids[prompt_length:])
        query = queries[row] if queries is not None else None
        query = recover_query(processor, ids[:prompt_length]) if query is None else query.strip()
        chosen = fields["segment_row"] == row
        valid = _pair(fields["sam_valid_sizes"][image_index[row]])
        segments = _finish_segments(
            {name: fields[name][chosen] for name in (*SEGMENT_FIELDS, PRESENCE) if name in fields},
            valid,
            sizes[row],
            mask_threshold,
            getattr(processor, "sam_frame_side", None),
        )
        labels = label_segments(answer, query, processor.segment_token, processor.reject_token)
        if len(labels) != len(segments["scores"]):
            labels = [query] * len(segments["scores"])
        kept = segments["scores"] >= threshold
        results.append(
            {
                "answer": answer,
                **{name: values[kept] for name, values in segments.items()},
                "labels": [label for label, keep in zip(labels, kept.tolist(), strict=True) if keep],
                **({} if finished is None else {"finished": bool(finished[row])}),
            }
        )
    return results


def check_thresholds(threshold: float, mask_threshold: float) -> None:
    """Raise a `ValueError` unless these are a score, in 0..1, and a logit."""
    check_number("threshold", threshold, 0, 1)
    check_number("mask_threshold", mask_threshold)


def _read(outputs, name: str):
    return outputs.get(name) if hasattr(outputs, "get") else getattr(outputs, name, None)


def _read_outputs(outputs) -> dict:
    """The fields in use, checked, the segments' on one device."""
    fields = {}
    for name in (*BATCH_FIELDS, *SEGMENT_FIELDS):
        value = _read(outputs, name)
        if value is None:
            raise ValueError(
                f"outputs must be what model.segment(...) returned, got {type(outputs).__name__} without {name}"
            )
        fields[name] = value
    if (presence := _read(outputs, PRESENCE)) is not None:
        fields[PRESENCE] = presence
    of_segments = [name for name in (*SEGMENT_FIELDS, PRESENCE) if name in fields]
    for name in of_segments:
        fields[name] = fields[name].to(fields["mask_logits"].device)
    for name in of_segments[2:]:
        if torch.isnan(fields[name]).any():
            raise ValueError(f"the model produced NaN in {name}: its weights are broken, or its dtype is too narrow")
    return fields


def _finish_segments(
    fields: dict, valid_hw, image_hw, mask_threshold: float, frame_side: int | None
) -> dict[str, torch.Tensor]:
    """Masks, scores, boxes, layers and presence of the segments of one query."""
    logits = fields["mask_logits"]
    sizes = (valid_hw, image_hw, frame_side)
    masks = torch.cat([_to_image_size(part, *sizes) > mask_threshold for part in logits.split(MASKS_AT_ONCE)])
    # What SAM draws into the padding is cut away from the masks, so it must not count in their scores either.
    frame = _frame_hw(logits, frame_side)
    cells = zip(valid_hw, logits.shape[-2:], frame, strict=True)
    rows, columns = (-(-valid * count // side) for valid, count, side in cells)
    padded = torch.full_like(logits, -torch.inf)
    padded[:, :rows, :columns] = logits[:, :rows, :columns]
    presence = fields[PRESENCE].float().sigmoid() if PRESENCE in fields else None
    scores = segment_scores(padded, fields["iou_scores"], fields["token_scores"], mask_threshold, presence)
    return {
        "masks": masks,
        "scores": scores * masks.flatten(1).any(1),
        "boxes": masks_to_boxes(masks),
        "layers": fields["layer_index"],
        **({} if presence is None else {"presences": presence}),
    }


def _frame_hw(logits: torch.Tensor, frame_side: int | None) -> tuple[int, int]:
    """Rows and columns of the SAM frame that logits `(n, h, w)` cover."""
    if frame_side is not None:
        return frame_side, frame_side
    return logits.shape[-2] * FRAME_SCALE, logits.shape[-1] * FRAME_SCALE


def _to_image_size(
    logits: torch.Tensor, valid_hw: tuple[int, int], image_hw: tuple[int, int], frame_side: int | None
) -> torch.Tensor:
    """`(n, h, w)` logits that cover the SAM frame to `(n, H, W)` float32."""
    frame = _frame_hw(logits, frame_side)
    if not (0 < valid_hw[0] <= frame[0] and 0 < valid_hw[1] <= frame[1]):
        raise ValueError(f"sam_valid_sizes must lie within the SAM frame of {frame}, got {valid_hw}")
    axes = zip(logits.shape[-2:], frame, valid_hw, image_hw, strict=True)
    rows, columns = (_axis_matrix(*lengths).to(logits.device) for lengths in axes)
    with torch.autocast(logits.device.type, enabled=False):
        return rows @ logits.float() @ columns.mT


@lru_cache(REMEMBERED)
def _axis_matrix(cells: int, side: int, valid: int, length: int) -> torch.Tensor:
    """
    Along one axis, `(length, cells)`: what becomes of each cell, found by resizing the identity. The frames of the
    model, `image_frames.grid_to_image`, give the same matrix from the frame's kind and side.
    """
    identity = torch.eye(cells)[None, None]
    pixels = F.interpolate(identity, (side, cells), mode="bilinear", align_corners=False)
    return F.interpolate(pixels[:, :, :valid], (length, cells), mode="bilinear", align_corners=False)[0, 0]


def _sizes_per_query(original_sizes, target_sizes, image_index: list[int]) -> list[tuple[int, int]]:
    """Height and width of the masks of each query."""
    if target_sizes is None:
        return [_pair(original_sizes[image]) for image in image_index]
    if len(target_sizes) in (len(original_sizes), len(image_index)):
        sizes = [_pair(size) for size in target_sizes]
        if any(side < 1 for size in sizes for side in size):
            raise ValueError(f"target_sizes must be heights and widths of at least 1, got {sizes}")
        return [sizes[image] for image in image_index] if len(sizes) == len(original_sizes) else sizes
    raise ValueError(
        f"target_sizes must hold one size per image ({len(original_sizes)}) or per query ({len(image_index)}), "
        f"got {len(target_sizes)}"
    )


def _pair(size) -> tuple[int, int]:
    height, width = size.tolist() if isinstance(size, torch.Tensor) else size
    return int(height), int(width)


__all__ = ["masks_to_boxes", "post_process_masks", "post_process_segments", "segment_scores"]
