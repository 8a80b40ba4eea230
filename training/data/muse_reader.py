"""MUSE: questions whose answer is several objects, over COCO images."""

from collections.abc import Iterator
from pathlib import Path

from uground.training.data.files import checked_root, first_existing, read_json, require, require_images
from uground.training.data.masks import read_mask
from uground.training.data.samples import Sample

FOLDERS = ("multi_reason_seg/MultiReasonSeg", "MultiReasonSeg", "multi_reason_seg", ".")
PLACES = ("refer_seg/images/mscoco/images", "images/mscoco/images", "coco", ".")
# The test set comes in two files; "test" is both, as published figures have it.
FILES = {"train": ("train",), "val": ("val",), "test": ("test_less", "test_many")}
FILES |= {part: (part,) for part in FILES["test"]}
MARK = "{seg}"


def read_muse(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    One sample per question, with the objects of its answer in order.

    A written answer (`text_answers`) is kept where it marks as many objects as the answer lists; templates answer
    otherwise.

    Raises:
        OSError: files are missing. ValueError: an annotation does not make sense.
    """
    root = checked_root(root, dataset)
    base = first_existing(root, FOLDERS)
    paths = [base / f"MUSE_{part}.json" for part in FILES[split]]
    require(dataset, root, paths)
    entries = [(path.stem, index, entry) for path in paths for index, entry in enumerate(read_json(path))]
    pictures = [_picture(root, entry) for _, _, entry in entries]
    require_images(dataset, root, pictures)
    return _samples(dataset, split, entries, pictures)


def _picture(root: Path, entry: dict) -> Path:
    if "file_name" in entry:
        return first_existing(root, [f"{place}/train2014" for place in PLACES]) / entry["file_name"]
    part, name = entry["coco_url"].split("/")[-2:]
    return first_existing(root, [f"{place}/{part}" for place in PLACES]) / name


def _samples(dataset: str, split: str, entries: list, pictures: list[Path]) -> Iterator[Sample]:
    for (file, index, entry), picture in zip(entries, pictures, strict=True):
        size = (int(entry["height"]), int(entry["width"]))
        questions, answers = entry.get("questions") or [], entry.get("answers") or []
        if len(questions) != len(answers):
            raise ValueError(
                f"{dataset}: {file}.json entry {index} has {len(questions)} questions, "
                f"so it must have as many answers, got {len(answers)}"
            )
        texts = entry.get("text_answers") or [None] * len(answers)
        for number, (question, objects, text) in enumerate(zip(questions, answers, texts, strict=True)):
            name = f"{dataset}: {file}.json entry {index}, question {number}"
            written = text is not None and text.count(MARK) == len(objects)
            yield Sample(
                id=f"{dataset}-{split}-{file}-{index}-{number}",
                image=str(picture),
                size=size,
                attribute="multi_rs",
                phrases=tuple(one.get("rephrased_name") or one["category_name"] for one in objects),
                masks=tuple(read_mask(one["segmentation"], size, name) for one in objects),
                question=question.strip(),
                answer=text.replace(MARK, "[SEG]") if written else None,
                subset="many" if file.endswith("many") else "less" if file.endswith("less") else None,
            )
