"""Semantic and part segmentation as something to ask for: one sample per class that an image holds.

Label maps: ADE20K, COCO-Stuff, Mapillary Vistas v2.0. COCO annotations: PACO-LVIS and PASCAL-Part. All objects of a
class are one target: "the cup" of a picture with three cups would mean none of them in particular. Unlabelled pixels
may belong to any class, so they are ignored.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from uground.processing.image_reading import opened_picture
from uground.training.data.class_names import ADE20K, COCO_STUFF
from uground.training.data.files import checked_root, first_existing, image_size, read_json, require, require_images
from uground.training.data.masks import encode_mask, is_empty, read_mask, shown, union_mask
from uground.training.data.records import Record
from uground.training.data.samples import NO_AREA, NO_NAME, Sample, Skipped

UNLABELLED = 255


@dataclass(frozen=True)
class MapLayout:
    """
    Where label maps and pictures lie, `{split}` standing for the folder of the split.

    Attributes:
        labels, images: candidates below the root.
        splits: folder of each split.
        first_label: label of the first class name; lower ones are unlabelled.
    """

    labels: tuple[str, ...]
    images: tuple[str, ...]
    splits: dict[str, str]
    first_label: int = 0


MAPS = {
    "ade20k": MapLayout(
        ("ade20k/annotations/{split}", "annotations/{split}"),
        ("ade20k/images/{split}", "images/{split}"),
        {"train": "training", "val": "validation"},
        first_label=1,
    ),
    "cocostuff": MapLayout(
        ("cocostuff/{split}", "{split}"), ("coco/{split}", "{split}"), {"train": "train2017", "val": "val2017"}
    ),
    "mapillary": MapLayout(
        ("mapillary/{split}/v2.0/labels", "{split}/v2.0/labels"),
        ("mapillary/{split}/images", "{split}/images"),
        {"train": "training", "val": "validation"},
    ),
}


def read_label_maps(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    One sample per class and image of a dataset in `MAPS`; a class whose name is blank is skipped.

    Raises:
        OSError: files are missing or unreadable.
        ValueError: a label has no name, or a map and its picture differ in size.
    """
    layout = MAPS[dataset]
    root = checked_root(root, dataset)
    part = layout.splits[split]
    labels = first_existing(root, [place.format(split=part) for place in layout.labels])
    images = first_existing(root, [place.format(split=part) for place in layout.images])
    require(dataset, root, (labels, images))
    names = _mapillary_names(root) if dataset == "mapillary" else COCO_STUFF if dataset == "cocostuff" else ADE20K
    maps = sorted(labels.glob("*.png"))
    if not maps:
        raise FileNotFoundError(f"{dataset} is incomplete under {root}; {labels} holds no label maps (*.png)")
    require_images(dataset, root, [images / f"{path.stem}.jpg" for path in maps])
    return _map_samples(dataset, split, maps, images, names, layout.first_label)


def _mapillary_names(root: Path) -> tuple[str, ...]:
    path = first_existing(root, ("mapillary/config_v2.0.json", "config_v2.0.json"))
    require("mapillary", root, (path,))
    labels = Record(read_json(path), str(path)).records("labels", "label")
    return tuple(label.text("readable").lower() for label in labels)


def _read_labels(path: Path) -> np.ndarray:
    """The label map `(H, W)` of a file: numbers of a palette count as they are, whatever their colours."""
    with opened_picture(path, f"the label map {path}") as opened:
        labels = np.asarray(opened)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"the label map {path} must have one whole number per pixel, got {labels.dtype} {labels.shape}"
        )
    return labels


def _map_samples(dataset, split, maps: list[Path], images: Path, names, first_label: int):
    for path in maps:
        picture = images / f"{path.stem}.jpg"
        labels = _read_labels(path)
        size = image_size(picture)
        if labels.shape != size:
            raise ValueError(
                f"{dataset}: the label map {path.name} has size {labels.shape}, expected that of its image, {size}"
            )
        unlabelled = (labels == UNLABELLED) | (labels < first_label)
        ignore = encode_mask(unlabelled) if unlabelled.any() else None
        for label in np.unique(labels[~unlabelled]).tolist():
            if label - first_label >= len(names):
                raise ValueError(f"{dataset}: {path} holds label {label}, but there are {len(names)} classes")
            name = names[label - first_label]
            if not name:
                yield Skipped(f"{path} label {label}", NO_NAME)
            elif _askable(dataset, name):
                yield Sample(
                    id=f"{dataset}-{split}-{path.stem}-{label}",
                    image=str(picture),
                    size=size,
                    attribute="res",
                    phrases=(name,),
                    masks=(encode_mask(labels == label),),
                    ignore=ignore,
                )


def _askable(dataset: str, name: str) -> bool:
    return "-" not in name if dataset == "cocostuff" else name != "unlabeled"


# Of each COCO dataset: its annotation file and its pictures below the root, per split.
COCO_FORM = {
    "paco-lvis": (
        {"train": "paco_lvis_v1_train.json", "val": "paco_lvis_v1_val.json", "test": "paco_lvis_v1_test.json"},
        ("vlpart/paco/annotations", "paco/annotations", "annotations"),
        ("coco", "."),
    ),
    "pascal-part": (
        {"train": "train.json", "val": "val.json"},
        ("vlpart/pascal_part", "pascal_part", "."),
        (
            "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages",
            "pascal_part/VOCdevkit/VOC2010/JPEGImages",
            "VOCdevkit/VOC2010/JPEGImages",
        ),
    ),
}


def read_coco_parts(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    One sample per class and image of a dataset in `COCO_FORM`; a class `object:part` is "the part of the object".

    Crowds belong to their class like any object. A class whose objects have no area, or whose name is blank, is
    skipped.

    Raises:
        OSError: files are missing. ValueError: an annotation does not make sense.
    """
    root = checked_root(root, dataset)
    files, places, pictures = COCO_FORM[dataset]
    path = first_existing(root, places) / files[split]
    require(dataset, root, (path,))
    content = Record(read_json(path), str(path))
    folder = first_existing(root, pictures)
    images = content.keyed_records("images", "image")
    categories = content.keyed_records("categories", "category")
    names = {number: part_name(category.text("name")) for number, category in categories.items()}
    grouped: dict[int | str, dict[int | str, list[Record]]] = {}
    for annotation in content.keyed_records("annotations", "annotation").values():
        image, category = annotation.key("image_id"), annotation.key("category_id")
        if image not in images:
            raise ValueError(f"{annotation.name} is about image {shown(image)}, which {path} does not list")
        if category not in names:
            raise ValueError(f"{annotation.name} is of category {shown(category)}, which {path} does not list")
        grouped.setdefault(image, {}).setdefault(category, []).append(annotation)
    require_images(dataset, root, [folder / images[image].filled_text("file_name") for image in grouped])
    return _part_samples(dataset, split, grouped, images, names, folder)


def _part_samples(dataset, split, grouped: dict, images: dict, names: dict, folder: Path):
    for image_id, by_category in grouped.items():
        image = images[image_id]
        size = image.size()
        for category, annotations in by_category.items():
            mask = union_mask([read_mask(one.take("segmentation"), size, one.name) for one in annotations], size)
            if not names[category] or is_empty(mask):
                yield Skipped(annotations[0].name, NO_AREA if names[category] else NO_NAME)
                continue
            yield Sample(
                id=f"{dataset}-{split}-{image_id}-{category}",
                image=str(folder / image.filled_text("file_name")),
                size=size,
                attribute="res",
                phrases=(names[category],),
                masks=(mask,),
            )


def part_name(name: str) -> str:
    """ "mug_(cup):handle" → "the handle of the mug"; "mug_(cup)" → "mug"; "" where a part of it is blank."""
    words = [part.split("_(")[0].replace("_", " ").strip() for part in name.split(":")]
    if not all(words):
        return ""
    return f"the {words[1]} of the {words[0]}" if len(words) == 2 else words[0]
