"""COCO's annotations of instances, as nearly every tool exports them; LVIS, Roboflow and results of ours alike."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from uground.training.data.files import read_json
from uground.training.data.importers.annotated import (
    ONLY_A_BOX,
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    check_in_pixels,
    number_of,
)
from uground.training.data.masks import box_polygon, shown
from uground.training.data.records import Record, checked_key

KEYS = ("images", "annotations", "categories")
CROWD = "a crowd, ignored in queries for its class"


def read_coco(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of files of COCO instances. A crowd is ignored; a box without a mask is left out unless boxes are taken.

    Of LVIS, only what an image lists as absent counts as absent.

    Raises:
        OSError: there is no file of instances. ValueError: one does not make sense.
    """
    files, several = reading.files(".json"), reading.source.is_dir()
    if any("instances" in path.name for path in files):
        # Beside them lie key points and captions of the same objects.
        for path in files:
            if "instances" not in path.name:
                reading.tally.leave("a file beside those called instances", str(path))
        files = [path for path in files if "instances" in path.name]
    found = False
    for path in files:
        content = read_json(path)
        if several and not (isinstance(content, dict) and all(key in content for key in KEYS)):
            reading.tally.leave("a JSON file without images, annotations and categories", str(path))
            continue
        found = True
        yield from _entries(Record(content, str(path)), path, reading)
    if not found:
        raise FileNotFoundError(f"the folder {reading.source} holds no annotations of COCO instances")


def _entries(content: Record, path: Path, reading: Reading) -> Iterator[Entry]:
    for kind in ("images", "categories"):
        seen = set()
        for record in content.records(kind, kind):
            if record.key("id") in seen:
                raise ValueError(f"{path} lists the id {shown(record.key('id'))} twice among its {kind}")
            seen.add(record.key("id"))
    images = content.keyed_records("images", "image")
    categories = content.keyed_records("categories", "category")
    names = {key: category.filled_text("name") for key, category in categories.items()}
    # Exports of Roboflow list the name of them all as a category too; it is absent from no picture.
    above = [one.optional_text("supercategory") for one in categories.values()]
    above = {name for name, own in zip(above, names.values(), strict=True) if name != own}
    reading.names.update(dict.fromkeys(name for name in names.values() if name not in above))
    grouped: dict[int | str, list[Record]] = {key: [] for key in images}
    for annotation in content.records("annotations", "annotation"):
        if "id" in annotation:
            annotation = Record(annotation.value, f"{path} annotation {shown(annotation.value['id'])}")
        image, category = annotation.key("image_id"), annotation.key("category_id")
        if image not in images:
            raise ValueError(f"{annotation.name} is about image {shown(image)}, which {path} does not list")
        if category not in names:
            raise ValueError(f"{annotation.name} is of category {shown(category)}, which {path} does not list")
        grouped[image].append(annotation)
    split = reading.split_of(path, by_file=True)
    for key, image in images.items():
        yield lambda image=image, own=grouped[key]: _annotated(image, own, names, split, path.parent, reading)


def _annotated(
    image: Record, annotations: list[Record], names: dict, split: str | None, beside: Path, reading: Reading
) -> AnnotatedPicture:
    # Annotations of LVIS name their pictures by address only.
    if "file_name" in image:
        file = image.filled_text("file_name")
    else:
        file = PurePosixPath(image.filled_text("coco_url")).name
    picture = Picture.of(reading.pictures.find(file, image.name, beside), image.name)
    size = image.size() if "height" in image or "width" in image else None
    canvas = picture.drawn_on(size, reading.tally, image.name)
    found = AnnotatedPicture(file, picture, split)
    if "neg_category_ids" in image:
        found.absent = _named(image, "neg_category_ids", names)
    found.present.update(_named(image, "not_exhaustive_category_ids", names))
    for annotation in annotations:
        name = names[annotation.key("category_id")]
        found.present.add(name)
        segmentation, what = _segmentation(annotation, canvas, reading)
        if segmentation is None:
            continue
        mask = canvas.mask(segmentation, annotation.name)
        if annotation.flag("iscrowd") or annotation.flag("ignore"):
            reading.tally.take(CROWD, annotation.name)
            found.ignore.append((name, mask))
        else:
            reading.add(found, name, mask, what, annotation.name)
    return found


def _named(image: Record, key: str, names: dict) -> tuple[str, ...]:
    """The names of the categories that an image of LVIS lists."""
    ids = [checked_key(one, f"{image.name}: {key}") for one in image.optional_items(key)]
    return tuple(names[one] for one in ids if one in names)


def _segmentation(annotation: Record, canvas: Canvas, reading: Reading):
    """What is drawn and what it is called; None where it is left out, which is said."""
    segmentation = annotation.value.get("segmentation")
    if segmentation is None or segmentation == []:
        if "bbox" not in annotation:
            reading.tally.leave("an annotation without mask and box", annotation.name)
        elif reading.takes_box(annotation.name, usually=False):
            numbers = [number_of(value, f"{annotation.name}: bbox") for value in annotation.items("bbox")]
            if len(numbers) != 4 or min(numbers[2:]) < 0:
                raise ValueError(
                    f"{annotation.name}: bbox must be [x, y, width, height], got {shown(annotation.value['bbox'])}"
                )
            return [box_polygon(*numbers)], "a box"
        return None, ONLY_A_BOX
    if isinstance(segmentation, dict):
        return segmentation, "a run-length mask"
    if isinstance(segmentation, list) and not any(isinstance(part, dict) for part in segmentation):
        check_in_pixels(segmentation, canvas.size, annotation.name)
    return segmentation, "an object of polygons"


__all__ = ["read_coco"]
