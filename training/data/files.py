"""Reading what lies in a dataset's folder: JSON, pickles, folders, pictures; one clear sentence if one is amiss."""

import io
import json
import os
import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from uground.processing.image_reading import opened_picture, picture_errors, read_image
from uground.processing.text_lines import looks_wide

ORIENTATION_TAG, TIFF_SIZE_TAGS = 0x0112, (256, 257)
# Of the EXIF orientations that lie on their side, what turns the upright picture back.
UNTURN = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
# What turns stored pixels upright; EXIF knows no other orientations.
TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Names in an error message; more would hide the sentence.
NAMES_SHOWN = 10
# What a pickle of plain data may name. `_codecs.encode` and the like stay out: they are calls.
PLAIN_TYPES = {
    (module, name)
    for module in ("builtins", "__builtin__")
    for name in ("set", "frozenset", "complex", "bytearray", "list", "dict", "tuple", "str", "int", "float", "bool")
} | {("collections", "OrderedDict")}


class _PlainUnpickler(pickle.Unpickler):
    """Admits containers, numbers and strings: a pickle that names anything else could run code."""

    def find_class(self, module: str, name: str):
        if (module, name) not in PLAIN_TYPES:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module.replace("__builtin__", "builtins"), name)


def read_pickle(path: Path) -> Any:
    """
    A pickle of plain containers, numbers and strings; also one written by Python 2.

    Raises:
        OSError: the file is missing.
        ValueError: it is no pickle, is cut off, or names a class or function.
    """
    data = path.read_bytes()
    try:
        # Python 2 wrote its byte strings without an encoding; what is no UTF-8 is shown as such, not lost silently.
        return _PlainUnpickler(io.BytesIO(data), encoding="utf-8", errors="replace").load()
    except Exception as error:  # bytes that are no pickle lead to errors of any kind
        raise ValueError(
            f"{path} must be a whole pickle of plain containers, numbers and strings, but {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_json(path: Path) -> Any:
    """
    A JSON file in UTF-8, or in Windows-1252 where it is not valid UTF-8, as some ReasonSeg files are.

    Raises:
        OSError: the file is missing.
        ValueError: it is no JSON, is cut off, or is nested too deep.
    """
    data = path.read_bytes()
    if looks_wide(data):
        raise ValueError(f"{path} looks like UTF-16 or UTF-32, expected JSON in UTF-8; save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252", errors="replace")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a whole JSON file, but {_reason(error)}") from error


def checked_root(root: str | os.PathLike | None, dataset: str) -> Path:
    """
    The folder that holds a dataset.

    Raises:
        ValueError: none is named.
        OSError: it does not exist.
    """
    if root is None:
        raise ValueError(f"{dataset} is read from its original files: name the folder that holds them with --root")
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"--root {root} is not a folder")
    return root


def first_existing(root: Path, candidates: Sequence[str]) -> Path:
    """The first of these places below `root` that exists, or the first one if none does."""
    places = [root / candidate for candidate in candidates]
    return next((place for place in places if place.exists()), places[0])


def require(dataset: str, root: Path, paths: Iterable[Path]) -> None:
    """
    Raise an `OSError` that names up to ten of the `paths` that do not exist; they are annotation files or folders.
    """
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"{dataset} is incomplete under {root}; missing: {name_some(missing, root)}")


def require_images(dataset: str, root: Path, paths: Iterable[str | os.PathLike]) -> None:
    """
    Raise an `OSError` that says how many of the annotated pictures are absent and names up to ten.

    Whole folders are listed once: a hundred thousand single looks at a network disk would take minutes.
    """
    listed: dict[str, set[str]] = {}
    missing = []
    for path in dict.fromkeys(map(str, paths)):
        folder, name = os.path.split(path)
        if folder not in listed:
            listed[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        if name not in listed[folder]:
            missing.append(Path(path))
    if missing:
        count = f"{len(missing)} annotated image{'s are' if len(missing) > 1 else ' is'} absent"
        raise FileNotFoundError(f"{dataset} is incomplete under {root}; {count}: {name_some(missing, root)}")


def name_some(paths: Sequence[Path], root: Path) -> str:
    """Up to ten paths, relative to `root` where they lie below it, and how many more there are."""
    names = [str(path.relative_to(root)) if path.is_relative_to(root) else str(path) for path in paths]
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def image_size(path: str | os.PathLike) -> tuple[int, int]:
    """
    Height and width of a picture, read off its header, turned as its EXIF orientation says.

    Raises:
        OSError: the file is missing or no picture. ValueError: it has more pixels than Pillow decodes.
    """
    return upright_size(path, f"the image {path}")[0]


def upright_size(file: Any, name: str) -> tuple[tuple[int, int], int]:
    """
    Height and width of a picture as its EXIF orientation turns it, and that orientation, 1 for none.

    Args:
        file: a path, or a binary stream.
        name: what to call it in an error message.

    Raises:
        OSError: the file is missing or no picture. ValueError: it has more pixels than Pillow decodes.
    """
    with opened_picture(file, name) as picture:
        width, height = picture.size
        if picture.format == "TIFF":
            # Pillow turns the size of these, but not the pixels until they are read.
            width, height = (picture.tag_v2[tag] for tag in TIFF_SIZE_TAGS)
        found = _orientation(picture)
    orientation = found if found in TURN else 1
    return ((width, height) if orientation in UNTURN else (height, width)), orientation


def _orientation(picture: Image.Image):
    """EXIF orientation of a picture; of a TIFF only until its pixels are read."""
    return picture.getexif().get(ORIENTATION_TAG, 1)


def open_image(image: Any, size: tuple[int, int] | None, name: str) -> Image.Image:
    """
    The pixels of an image of an example, in the orientation its masks were drawn in.

    Args:
        image: a path, `{"bytes": …, "path": …}` as `datasets` stores it, or a `PIL.Image`.
        size: height and width of the masks; None where there are none.
        name: what to call the example in an error message.

    Returns:
        RGB, without EXIF data: nothing turns it later on.

    Raises:
        OSError: the file is missing or unreadable.
        ValueError: the picture does not have the size of the masks, upright or as stored, or has more pixels than
            Pillow decodes.
    """
    orientation = None
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") is not None else image.get("path")
    if isinstance(image, io.BytesIO):
        with picture_errors(f"{name}: its image"):
            image = Image.open(image)
    if isinstance(image, Image.Image):
        with picture_errors(f"{name}: its image"):
            orientation = _orientation(image)
    upright = read_image(image, f"the image of {name}")
    if size is None or (upright.height, upright.width) == tuple(size):
        return upright
    if orientation is None:
        with opened_picture(image, f"{name}: its image") as stored:
            orientation = _orientation(stored)
    # Tools that ignore EXIF annotate the stored pixels.
    if orientation in UNTURN and upright.size == tuple(size):
        return upright.transpose(UNTURN[orientation])
    raise ValueError(
        f"{name}: masks of {size[0]}x{size[1]} pixels do not fit its image of {upright.height}x{upright.width} "
        "(height x width)"
    )
