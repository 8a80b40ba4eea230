"""
Masks that lie in picture files: which of their pixels are the object.

A file may be black and white, colours of a palette, a label map, a cut-out with an alpha channel, or a lossy copy of
any of these. What has one reading is read; of anything else its line must say which value or channel it means.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from uground.processing.image_reading import opened_picture
from uground.training.data.masks import check_same_size, encode_mask, is_whole, shown

COLOURS = ("red", "green", "blue")
CHANNELS = (*COLOURS, "grey", "alpha")
KEYS = {"png", "value", "channel"}
WITH_ALPHA = ("LA", "PA", "RGBA", "RGBa")
# Formats that may blur the edge between two colours.
LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
# A mask of more of its image is rather one whose background is not black.
MOST_OF_IMAGE = 0.95
# Pixels between black and white, per pixel of the object: more of them are no edge but a third class.
MOST_EDGE = 0.25
# How far off its neighbours a lossy format may put the channel of a colour, as a share of white.
FAR_COLOUR = 0.25
VALUES_SHOWN = 6


@dataclass(frozen=True)
class _Layers:
    """
    What a mask picture holds.

    Attributes:
        mode: Pillow's name for its pixels.
        numbers: `(H, W)` as stored, of a palette the numbers of its colours; None where a pixel has a colour itself.
        seen: `(H, W, C)` what a viewer shows, C = 1 for grey and 3 for colours.
        alpha: `(H, W)` uint8, 0 where nothing is shown; None without transparency.
        white: the number of white.
    """

    mode: str
    numbers: np.ndarray | None
    seen: np.ndarray
    alpha: np.ndarray | None
    white: float


def read_mask_picture(given: str | Mapping, size: tuple[int, int], folder: Path, name: str) -> dict:
    """
    RLE of a mask in a picture file.

    Args:
        given: the path of a picture of black and one colour more, which is the object; or `{"png": path}` with
            `"value"`, the number of the object's pixels as stored, `"channel"`, one of `CHANNELS` that is at least
            half of white on the object, or both, the number in that channel.
        size: height and width of the image, to which the mask is turned as its EXIF orientation says.
        folder: which the path is relative to.
        name: what to call the mask in an error message.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: it has another size than the image, no such value or channel, or several readings.
    """
    file, value, channel = _choice({"png": given} if isinstance(given, str) else given, name)
    path = folder / file
    return mask_in_picture(path, size, f"{name}: the mask {path}", value, channel, f"{name}: the mask file {path}")


def mask_in_picture(
    file: Any,
    size: tuple[int, int],
    name: str,
    value: int | None = None,
    channel: str | None = None,
    file_name: str | None = None,
) -> dict:
    """
    RLE of the mask in a picture.

    Args:
        file: a path, or a binary stream.
        size: height and width of the image.
        name: what to call the mask in an error message.
        value, channel: as in [`read_mask_picture`], which also says what is raised.
        file_name: what to call the file where it cannot be opened, if not `name`.
    """
    with opened_picture(file, file_name or name) as opened:
        is_lossy = opened.format in LOSSY
        layers = _layers(ImageOps.exif_transpose(opened))
    check_same_size(layers.seen.shape[:2], size, name)
    if value is None and channel is None:
        return encode_mask(_plain_mask(layers, is_lossy, name))
    values = _channel(layers, channel, name)
    mask = values * 2.0 >= layers.white if value is None else values == value
    if not mask.any():
        wanted = f"the value {shown(value)}" if value is not None else "at least half of white"
        raise ValueError(f"{name} has no pixel of {wanted}, it holds {_held(values[..., None])}")
    return encode_mask(mask)


def _choice(given: Mapping, name: str) -> tuple[str, int | None, str | None]:
    unknown = set(given) - KEYS
    if unknown:
        raise ValueError(f"{name}: a mask picture has the keys {sorted(KEYS)}, got {sorted(unknown)} as well")
    file, value, channel = (given.get(key) for key in ("png", "value", "channel"))
    if not isinstance(file, str):
        raise ValueError(f"{name}: png must be the path of a picture, got {shown(file)}")
    if value is not None and not (is_whole(value) and value >= 0):
        raise ValueError(f"{name}: value must be a whole number of at least 0, got {shown(value)}")
    if channel is not None and channel not in CHANNELS:
        raise ValueError(f"{name}: channel must be one of {', '.join(CHANNELS)}, got {shown(channel)}")
    return file, value, channel


def _layers(picture: Image.Image) -> _Layers:
    if picture.mode == "La":  # converts to nothing but this
        picture = picture.convert("LA")
    mode, is_wide = picture.mode, picture.mode.startswith("I")
    stored = np.asarray(picture)
    numbers = alpha = None
    if is_wide or mode in ("1", "L", "LA", "P", "PA", "F"):
        numbers = (stored if stored.ndim == 2 else stored[..., 0]).astype(np.uint8 if mode == "1" else stored.dtype)
    if mode in WITH_ALPHA or ("transparency" in picture.info and not is_wide):
        picture = picture.convert("RGBA")
        alpha = np.asarray(picture.getchannel("A"))
    if numbers is None or mode in ("P", "PA"):
        seen = np.asarray(picture.convert("RGB"))
        seen = seen[..., :1] if (seen == seen[..., :1]).all() else seen
    else:
        seen = numbers[..., None]
    # Of floating values, those of a mask lie in 0..1 or are 8-bit ones.
    white = 1 if mode == "1" or (mode == "F" and seen.max() <= 1) else 65535 if is_wide else 255
    return _Layers(mode, numbers, seen, alpha, white)


def _channel(layers: _Layers, channel: str | None, name: str) -> np.ndarray:
    """`(H, W)` of the channel that was chosen; without a choice, the numbers as stored."""
    if channel is None and layers.numbers is not None:
        return layers.numbers
    if channel == "alpha" and layers.alpha is not None:
        return layers.alpha
    if channel in COLOURS and layers.seen.shape[-1] == 3:
        return layers.seen[..., COLOURS.index(channel)]
    if channel in (None, "grey") and layers.seen.shape[-1] == 1:
        return layers.seen[..., 0]
    if channel is None:
        raise ValueError(f"{name} has colours, so a value needs a channel as well: {', '.join(COLOURS)}")
    kind = "colours" if layers.seen.shape[-1] == 3 else "grey"
    raise ValueError(
        f"{name} has no channel {channel}: it holds {kind} {'without' if layers.alpha is None else 'and'} alpha"
    )


def _plain_mask(layers: _Layers, is_lossy: bool, name: str) -> np.ndarray:
    """What is not black, where nothing else can be meant."""
    seen = layers.seen
    mask = seen.any(-1)
    object_colours = seen[mask]
    if is_lossy and mask.any():
        mask = _without_edges(seen, layers.white)
    elif (object_colours != object_colours[:1]).any():
        mask = None
    if mask is None:
        raise ValueError(f"{name} holds {_held(seen)}, expected black and one more; {_advice(layers)}")
    hidden = None if layers.alpha is None else layers.alpha < 128
    if hidden is not None and hidden.any() and not hidden.all() and not mask.any():
        raise ValueError(f"{name} is black, its alpha channel alone holds an object; write {_written('alpha')}")
    if hidden is not None and (hidden & mask).any():
        raise ValueError(
            f"{name} is transparent where its colours show an object; write {_written('alpha')} if the object is "
            f"what can be seen, {_written('grey')} if it is what is white"
        )
    if mask.mean() > MOST_OF_IMAGE:
        raise ValueError(
            f"{name} is not black on {mask.mean():.0%} of the image, expected at most {MOST_OF_IMAGE:.0%}; if that is "
            f"the object, {_advice(layers)}"
        )
    return mask


def _without_edges(seen: np.ndarray, white: float) -> np.ndarray | None:
    """The brighter of the two colours of a lossy picture, None if it has more than two."""
    brightest = seen.max(-1)
    mask = brightest * 2.0 >= white
    between = (brightest * 4.0 >= white) & (brightest * 4.0 < 3 * white)
    if not mask.any() or between.sum() > MOST_EDGE * mask.sum():
        return None
    colours = seen[mask].astype(float)
    off = np.abs(colours - np.median(colours, axis=0)).max(-1) > FAR_COLOUR * white
    return None if off.mean() > MOST_EDGE else mask


def _held(seen: np.ndarray) -> str:
    """The first of the values or colours `(…, C)`, in words."""
    rows = seen.reshape(-1, seen.shape[-1])
    if rows.shape[1] == 1:
        values = np.unique(rows).tolist()
        kind = "values" if len(values) > 1 else "value"
    else:
        packed = np.unique((rows.astype(np.int64) * (1 << 16, 1 << 8, 1)).sum(1))
        values = [f"#{value:06x}" for value in packed.tolist()]
        kind = "colours" if len(values) > 1 else "colour"
    more = ", …" if len(values) > VALUES_SHOWN else ""
    return f"{len(values)} {kind} ({', '.join(map(str, values[:VALUES_SHOWN]))}{more})"


def _advice(layers: _Layers) -> str:
    """What to write instead."""
    if layers.numbers is not None:
        by_number = 'write {"png": "…", "value": N} with the number N of the object'
        is_grey = layers.seen.shape[-1] == 1
        return f"{by_number}, or {_written('grey')} for all that is lighter than half" if is_grey else by_number
    if layers.alpha is not None:
        return f"write {_written('alpha')} if its alpha channel is the object"
    return f"write {_written('red')}, or another channel, if that is white on the object"


def _written(channel: str) -> str:
    return f'{{"png": "…", "channel": "{channel}"}}'
