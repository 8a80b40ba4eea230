"""Whether an answer means "not there": the model says so, or every map it made is weak."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def valid_maps(outputs: Mapping[str, Any], patch_size: int) -> list[list[np.ndarray]]:
    """
    Similarity maps without the image tokens that see padding only.

    Args:
        outputs: of `model.segment` or `model.read_masks`, for B rows.
        patch_size: pixels of an image token.

    Returns:
        Of each of the B rows, the maps `(h, w)` of its segments, in order.
    """
    maps = [[] for _ in range(len(outputs["sequences"]))]
    for row, similarity_map in zip(outputs["segment_row"].tolist(), outputs["similarity_map"], strict=True):
        valid = outputs["valid_sizes"][outputs["image_index"][row]]
        rows, columns = (-(-side // patch_size) for side in valid.tolist())
        maps[row].append(similarity_map[:rows, :columns].float().cpu().numpy())
    return maps


def map_peak(similarity_map: np.ndarray) -> float:
    """
    How sure a similarity map is of its surest image token.

    Args:
        similarity_map (`(h, w)`): logits, of a model with `similarity_scaling="scaled"`.

    Returns:
        The largest value as a probability, in 0..1.
    """
    return 1.0 / (1.0 + math.exp(-float(np.clip(similarity_map.max(), -50.0, 50.0))))


def is_rejected(
    answer: str, peaks: Sequence[float], reject_token: str = "[REJ]", threshold: float | None = 0.0
) -> bool:
    """
    The rejection rule.

    Args:
        answer: what was written, special tokens included.
        peaks: of the similarity maps of its segments, see [`map_peak`].
        reject_token: the token that says "not there".
        threshold: a map with a lower peak is weak, `reject_threshold` of the checkpoint's config; 0 leaves the token
            alone to decide.

    Returns:
        `True` if the answer holds the reject token and no segment, or segments whose maps are all weak. An answer in
        words alone rejects nothing. An answer that rejects one thing and finds another is not rejected.
    """
    return max(peaks) < threshold if len(peaks) else reject_token in answer


__all__ = ["is_rejected", "map_peak", "valid_maps"]
