"""MUSE: questions whose answer is several objects, over COCO images."""

from collections.abc import Iterator
from pathlib import Path

from uground.training.data.files import checked_root, first_existing, read_json, require, require_images
from uground.training.data.masks import is_empty, read_mask, shown
from uground.training.data.records import Record, checked_text, records
from uground.training.data.samples import NO_AREA, NO_NAME, NO_TARGET, NO_WORDS, Sample, Skipped

FOLDERS = ("multi_reason_seg/MultiReasonSeg", "MultiReasonSeg", "multi_reason_seg", ".")
PLACES = ("refer_seg/images/mscoco/images", "images/mscoco/images", "coco", ".")
# The test set comes in two files; "test" is both, as published figures have it.
FILES = {"train": ("train",), "val": ("val",), "test": ("test_less", "test_many")}
FILES |= {part: (part,) for part in FILES["test"]}
MARK = "{seg}"


def read_muse(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    One sample per question, with the objects of its answer in order.

    A written answer (`text_answers`) is kept where it marks as many objects as the answer lists; templates answer
    otherwise. A question without words, without objects, or with an object that has no area or no name is skipped.

    Raises:
        OSError: files are missing. ValueError: an annotation does not make sense.
    """
    root = checked_root(root, dataset)
    base = first_existing(root, FOLDERS)
    paths = [base / f"MUSE_{part}.json" for part in FILES[split]]
    require(dataset, root, paths)
    entries = [
        (path.stem, index, entry)
        for path in paths
        for index, entry in enumerate(records(read_json(path), str(path), "entry"))
    ]
    pictures = [_picture(root, entry) for _, _, entry in entries]
    require_images(dataset, root, pictures)
    return _samples(dataset, split, entries, pictures)


def _picture(root: Path, entry: Record) -> Path:
    if "file_name" in entry:
        return first_existing(root, [f"{place}/train2014" for place in PLACES]) / entry.filled_text("file_name")
    address = entry.filled_text("coco_url").split("/")
    if len(address) < 2:
        raise ValueError(f"{entry.name}: coco_url must end in FOLDER/NAME, got {shown(address[-1])}")
    return first_existing(root, [f"{place}/{address[-2]}" for place in PLACES]) / address[-1]


def _samples(dataset: str, split: str, entries: list, pictures: list[Path]) -> Iterator[Sample | Skipped]:
    for (file, index, entry), picture in zip(entries, pictures, strict=True):
        size = entry.size()
        questions, answers = entry.optional_items("questions"), entry.optional_items("answers")
        texts = entry.optional_items("text_answers") or [None] * len(answers)
        for name, others in (("answers", answers), ("text answers", texts)):
            if len(questions) != len(others):
                raise ValueError(
                    f"{entry.name} has {len(questions)} questions, so it must have as many {name}, got {len(others)}"
                )
        for number, (question, objects, text) in enumerate(zip(questions, answers, texts, strict=True)):
            where = f"{entry.name}, question {number}"
            question = checked_text(question, where)
            text = None if text is None else checked_text(text, f"{where}: its text answer")
            objects = records(objects, f"{where},", "object")
            phrases = tuple(one.optional_text("rephrased_name") or one.text("category_name") for one in objects)
            masks = tuple(read_mask(one.take("segmentation"), size, one.name) for one in objects)
            reason = _reason_to_skip(question, phrases, masks)
            if reason is not None:
                yield Skipped(where, reason)
                continue
            yield Sample(
                id=f"{dataset}-{split}-{file}-{index}-{number}",
                image=str(picture),
                size=size,
                attribute="multi_rs",
                phrases=phrases,
                masks=masks,
                question=question,
                answer=text.replace(MARK, "[SEG]") if text and text.count(MARK) == len(objects) else None,
                subset="many" if file.endswith("many") else "less" if file.endswith("less") else None,
            )


def _reason_to_skip(question: str, phrases: tuple[str, ...], masks: tuple[dict, ...]) -> str | None:
    if not question:
        return NO_WORDS
    if not masks:
        return NO_TARGET
    if not all(phrases):
        return NO_NAME
    return NO_AREA if any(map(is_empty, masks)) else None
