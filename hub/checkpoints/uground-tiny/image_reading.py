"""Any image a user may hold, as an upright 8-bit RGB `PIL.Image`."""

import base64
import os
import string
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote, unquote_to_bytes
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps

# The least rows and columns of an image: with one there is nothing to interpolate between.
MIN_SIDE = 2
URL_PREFIXES = ("http://", "https://", "data:image/")
# Seconds a server may stay silent, and the most bytes it may send.
URL_TIMEOUT = 30
MAX_URL_BYTES = 2**28
CHUNK_BYTES = 2**20


def read_image(image: Any, name: str = "the image") -> Image.Image:
    """
    Read one image.

    Args:
        image: a `PIL.Image` of any mode, with its EXIF orientation; a path (`str` or `Path`); a URL or data URI; an
            array or tensor `(H, W)`, `(H, W, C)` or `(C, H, W)` with 1, 3 or 4 channels, unsigned 8 or 16 bit, other
            integers within 0..255, boolean, or floating within 0..1. Transparency is laid on white; 16-bit grey is
            scaled to 8 bit.
        name: what to call an in-memory image in an error message.

    Returns:
        An RGB image of at least 2x2 pixels, turned as its EXIF orientation says.

    Raises:
        OSError: a file or URL is missing, unreadable or truncated.
        ValueError: the type, shape, value range or size is none of the above.
    """
    if isinstance(image, (str, os.PathLike)):
        name = f"the image {str(image)[:200]!r}"
        picture = _open(str(image), name)
    elif isinstance(image, Image.Image):
        picture = image
        filename = getattr(image, "filename", "")
        name = f"the image {str(filename)!r}" if filename else name
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        picture = _array_to_picture(image, name)
    else:
        raise ValueError(
            f"{name} must be a PIL image, an array, a tensor, a path or a URL, got {type(image).__name__}"
        )
    width, height = picture.size
    if min(width, height) < MIN_SIDE:
        raise ValueError(
            f"{name} must be at least {MIN_SIDE} pixels wide and high, got {width} wide and {height} high"
        )
    with picture_errors(name):
        return _to_rgb(ImageOps.exif_transpose(picture))


@contextmanager
def picture_errors(name: str) -> Iterator[None]:
    """
    One sentence, which begins with `name`, for whatever Pillow raises at a picture file.

    Raises:
        OSError: the file is missing, unreadable or truncated.
        ValueError: it has more pixels than Pillow decodes.
    """
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} is too large: {_first_line(error)}") from error
    except FileNotFoundError:
        raise FileNotFoundError(f"{name} does not exist") from None
    except Exception as error:  # a broken file leads decoders to errors of any kind
        reason = "it is no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise OSError(f"{name} cannot be read: {_first_line(reason)}") from error


@contextmanager
def opened_picture(file: Any, name: str) -> Iterator[Image.Image]:
    """
    A picture file as Pillow opens it, under [`picture_errors`].

    Args:
        file: a path, or a binary stream.
        name: what to call it in an error message.
    """
    with ExitStack() as stack, picture_errors(name):
        # A stream, as Pillow maps files that it is given by path into memory, and then mixes up turned TIFFs.
        stream = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
        yield stack.enter_context(Image.open(stream))


def _open(source: str, name: str) -> Image.Image:
    file: str | BytesIO
    if source.startswith(URL_PREFIXES):
        file = BytesIO(_load(source, name))
    elif _is_file(source):
        file = source
    else:
        raise FileNotFoundError(f"{name} does not exist or is not a file")
    with opened_picture(file, name) as picture:
        picture.load()
        # Its EXIF data, which say how it is turned, go along.
        return picture.copy()


def _is_file(source: str) -> bool:
    try:
        return Path(source).is_file()
    except OSError:
        # No name of a file is as long as the content of one, which is handed in by mistake.
        return False


def _load(url: str, name: str) -> bytes:
    """The file behind a URL, or within a base64 data URI."""
    try:
        if url.startswith("data:"):
            return base64.b64decode(unquote_to_bytes(url.partition(",")[2]))
        # Some servers refuse urllib's own name; spaces and letters beyond ASCII must be escaped.
        request = Request(quote(url, safe=string.punctuation), headers={"User-Agent": "uground"})
        content = bytearray()
        with urlopen(request, timeout=URL_TIMEOUT) as response:
            while len(content) <= MAX_URL_BYTES and (chunk := response.read(CHUNK_BYTES)):
                content += chunk
    except (OSError, ValueError, HTTPException) as error:
        reason = error.reason if type(error) is URLError else error
        raise OSError(f"{name} cannot be loaded: {_first_line(reason)}") from error
    if len(content) > MAX_URL_BYTES:
        raise ValueError(f"{name} is too large: expected at most {MAX_URL_BYTES} bytes, got more")
    return bytes(content)


def _first_line(error) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _array_to_picture(array, name: str) -> Image.Image:
    if isinstance(array, torch.Tensor):
        if array.is_meta or array.layout != torch.strided or array.is_complex() or array.is_quantized:
            raise ValueError(
                f"{name} must be a dense tensor of real numbers, got one of {array.dtype}, {array.layout}"
            )
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()
    given = array.shape
    if array.ndim == 3 and array.shape[-1] not in (1, 3, 4) and array.shape[0] in (1, 3, 4):
        array = np.moveaxis(array, 0, -1)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (1, 3, 4)):
        raise ValueError(
            f"{name} must have the shape (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels, got {tuple(given)}"
        )
    if array.dtype.kind not in "buif":
        raise ValueError(f"{name} must hold real numbers, got {array.dtype}")
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if min(array.shape[:2]) < MIN_SIDE:
        raise ValueError(f"{name} must be at least {MIN_SIDE} pixels wide and high, got the shape {tuple(given)}")
    return Image.fromarray(_to_bytes(array, name))


def _to_bytes(array: np.ndarray, name: str) -> np.ndarray:
    """An array of any accepted type as uint8."""
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype == np.uint16:
        return np.round(array / 257.0).astype(np.uint8)
    floating = np.issubdtype(array.dtype, np.floating)
    top = 1.0 if floating else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= top):
        raise ValueError(f"{name} must have {array.dtype} values within 0..{top:g}, got {low:g}..{high:g}")
    return np.round(array * 255.0).astype(np.uint8) if floating else array.astype(np.uint8)


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        values = np.asarray(picture, dtype=np.int64)
        # 16-bit files open as 32-bit integers in some Pillow versions; 8-bit values in such an image stay as they are.
        scale = 257.0 if picture.mode != "I" or values.max() > 255 else 1.0
        picture = Image.fromarray(np.clip(np.round(values / scale), 0, 255).astype(np.uint8))
    elif picture.mode == "F":
        values = np.nan_to_num(np.asarray(picture))
        values = values * 255.0 if values.max() <= 1.0 else values
        picture = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    if picture.mode == "La":  # converts to nothing but this
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


__all__ = ["opened_picture", "picture_errors", "read_image"]
