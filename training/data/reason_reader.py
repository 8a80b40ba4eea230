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
from uground.training.data.masks import encode_mask, is_empty, paint_polygon, read_mask
from uground.training.data.samples import Sample

TARGET, IGNORED = 1, 255
REASONSEG_FOLDERS = ("reason_seg/ReasonSeg", "ReasonSeg", ".")
LISA_PLUS_FOLDERS = ("reason_seg_plus", ".")
COCO2017_IMAGES = (
    "refer_seg/images/mscoco/images/train2017",
    "images/mscoco/images/train2017",
    "coco/train2017",
    "train2017",
)


def read_reasonseg(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    ReasonSeg: one sample per way of asking in training, the first way in evaluation, as published figures have it.

    Queries are reported apart as `"short"` (phrases) and `"long"` (sentences). Pixels labelled "ignore" count neither
    way. Pictures of the training split may have an explanation, and any JSON `false_premise_QA`, questions about what
    is not there; these are read in training.

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
    return {entry["image"]: entry["outputs"] for entry in read_json(path)} if path.exists() else {}


def _reasonseg_samples(dataset: str, split: str, files: list[Path], explanations: dict) -> Iterator[Sample]:
    for path in files:
        content = read_json(path)
        absent = [key for key in ("shapes", "text", "is_sentence") if key not in content]
        if absent:
            raise ValueError(f"{path} must have shapes, text and is_sentence, got none of the name {absent[0]}")
        picture = path.with_suffix(".jpg")
        size = image_size(picture)
        labels = paint_shapes(content["shapes"], size)
        mask, ignored = encode_mask(labels == TARGET), labels == IGNORED
        shared = {
            "image": str(picture),
            "size": size,
            "ignore": encode_mask(ignored) if ignored.any() else None,
        }
        texts = [text.strip() for text in content["text"]]
        asked = texts if split == "train" else texts[:1]
        for number, text in enumerate(asked):
            yield Sample(
                id=f"{dataset}-{split}-{path.stem}-{number}",
                attribute="rs",
                phrases=(text,),
                masks=(None if is_empty(mask) else mask,),
                question=text if content["is_sentence"] else None,
                explanation=explanations.get(picture.name),
                subset="long" if content["is_sentence"] else "short",
                **shared,
            )
        if split == "train":
            yield from _false_premises(f"{dataset}-{split}-{path.stem}", content, shared)


def _false_premises(name: str, content: dict, shared: dict) -> Iterator[Sample]:
    for number, (text, is_sentence, answer) in enumerate(content.get("false_premise_QA", [])):
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


def paint_shapes(shapes: list[dict], size: tuple[int, int]) -> np.ndarray:
    """
    Label map of a ReasonSeg annotation.

    Shapes are painted from the largest to the smallest, so that a hole drawn as an ignored or inner shape survives;
    those labelled "flag" mean nothing.

    Returns:
        `(H, W)` uint8: 0 elsewhere, 1 target, 255 ignored.
    """
    painted = []
    for shape in shapes:
        if shape["label"].lower() == "flag":
            continue
        alone = np.zeros(size, dtype=np.uint8)
        paint_polygon(alone, shape["points"], TARGET)
        painted.append((int(alone.sum()), alone > 0, IGNORED if "ignore" in shape["label"].lower() else TARGET))
    labels = np.zeros(size, dtype=np.uint8)
    for _, mask, value in sorted(painted, key=lambda entry: -entry[0]):
        labels[mask] = value
    return labels


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
BARE_OBJECT = re.compile(r"(\d+)\|\s*[^,\]]+")
TURN = re.compile(r"<(person|robot)>:")
SEGMENT = "[SEG]"


def read_lisa_plus(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    One of the four files of LISA++; answers keep their words, objects in them become segment tokens.

    An object without polygons, or that the file does not describe, is left out of its answer. Each turn of a
    conversation is a sample of its own.

    Raises:
        OSError: files are missing. ValueError: a file does not make sense.
    """
    root = checked_root(root, dataset)
    name, image_key, mask_key = LISA_PLUS[dataset]
    path = first_existing(root, [f"{folder}/{name}" for folder in LISA_PLUS_FOLDERS])
    require(dataset, root, (path,))
    entries = read_json(path)
    folder = first_existing(root, COCO2017_IMAGES)
    require_images(dataset, root, [folder / entry[image_key] for entry in entries])
    return _lisa_plus_samples(dataset, split, entries, folder, image_key, mask_key)


def _lisa_plus_samples(dataset, split, entries, folder: Path, image_key: str, mask_key: str) -> Iterator[Sample]:
    for index, entry in enumerate(entries):
        picture = folder / entry[image_key]
        size = image_size(picture)
        masks, names = _described_objects(f"{dataset}: entry {index}", entry.get(mask_key) or {}, size)
        for number, (question, answer, ids) in enumerate(_lisa_plus_turns(entry, masks)):
            yield Sample(
                id=f"{dataset}-{split}-{index}-{number}",
                image=str(picture),
                size=size,
                attribute="multi_rs" if len(ids) > 1 else "rs" if ids else "vqa",
                phrases=tuple(names[key] for key in ids),
                masks=tuple(masks[key] for key in ids),
                question=question,
                answer=answer,
            )


def _described_objects(where: str, described: dict, size: tuple[int, int]) -> tuple[dict[str, dict], dict[str, str]]:
    """Masks with pixels, and names, by number."""
    masks, names = {}, {}
    for key, value in described.items():
        polygons = value.get("polygon", value.get("points")) if isinstance(value, dict) else value
        mask = read_mask(polygons, size, f"{where}, object {key}")
        if not is_empty(mask):
            masks[key] = mask
            label = value.get("label name", value.get("label")) if isinstance(value, dict) else None
            names[key] = str(label or "object")
    return masks, names


def _lisa_plus_turns(entry: dict, masks: dict) -> Iterator[tuple[str, str | None, list[str]]]:
    """Question, answer and the numbers of its objects, of each turn; templates answer instead of None."""
    if "ID" in entry:
        ids = [str(key) for key in entry["ID"] if str(key) in masks]
        if ids:
            yield entry["English Question"].strip(), None, ids
    elif "output" in entry:
        parts = TURN.split(entry["output"])
        turns = [(role, text.strip()) for role, text in zip(parts[1::2], parts[2::2], strict=True)]
        for (asker, question), (answerer, answer) in zip(turns[:-1], turns[1:], strict=True):
            if (asker, answerer) == ("person", "robot") and question and answer:
                # A question shows objects by their names: masks belong to answers.
                yield OBJECT.sub(_object_name, question), *mark_objects(answer, masks)
    else:
        yield entry["English Question"].strip(), *mark_objects(entry["English Answer"].strip(), masks)


def _object_name(match: re.Match) -> str:
    return match.group(0)[1:-1].partition("|")[2].strip() or "it"


def mark_objects(text: str, masks: dict) -> tuple[str, list[str]]:
    """
    Put a segment token in the place of each object that has a mask, and nothing in that of the others.

    Returns:
        The text, and the numbers of the objects in the order of their tokens.
    """
    ids: list[str] = []
    pieces, end = [], 0
    for match in re.finditer(f"{LISTED.pattern}|{OBJECT.pattern}", text):
        listed = match.group(1)
        found = OBJECT.findall(match.group(0)) or (BARE_OBJECT.findall(listed) if listed else [])
        known = [key for key in found if key in masks]
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
