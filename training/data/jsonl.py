"""A user's own data: a JSONL file whose lines each ask about one image.

    {"image": "a.jpg", "query": "the red cup", "masks": [[[12, 8, 40, 8, 40, 30, 12, 30]]]}
    {"image": "a.jpg", "query": "cup and spoon", "phrases": ["the cup", "the spoon"], "masks": [{"size": …}, "m.png"]}
    {"image": "b.jpg", "query": "the dog", "masks": []}
    {"image": "b.jpg", "query": "What is it?", "answer": "A cat on a sofa."}
    {"image": "b.jpg", "turns": [{"query": "the cat", "masks": […]}, {"query": "And its tail?", "masks": […]}]}

A mask is a list of polygons (x, y, x, y, … in pixels), a COCO RLE, the path of a PNG of black and one more colour,
`{"png": path, "value": N}` or `{"png": path, "channel": "alpha"}` for a PNG that holds more, or null for a phrase
whose object is not there. Paths are relative to the file. Without an `answer` one is made of the phrases. `ignore` is
a mask of pixels that count neither way, `boxes` holds one [x0, y0, x1, y1] per mask and is checked against it, `id`
(no two lines have the same) and `attribute` are kept. Where lines have a `split`, `mine.jsonl:val` names those of one.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image

from uground.processing.image_reading import read_image
from uground.processing.text_lines import decode_line, raw_lines
from uground.training.data.mask_pictures import read_mask_picture
from uground.training.data.masks import (
    LEAST_POLYGON,
    SIDEWAYS,
    decode_mask,
    flat_polygon,
    has_area,
    is_empty,
    is_number,
    is_whole,
    read_mask,
    shown,
)
from uground.training.data.samples import OVERALL

SEGMENT, REJECT = "[SEG]", "[REJ]"
TURN_KEYS = {"query", "answer", "phrases", "masks", "boxes"}
KEYS = {"id", "image", "ignore", "attribute", "split", "turns"} | TURN_KEYS
# Annotation tools round: a corner may lie this many pixels outside of the image.
OUTSIDE_TOLERANCE = 1.0
# Overlap with the box around its mask, below which a box belongs to something else.
LEAST_BOX_IOU = 0.5
POINTS = "; it looks like a list of points, write [x, y, x, y, …] without inner lists"
COCO_KEYS = {"images", "annotations"}
ID_KEY, SPLIT_KEY = b'"id"', b'"split"'
JSONL = ".jsonl"


class JsonlSource:
    """
    A JSONL file as items for the collator; a line is read and checked when it is asked for.

    Args:
        path: of the file.
        split: the lines of this split only; a file whose lines have none is one split, whatever it is called.

    Attributes:
        splits: those that its lines have, in order; empty where they have none.

    Raises:
        OSError: the file is missing.
        ValueError: it has no lines, or none of the split, or is another form of text or JSON as a whole.
    """

    def __init__(self, path: str | Path, split: str | None = None):
        self.path = Path(path)
        if not self.path.is_file():
            kind = "is a folder" if self.path.is_dir() else "does not exist"
            raise FileNotFoundError(f"the data file {path} {kind}")
        lines = raw_lines(self.path)
        self._lines = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        if not self._lines:
            raise ValueError(f"the data file {path} is empty, expected one JSON object per line")
        _refuse_other_forms([line for _, line in self._lines], self.name_of(0))
        own = [_split_of(line) for _, line in self._lines]
        self.splits = list(dict.fromkeys(name for name in own if name is not None))
        self.split = split if self.splits else None
        if self.split is not None:
            if split not in self.splits:
                raise ValueError(f"{path} has no split {split!r}; it has: {', '.join(self.splits)}")
            # A line that does not say stays, to be refused when it is read.
            self._lines = [line for line, name in zip(self._lines, own, strict=True) if name in (split, None)]
        self._repeated = _repeated_ids([line for _, line in self._lines])

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        """
        Item `{"image", "examples"}` of a line.

        Raises:
            OSError, ValueError: the line is bad; the sentence begins with file and line number.
        """
        name = self.name_of(index)
        if index in self._repeated:
            raise ValueError(f"{name}: the id {shown(self._repeated[index])} stands in an earlier line too")
        line = self._lines[index][1]
        example = read_line(decode_line(line, name), self.path.parent, name)
        if self.splits and _split_of(line) is None:
            raise ValueError(f"{name}: the line has no split, but others have: {', '.join(self.splits)}")
        return {"image": example["image"], "examples": [example]}

    def name_of(self, index: int) -> str:
        """What a line is called in messages: file and line number."""
        return f"{self.path}:{self._lines[index][0]}"

    def line(self, index: int) -> dict:
        """
        A line as it stands, its image and masks not opened.

        Raises:
            ValueError: it is no JSON object; the sentence begins with file and line number.
        """
        name = self.name_of(index)
        return parse_line(decode_line(self._lines[index][1], name), name)

    def record(self) -> dict:
        """What the data are, for a run that is to be resumed: changed lines change it."""
        content = b"\n".join(line for _, line in self._lines)
        split = {} if self.split is None else {"split": self.split}
        return {"jsonl": self.path.name, **split, "content": hashlib.sha256(content).hexdigest()[:16]}


def named_file(name: str) -> tuple[str, str | None] | None:
    """Path and split of `mine.jsonl` or `mine.jsonl:SPLIT`; None for what is called otherwise."""
    if name.endswith(JSONL):
        return name, None
    path, colon, split = name.rpartition(":")
    return (path, split) if colon and split and path.endswith(JSONL) else None


def _load(text: bytes):
    """JSON, or None where it is none: what is wrong with it is said when its line is read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _refuse_other_forms(lines: list[bytes], name: str) -> None:
    """Say what a whole file looks like, if it is JSON but no JSON lines."""
    first = _load(lines[0])
    whole = first if first is not None else _load(b"\n".join(lines))
    expected = "expected one JSON object per line, each with an image and a query"
    if isinstance(whole, dict) and set(whole) >= COCO_KEYS:
        raise ValueError(f"{name}: the file looks like annotations of COCO, {expected}")
    if isinstance(whole, list) and (first is None or len(lines) == 1):
        raise ValueError(f"{name}: the file looks like one JSON array, {expected}")
    if first is None and whole is not None:
        raise ValueError(f"{name}: the file looks like one JSON object over several lines, {expected}")


def _split_of(line: bytes) -> str | None:
    """The split of a line, None where it has none that can be read."""
    record = _load(line) if SPLIT_KEY in line else None
    split = record.get("split") if isinstance(record, dict) else None
    return split if isinstance(split, str) and split.strip() else None


def _repeated_ids(lines: list[bytes]) -> dict[int, str]:
    """The id of each line whose id stands in an earlier one, by the index of the line."""
    seen: set[str] = set()
    repeated = {}
    for index, line in enumerate(lines):
        record = _load(line) if ID_KEY in line else None
        identifier = record.get("id") if isinstance(record, dict) else None
        if isinstance(identifier, str) or is_whole(identifier):
            if str(identifier) in seen:
                repeated[index] = str(identifier)
            seen.add(str(identifier))
    return repeated


def read_line(line: str, folder: Path, name: str) -> dict:
    """
    An example of the common schema, with its image read.

    Args:
        line: JSON of the line.
        folder: which paths are relative to.
        name: what to call the line in an error message.

    Raises:
        OSError: an image or a mask file is missing or unreadable.
        ValueError: the line does not say what it must; the sentence begins with `name`.
    """
    record = parse_line(line, name)
    _check_keys(record, KEYS, name)
    if not isinstance(record.get("image"), str):
        raise ValueError(f"{name}: image must be the path of a picture, got {shown(record.get('image'))}")
    image = _read_picture(folder / _text(record["image"], "image", name), name)
    return build_example(record, image, folder, name)


def parse_line(line: str, name: str) -> dict:
    """The object of a line; a `ValueError` that begins with `name` for anything else."""
    record = _parse(line, name)
    if not isinstance(record, dict):
        raise ValueError(f"{name}: a line must be a JSON object, got {type(record).__name__}")
    return record


def asks_for_masks(record: dict) -> bool:
    """Whether a line wants masks, or to hear that nothing is there, and not an answer in words alone."""
    turns = record.get("turns")
    asked = turns[-1] if isinstance(turns, list) and turns and isinstance(turns[-1], dict) else record
    answer = asked.get("answer")
    attribute = record.get("attribute") or (_attribute(answer) if isinstance(answer, str) else None)
    return attribute != "vqa"


def _parse(line: str, name: str):
    try:
        return json.loads(line, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError(f"{name}: the line is not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        hint = (
            "; it looks like part of a JSON array" if line.lstrip()[:1] in "[]," or line.rstrip()[-1:] == "," else ""
        )
        raise ValueError(f"{name}: the line is not JSON: {error}{hint}") from error


def _object(pairs: list[tuple]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
    return found


def _refuse_constant(constant: str):
    raise ValueError(f"{constant} is no number of JSON")


def build_example(record: dict, image: Image.Image, folder: Path, name: str) -> dict:
    """An example of the common schema from a line's `record`; other arguments and errors as in [`read_line`]."""
    size = (image.height, image.width)
    turns = record.get("turns")
    if turns is None:
        read = [_read_turn(record, size, folder, name)]
    else:
        if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"{name}: turns must be a list of objects with a query each, got {shown(turns)}")
        beside = sorted(key for key in TURN_KEYS if record.get(key) is not None)
        if beside:
            raise ValueError(
                f"{name}: with turns, {', '.join(beside)} must stand within a turn, got them beside turns"
            )
        read = []
        for number, turn in enumerate(turns, start=1):
            _check_keys(turn, TURN_KEYS, f"{name}: turn {number}")
            read.append(_read_turn(turn, size, folder, f"{name}: turn {number}"))
    if record.get("split") is not None:
        _text(record["split"], "split", name)
    last, ignore, identifier, attribute = read[-1], *(record.get(key) for key in ("ignore", "id", "attribute"))
    if not (identifier is None or is_whole(identifier)):
        _text(identifier, "id", name)
    if attribute is not None and _text(attribute, "attribute", name) == OVERALL:
        raise ValueError(f"{name}: attribute must name a part of the data, got {OVERALL!r}, which is all of them")
    example = {
        "id": name if identifier is None else str(identifier),
        "image": image,
        "query": last["query"],
        "answer": last["answer"],
        "phrases": [phrase for turn in read for phrase in turn["phrases"]],
        "masks": [mask for turn in read for mask in turn["masks"]],
        "ignore": None if ignore is None else _read_one(ignore, size, folder, f"{name}: ignore"),
        "attribute": _attribute(last["answer"]) if attribute is None else attribute,
    }
    if len(read) > 1:
        example["history"] = [{"query": turn["query"], "answer": turn["answer"]} for turn in read[:-1]]
    return example


def _check_keys(record: dict, allowed: set[str], name: str) -> None:
    unknown = sorted(set(record) - allowed)
    if unknown:
        raise ValueError(f"{name}: unknown keys {unknown}, expected some of {sorted(allowed)}")


def _text(value, what: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name}: {what} must be a text that is not empty, got {shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name}: {what} holds {value[error.start]!r}, half of a character that JSON writes as two, expected both "
            "halves or the character itself"
        ) from None
    return value


def _read_picture(path: Path, name: str) -> Image.Image:
    try:
        return read_image(str(path), f"the image {path}")
    except OSError as error:
        raise OSError(f"{name}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _read_turn(turn: dict, size: tuple[int, int], folder: Path, name: str) -> dict:
    """Query, answer, phrases and masks of one question; a null mask has turned into a reject token."""
    query = _text(turn.get("query"), "query", name)
    masks, answer, phrases = turn.get("masks"), turn.get("answer"), turn.get("phrases")
    if masks is None and answer is None:
        raise ValueError(f"{name}: masks or an answer are needed, got neither; masks: [] says that nothing is there")
    masks = [] if masks is None else masks
    if not isinstance(masks, list):
        raise ValueError(f"{name}: masks must be a list with one entry per object, got {type(masks).__name__}")
    if phrases is not None:
        _check_phrases(phrases, len(masks), name)
    if answer is None:
        answer = _compose(phrases, [mask is not None for mask in masks])
    else:
        _text(answer, "answer", name)
    present = [number for number, mask in enumerate(masks) if mask is not None]
    if answer.count(SEGMENT) != len(present):
        raise ValueError(
            f"{name}: the answer {shown(answer)} holds {answer.count(SEGMENT)} {SEGMENT}, expected one for each of "
            f"its {len(present)} masks"
        )
    read = {number: _read_one(masks[number], size, folder, f"{name}: mask {number + 1}") for number in present}
    for number, rle in read.items():
        if is_empty(rle):
            raise ValueError(f"{name}: mask {number + 1} covers no pixel; write null for an object that is not there")
    _check_boxes(turn.get("boxes"), len(masks), read, size, name)
    named = [] if phrases is None else [phrases[number] for number in present]
    return {"query": query, "answer": answer, "phrases": named, "masks": list(read.values())}


def check_phrase(phrase: object, what: str, name: str) -> None:
    """
    Raises:
        ValueError: this cannot name an object in an answer; the sentence begins with `name` and `what` it is.
    """
    for token in (SEGMENT, REJECT):
        if token in _text(phrase, what, name):
            raise ValueError(f"{name}: {what} must name an object, got {shown(phrase)} with {token}")


def _check_phrases(phrases, count: int, name: str) -> None:
    if not isinstance(phrases, list):
        raise ValueError(f"{name}: phrases must be a list with one phrase per mask, got {shown(phrases)}")
    if len(phrases) != count:
        raise ValueError(f"{name}: {len(phrases)} phrases name {count} masks, expected one phrase per mask")
    for number, phrase in enumerate(phrases, start=1):
        check_phrase(phrase, f"phrase {number}", name)


def _compose(phrases: list[str] | None, present: list[bool]) -> str:
    """An answer to a query whose line has none."""
    tokens = [SEGMENT if there else REJECT for there in present] or [REJECT]
    if phrases is None or len(tokens) == 1:
        parts = tokens
        lead = "It is " if len(tokens) == 1 else "They are "
    else:
        parts, lead = [f"{phrase} is {token}" for phrase, token in zip(phrases, tokens, strict=True)], ""
    joined = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"{lead}{joined}."


def _attribute(answer: str) -> str:
    count = answer.count(SEGMENT)
    if count:
        return "res" if count == 1 else "multi_rs"
    return "fp_res" if REJECT in answer else "vqa"


def _read_one(mask, size: tuple[int, int], folder: Path, name: str) -> dict:
    """COCO RLE of a mask in any of the accepted forms."""
    if isinstance(mask, str) or (isinstance(mask, dict) and "png" in mask):
        for text in [mask] if isinstance(mask, str) else filter(lambda value: isinstance(value, str), mask.values()):
            _text(text, "the path of a mask", name)
        return read_mask_picture(mask, size, folder, name)
    if isinstance(mask, list):
        if not mask:
            raise ValueError(f"{name}: a mask of polygons must hold at least one, got an empty list")
        for polygon in mask:
            _check_polygon(polygon, size, name)
    elif not isinstance(mask, dict):
        hint = "; two levels of lists are missing, write [[[x, y, …]]]" if is_number(mask) else ""
        raise ValueError(f"{name}: a mask must be polygons, a COCO RLE or the path of a PNG, got {shown(mask)}{hint}")
    return read_mask(mask, size, name)


def _check_polygon(polygon, size: tuple[int, int], name: str) -> None:
    """More than readers of published data ask: here somebody can mend the line."""
    if not isinstance(polygon, list) or not all(map(is_number, polygon)):
        hint = "; a level of lists is missing, write [[x, y, …]]" if is_number(polygon) else ""
        if isinstance(polygon, list) and any(isinstance(part, list) for part in polygon):
            hint = POINTS
        raise ValueError(f"{name}: a polygon must be a flat list of numbers x, y, x, y, …, got {shown(polygon)}{hint}")
    if len(polygon) % 2 or len(polygon) < LEAST_POLYGON:
        hint = POINTS if len(polygon) == 2 else ""
        raise ValueError(f"{name}: a polygon must have at least 3 points of x and y, got {len(polygon)} numbers{hint}")
    if all(0 <= number <= 1 for number in polygon):
        raise ValueError(
            f"{name}: all numbers of a polygon lie within 0..1, as YOLO writes them, expected pixels; multiply x by "
            f"the width {size[1]} and y by the height {size[0]}"
        )
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    for x, y in points:
        if not _is_inside(x, y, size):
            sideways = all(_is_inside(*point, size[::-1]) for point in points)
            hint = SIDEWAYS if sideways else ""
            raise ValueError(
                f"{name}: the polygon's point ({shown(x)}, {shown(y)}) lies outside of the image, which is {size[1]} "
                f"wide and {size[0]} high{hint}"
            )
    if not has_area(flat_polygon(polygon, size, name)):
        raise ValueError(f"{name}: a polygon holds no area, all its points lie on one line: {shown(polygon)}")


def _is_inside(x, y, size: tuple[int, int]) -> bool:
    within_width = -OUTSIDE_TOLERANCE <= x <= size[1] + OUTSIDE_TOLERANCE
    return within_width and -OUTSIDE_TOLERANCE <= y <= size[0] + OUTSIDE_TOLERANCE


def _check_boxes(boxes, count: int, masks: dict[int, dict], size: tuple[int, int], name: str) -> None:
    """Boxes are redundant beside masks; one that does not fit betrays a mix-up."""
    if boxes is None:
        return
    if not isinstance(boxes, list) or len(boxes) != count:
        raise ValueError(f"{name}: boxes must be a list with one box per mask, expected {count}, got {shown(boxes)}")
    for number, box in enumerate(boxes):
        place = f"{name}: box {number + 1}"
        if number not in masks:
            if box is not None:
                raise ValueError(f"{place} must be null as its mask is, got {shown(box)}")
            continue
        is_box = isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
        if not is_box or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ValueError(f"{place} must be [x0, y0, x1, y1], x0 < x1 and y0 < y1, got {shown(box)}")
        if not _is_inside(box[2], box[3], size):
            raise ValueError(f"{place} {shown(box)} lies outside of the image of {size[1]}x{size[0]} pixels")
        overlap = _box_iou(box, _box_around(decode_mask(masks[number])))
        if overlap < LEAST_BOX_IOU:
            relative = "; it looks like shares of the image, expected pixels" if max(box) <= 1 else ""
            raise ValueError(
                f"{place} {shown(box)} does not lie around its mask (their IoU is {overlap:.2f}){relative}"
            )


def _box_around(mask: np.ndarray) -> list[float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def _box_iou(first, second) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    overlap = max(0.0, width) * max(0.0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return float(overlap / (sum(areas) - overlap))


__all__ = [
    "JSONL",
    "REJECT",
    "JsonlSource",
    "asks_for_masks",
    "build_example",
    "named_file",
    "parse_line",
    "read_line",
]
