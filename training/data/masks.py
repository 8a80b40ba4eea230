"""Masks as the example schema holds them, COCO RLE, from all the forms that annotations have."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

# Fewer numbers are no area, and pycocotools would take four for a box.
LEAST_POLYGON = 6


def encode_mask(mask: np.ndarray) -> dict:
    """COCO RLE `{"size": [H, W], "counts": str}` of an `(H, W)` boolean mask."""
    return _plain(coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)))


def decode_mask(rle: dict) -> np.ndarray:
    """`(H, W)` boolean mask of a COCO RLE."""
    return coco_mask.decode(rle).astype(bool)


def empty_mask(size: tuple[int, int]) -> dict:
    """RLE of a mask of this height and width without a pixel."""
    return encode_mask(np.zeros(size, dtype=bool))


def is_empty(rle: dict) -> bool:
    """Whether a mask has no pixel."""
    return int(coco_mask.area(rle)) == 0


def _plain(rle: dict) -> dict:
    counts = rle["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def union_mask(rles: Sequence[dict], size: tuple[int, int]) -> dict:
    """RLE of all pixels that are in any of the masks; overlaps count once. Without masks, an empty one."""
    return _plain(coco_mask.merge(list(rles), intersect=False)) if rles else empty_mask(size)


def read_mask(segmentation, size: tuple[int, int], name: str) -> dict:
    """
    RLE of an annotation.

    Args:
        segmentation: polygons (lists of x, y, x, y …, or of [x, y] pairs; one or several), an RLE (compressed, or with
            a list of counts, as crowds have it), a list of RLEs, or nothing for an empty mask. Polygons of fewer than
            three points are left out: they hold no area.
        size: height and width of the image.
        name: what to call the annotation in an error message.

    Returns:
        `{"size": [H, W], "counts": str}`; several parts are united.

    Raises:
        ValueError: none of these forms, or an RLE of another size.
    """
    if segmentation is None or (isinstance(segmentation, (list, tuple)) and not segmentation):
        return empty_mask(size)
    if isinstance(segmentation, dict):
        return _from_rle(segmentation, size, name)
    if isinstance(segmentation, (list, tuple)):
        if all(isinstance(part, dict) for part in segmentation):
            return union_mask([_from_rle(part, size, name) for part in segmentation], size)
        return _from_polygons(segmentation, size, name)
    raise ValueError(f"{name}: a mask must be polygons or RLE, got {type(segmentation).__name__}")


def _from_rle(rle: dict, size: tuple[int, int], name: str) -> dict:
    if not {"size", "counts"} <= set(rle):
        raise ValueError(f"{name}: an RLE must have size and counts, got {sorted(rle)}")
    if tuple(map(int, rle["size"])) != tuple(size):
        raise ValueError(f"{name}: its mask has size {list(rle['size'])}, expected that of the image, {list(size)}")
    if isinstance(rle["counts"], list):
        if sum(rle["counts"]) != size[0] * size[1]:
            raise ValueError(
                f"{name}: its RLE counts {sum(rle['counts'])} pixels, expected {size[0] * size[1]} as in the image"
            )
        rle = coco_mask.frPyObjects(rle, *size)
    return _plain(rle)


def _from_polygons(segmentation, size: tuple[int, int], name: str) -> dict:
    polygons = [_flat(polygon, name) for polygon in _rings(segmentation, name)]
    polygons = [polygon for polygon in polygons if len(polygon) >= LEAST_POLYGON]
    return union_mask(coco_mask.frPyObjects(polygons, *size), size) if polygons else empty_mask(size)


def _rings(segmentation, name: str) -> list:
    """Rings out of a flat list of numbers, a list of points, a list of flat rings, or a list of rings of points."""
    depth, probe = 0, segmentation
    while isinstance(probe, (list, tuple)):
        depth, probe = depth + 1, probe[0] if len(probe) else 0
    points = depth == 2 and all(len(part) == 2 for part in segmentation)
    if depth == 1 or points:
        return [segmentation]
    if depth in (2, 3):
        return list(segmentation)
    raise ValueError(f"{name}: a mask must be polygons or RLE, got lists nested {depth} deep")


def _flat(ring, name: str) -> list[float]:
    numbers = [number for part in ring for number in (part if isinstance(part, (list, tuple)) else [part])]
    if len(numbers) % 2 or not all(isinstance(number, (int, float)) for number in numbers):
        raise ValueError(f"{name}: a polygon must be x, y pairs of numbers, got {len(numbers)} values")
    return [float(number) for number in numbers]


def paint_polygon(canvas: np.ndarray, points, value: int) -> None:
    """
    Paint a polygon onto an `(H, W)` uint8 label map, outline included.

    Points are cut to whole pixels and the outline belongs to the polygon, as in the code that ReasonSeg's published
    figures come from; COCO's rasteriser would leave about half of the outline out.
    """
    picture = Image.new("L", (canvas.shape[1], canvas.shape[0]))
    corners = [(int(x), int(y)) for x, y in points]
    draw = ImageDraw.Draw(picture)
    if len(corners) > 2:
        draw.polygon(corners, fill=1, outline=1)
    elif corners:
        draw.line(corners if len(corners) > 1 else corners * 2, fill=1)
    canvas[np.asarray(picture) > 0] = value
