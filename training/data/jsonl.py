"""A user's own data: a JSONL file whose lines each ask about one image.

    {"image": "a.jpg", "query": "the red cup", "masks": [[[12, 8, 40, 8, 40, 30, 12, 30]]]}
    {"image": "a.jpg", "query": "cup and spoon", "phrases": ["the cup", "the spoon"], "masks": [{"size": …}, "m.png"]}
    {"image": "b.jpg", "query": "the dog", "masks": []}
    {"image": "b.jpg", "query": "What is it?", "answer": "A cat on a sofa."}
    {"image": "b.jpg", "turns": [{"query": "the cat", "masks": […]}, {"query": "And its tail?", "masks": […]}]}

A mask is a list of polygons (x, y, x, y, … in pixels), a COCO RLE, the path of a PNG whose pixels are not 0 where the
mask is, or null for a phrase whose object is not there. Paths are relative to the file. Without an `answer` one is
made of the phrases. `ignore` is a mask of pixels that count neither way, `boxes` holds one [x0, y0, x1, y1] per mask
and is checked against it, `id` and `attribute` are kept.
"""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
from PIL import Image

from uground.processing.image_reading import read_image
from uground.training.data.masks import decode_mask, encode_mask, is_empty, read_mask

SEGMENT, REJECT = "[SEG]", "[REJ]"
KEYS = {"id", "image", "query", "answer", "phrases", "masks", "ignore", "boxes", "attribute", "turns"}
TURN_KEYS = {"query", "answer", "phrases", "masks", "boxes"}
# Annotation tools round: a corner may lie this many pixels outside of the image.
OUTSIDE_TOLERANCE = 1.0
# Overlap with the box around its mask, below which a box belongs to something else.
LEAST_BOX_IOU = 0.5


class JsonlSource:
    """
    A JSONL file as items for the collator; a line is read and checked when it is asked for.

    Args:
        path: of the file.

    Raises:
        OSError: the file is missing.
        ValueError: it has no lines.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"the data file {path} does not exist")
        self._lines = [
            (number, line)
            for number, line in enumerate(self.path.read_text(encoding="utf-8-sig").splitlines(), start=1)
            if line.strip()
        ]
        if not self._lines:
            raise ValueError(f"the data file {path} is empty, expected one JSON object per line")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict:
        """
        Item `{"image", "examples"}` of a line.

        Raises:
            OSError, ValueError: the line is bad; the sentence begins with file and line number.
        """
        example = read_line(self._lines[index][1], self.path.parent, self.name_of(index))
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
        return parse_line(self._lines[index][1], self.name_of(index))

    def record(self) -> dict:
        """What the data are, for a run that is to be resumed: changed lines change it."""
        text = "\n".join(line for _, line in self._lines)
        return {"jsonl": self.path.name, "content": hashlib.sha256(text.encode()).hexdigest()[:16]}


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
        raise ValueError(f"{name}: image must be the path of a picture, got {record.get('image')!r}")
    image = _read_picture(folder / record["image"], name)
    return build_example(record, image, folder, name)


def parse_line(line: str, name: str) -> dict:
    """The object of a line; a `ValueError` that begins with `name` for anything else."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: the line is not JSON: {error}") from error
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


def build_example(record: dict, image: Image.Image, folder: Path, name: str) -> dict:
    """An example of the common schema from a line's `record`; other arguments and errors as in [`read_line`]."""
    size = (image.height, image.width)
    turns = record.get("turns")
    if turns is None:
        turns = [record]
    elif not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{name}: turns must be a list of objects with a query each, got {turns!r}")
    else:
        for turn in turns:
            _check_keys(turn, TURN_KEYS, name)
    read = [_read_turn(turn, size, folder, name) for turn in turns]
    last, ignore = read[-1], record.get("ignore")
    example = {
        "id": str(record.get("id", name)),
        "image": image,
        "query": last["query"],
        "answer": last["answer"],
        "phrases": [phrase for turn in read for phrase in turn["phrases"]],
        "masks": [mask for turn in read for mask in turn["masks"]],
        "ignore": None if ignore is None else _read_one(ignore, size, folder, f"{name}: ignore"),
        "attribute": record.get("attribute") or _attribute(last["answer"]),
    }
    if len(read) > 1:
        example["history"] = [{"query": turn["query"], "answer": turn["answer"]} for turn in read[:-1]]
    return example


def _check_keys(record: dict, allowed: set[str], name: str) -> None:
    unknown = sorted(set(record) - allowed)
    if unknown:
        raise ValueError(f"{name}: unknown keys {unknown}, expected some of {sorted(allowed)}")


def _read_picture(path: Path, name: str) -> Image.Image:
    try:
        return read_image(str(path), f"the image {path}")
    except (OSError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error


def _read_turn(turn: dict, size: tuple[int, int], folder: Path, name: str) -> dict:
    """Query, answer, phrases and masks of one question; a null mask has turned into a reject token."""
    query = turn.get("query")
    if not isinstance(query, str) or not query.strip():
        raise ValueError(f"{name}: query must be a text that is not empty, got {query!r}")
    masks, answer, phrases = turn.get("masks"), turn.get("answer"), turn.get("phrases")
    if masks is None and answer is None:
        raise ValueError(f"{name}: masks or an answer are needed, got neither; masks: [] says that nothing is there")
    masks = [] if masks is None else masks
    if not isinstance(masks, list):
        raise ValueError(f"{name}: masks must be a list with one entry per object, got {type(masks).__name__}")
    if phrases is not None and len(phrases) != len(masks):
        raise ValueError(f"{name}: {len(phrases)} phrases name {len(masks)} masks, expected one phrase per mask")
    if answer is None:
        answer = _compose(phrases, [mask is not None for mask in masks])
    elif not isinstance(answer, str) or not answer.strip():
        raise ValueError(f"{name}: answer must be a text that is not empty, got {answer!r}")
    present = [number for number, mask in enumerate(masks) if mask is not None]
    if answer.count(SEGMENT) != len(present):
        raise ValueError(
            f"{name}: the answer {answer!r} holds {answer.count(SEGMENT)} {SEGMENT}, expected one for each of its "
            f"{len(present)} masks"
        )
    read = [_read_one(masks[number], size, folder, f"{name}: mask {number + 1}") for number in present]
    for number, rle in zip(present, read, strict=True):
        if is_empty(rle):
            raise ValueError(f"{name}: mask {number + 1} covers no pixel; write null for an object that is not there")
    _check_boxes(turn.get("boxes"), len(masks), dict(zip(present, read, strict=True)), size, name)
    named = [] if phrases is None else [str(phrases[number]) for number in present]
    return {"query": query, "answer": answer, "phrases": named, "masks": read}


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
    if isinstance(mask, str):
        return _from_file(folder / mask, size, name)
    if isinstance(mask, list):
        for polygon in mask:
            _check_polygon(polygon, size, name)
        if not mask:
            raise ValueError(f"{name}: a mask of polygons must hold at least one, got an empty list")
    elif not isinstance(mask, dict):
        raise ValueError(f"{name}: a mask must be polygons, a COCO RLE or the path of a PNG, got {mask!r}")
    return read_mask(mask, size, name)


def _check_polygon(polygon, size: tuple[int, int], name: str) -> None:
    if not isinstance(polygon, list) or not all(
        isinstance(number, (int, float)) and math.isfinite(number) for number in polygon
    ):
        raise ValueError(f"{name}: a polygon must be a flat list of numbers x, y, x, y, …, got {str(polygon)[:80]}")
    if len(polygon) % 2 or len(polygon) < 6:
        raise ValueError(f"{name}: a polygon must have at least 3 points of x and y, got {len(polygon)} numbers")
    for x, y in zip(polygon[::2], polygon[1::2], strict=True):
        inside_x = -OUTSIDE_TOLERANCE <= x <= size[1] + OUTSIDE_TOLERANCE
        if not inside_x or not -OUTSIDE_TOLERANCE <= y <= size[0] + OUTSIDE_TOLERANCE:
            raise ValueError(
                f"{name}: the polygon's point ({x:g}, {y:g}) lies outside of the image, which is {size[1]} wide and "
                f"{size[0]} high"
            )


def _from_file(path: Path, size: tuple[int, int], name: str) -> dict:
    try:
        with Image.open(path) as picture:
            values = np.asarray(picture)
    except FileNotFoundError:
        raise FileNotFoundError(f"{name}: the mask file {path} does not exist") from None
    except OSError as error:
        raise OSError(f"{name}: the mask file {path} cannot be read: {error}") from error
    values = values[..., :3].any(-1) if values.ndim == 3 else values != 0
    if values.shape != tuple(size):
        raise ValueError(
            f"{name}: the mask {path} has size {list(values.shape)}, expected that of the image, {list(size)}"
        )
    return encode_mask(values)


def _check_boxes(boxes, count: int, masks: dict[int, dict], size: tuple[int, int], name: str) -> None:
    """Boxes are redundant beside masks; one that does not fit betrays a mix-up."""
    if boxes is None:
        return
    if not isinstance(boxes, list) or len(boxes) != count:
        raise ValueError(f"{name}: boxes must be a list with one box per mask, expected {count}, got {boxes!r}")
    for number, rle in masks.items():
        box = boxes[number]
        if not isinstance(box, list) or len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ValueError(f"{name}: box {number + 1} must be [x0, y0, x1, y1], x0 < x1 and y0 < y1, got {box}")
        if box[2] > size[1] + OUTSIDE_TOLERANCE or box[3] > size[0] + OUTSIDE_TOLERANCE:
            raise ValueError(f"{name}: box {number + 1} {box} lies outside of the image of {size[1]}x{size[0]} pixels")
        overlap = _box_iou(box, _box_around(decode_mask(rle)))
        if overlap < LEAST_BOX_IOU:
            raise ValueError(
                f"{name}: box {number + 1} {box} does not lie around its mask (their IoU is {overlap:.2f})"
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


__all__ = ["JsonlSource", "asks_for_masks", "build_example", "parse_line", "read_line"]
