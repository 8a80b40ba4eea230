"""Whether an answer means "not there": the model says so, or everything that it found is weak."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# The presence below which a SAM 2 takes a thing for absent: its own rule, that the logit is above 0.
PRESENCE_THRESHOLD = 0.5


def valid_maps(outputs: Mapping[str, Any], patch_size: int) -> list[list[np.ndarray]]:
    """
    Similarity maps without the image tokens that see padding only.

    Args:
        outputs: of `model.segment` or `model.read_masks`, for B rows.
        patch_size: pixels of an image token.

    Returns:
        Of each of the B rows, the maps `(h, w)` of its segments, in order.
    """
    maps: list[list[np.ndarray]] = [[] for _ in range(len(outputs["sequences"]))]
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
    answer: str,
    peaks: Sequence[float],
    reject_token: str = "[REJ]",
    threshold: float = 0.0,
    presences: Sequence[float] = (),
    presence_threshold: float = PRESENCE_THRESHOLD,
) -> bool:
    """
    The rejection rule.

    Args:
        answer: what was written, special tokens included.
        peaks: of the similarity maps of its segments, see [`map_peak`].
        reject_token: the token that says "not there".
        threshold: a segment whose map has a lower peak is weak, `reject_threshold` of the checkpoint's config; 0
            leaves that out.
        presences: of the same segments, in 0..1, from a mask head that estimates it; or none.
        presence_threshold: a segment of lower presence is weak; 0 leaves that out.

    Returns:
        `True` if the answer holds the reject token and no segment, or segments that are all weak. An answer in
        words alone rejects nothing. An answer that rejects one thing and finds another is not rejected.
    """
    if not len(peaks):
        return reject_token in answer
    presences = presences if len(presences) else [1.0] * len(peaks)
    pairs = zip(peaks, presences, strict=True)
    return all(peak < threshold or presence < presence_threshold for peak, presence in pairs)


__all__ = ["PRESENCE_THRESHOLD", "is_rejected", "map_peak", "valid_maps"]
