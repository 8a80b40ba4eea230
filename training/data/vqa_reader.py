"""Visual question answering: LLaVA-Instruct, so that training on masks does not unlearn talking."""

from collections.abc import Iterator
from pathlib import Path

from uground.training.data.files import checked_root, first_existing, image_size, read_json, require, require_images
from uground.training.data.records import Record, records
from uground.training.data.samples import NO_ANSWER, NO_WORDS, Sample, Skipped

FILES = ("llava_dataset/llava_instruct_150k.json", "llava_instruct_150k.json")
IMAGES = ("coco/train2017", "refer_seg/images/mscoco/images/train2017", "train2017")
PLACEHOLDER = "<image>"


def read_llava_instruct(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    One sample per question and answer; later turns of a conversation stand alone. Those without words are skipped.

    Raises:
        OSError: files are missing. ValueError: a conversation does not alternate, or an entry does not make sense.
    """
    root = checked_root(root, dataset)
    path = first_existing(root, FILES)
    require(dataset, root, (path,))
    entries = [entry for entry in records(read_json(path), str(path), "entry") if "image" in entry]
    folder = first_existing(root, IMAGES)
    require_images(dataset, root, [folder / entry.filled_text("image") for entry in entries])
    return _samples(dataset, split, entries, folder)


def _samples(dataset: str, split: str, entries: list[Record], folder) -> Iterator[Sample | Skipped]:
    for index, entry in enumerate(entries):
        turns = entry.records("conversations", "turn")
        roles = [turn.text("from") for turn in turns]
        if len(turns) % 2 or roles != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError(f"{entry.name} must alternate human and gpt, got {', '.join(roles)}")
        picture = folder / entry.filled_text("image")
        size = image_size(picture)
        named = entry.key("id") if "id" in entry else index
        for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            question, answer = asked.text("value").replace(PLACEHOLDER, "").strip(), answered.text("value")
            if not question or not answer:
                yield Skipped(asked.name, NO_ANSWER if question else NO_WORDS)
                continue
            yield Sample(
                id=f"{dataset}-{split}-{named}-{number}",
                image=str(picture),
                size=size,
                attribute="vqa",
                phrases=(),
                masks=(),
                question=question,
                answer=answer,
            )
