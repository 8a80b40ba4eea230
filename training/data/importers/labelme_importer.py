"""What labelme saves: one JSON file per picture, with shapes."""

import base64
import binascii
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uground.processing.image_reading import opened_picture
from uground.training.data.files import read_json
from uground.training.data.importers.annotated import (
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    check_in_pixels,
    key_of,
    number_of,
    with_article,
)
from uground.training.data.masks import MOST_SIDE, box_polygon, ellipse_polygon, shown, union_mask
from uground.training.data.records import Record, checked_list

# labelme's own names for what is no object.
IGNORED, BACKGROUND = "__ignore__", "_background_"
LINES = ("line", "linestrip", "point", "points")


def read_labelme(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of labelme files. Shapes of one label and one `group_id` are one object.

    labelme shows pictures as EXIF turns them, so its numbers refer to that. A picture that is nowhere is taken from
    the `imageData` of its file.

    Raises:
        OSError: there are no files. ValueError: one does not make sense.
    """
    several, found = reading.source.is_dir(), False
    for path in reading.files(".json"):
        content = read_json(path)
        if several and not (isinstance(content, dict) and "shapes" in content):
            reading.tally.leave("a JSON file without shapes", str(path))
            continue
        found = True
        record = Record(content, str(path))
        for shape in record.records("shapes", "shape"):
            label = shape.text("label")
            if label and label not in (IGNORED, BACKGROUND):
                reading.names[label] = None
        # What holds the picture as text is read again when its turn comes.
        yield lambda path=path: _annotated(Record(read_json(path), str(path)), path, reading)
    if not found:
        raise FileNotFoundError(f"the folder {reading.source} holds no files of labelme")


def _annotated(content: Record, path: Path, reading: Reading) -> AnnotatedPicture:
    picture = _picture(content, path, reading)
    size = None
    if "imageHeight" in content or "imageWidth" in content:
        size = (content.take("imageHeight"), content.take("imageWidth"))
    canvas = picture.drawn_on(size, reading.tally, str(path))
    found = AnnotatedPicture(key_of(path.with_suffix(""), reading.source), picture, reading.split_of(path))
    grouped: dict[tuple, tuple[str, str, str, list[dict]]] = {}
    for number, shape in enumerate(content.records("shapes", "shape")):
        label = shape.text("label")
        if not label or label == BACKGROUND:
            reading.tally.leave("a shape without a label" if not label else f"a shape called {label}", shape.name)
            continue
        if label != IGNORED:
            found.present.add(label)
        mask, what = _mask(shape, canvas, reading)
        if mask is None:
            continue
        if label == IGNORED:
            reading.tally.take(f"a shape called {IGNORED}", shape.name)
            found.ignore.append((None, mask))
            continue
        group = shape.value.get("group_id")
        key = (label, "alone", number) if group is None else (label, "group", str(group))
        grouped.setdefault(key, (label, what, shape.name, []))[-1].append(mask)
    for label, what, place, masks in grouped.values():
        what = what if len(masks) == 1 else "a group of shapes"
        reading.add(found, label, union_mask(masks, picture.size), what, place)
    return found


def _picture(content: Record, path: Path, reading: Reading) -> Picture:
    name = content.filled_text("imagePath")
    try:
        return Picture.of(reading.pictures.find(name, str(path), beside=path.parent), str(path))
    except FileNotFoundError:
        if "imageData" not in content:
            raise
    reading.tally.note("a picture taken from the imageData of its annotations", str(path))
    file = Path(name.replace("\\", "/")).name
    if file in ("", ".."):
        raise ValueError(f"{path}: imagePath must name a file, got {shown(name)}")
    return Picture.inside(_decoded(content.text("imageData"), f"{path}: imageData"), file, str(path))


def _decoded(text: str, name: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name} must be the file of a picture in base64, but {error}") from None


def _mask(shape: Record, canvas: Canvas, reading: Reading) -> tuple[dict | None, str]:
    """RLE of a shape and what it is called; None where it is left out, which is said."""
    kind = shape.text("shape_type") if "shape_type" in shape else "polygon"
    points = [_point(point, f"{shape.name}: point {i}") for i, point in enumerate(shape.items("points"), start=1)]
    if kind in LINES:
        reading.tally.leave(f"{with_article(kind)}, which has no area", shape.name)
        return None, kind
    if kind == "mask":
        return _drawn_mask(shape, points, canvas), "a mask"
    if kind == "polygon":
        polygon = [number for point in points for number in point]
        check_in_pixels([polygon], canvas.size, shape.name)
    elif kind in ("rectangle", "rotation", "oriented_rectangle"):
        _check_count(points, (2, 4) if kind == "rectangle" else (4,), shape.name, kind)
        if not reading.takes_box(shape.name, usually=True):
            return None, kind
        polygon = [number for point in points for number in point]
        if len(points) == 2:
            (x0, y0), (x1, y1) = points
            polygon = box_polygon(min(x0, x1), min(y0, y1), abs(x1 - x0), abs(y1 - y0))
    elif kind == "circle":
        _check_count(points, (2,), shape.name, kind)
        radius = float(np.hypot(*np.subtract(points[1], points[0])))
        polygon = ellipse_polygon(*points[0], (radius, radius))
    else:
        reading.tally.leave(f"a shape of the unknown type {shown(kind)}", shape.name)
        return None, kind
    return canvas.mask([polygon], shape.name), with_article(kind)


def _point(point, name: str) -> tuple[float, float]:
    numbers = [number_of(value, name) for value in checked_list(point, name)]
    if len(numbers) != 2:
        raise ValueError(f"{name} must be [x, y], got {shown(point)}")
    return numbers[0], numbers[1]


def _check_count(points: list, counts: tuple[int, ...], name: str, kind: str) -> None:
    if len(points) not in counts:
        expected = " or ".join(map(str, counts))
        raise ValueError(f"{name}: a {kind} must have {expected} points, got {len(points)}")


def _drawn_mask(shape: Record, points: list, canvas: Canvas) -> dict:
    """A mask that is a picture of its own, within the box of its two points, both included."""
    _check_count(points, (2,), shape.name, "mask")
    with opened_picture(io.BytesIO(_decoded(shape.text("mask"), f"{shape.name}: mask")), f"{shape.name}: mask") as png:
        pixels = np.asarray(png.convert("L")) > 0 if png.mode != "P" else np.asarray(png) > 0
    height, width = canvas.size
    # Beyond, the numbers would leave the range of whole ones.
    (x0, y0), (x1, y1) = (map(int, np.round(point)) for point in np.clip(points, -MOST_SIDE, MOST_SIDE))
    if pixels.shape != (y1 - y0 + 1, x1 - x0 + 1):
        raise ValueError(
            f"{shape.name}: its mask is {pixels.shape[1]} wide and {pixels.shape[0]} high, expected "
            f"{x1 - x0 + 1} and {y1 - y0 + 1} as its points say"
        )
    if x0 < 0 or y0 < 0 or x1 >= width or y1 >= height:
        raise ValueError(
            f"{shape.name}: its mask reaches from ({x0}, {y0}) to ({x1}, {y1}), outside of the picture, which is "
            f"{width} wide and {height} high"
        )
    mask = np.zeros(canvas.size, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = pixels
    return canvas.pixels(mask)


__all__ = ["read_labelme"]
