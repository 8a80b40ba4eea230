"""YOLO's labels for segmentation: a text file per picture, a line per object: its class and shares of the picture."""

from collections.abc import Iterator
from pathlib import Path

from uground.processing.text_lines import read_lines
from uground.training.data.importers.annotated import (
    PICTURE_ENDINGS,
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    key_of,
    number_of,
)
from uground.training.data.importers.name_lists import names_of, read_names, read_yaml
from uground.training.data.masks import LEAST_POLYGON, box_polygon
from uground.training.data.records import Record

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
NAME_FILES = ("classes.txt", "obj.names")
# Lists of pictures and notes of the tool, which lie among the labels.
NO_LABELS = ("readme", "train.", "val.", "valid.", "test.")
SPLITS = ("train", "val", "test")
# Tools round shares: what lies this far outside is clipped.
TOLERANCE = 0.01


def read_yolo(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of a data.yaml, a folder that holds one, or a folder of label files. A box is left out unless boxes are
    taken; a picture without a file of labels holds nothing.

    YOLO trains on pictures as EXIF turns them, so its shares refer to that.

    Raises:
        OSError: there are no labels, or no names of classes. ValueError: a file does not make sense.
    """
    source = reading.source
    data = next((source / name for name in DATA_FILES if (source / name).is_file()), None)
    if source.suffix.lower() in (".yaml", ".yml"):
        data = source
    if data is not None and data.is_file():
        content = read_yaml(data)
        if "kpt_shape" in content:
            raise ValueError(f"{data} is about key points (kpt_shape), which have no masks")
        by_file = reading.names_file is not None
        names = read_names(reading.names_file) if by_file else names_of(content.take("names"), f"{data}: names")
        found = list(_listed(content, data, reading))
    else:
        files = [path for path in reading.files(".txt") if path.name not in NAME_FILES]
        for path in [path for path in files if path.name.lower().startswith(NO_LABELS)]:
            reading.tally.leave("a text file that by its name holds no labels", str(path))
            files.remove(path)
        beside = next((source / name for name in NAME_FILES if (source / name).is_file()), None)
        if reading.names_file is None and beside is None:
            raise ValueError(
                f"{source} holds numbers of classes and no names: name a list of them, or data.yaml, with --names"
            )
        names = read_names(reading.names_file or beside)
        if not files:
            raise FileNotFoundError(f"the folder {source} holds no label files (*.txt)")
        found = [(None, path, reading.split_of(path)) for path in files]
    reading.names.update(dict.fromkeys(names.values()))
    for picture, labels, split in found:
        yield lambda at=(picture, labels, split): _annotated(*at, names, reading)


def _listed(content: Record, data: Path, reading: Reading) -> Iterator[tuple[Path, Path, str]]:
    """Picture, labels and split of what a data.yaml lists."""
    root = data.parent / (content.text("path") if "path" in content else "")
    if not root.is_dir():
        # Written on another machine, or relative to a folder that only its writer knows.
        reading.tally.note(f"the path of {data.name} is not here: taken as its own folder", str(data))
        root = data.parent
    splits = [name for name in SPLITS if name in content]
    if not splits:
        raise ValueError(f"{content.name} must have train, val or test, got none of them")
    for split in splits:
        given = content.value[split]
        for place in given if isinstance(given, list) else [given]:
            if not isinstance(place, str):
                raise ValueError(f"{content.name}: {split} must be the path of a folder or list, got {place!r}")
            for picture in _pictures(root, place, f"{content.name}: {split}", reading):
                parts = list(picture.parent.parts)
                if "images" in parts:
                    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
                yield picture, Path(*parts) / f"{picture.stem}.txt", reading.split or split


def _pictures(root: Path, place: str, name: str, reading: Reading) -> list[Path]:
    # Exports of Roboflow go one folder up too many, which YOLO itself forgives.
    candidates = [root / place, root / place.removeprefix("../"), reading.pictures.folder / place]
    at = next((path for path in candidates if path.exists()), None)
    if at is None:
        raise FileNotFoundError(f"{name} names {candidates[0]}, which does not exist")
    if at.is_dir():
        return sorted(path for path in at.rglob("*") if path.suffix.lower() in PICTURE_ENDINGS)
    lines = [line.strip() for line in read_lines(at) if line.strip()]
    return [
        reading.pictures.find(line, f"{at}:{number}", beside=at.parent if line.startswith("./") else root)
        for number, line in enumerate(lines, start=1)
    ]


def _annotated(picture: Path | None, labels: Path, split: str | None, names: dict, reading: Reading):
    folder = reading.source if reading.source.is_dir() else reading.source.parent
    if picture is None:
        stem = key_of(labels.with_suffix(""), folder)
        # What lies below `labels/` is called as the picture below `images/`.
        key = stem.removeprefix("labels/")
        pictures = f"/{stem}".replace("/labels/", "/images/")[1:]
        picture = reading.pictures.of_stem((stem, key, pictures), str(labels))
    else:
        key = key_of(picture, folder)
    image = Picture.of(picture, str(labels))
    found = AnnotatedPicture(key, image, split)
    canvas = image.drawn_on(None, reading.tally, str(labels))
    if not labels.is_file():
        reading.tally.note("a picture without a file of labels: nothing is in it", str(labels))
        return found
    for number, line in enumerate(read_lines(labels), start=1):
        if line.strip():
            _read_line(line.split(), f"{labels}:{number}", canvas, names, found, reading)
    return found


def _read_line(fields: list[str], place: str, canvas: Canvas, names: dict, found: AnnotatedPicture, reading: Reading):
    numbers = [number_of(field, f"{place}: field {i}") for i, field in enumerate(fields, start=1)]
    label, shares = numbers[0], numbers[1:]
    if label not in names:
        raise ValueError(f"{place} is of class {fields[0]}, which has no name; there are {len(names)} names")
    name = names[int(label)]
    found.present.add(name)
    if len(shares) != 4 and (len(shares) < LEAST_POLYGON or len(shares) % 2):
        raise ValueError(
            f"{place} must hold a class and 4 numbers of a box, or 3 and more pairs of a polygon, got {len(shares)} "
            "numbers behind the class; leave out confidences"
        )
    if not all(-TOLERANCE <= share <= 1 + TOLERANCE for share in shares):
        raise ValueError(f"{place} must hold shares of the picture in 0..1, got {max(shares, key=abs):g}")
    height, width = canvas.size
    if len(shares) == 4:
        if not reading.takes_box(place, usually=False):
            return
        x, y, w, h = shares
        polygon = box_polygon((x - w / 2) * width, (y - h / 2) * height, w * width, h * height)
        reading.add(found, name, canvas.mask([polygon], place), "a box", place)
        return
    polygon = [share * side for share, side in zip(shares, (width, height) * (len(shares) // 2), strict=True)]
    reading.add(found, name, canvas.mask([polygon], place), "a polygon", place)


__all__ = ["read_yolo"]
