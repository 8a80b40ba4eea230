"""Label Studio's exports in JSON and JSON-MIN: brushes, polygons, boxes and ellipses, in shares of a hundred."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from uground.training.data.files import read_json
from uground.training.data.importers.annotated import (
    PICTURE_ENDINGS,
    AnnotatedPicture,
    Canvas,
    Entry,
    Picture,
    Reading,
    key_of,
    number_of,
    with_article,
)
from uground.training.data.masks import MOST_PIXELS, box_polygon, check_size, ellipse_polygon, is_whole, shown
from uground.training.data.records import Record, checked_list, records

SHAPES = {
    "brushlabels": "brush",
    "polygonlabels": "polygon",
    "rectanglelabels": "rectangle",
    "ellipselabels": "ellipse",
}
BARE_SHAPES = tuple(SHAPES.values())
# Bits of the fields of its run lengths: how many values, of how many bits each, and four sizes of runs.
COUNT_BITS, WORD_BITS, SIZE_BITS, SIZES = 32, 5, 4, 4
# A brush paints red, green, blue and opacity; half of it and more is the object.
CHANNELS, HALF = 4, 128
UPLOAD_MARK = 8
UNANNOTATED = "a picture that nobody annotated"
# Fields of JSON-MIN that come with an annotation, also with one that marks nothing.
OF_AN_ANNOTATION = ("annotation_id", "annotator")


def read_label_studio(reading: Reading) -> Iterator[Entry]:
    """
    Pictures of exports as JSON or JSON-MIN. Of several annotations of a picture the ground truth is taken, or the
    latest; predictions only where nobody annotated, and if they are asked for. A picture without an annotation is left
    out, and nothing is denied of it. Browsers turn pictures as EXIF says, so the numbers refer to that.

    Raises:
        OSError: there are no files. ValueError: one does not make sense.
    """
    for path in reading.files(".json"):
        for task in records(read_json(path), f"{path}:", "task"):
            if "id" in task:
                task = Record(task.value, f"{path} task {shown(task.value['id'])}")
            regions = _chosen(task, reading) if "data" in task else _minimal(task, reading)
            if regions is None:
                continue
            if regions and all("original_width" not in region.value for region in regions):
                reading.tally.leave("a task without regions of a picture", task.name)
                continue
            for region in regions:
                reading.names.update(dict.fromkeys(_labels(region, regions)))
            data = task.record("data") if "data" in task else task
            yield lambda at=(task.name, data, regions, path): _annotated(*at, reading)


def _chosen(task: Record, reading: Reading) -> list[Record] | None:
    """The regions of the annotation that counts; None where nobody annotated, which is said."""
    given = task.records("annotations", "annotation") if "annotations" in task else []
    kept = [one for one in given if not one.flag("was_cancelled")]
    for one in (one for one in given if one.flag("was_cancelled")):
        reading.tally.leave("an annotation that was cancelled", one.name)
    predicted = task.records("predictions", "prediction") if "predictions" in task else []
    if not kept and reading.takes_predictions:
        kept = [one for one in predicted if _score(one) >= reading.least_score]
        for one in (one for one in predicted if _score(one) < reading.least_score):
            reading.tally.leave(f"a prediction of a score below {reading.least_score:g}", one.name)
    else:
        for one in predicted:
            reading.tally.leave("a prediction (--predictions takes those of pictures without annotation)", one.name)
    if not kept:
        reading.tally.leave(UNANNOTATED, task.name)
        return None
    order = [
        (one.flag("ground_truth"), str(one.value.get("updated_at") or ""), place) for place, one in enumerate(kept)
    ]
    best = max(range(len(kept)), key=lambda place: order[place])
    for place, one in enumerate(kept):
        if place != best:
            reading.tally.leave("another annotation of a picture: neither ground truth nor the latest", one.name)
    return kept[best].records("result", "region")


def _score(prediction: Record) -> float:
    return number_of(prediction.value["score"], f"{prediction.name}: score") if "score" in prediction else 0.0


def _minimal(task: Record, reading: Reading) -> list[Record] | None:
    """The regions of a task in JSON-MIN, in the form of JSON; None where nobody annotated, which is said."""
    regions = []
    for key, value in task.value.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for number, one in enumerate(value):
                kind = next((name for name in one if name.endswith("labels") and isinstance(one[name], list)), "?")
                region = {"type": kind, "value": one, "original_width": one.get("original_width")}
                region |= {name: one.get(name) for name in ("original_height", "image_rotation")}
                regions.append(Record(region, f"{task.name}, {key} {number}"))
    if not regions and not any(key in task for key in OF_AN_ANNOTATION):
        reading.tally.leave(UNANNOTATED, task.name)
        return None
    return regions


def _labels(region: Record, regions: list[Record]) -> list[str]:
    """What a region is called, by itself or by one that shares its id."""
    kind = region.filled_text("type")
    if kind in SHAPES:
        value = region.record("value")
        return [name for name in value.texts(kind) if name] if kind in value else []
    if kind in BARE_SHAPES:
        own = [
            one
            for one in regions
            if one.value.get("type") == "labels" and one.value.get("id") == region.value.get("id")
        ]
        return [name for one in own for name in one.record("value").texts("labels") if name]
    return []


def _annotated(place: str, data: Record, regions: list[Record], path: Path, reading: Reading) -> AnnotatedPicture:
    name = _picture_name(data)
    picture = Picture.of(_find(name, place, path, reading), place)
    # An address may end in anything; the file is what it stands for.
    found = AnnotatedPicture(key_of(picture.path, reading.pictures.folder), picture, reading.split_of(path))
    for region in regions:
        kind = region.filled_text("type")
        if kind == "labels":
            continue
        labels = _labels(region, regions)
        found.present.update(labels)
        shape = SHAPES.get(kind, kind)
        if shape not in BARE_SHAPES:
            reading.tally.leave(f"a region of the type {kind}, which has no mask", region.name)
            continue
        if not labels:
            reading.tally.leave("a region without a label", region.name)
            continue
        if region.value.get("image_rotation"):
            reading.tally.leave("a region drawn on a picture that was turned in the tool", region.name)
            continue
        size = check_size([region.take("original_height"), region.take("original_width")], region.name)
        canvas = picture.drawn_on(size, reading.tally, region.name)
        if shape == "rectangle" and not reading.takes_box(region.name, usually=True):
            continue
        mask = _mask(shape, region.record("value"), canvas, region.name)
        for label in labels:
            reading.add(found, label, mask, with_article(shape), region.name)
    return found


def _picture_name(data: Record) -> str:
    texts = [value for value in data.value.values() if isinstance(value, str)]
    # An address may go on behind the name, and a folder of the server be named behind a question mark.
    pictures = [
        text for text in texts if any(part.lower().endswith(PICTURE_ENDINGS) for part in unquote(text).split("?"))
    ]
    if len(pictures) != 1:
        got = " and ".join(map(shown, pictures)) or "none"
        raise ValueError(f"{data.name} must name one picture, got {got}")
    return pictures[0]


def _find(name: str, place: str, path: Path, reading: Reading) -> Path:
    """The file behind an address of Label Studio's server, of a storage or of the web."""
    parts = urlsplit(name)
    local = parse_qs(parts.query).get("d")
    given = unquote(local[0] if local else parts.path if parts.scheme else name).lstrip("/")
    file = PurePosixPath(given).name
    # An upload is called by eight letters and a dash before its own name.
    bare = file[UPLOAD_MARK + 1 :] if file[UPLOAD_MARK : UPLOAD_MARK + 1] == "-" else file
    for form in (given, file, bare):
        at = reading.pictures.lies_at(form, path.parent)
        if at is not None:
            return at
    try:
        return reading.pictures.find(file, place)
    except FileNotFoundError:
        return reading.pictures.find(bare, place)


def _mask(shape: str, value: Record, canvas: Canvas, place: str) -> dict:
    height, width = canvas.size
    if shape == "brush":
        return canvas.pixels(decode_brush(value.items("rle"), canvas.size, place))
    if shape == "polygon":
        points = [checked_list(point, f"{place}: a point") for point in value.items("points")]
        if any(len(point) != 2 for point in points):
            raise ValueError(f"{place}: points must be pairs of x and y, got {shown(points)}")
        shares = [number_of(number, f"{place}: a point") for point in points for number in point]
        sides = (width, height) * len(points)
        return canvas.mask([[share / 100 * side for share, side in zip(shares, sides, strict=True)]], place)
    keys = ("x", "y", "width", "height") if shape == "rectangle" else ("x", "y", "radiusX", "radiusY")
    shares = [number_of(value.take(key), f"{place}: {key}") for key in keys]
    x, y, first, second = (share / 100 * side for share, side in zip(shares, (width, height) * 2, strict=True))
    if first < 0 or second < 0:
        raise ValueError(f"{place}: {keys[2]} and {keys[3]} must be at least 0, got {shares[2:]}")
    degrees = number_of(value.value.get("rotation") or 0, f"{place}: rotation")
    if shape == "ellipse":
        return canvas.mask([ellipse_polygon(x, y, (first, second), degrees)], place)
    return canvas.mask([box_polygon(x, y, first, second, degrees, (x, y))], place)


def decode_brush(data: list, size: tuple[int, int], place: str) -> np.ndarray:
    """
    `(H, W)` boolean mask of a brush: whole numbers in 0..255, the bytes of run lengths of its red, green, blue and
    opacity, pixel by pixel, as `label_studio_converter.brush` writes them.

    Raises:
        ValueError: it is anything else, or of another size; the sentence begins with `place`.
    """
    if not all(is_whole(byte) and 0 <= byte <= 255 for byte in data):
        raise ValueError(f"{place}: rle must be a list of whole numbers in 0..255, got {shown(data)}")
    bits = np.unpackbits(np.array(data, dtype=np.uint8))
    text, at = (bits + ord("0")).tobytes().decode(), 0

    def read(count: int) -> int:
        nonlocal at
        if at + count > len(text):
            raise ValueError(f"{place}: its rle ends too early, after {len(data)} bytes")
        at += count
        return int(text[at - count : at], 2)

    count, word = read(COUNT_BITS), read(WORD_BITS) + 1
    sizes = [read(SIZE_BITS) + 1 for _ in range(SIZES)]
    if count != size[0] * size[1] * CHANNELS or count > MOST_PIXELS * CHANNELS:
        raise ValueError(
            f"{place}: its rle holds {count} values, expected {size[0] * size[1] * CHANNELS}: {CHANNELS} for each of "
            f"{size[1]}x{size[0]} pixels"
        )
    if word != 8:
        raise ValueError(f"{place}: values of its rle must have 8 bits, got {word}")
    values, filled = np.empty(count, dtype=np.uint8), 0
    while filled < count:
        repeats, length = read(1), 1 + read(sizes[read(2)])
        if filled + length > count:
            raise ValueError(f"{place}: its rle holds more than the {count} values it says")
        if repeats:
            values[filled : filled + length] = read(word)
        else:
            if at + length * word > len(text):
                raise ValueError(f"{place}: its rle ends too early, after {len(data)} bytes")
            values[filled : filled + length] = np.packbits(bits[at : at + length * word])
            at += length * word
        filled += length
    return values.reshape(*size, CHANNELS)[..., -1] >= HALF


__all__ = ["decode_brush", "read_label_studio"]
