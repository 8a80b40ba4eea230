"""Masks as text: the run-length encoding of COCO, compressed as pycocotools writes and reads it.

A checkpoint's own code may not lean on pycocotools, which is why the few lines are here.
"""

from collections.abc import Mapping

import numpy as np
from PIL import Image

# A character holds 5 bits of a number; the sixth says that more follow; 48 makes it a printable character.
BITS, LOW_BITS, SIGN_BIT, MORE, FIRST_CHARACTER = 5, 0x1F, 0x10, 0x20, 48
# Of a number: 7 times 5 bits hold every length of a run that fits into 32 bits, and its sign.
MOST_CHARACTERS = 7


def encode_mask(mask: Image.Image | np.ndarray) -> dict:
    """
    The COCO run-length encoding of a mask.

    Args:
        mask (`(H, W)`): array or picture; what is not 0 is mask.

    Returns:
        `{"size": [H, W], "counts": str}`, as `pycocotools.mask.encode` gives it, its `counts` decoded to a `str`.

    Raises:
        ValueError: the mask does not have two axes.
    """
    pixels = np.asarray(mask)
    if pixels.ndim != 2:
        raise ValueError(f"a mask must have the shape (H, W), got {pixels.shape}")
    # Column by column, beginning with a run of zeros, which may be empty.
    flat = np.concatenate([[False], (pixels != 0).ravel(order="F")])
    changes = np.flatnonzero(flat[1:] != flat[:-1])
    counts = np.diff(np.concatenate([[0], changes, [pixels.size]]))
    # From the fourth on, how much longer a run is than the last but one.
    values = counts.copy()
    values[3:] -= counts[1:-2]
    characters = np.zeros((len(values), MOST_CHARACTERS), dtype=np.uint8)
    going = np.ones(len(values), dtype=bool)
    for place in range(MOST_CHARACTERS):
        low = values & LOW_BITS
        values = values >> BITS
        more = np.where(low & SIGN_BIT, values != -1, values != 0)
        characters[going, place] = (low + MORE * more + FIRST_CHARACTER)[going]
        going &= more
        if not going.any():
            break
    text = characters[characters > 0].tobytes().decode("ascii")
    return {"size": [int(side) for side in pixels.shape], "counts": text}


def decode_mask(encoded: Mapping) -> np.ndarray:
    """
    The mask of a COCO run-length encoding.

    Args:
        encoded: `{"size": [H, W], "counts": …}`, with compressed counts, `str` or `bytes`, or a list of numbers.

    Returns:
        `(H, W)` bool.

    Raises:
        ValueError: it is none, or its runs do not fill the mask.
    """
    is_encoding = isinstance(encoded, Mapping) and {"size", "counts"} <= set(encoded)
    size = list(encoded["size"]) if is_encoding else []
    if len(size) != 2 or not all(isinstance(side, int) and side >= 0 for side in size):
        raise ValueError(f'a mask must be {{"size": [H, W], "counts": …}}, got {encoded!r:.100}')
    counts = encoded["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _read_counts(counts.encode("utf-8") if isinstance(counts, str) else counts)
    try:
        runs = np.asarray(counts, dtype=np.int64).reshape(-1)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"the counts of a mask must be numbers, got {counts!r:.100}") from error
    if (runs < 0).any() or runs.sum() != size[0] * size[1]:
        raise ValueError(
            f"the runs of a mask must fill its {size[0]} x {size[1]} pixels, got {int(runs.sum())} of them"
        )
    values = np.arange(len(runs)) % 2 == 1
    return np.repeat(values, runs).reshape(size, order="F")


def _read_counts(text: bytes) -> np.ndarray:
    """Lengths of the runs of compressed counts."""
    codes = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - FIRST_CHARACTER
    more = (codes & MORE) > 0
    if not len(codes):
        return codes
    if (codes < 0).any() or (codes >= 2 * MORE).any() or more[-1]:
        raise ValueError(f"the counts of a mask must be those of a COCO encoding, got {text[:100]!r}")
    ends = np.flatnonzero(~more)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MOST_CHARACTERS:
        raise ValueError(f"the counts of a mask must fit into 32 bits, got {text[:100]!r}")
    place = np.arange(len(codes)) - np.repeat(starts, lengths)
    values = np.add.reduceat((codes & LOW_BITS) << (BITS * place), starts)
    values -= np.where(codes[ends] & SIGN_BIT, np.int64(1) << (BITS * lengths), 0)
    for first in (1, 2):
        values[first::2] = np.cumsum(values[first::2])
    return values


__all__ = ["decode_mask", "encode_mask"]
