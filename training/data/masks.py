"""
Masks as the example schema holds them, COCO RLE, from all the forms that annotations have.

pycocotools trusts what it is given: an RLE of too few pixels shows memory of others, a point far away ends the
process. So whatever comes from outside passes through here first.
"""

import reprlib
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

# Fewer numbers are no area, and pycocotools would take four for a box.
LEAST_POLYGON = 6
# Pixels that a point must lie off the line through the others; less is rounding.
LEAST_WIDTH = 1e-3
INFINITE = (float("inf"), -float("inf"))
# What is said of a mask that would fit the image lying on its side: cameras store pixels as the sensor lay.
SIDEWAYS = "; it looks drawn on the picture before its EXIF orientation turned it, so turn the mask likewise"
# The longest side of a JPEG, and about twice as many pixels as Pillow opens: nothing larger is a picture, and
# pycocotools counts in 32 bits.
MOST_SIDE, MOST_PIXELS = 65535, 2**28
# pycocotools keeps 5 points of 16 bytes per pixel of outline: 0.7 GB.
MOST_OUTLINE = 2**23
# Its compressed counts: five bits a character from "0" on, the sixth says that more follow; 32 bits take 7 characters.
FIRST_CHARACTER, BITS, MORE, SIGN, MOST_CHARACTERS = 48, 5, 32, 16, 7


def encode_mask(mask: np.ndarray) -> dict:
    """COCO RLE `{"size": [H, W], "counts": str}` of an `(H, W)` boolean mask."""
    return _plain(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode_mask(rle: dict, name: str = "a mask") -> np.ndarray:
    """
    `(H, W)` boolean mask of a COCO RLE.

    Raises:
        ValueError: it is no RLE, see [`read_runs`]; the sentence begins with `name`.
    """
    size, runs = read_runs(rle, name)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(size, order="F")


def empty_mask(size: tuple[int, int]) -> dict:
    """RLE of a mask of this height and width without a pixel."""
    return _from_runs(check_size(size, "a mask"), np.array([size[0] * size[1]]))


def is_empty(rle: dict, name: str = "a mask") -> bool:
    """Whether a mask has no pixel. Raises as [`decode_mask`] does."""
    return not read_runs(rle, name)[1][1::2].any()


def union_mask(rles: Sequence[dict], size: tuple[int, int]) -> dict:
    """
    RLE of all pixels that are in any of the masks; overlaps count once. Without masks, an empty one.

    Raises:
        ValueError: one of them is no RLE or has another size.
    """
    if not rles:
        return empty_mask(size)
    return _plain(coco_mask.merge([_from_rle(rle, size, "a mask") for rle in rles], intersect=False))


def check_size(size: Any, name: str) -> tuple[int, int]:
    """
    Height and width of a mask.

    Raises:
        ValueError: they are no whole numbers of pixels, or more than any picture has; the sentence begins with `name`.
    """
    is_pair = isinstance(size, (list, tuple, np.ndarray)) and len(size) == 2
    if not is_pair or not all(is_whole(side) and side >= 1 for side in size):
        raise ValueError(f"{name}: a size must be whole numbers of pixels, [height, width], got {shown(size)}")
    if max(size) > MOST_SIDE or size[0] * size[1] > MOST_PIXELS:
        raise ValueError(
            f"{name}: a size may be at most {MOST_SIDE} pixels a side and {MOST_PIXELS} in all, got {shown(size)}"
        )
    return int(size[0]), int(size[1])


def read_runs(rle: Mapping, name: str) -> tuple[tuple[int, int], np.ndarray]:
    """
    Size and runs of a COCO RLE, compressed or not.

    Args:
        rle: a dict of `size`, `[H, W]`, and `counts`: a list of numbers, or the same compressed as `str` or `bytes`.
        name: what to call it in an error message.

    Returns:
        `(H, W)`, and how many pixels, column by column, are off, on, off, … in turn (int64); none of the runs is 0 but
        perhaps the first.

    Raises:
        ValueError: it is anything else, or its runs do not add up to H·W pixels.
    """
    if not isinstance(rle, Mapping) or not {"size", "counts"} <= set(rle):
        got = sorted(map(str, rle)) if isinstance(rle, Mapping) else shown(rle)
        raise ValueError(f"{name}: an RLE must have size and counts, got {got}")
    size, counts = check_size(rle["size"], name), rle["counts"]
    if isinstance(counts, (str, bytes)):
        counts = _decompress(counts, name)
    elif not isinstance(counts, (list, tuple, np.ndarray)) or not all(map(is_whole, counts)):
        raise ValueError(f"{name}: the counts of an RLE must be whole numbers or a text, got {shown(counts)}")
    pixels, least, most = size[0] * size[1], min(counts, default=0), max(counts, default=0)
    if least < 0:
        raise ValueError(f"{name}: a run of an RLE must be at least 0 pixels long, got {shown(least)}")
    # A sum of longer runs might leave 64 bits.
    total = most if most > pixels else sum(map(int, counts))
    if total != pixels:
        raise ValueError(
            f"{name}: its RLE counts {shown(total)} pixels{' in one run' * (most > pixels)}, expected {pixels} as in "
            "the image"
        )
    runs = np.array(counts, dtype=np.int64)
    return size, _without_zeros(runs)


def _decompress(counts: str | bytes, name: str) -> list[int]:
    """Runs of compressed counts; from the fourth on they are written as differences to the last but one."""
    data = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - FIRST_CHARACTER
    last = codes & MORE == 0
    if not codes.size or codes.min() < 0 or codes.max() >= 2 * MORE or not last[-1]:
        raise ValueError(f"{name}: the counts of an RLE must be compressed as COCO does, got {shown(counts)}")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > MOST_CHARACTERS:
        raise ValueError(f"{name}: a run of an RLE takes at most {MOST_CHARACTERS} characters, got {lengths.max()}")
    places = np.arange(len(codes)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & (MORE - 1)) << (BITS * places), starts)
    runs -= np.where(codes[ends] & SIGN, np.int64(1) << (BITS * lengths), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return runs.tolist()


def _without_zeros(runs: np.ndarray) -> np.ndarray:
    """The same pixels without runs of none: pycocotools ends a union where two of these meet."""
    kept = np.flatnonzero(runs)
    is_on = kept % 2
    starts = np.flatnonzero(np.concatenate([[True], is_on[1:] != is_on[:-1]]))
    merged = np.add.reduceat(runs[kept], starts)
    return np.concatenate([[0], merged]) if is_on[0] else merged


def _from_runs(size: tuple[int, int], runs: np.ndarray) -> dict:
    return _plain(coco_mask.frPyObjects({"size": list(size), "counts": runs.tolist()}, *size))


def _plain(rle: dict) -> dict:
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def read_mask(segmentation: Any, size: tuple[int, int], name: str) -> dict:
    """
    RLE of an annotation.

    Args:
        segmentation: polygons (lists of x, y, x, y …, or of [x, y] pairs; one or several), an RLE (compressed, or with
            a list of counts, as crowds have it), a list of RLEs, or nothing for an empty mask. Polygons that hold no
            area, of fewer than three points or with all of them on one line, are left out.
        size: height and width of the image.
        name: what to call the annotation in an error message.

    Returns:
        `{"size": [H, W], "counts": str}`; several parts are united.

    Raises:
        ValueError: none of these forms, an RLE of another size, a point that is no number, or one farther from the
            image than its longer side.
    """
    size = check_size(size, f"{name}: the image")
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not segmentation):
        return empty_mask(size)
    if isinstance(segmentation, Mapping):
        return _from_rle(segmentation, size, name)
    if isinstance(segmentation, (list, tuple)):
        if all(isinstance(part, Mapping) for part in segmentation):
            return union_mask([_from_rle(part, size, name) for part in segmentation], size)
        return _from_polygons(segmentation, size, name)
    raise ValueError(f"{name}: a mask must be polygons or RLE, got {type(segmentation).__name__}")


def _from_rle(rle: Mapping, size: tuple[int, int], name: str) -> dict:
    found, runs = read_runs(rle, name)
    check_same_size(found, size, f"{name}: its mask")
    return _from_runs(found, runs)


def check_same_size(found: tuple[int, int], size: tuple[int, int], name: str) -> None:
    """
    Raises:
        ValueError: height and width `found` of a mask are not the image's `size`; the sentence begins with `name`.
    """
    if tuple(found) != tuple(size):
        hint = SIDEWAYS if tuple(found) == tuple(size)[::-1] else ""
        raise ValueError(f"{name} has size {list(found)}, expected that of the image, {list(size)}{hint}")


def _from_polygons(segmentation, size: tuple[int, int], name: str) -> dict:
    polygons = [flat_polygon(polygon, size, name) for polygon in _rings(segmentation, name)]
    polygons = [polygon for polygon in polygons if has_area(polygon)]
    if not polygons:
        return empty_mask(size)
    return _plain(coco_mask.merge(coco_mask.frPyObjects(polygons, *size), intersect=False))


def _rings(segmentation, name: str) -> list:
    """Rings out of a flat list of numbers, a list of points, a list of flat rings, or a list of rings of points."""
    depth, probe = 0, segmentation
    while isinstance(probe, (list, tuple)):
        depth, probe = depth + 1, probe[0] if len(probe) else 0
    points = depth == 2 and all(isinstance(part, (list, tuple)) and len(part) == 2 for part in segmentation)
    if depth == 1 or points:
        return [segmentation]
    if depth in (2, 3):
        return list(segmentation)
    raise ValueError(f"{name}: a mask must be polygons or RLE, got lists nested {depth} deep")


def flat_polygon(ring: object, size: tuple[int, int], name: str) -> list[float]:
    """
    The numbers x, y, x, y, … of a polygon.

    Args:
        ring: a list of them, or of pairs.
        size: height and width of the image.
        name: what to call its mask in an error message.

    Raises:
        ValueError: it is something else, a number is not finite, a point lies farther from the image than its longer
            side, or the outline is longer than any that was drawn.
    """
    if not isinstance(ring, (list, tuple)):
        raise ValueError(f"{name}: a polygon must be a list of numbers x, y, x, y, …, got {shown(ring)}")
    are_pairs = all(isinstance(part, (list, tuple)) and len(part) == 2 for part in ring)
    numbers = [number for part in ring for number in part] if are_pairs else list(ring)
    if len(numbers) % 2 or not all(map(is_number, numbers)):
        raise ValueError(f"{name}: a polygon must be x, y pairs of numbers, got {len(numbers)} values: {shown(ring)}")
    height, width = size
    margin = max(size)
    for x, y in zip(numbers[::2], numbers[1::2], strict=True):
        if x != x or y != y or x in INFINITE or y in INFINITE:
            raise ValueError(f"{name}: the numbers of a polygon must be finite, got the point ({x}, {y})")
        if not (-margin <= x <= width + margin and -margin <= y <= height + margin):
            raise ValueError(
                f"{name}: the polygon's point ({shown(x)}, {shown(y)}) lies far outside of the image, which is "
                f"{width} wide and {height} high"
            )
    corners = np.array(numbers, dtype=float).reshape(-1, 2)
    outline = np.abs(np.diff(corners, axis=0, append=corners[:1])).max(axis=1).sum() if len(corners) else 0
    if outline > MOST_OUTLINE:
        raise ValueError(f"{name}: a polygon's outline may be {MOST_OUTLINE} pixels long, got {outline:.0f}")
    return corners.ravel().tolist()


def has_area(polygon: Sequence[float]) -> bool:
    """Whether the points x, y, x, y, … are three or more and do not all lie on one line."""
    if len(polygon) < LEAST_POLYGON:
        return False
    from_first = np.array(polygon, dtype=float).reshape(-1, 2)
    from_first -= from_first[0]
    farthest = from_first[np.linalg.norm(from_first, axis=1).argmax()]
    doubled_areas = np.abs(from_first[:, 0] * farthest[1] - from_first[:, 1] * farthest[0])
    return bool(doubled_areas.max() > LEAST_WIDTH * np.linalg.norm(farthest))


def box_polygon(
    x: float, y: float, width: float, height: float, degrees: float = 0.0, pivot: tuple[float, float] | None = None
) -> list[float]:
    """
    The corners x, y, x, y, … of a box.

    Args:
        x, y: its corner at the top left before it is turned, in pixels.
        width, height: in pixels.
        degrees: how far it is turned, clockwise as seen.
        pivot: the point it is turned around; by default its centre.
    """
    corners = np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]], dtype=float)
    return _turned(corners, degrees, (x + width / 2, y + height / 2) if pivot is None else pivot)


def ellipse_polygon(x: float, y: float, radii: tuple[float, float], degrees: float = 0.0) -> list[float]:
    """
    A polygon around an ellipse.

    Args:
        x, y: its centre, in pixels.
        radii: half of its width and of its height before it is turned, in pixels.
        degrees: how far it is turned around its centre, clockwise as seen.
    """
    # So many corners that no side strays a tenth of a pixel from the arc, of the largest that a picture can hold.
    count = int(np.ceil(np.pi / np.arccos(1 - min(0.1 / min(max(*radii, 0.1), MOST_SIDE), 0.2))))
    angles = np.linspace(0, 2 * np.pi, max(count, 12), endpoint=False)
    points = np.stack([x + radii[0] * np.cos(angles), y + radii[1] * np.sin(angles)], axis=1)
    return _turned(points, degrees, (x, y))


def _turned(points: np.ndarray, degrees: float, pivot: tuple[float, float]) -> list[float]:
    """Points `(N, 2)` turned clockwise as seen, where y points down."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return ((points - pivot) @ turn + pivot).ravel().tolist()


def _is_truth(number) -> bool:
    return isinstance(number, (bool, np.bool_))


def is_number(number: object) -> bool:
    """Whether this is a real number, and no truth value."""
    return isinstance(number, Real) and not _is_truth(number)


def is_whole(number: object) -> bool:
    """Whether this is a whole number, and no truth value."""
    return isinstance(number, Integral) and not _is_truth(number)


def shown(value: object) -> str:
    """The beginning of what was got, for an error message, however long or deep it is."""
    return reprlib.repr(value)


def paint_polygon(canvas: np.ndarray, points: Any, value: int, name: str = "a shape") -> None:
    """
    Paint a polygon onto an `(H, W)` uint8 label map, outline included.

    Points are cut to whole pixels and the outline belongs to the polygon, as in the code that ReasonSeg's published
    figures come from; COCO's rasteriser would leave about half of the outline out.

    Raises:
        ValueError: the points are none, see [`flat_polygon`]; the sentence begins with `name`.
    """
    numbers = flat_polygon(points, canvas.shape, name)
    picture = Image.new("L", (canvas.shape[1], canvas.shape[0]))
    corners = [(int(x), int(y)) for x, y in zip(numbers[::2], numbers[1::2], strict=True)]
    draw = ImageDraw.Draw(picture)
    if len(corners) > 2:
        draw.polygon(corners, fill=1, outline=1)
    elif corners:
        draw.line(corners if len(corners) > 1 else corners * 2, fill=1)
    canvas[np.asarray(picture) > 0] = value
