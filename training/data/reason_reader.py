"""Reasoning segmentation: ReasonSeg and LISA++.

ReasonSeg keeps, beside each picture, a JSON of `shapes` (polygons labelled target, ignore or flag), `text` (ways to
ask) and `is_sentence`. LISA++ keeps four files, each with its own key for the picture and for the polygons, and
answers that point at objects by number.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from uground.training.data.files import (
    checked_root,
    first_existing,
    image_size,
    read_json,
    require,
    require_images,
)
from uground.training.data.masks import encode_mask, flat_polygon, has_area, is_empty, paint_polygon, read_mask, shown
from uground.training.data.records import (
    Record,
    checked_flag,
    checked_key,
    checked_list,
    checked_text,
    keyed,
    records,
)
from uground.training.data.samples import NO_ANSWER, NO_AREA, NO_TARGET, NO_WORDS, Sample, Skipped

TARGET, IGNORED = 1, 255
REASONSEG_FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg", ".")
LISA_PLUS_FOLDERS = ("reason_seg_plus", ".")
COCO2017_IMAGES = (
    "refer_seg/images/mscoco/images/train2017",
    "images/mscoco/images/train2017",
    "coco/train2017",
    "train2017",
)


def read_reasonseg(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    ReasonSeg: one sample per way of asking in training, the first way in evaluation, as published figures have it.

    Queries are reported apart as `"short"` (phrases) and `"long"` (sentences). Pixels labelled "ignore" count neither
    way. Pictures of the training split may have an explanation, and any JSON `false_premise_QA`, questions about what
    is not there; these are read in training. Only these ask for what is not there: a target without area is skipped,
    and so is a query without words.

    Raises:
        OSError: files are missing. ValueError: a file does not make sense.
    """
    root = checked_root(root, dataset)
    base = first_existing(root, REASONSEG_FOLDERS)
    folder = base / split
    require(dataset, root, (folder,))
    annotation_files = sorted(folder.glob("*.json"))
    pictures = sorted(folder.glob("*.jpg"))
    require(dataset, root, [path.with_suffix(".json") for path in pictures])
    require_images(dataset, root, [path.with_suffix(".jpg") for path in annotation_files])
    if not annotation_files:
        raise FileNotFoundError(f"{dataset} is incomplete under {root}; {folder} holds no annotated image")
    explanations = _explanations(base) if split == "train" else {}
    return _reasonseg_samples(dataset, split, annotation_files, explanations)


def _explanations(base: Path) -> dict[str, str]:
    path = base / "explanatory" / "train.json"
    entries = records(read_json(path), str(path), "entry") if path.exists() else []
    return {entry.text("image"): entry.text("outputs") for entry in entries}


def _reasonseg_samples(dataset: str, split: str, files: list[Path], explanations: dict) -> Iterator[Sample | Skipped]:
    for path in files:
        content = Record(read_json(path), str(path))
        absent = [key for key in ("shapes", "text", "is_sentence") if key not in content]
        if absent:
            raise ValueError(f"{path} must have shapes, text and is_sentence, got none of the name {absent[0]}")
        picture = path.with_suffix(".jpg")
        size = image_size(picture)
        shapes = content.items("shapes")
        labels = paint_shapes(shapes, size, str(path))
        mask, ignored = encode_mask(labels == TARGET), labels == IGNORED
        has_area = not is_empty(mask) and _has_area(shapes, size, str(path))
        shared = {
            "image": str(picture),
            "size": size,
            "ignore": encode_mask(ignored) if ignored.any() else None,
        }
        is_sentence = content.flag("is_sentence")
        texts = content.texts("text")
        if not texts:
            yield Skipped(str(path), NO_WORDS)
        for number, text in enumerate(texts if split == "train" else texts[:1]):
            if not text or not has_area:
                yield Skipped(f"{path} text {number}", NO_AREA if text else NO_WORDS)
                continue
            yield Sample(
                id=f"{dataset}-{split}-{path.stem}-{number}",
                attribute="rs",
                phrases=(text,),
                masks=(mask,),
                question=text if is_sentence else None,
                explanation=explanations.get(picture.name) or None,
                subset="long" if is_sentence else "short",
                **shared,
            )
        if split == "train":
            yield from _false_premises(f"{dataset}-{split}-{path.stem}", content, shared)


def _false_premises(name: str, content: Record, shared: dict) -> Iterator[Sample | Skipped]:
    for number, premise in enumerate(content.optional_items("false_premise_QA")):
        where = f"{content.name} false_premise_QA {number}"
        premise = checked_list(premise, where)
        if len(premise) != 3:
            raise ValueError(f"{where} must hold a query, whether it is a sentence, and an answer, got {len(premise)}")
        text, is_sentence = checked_text(premise[0], where), checked_flag(premise[1], where)
        answer = checked_text(premise[2], where)
        if not text or not answer:
            yield Skipped(where, NO_ANSWER if text else NO_WORDS)
            continue
        yield Sample(
            id=f"{name}-false-{number}",
            attribute="fp_res",
            phrases=(text,),
            masks=(None,),
            question=text if is_sentence else None,
            explanation=answer,
            subset="long" if is_sentence else "short",
            **shared,
        )


def paint_shapes(shapes: list[dict], size: tuple[int, int], name: str = "the annotation") -> np.ndarray:
    """
    Label map of a ReasonSeg annotation.

    Shapes are painted from the largest to the smallest, so that a hole drawn as an ignored or inner shape survives;
    those labelled "flag" mean nothing.

    Args:
        shapes: `{"label", "points"}` each, points as [x, y] in pixels.
        size: height and width of the picture.
        name: what to call the annotation in an error message.

    Returns:
        `(H, W)` uint8: 0 elsewhere, 1 target, 255 ignored.

    Raises:
        ValueError: a shape has no label, or its points are none.
    """
    painted = []
    for kind, points, where in _drawn_shapes(shapes, name):
        alone = np.zeros(size, dtype=np.uint8)
        paint_polygon(alone, points, TARGET, where)
        painted.append((int(alone.sum()), alone > 0, kind))
    labels = np.zeros(size, dtype=np.uint8)
    for _, mask, value in sorted(painted, key=lambda entry: -entry[0]):
        labels[mask] = value
    return labels


def _drawn_shapes(shapes: list[dict], name: str) -> Iterator[tuple[int, list, str]]:
    """`TARGET` or `IGNORED`, the points, and the name of each shape but flags."""
    for shape in records(shapes, name, "shape"):
        label = shape.text("label").lower()
        if label != "flag":
            yield IGNORED if "ignore" in label else TARGET, shape.items("points"), shape.name


def _has_area(shapes: list[dict], size: tuple[int, int], name: str) -> bool:
    """Whether some target is more than points on one line: outlines are painted, so pixels do not tell."""
    return any(
        kind == TARGET and has_area(flat_polygon(points, size, where))
        for kind, points, where in _drawn_shapes(shapes, name)
    )


# Of each kind of LISA++: its file, the keys of picture and of polygons.
LISA_PLUS = {
    "lisa-plus-instance-seg": ("LISA_Plus_Instance_Seg.json", "img_path", "points"),
    "lisa-plus-cot": ("LISA_Plus_COT.json", "image_path", "info"),
    "lisa-plus-conversations": ("LISA_Plus_Conversations.json", "img_pth", "info"),
    "lisa-plus-caption": ("LISA_Plus_Caption.json", "image_path", "info"),
}
# Objects in an answer: `<380|remote>`, `《380|remote》`, `pizza <1072129>`; several in square brackets.
OBJECT = re.compile(r"[<《](\d+)(?:\|[^>》]*)?[>》]")
LISTED = re.compile(r"\[([^\]]*[<《|][^\]]*)\]")
NAMED = re.compile(f"{LISTED.pattern}|{OBJECT.pattern}")
BARE_OBJECT = re.compile(r"(\d+)\|\s*[^,\]]+")
TURN = re.compile(r"<(person|robot)>:")
SEGMENT = "[SEG]"


def read_lisa_plus(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    One of the four files of LISA++; answers keep their words, objects in them become segment tokens.

    An object without polygons, or that the file does not describe, is left out of its answer. An answer none of whose
    objects is left, or with one whose polygons hold no area, is skipped. Each turn of a conversation is a sample of
    its own.

    Raises:
        OSError: files are missing. ValueError: a file does not make sense.
    """
    root = checked_root(root, dataset)
    name, image_key, mask_key = LISA_PLUS[dataset]
    path = first_existing(root, [f"{folder}/{name}" for folder in LISA_PLUS_FOLDERS])
    require(dataset, root, (path,))
    entries = records(read_json(path), str(path), "entry")
    folder = first_existing(root, COCO2017_IMAGES)
    require_images(dataset, root, [folder / entry.filled_text(image_key) for entry in entries])
    return _lisa_plus_samples(dataset, split, entries, folder, image_key, mask_key)


def _lisa_plus_samples(dataset, split, entries: list[Record], folder: Path, image_key: str, mask_key: str):
    for index, entry in enumerate(entries):
        picture = folder / entry.filled_text(image_key)
        size = image_size(picture)
        masks, names = _described_objects(entry, mask_key, size)
        for number, (question, answer, ids) in enumerate(_lisa_plus_turns(entry)):
            where = f"{entry.name}, question {number}"
            drawn = [key for key in ids if key in masks]
            if not question or answer == "":
                yield Skipped(where, NO_ANSWER if question else NO_WORDS)
            elif any(is_empty(masks[key]) for key in drawn):
                yield Skipped(where, NO_AREA)
            elif not drawn and (ids or answer is None):
                yield Skipped(where, NO_TARGET)
            else:
                yield Sample(
                    id=f"{dataset}-{split}-{index}-{number}",
                    image=str(picture),
                    size=size,
                    attribute="multi_rs" if len(drawn) > 1 else "rs" if drawn else "vqa",
                    phrases=tuple(names[key] for key in drawn),
                    masks=tuple(masks[key] for key in drawn),
                    question=question,
                    answer=None if answer is None else mark_objects(answer, masks)[0],
                )


def _described_objects(entry: Record, mask_key: str, size: tuple[int, int]) -> tuple[dict[str, dict], dict[str, str]]:
    """Masks and names, by number, of the objects that have polygons, with or without area."""
    masks, names = {}, {}
    for key, value in keyed(entry.value.get(mask_key), f"{entry.name}: {mask_key}"):
        where, label = f"{entry.name}, object {shown(key)}", None
        if isinstance(value, dict):
            described = Record(value, where)
            label = described.optional_text("label name") or described.optional_text("label")
            value = value.get("polygon", value.get("points"))
        if value is None or (isinstance(value, list) and not value):
            continue
        masks[key] = read_mask(value, size, where)
        names[key] = label or "object"
    return masks, names


def _lisa_plus_turns(entry: Record) -> Iterator[tuple[str, str | None, list[str]]]:
    """Question, answer and the numbers of its objects, of each turn; templates answer instead of None."""
    if "ID" in entry:
        ids = [str(checked_key(key, f"{entry.name}: ID")) for key in entry.items("ID")]
        yield entry.text("English Question"), None, ids
    elif "output" in entry:
        parts = TURN.split(entry.text("output"))
        turns = [(role, text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
        for (asker, question), (answerer, answer) in zip(turns[:-1], turns[1:], strict=True):
            if (asker, answerer) == ("person", "robot"):
                # A question shows objects by their names: masks belong to answers.
                yield OBJECT.sub(_object_name, question), answer, named_objects(answer)
    else:
        answer = entry.text("English Answer")
        yield entry.text("English Question"), answer, named_objects(answer)


def _object_name(match: re.Match) -> str:
    return match.group(0)[1:-1].partition("|")[2].strip() or "it"


def named_objects(text: str) -> list[str]:
    """The numbers of the objects that an answer points at, in order."""
    return [key for match in NAMED.finditer(text) for key in _keys(match)]


def _keys(match: re.Match) -> list[str]:
    listed = match.group(1)
    return OBJECT.findall(match.group(0)) or (BARE_OBJECT.findall(listed) if listed else [])


def mark_objects(text: str, masks: dict) -> tuple[str, list[str]]:
    """
    Put a segment token in the place of each object that has a mask, and nothing in that of the others.

    Returns:
        The text, and the numbers of the objects in the order of their tokens.
    """
    ids: list[str] = []
    pieces, end = [], 0
    for match in NAMED.finditer(text):
        known = [key for key in _keys(match) if key in masks]
        ids += known
        before = text[end : match.start()]
        marks = enumerate_phrases([SEGMENT] * len(known))
        pieces.append(before + (" " if marks and before and not before[-1].isspace() else "") + marks)
        end = match.end()
    pieces.append(text[end:])
    return re.sub(r"[ \t]{2,}", " ", "".join(pieces)).strip(), ids


def enumerate_phrases(phrases: list[str]) -> str:
    """ "a", "a and b", "a, b and c"; "" of none."""
    return " and ".join(part for part in (", ".join(phrases[:-1]), *phrases[-1:]) if part)
