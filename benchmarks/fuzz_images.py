"""Pictures and arrays for `fuzz.py`, with the pixels that they show worked out by numpy."""

import io
import struct
import zlib
from pathlib import Path
from random import Random

import numpy as np
from fuzz_inputs import Refused, Wrong, broken_bytes
from PIL import Image, features

from uground.processing import read_image

MODES = ("L", "RGB", "RGBA", "P", "1", "LA", "I;16")
FORMATS = ["PNG", "PNG", "TIFF", "JPEG", "WEBP", "GIF", "BMP", "PPM"] + (["AVIF"] if features.check("avif") else [])
# How a viewer turns what is stored, by EXIF orientation.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
ORIENTATION = 0x0112
# Of the modes whose stored values a format keeps.
LOSSLESS = {"PNG": MODES, "TIFF": ("L", "RGB", "RGBA", "1", "I;16"), "BMP": ("L", "RGB", "1"), "PPM": ("L", "RGB")}
TURNING = ("PNG", "TIFF", "JPEG")


def image_input(rng: Random, folder: Path, checkpoint) -> None:
    """A file or an array: refused, or the pixels that it shows."""
    if rng.random() < 0.25:
        _array(rng)
        return
    numbers = np.random.default_rng(rng.getrandbits(64))
    height, width = rng.choice([1, 2, 3, 8, 33]), rng.choice([2, 3, 7, 40])
    form, mode = rng.choice(FORMATS), rng.choice(MODES)
    orientation = rng.choice([1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 9, 255])
    picture, shown = _picture(numbers, mode, height, width)
    content = _encoded(picture, form, orientation)
    if content is None:
        return
    is_broken = rng.random() < 0.6
    if is_broken:
        content = _bomb(rng) if rng.random() < 0.05 else broken_bytes(rng, content)
    path = folder / f"picture.{form.lower()}"
    path.write_bytes(content)
    found = _read(path, (str(path),))
    if is_broken or mode not in LOSSLESS.get(form, ()):
        return
    wanted = TURNS.get(orientation, TURNS[1])(shown) if form in TURNING else shown
    # Laying on white rounds once.
    if found.shape != wanted.shape or np.abs(found.astype(int) - wanted).max() > (1 if mode in ("RGBA", "LA") else 0):
        raise Wrong(f"a {mode} {form} of {height}x{width} with orientation {orientation} is read otherwise")


def _read(image, names: tuple[str, ...] = ()) -> np.ndarray:
    try:
        picture = read_image(image)
    except (ValueError, OSError, TypeError) as error:
        raise Refused(names) from error
    if picture.mode != "RGB" or min(picture.size) < 2:
        raise Wrong(f"an image of mode {picture.mode} and size {picture.size} came out")
    return np.asarray(picture)


def _picture(numbers: np.random.Generator, mode: str, height: int, width: int) -> tuple[Image.Image, np.ndarray]:
    """A picture, and what it shows, `(H, W, 3)`."""
    grey = numbers.integers(0, 256, (height, width), dtype=np.uint8)
    colour = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
    alpha = numbers.choice([0, 255, 100], (height, width)).astype(np.uint8)

    def on_white(values):
        share = alpha[..., None] / 255.0
        return np.round(values * share + 255 * (1 - share)).astype(int)

    if mode == "L":
        return Image.fromarray(grey), _three(grey)
    if mode == "RGB":
        return Image.fromarray(colour), colour
    if mode == "RGBA":
        return Image.fromarray(np.dstack([colour, alpha])), on_white(colour)
    if mode == "LA":
        return Image.fromarray(np.dstack([grey, alpha]), "LA"), on_white(_three(grey))
    if mode == "1":
        return Image.fromarray(grey > 127), _three((grey > 127) * 255)
    if mode == "I;16":
        deep = numbers.integers(0, 2**16, (height, width), dtype=np.uint16)
        deep.flat[0] = 2**16 - 1  # values of 8 bits alone would be taken for such
        return Image.fromarray(deep), _three(np.round(deep / 257.0).astype(int))
    palette = numbers.integers(0, 256, (256, 3), dtype=np.uint8)
    picture = Image.fromarray(grey, "P")
    picture.putpalette(palette.tobytes())
    return picture, palette[grey]


def _three(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=-1)


def _encoded(picture: Image.Image, form: str, orientation: int) -> bytes | None:
    """The file of a picture; None where the format does not hold its mode."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    buffer = io.BytesIO()
    try:
        picture.save(buffer, form, **({"exif": tags} if form in (*TURNING, "WEBP", "AVIF") else {}))
    except (OSError, ValueError, KeyError):
        return None
    return buffer.getvalue()


def _bomb(rng: Random) -> bytes:
    """A PNG whose header promises more pixels than anybody wants."""
    sides = [rng.choice([30_000, 2**31 - 1, 0, 65_536]) for _ in range(2)]
    pieces = (b"IHDR" + struct.pack(">IIBBBBB", *sides, 8, 2, 0, 0, 0), b"IDAT" + zlib.compress(b""), b"IEND")
    chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in pieces]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _array(rng: Random) -> None:
    numbers = np.random.default_rng(rng.getrandbits(64))
    height, width = rng.choice([2, 3, 5, 9]), rng.choice([2, 6, 11])
    colour = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
    way = rng.randrange(8)
    if way == 0:
        given, wanted = colour, colour
    elif way == 1:
        given, wanted = np.moveaxis(colour, -1, 0), colour if width not in (1, 3, 4) else None
    elif way == 2:
        given, wanted = colour[..., 0] > 127, _three((colour[..., 0] > 127) * 255)
    elif way == 3:
        given = numbers.random((height, width, 3)).astype(rng.choice([np.float32, np.float64]))
        wanted = np.round(given * 255).astype(int)
    elif way == 4:
        given, wanted = colour.astype(rng.choice([np.int64, np.int32])), colour
    else:
        given, wanted = _odd_array(rng, numbers, height, width), None
    found = _read(given)
    if wanted is not None and (found.shape != wanted.shape or np.abs(found.astype(int) - wanted).max() > 0):
        raise Wrong(f"an array {given.dtype} {given.shape} is read otherwise")


def _odd_array(rng: Random, numbers: np.random.Generator, height: int, width: int) -> np.ndarray:
    shape = rng.choice([(), (0,), (height,), (height, 0), (height, width, 2), (1, height, width, 3), (height, width),
                        (1, 1, 3), (5, height, width), (height, width, 4)])  # fmt: skip
    values = numbers.random(shape) * rng.choice([1, 255, 1e9, -1])
    if values.size and rng.random() < 0.4:
        values.flat[0] = rng.choice([np.nan, np.inf, -1.0, 1.5, 300.0])
    kind = rng.choice(["float64", "float16", "int64", "uint16", "object", "complex128", "datetime64[s]", "U3"])
    with np.errstate(all="ignore"):
        return values.astype("int64").astype(kind) if kind.startswith("datetime") else values.astype(kind)
