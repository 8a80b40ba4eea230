"""Small copies of datasets in their original layouts, written by the tests: a few images, all the odd cases."""

import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

HEIGHT, WIDTH = 20, 30
SIZE = (HEIGHT, WIDTH)


def box_mask(x0: int, y0: int, x1: int, y1: int, size=SIZE) -> np.ndarray:
    """(H, W) boolean, true for x0 <= x < x1 and y0 <= y < y1."""
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def box_polygon(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    """The polygon that pycocotools fills as `box_mask` of the same numbers."""
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def crowd_rle(mask: np.ndarray) -> dict:
    """Uncompressed RLE, as crowds have it."""
    counts, value = [], False
    for pixel in mask.flatten(order="F"):
        if pixel != value or not counts:
            if not counts and pixel:
                counts.append(0)
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": list(mask.shape), "counts": counts}


def compressed_rle(mask: np.ndarray, text: bool = True) -> dict:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {**rle, "counts": rle["counts"].decode()} if text else rle


def decoded(rle: dict) -> np.ndarray:
    return coco_mask.decode(rle).astype(bool)


def save_image(path: Path, size=SIZE, value: int = 90, exif: int | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (size[1], size[0]), (value, 40, 200))
    tags = Image.Exif()
    if exif is not None:
        tags[0x0112] = exif
    image.save(path, exif=tags)
    return path


def save_json(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def save_pickle(path: Path, content, protocol: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


# Annotations of image 1: two overlapping parts (an L), a crowd as RLE, a compressed RLE in a list, and a line.
ANNOTATIONS = [
    {"id": 10, "image_id": 1, "category_id": 1, "iscrowd": 0,
     "segmentation": [box_polygon(2, 2, 10, 6), box_polygon(2, 4, 6, 16)]},
    {"id": 11, "image_id": 1, "category_id": 1, "iscrowd": 1, "segmentation": crowd_rle(box_mask(0, 0, 30, 3))},
    {"id": 12, "image_id": 1, "category_id": 2, "iscrowd": 0,
     "segmentation": [compressed_rle(box_mask(20, 10, 28, 18))]},
    {"id": 13, "image_id": 2, "category_id": 2, "iscrowd": 0, "segmentation": [box_polygon(5, 5, 9, 9), [1, 1, 4, 1]]},
]  # fmt: skip
PIXELS = {
    10: box_mask(2, 2, 10, 6) | box_mask(2, 4, 6, 16),
    11: box_mask(0, 0, 30, 3),
    12: box_mask(20, 10, 28, 18),
    13: box_mask(5, 5, 9, 9),
}


def instances() -> dict:
    """`instances.json` of the referring datasets."""
    names = {1: "COCO_train2014_000000000001.jpg", 2: "COCO_train2014_000000000002.jpg"}
    return {
        "images": [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH} for i, name in names.items()],
        "annotations": ANNOTATIONS,
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}],
    }


def reference(ref_id: int, ann_id, split: str, *sentences, image_id: int = 1) -> dict:
    """A reference; a sentence is its text, or a dict of its keys."""
    dicts = [sentence if isinstance(sentence, dict) else {"sent": sentence} for sentence in sentences]
    return {
        "ref_id": ref_id,
        "ann_id": ann_id,
        "image_id": image_id,
        "category_id": 1,
        "split": split,
        "file_name": f"COCO_train2014_{image_id:012d}_{ref_id}.jpg",
        "sentences": [{"sent_id": 100 * ref_id + i, "tokens": d["sent"].split(), **d} for i, d in enumerate(dicts)],
    }


def refer_family(root: Path, folder: str, file: str, references: list[dict], images: str | None = None) -> Path:
    """One dataset of the REFER family under `root`, which is returned."""
    base = root / "refer_seg"
    save = save_json if file.endswith(".json") else save_pickle
    save(base / folder / file, references)
    save_json(base / folder / "instances.json", instances())
    place = root / (images or "refer_seg/images/mscoco/images/train2014")
    for image in instances()["images"]:
        save_image(place / image["file_name"])
    return root
