"""Whether an answer means "not there": the model says so, or everything that it found is weak."""

import math
from collections.abc import Sequence

import numpy as np

# The peak below which a similarity map counts as weak: `benchmarks/rejection.py` chooses it on validation scenes so
# that it costs at most 2 % of the answerable queries, and docs/speed.md has what it brings on test scenes. It belongs
# to the bundled checkpoint; measure it anew for another model.
REJECT_THRESHOLD = 0.985
# The presence below which a SAM 2 takes a thing for absent: its own rule, that the logit is above 0.
PRESENCE_THRESHOLD = 0.5


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
    threshold: float = REJECT_THRESHOLD,
    presences: Sequence[float] = (),
    presence_threshold: float = PRESENCE_THRESHOLD,
) -> bool:
    """
    The rejection rule.

    Args:
        answer: what was written, special tokens included.
        peaks: of the similarity maps of its segments, see [`map_peak`].
        reject_token: the token that says "not there".
        threshold: a segment whose map has a lower peak is weak; 0 leaves that out.
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


__all__ = ["PRESENCE_THRESHOLD", "REJECT_THRESHOLD", "is_rejected", "map_peak"]
