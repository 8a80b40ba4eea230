"""CVAT for images, XML 1.1: polygons, boxes, ellipses and masks of single pictures."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from uground.training.data.importers.annotated import (
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    number_of,
    with_article,
)
from uground.training.data.masks import (
    box_polygon,
    check_size,
    decode_mask,
    ellipse_polygon,
    encode_mask,
    is_empty,
    shown,
    union_mask,
)

WITHOUT_AREA = ("polyline", "points", "tag", "skeleton", "cuboid")
COVERED = "a mask cut where one of a higher z_order lies over it"


def read_cvat(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of files of CVAT for images. Shapes of one label and group are one object; a shape hides what has a lower
    z_order. CVAT turns pictures as EXIF says, so its numbers refer to that.

    Raises:
        OSError: there are no files. ValueError: one is none, or is about a video.
    """
    several, found = reading.source.is_dir(), False
    for path in reading.files(".xml"):
        try:
            root = ElementTree.parse(path).getroot()
        except (ElementTree.ParseError, ValueError, LookupError) as error:
            raise ValueError(f"{path} must be a whole XML file, but {error}") from error
        if root.tag != "annotations":
            if several:
                reading.tally.leave("an XML file that is none of CVAT for images", str(path))
                continue
            raise ValueError(f"{path} must be a file of CVAT for images, <annotations>, got <{root.tag}>")
        found = True
        if root.find("track") is not None:
            raise ValueError(f"{path} holds tracks of a video, expected an export as CVAT for images 1.1")
        for label in root.iterfind("meta//labels/label/name"):
            if label.text and label.text.strip():
                reading.names[label.text.strip()] = None
        for image in root.iterfind("image"):
            yield lambda image=image, path=path: _annotated(image, path, reading)
    if not found:
        raise FileNotFoundError(f"the folder {reading.source} holds no files of CVAT for images")


class _Fields:
    """The attributes of an element, checked as they are taken."""

    def __init__(self, element: ElementTree.Element, name: str):
        self.element, self.name = element, name

    def text(self, key: str) -> str:
        """An attribute that is not blank."""
        text = self.element.get(key, "").strip()
        if not text:
            raise ValueError(f"{self.name} must have the attribute {key}, got {sorted(self.element.attrib)}")
        return text

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number."""
        if default is not None and self.element.get(key) is None:
            return default
        return number_of(self.text(key), f"{self.name}: {key}")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number."""
        number = self.number(key, default)
        if number != int(number):
            raise ValueError(f"{self.name}: {key} must be a whole number, got {self.text(key)}")
        return int(number)


def _annotated(element: ElementTree.Element, path: Path, reading: Reading) -> AnnotatedPicture:
    image = _Fields(element, f"{path}, image {element.get('id', '?')}")
    file = image.text("name")
    picture = Picture.of(reading.pictures.find(file, image.name, path.parent), image.name)
    size = check_size([image.whole("height"), image.whole("width")], image.name)
    canvas = picture.drawn_on(size, reading.tally, image.name)
    subset = element.get("subset", "").strip()
    split = reading.split or (subset if subset.lower() not in ("", "default") else reading.split_of(path))
    found = AnnotatedPicture(file, picture, split)
    shapes: dict[tuple, tuple[str, str, str, int, list[dict]]] = {}
    for number, child in enumerate(element):
        shape = _Fields(child, f"{image.name}, {child.tag} {number}")
        if child.tag in WITHOUT_AREA:
            reading.tally.leave(f"{with_article(child.tag)}, which has no mask", shape.name)
            if child.get("label"):
                found.present.add(child.get("label").strip())
            continue
        label = shape.text("label")
        reading.names[label] = None
        found.present.add(label)
        mask = _mask(shape, canvas, reading)
        if mask is None:
            continue
        group = child.get("group_id", "0")
        z_order = shape.whole("z_order", 0)
        # In a group, each shape still lies where its own z_order says.
        key = (label, z_order, "alone", number) if group == "0" else (label, z_order, "group", group)
        shapes.setdefault(key, (label, with_article(child.tag), shape.name, z_order, []))[-1].append(mask)
    _add_visible(found, list(shapes.values()), picture.size, reading)
    return found


def _add_visible(found: AnnotatedPicture, shapes: list[tuple], size: tuple[int, int], reading: Reading) -> None:
    """Take each object but for what lies under another."""
    united = [union_mask(masks, size) for *_, masks in shapes]
    for (label, what, place, z_order, masks), mask in zip(shapes, united, strict=True):
        over = [other for (*_, above, _), other in zip(shapes, united, strict=True) if above > z_order]
        if over and not is_empty(mask):
            pixels = decode_mask(mask)
            left = pixels & ~decode_mask(union_mask(over, size))
            if (left != pixels).any():
                reading.tally.note(COVERED, place)
                mask = encode_mask(left)
        reading.add(found, label, mask, what if len(masks) == 1 else "a group of shapes", place)


def _mask(shape: _Fields, canvas: Canvas, reading: Reading) -> dict | None:
    """RLE of a shape; None where it is left out, which is said."""
    kind = shape.element.tag
    if kind == "polygon":
        points = [_point(text, shape) for text in shape.text("points").split(";")]
        return canvas.mask([[number for point in points for number in point]], shape.name)
    if kind == "box":
        if not reading.takes_box(shape.name, usually=True):
            return None
        x0, y0, x1, y1 = (shape.number(key) for key in ("xtl", "ytl", "xbr", "ybr"))
        if x1 < x0 or y1 < y0:
            raise ValueError(f"{shape.name}: its bottom right ({x1:g}, {y1:g}) must not lie before ({x0:g}, {y0:g})")
        return canvas.mask([box_polygon(x0, y0, x1 - x0, y1 - y0, shape.number("rotation", 0.0))], shape.name)
    if kind == "ellipse":
        radii = (shape.number("rx"), shape.number("ry"))
        if min(radii) < 0:
            raise ValueError(f"{shape.name}: rx and ry must be at least 0, got {radii}")
        polygon = ellipse_polygon(shape.number("cx"), shape.number("cy"), radii, shape.number("rotation", 0.0))
        return canvas.mask([polygon], shape.name)
    if kind == "mask":
        return _drawn_mask(shape, canvas)
    reading.tally.leave(f"a shape of the unknown type {shown(kind)}", shape.name)
    return None


def _point(text: str, shape: _Fields) -> tuple[float, float]:
    numbers = [number_of(part.strip(), f"{shape.name}: points") for part in text.split(",")]
    if len(numbers) != 2:
        raise ValueError(f"{shape.name}: points must be x,y;x,y;…, got {shown(text)}")
    return numbers[0], numbers[1]


def _drawn_mask(shape: _Fields, canvas: Canvas) -> dict:
    """A mask of runs, row by row, off first, within a box."""
    left, top, width, height = (shape.whole(key) for key in ("left", "top", "width", "height"))
    check_size([height, width], shape.name)
    if left < 0 or top < 0 or left + width > canvas.size[1] or top + height > canvas.size[0]:
        raise ValueError(
            f"{shape.name}: its {width}x{height} pixels at ({left}, {top}) reach outside of the picture, which is "
            f"{canvas.size[1]} wide and {canvas.size[0]} high"
        )
    runs = [number_of(part.strip(), f"{shape.name}: rle") for part in shape.text("rle").split(",")]
    if any(run < 0 or run != int(run) for run in runs) or sum(runs) != width * height:
        raise ValueError(
            f"{shape.name}: rle must be runs of whole numbers that add up to {width * height} pixels, got "
            f"{shown(shape.text('rle'))}, {sum(runs):g} in all"
        )
    runs = np.array(runs, dtype=np.int64)
    mask = np.zeros(canvas.size, dtype=bool)
    inner = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)
    mask[top : top + height, left : left + width] = inner
    return canvas.pixels(mask)


__all__ = ["read_cvat"]
