"""Label maps: PNG files in which every pixel holds the number or the colour of its class, as PASCAL VOC has them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uground.processing.image_reading import opened_picture
from uground.processing.text_lines import read_lines
from uground.training.data.importers.annotated import (
    BACKGROUND_NAMES,
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    key_of,
)
from uground.training.data.importers.name_lists import read_names

# labelme's export has both names, with pictures in the second.
CLASSES, OBJECTS = (tuple(f"Segmentation{kind}{end}" for end in ("", "PNG")) for kind in ("Class", "Object"))
LISTS, PICTURES = "ImageSets/Segmentation", "JPEGImages"
NAME_FILES = ("labelmap.txt", "class_names.txt", "classes.txt")
SPLITS = ("train", "val", "test")
IGNORED_NAMES = ("__ignore__", "ignore", "void")
# VOC's number and colour for what belongs to no class for certain.
VOID, VOID_COLOUR, BLACK = 255, (224, 224, 192), (0, 0, 0)
SHIFTS = np.array([1 << 16, 1 << 8, 1])


@dataclass(frozen=True)
class _Map:
    """The classes `(H, W)` of a label map as whole numbers: of a colour, its three bytes in one."""

    values: np.ndarray
    by_colour: bool

    def shown(self, value: int) -> str:
        """A value as one writes it into a list of names."""
        return f"the colour {' '.join(map(str, _colour(value)))}" if self.by_colour else f"the value {value}"


def _colour(value: int) -> tuple[int, int, int]:
    return value >> 16, value >> 8 & 255, value & 255


def read_label_map_files(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of a label map, a folder of them, or a folder as of VOC, with `SegmentationClass` and perhaps
    `SegmentationObject` and lists of splits. 255, or VOC's colour for it, is ignored; 0 or black without a name is
    background. A map is turned as its picture is if its size is that of the picture as stored.

    Raises:
        OSError: there are no maps. ValueError: there are no names, or a map holds what has none.
    """
    root = reading.source
    maps_folder = next((root / name for name in CLASSES if any((root / name).glob("*.png"))), root)
    objects = next((root / name for name in OBJECTS if any((root / name).glob("*.png"))), None)
    splits = _splits(root / LISTS)
    names_file = reading.names_file or next((root / n for n in NAME_FILES if (root / n).is_file()), None)
    if names_file is None:
        raise ValueError(f"{root} holds no names of classes: name a list of numbers or colours with --names")
    names = read_names(names_file)
    reading.names.update(
        dict.fromkeys(name for name in names.values() if name not in (*BACKGROUND_NAMES, *IGNORED_NAMES))
    )
    if maps_folder.is_dir():
        maps = sorted(path for path in maps_folder.rglob("*.png") if path.is_file())
        if not maps:
            raise FileNotFoundError(f"the folder {maps_folder} holds no label maps (*.png)")
    else:
        maps = reading.files(".png")
    for path in maps:
        key = key_of(path.with_suffix(""), maps_folder if maps_folder.is_dir() else path.parent)
        if splits and reading.split is None and key not in splits:
            reading.tally.leave(f"a map that no list of {LISTS} names", str(path))
            continue
        split = reading.split or splits.get(key) or reading.split_of(path)
        of_objects = None if objects is None else objects / f"{key}.png"
        yield lambda at=(path, key, split, of_objects): _annotated(*at, names, names_file, reading)


def _splits(folder: Path) -> dict[str, str]:
    """The split of each name that stands in a list."""
    files = [folder / f"{name}.txt" for name in SPLITS]
    return {
        line.split()[0]: path.stem for path in files if path.is_file() for line in read_lines(path) if line.strip()
    }


def _annotated(path: Path, key: str, split, of_objects: Path | None, names: dict, names_file: Path, reading: Reading):
    pictures = (f"{PICTURES}/{key}", key)
    picture = Picture.of(reading.pictures.of_stem(pictures, str(path), other_than=path), str(path))
    found = AnnotatedPicture(key, picture, split)
    classes = _read_map(path, any(isinstance(known, tuple) for known in names))
    canvas = picture.drawn_on(classes.values.shape, reading.tally, str(path))
    own = {_packed(known): name for known, name in names.items() if isinstance(known, tuple) == classes.by_colour}
    if not own:
        kind = "colours" if classes.by_colour else "numbers"
        raise ValueError(f"the label map {path} holds {kind}, but {names_file} names none of these")
    void = _packed(VOID_COLOUR) if classes.by_colour else VOID
    numbers = None
    if of_objects is not None and of_objects.is_file():
        numbers = _read_map(of_objects, False).values
        if numbers.shape != classes.values.shape:
            raise ValueError(f"{of_objects} is {numbers.shape} pixels, expected {classes.values.shape} as {path}")
    for value in np.unique(classes.values).tolist():
        name, place = own.get(value), f"{path}, {classes.shown(value)}"
        pixels = classes.values == value
        if name in IGNORED_NAMES or (name is None and value == void):
            reading.tally.take("what is ignored: 255 or what is called so", place)
            found.ignore.append((None, canvas.pixels(pixels)))
        elif name is None and value != _packed(BLACK):
            raise ValueError(f"{place} has no name in {names_file}")
        elif name is not None and name not in BACKGROUND_NAMES:
            _add_objects(found, name, pixels, numbers, canvas, place, reading)
    return found


def _add_objects(found, name: str, pixels: np.ndarray, numbers, canvas: Canvas, place: str, reading: Reading) -> None:
    """All pixels of a class, or its objects where a second map tells them apart."""
    if numbers is None:
        reading.add(found, name, canvas.pixels(pixels), "a class of a label map", place)
        return
    for number in np.unique(numbers[pixels]).tolist():
        if number in (0, VOID, _packed(VOID_COLOUR)):
            reading.tally.leave("pixels of a class that belong to no object", place)
        else:
            reading.add(found, name, canvas.pixels(pixels & (numbers == number)), "an object of a label map", place)


def _packed(known) -> int:
    return int(np.dot(known, SHIFTS)) if isinstance(known, tuple) else known


def _read_map(path: Path, by_colour: bool) -> _Map:
    """
    A label map; of a palette the numbers count, or the colours if `by_colour`.

    Raises:
        OSError: it cannot be read. ValueError: it holds something else than whole numbers or colours.
    """
    with opened_picture(path, f"the label map {path}") as opened:
        if opened.mode == "1" or opened.mode.startswith("I") or (opened.mode in ("L", "P") and not by_colour):
            values = np.asarray(opened).astype(np.int64)
            return _Map(values, False)
        mode = opened.mode
        colours = np.asarray(opened.convert("RGB")).astype(np.int64)
    if mode not in ("L", "P", "RGB", "RGBA"):
        raise ValueError(f"the label map {path} must hold numbers or colours, got the mode {mode}")
    if not by_colour and (colours == colours[..., :1]).all():
        # Grey that was saved in three channels.
        return _Map(colours[..., 0], False)
    return _Map(colours @ SHIFTS, True)


__all__ = ["read_label_map_files"]
