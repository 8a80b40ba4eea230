"""Visual question answering: LLaVA-Instruct, so that training on masks does not unlearn talking."""

from collections.abc import Iterator

from uground.training.data.files import checked_root, first_existing, image_size, read_json, require, require_images
from uground.training.data.samples import Sample

FILES = ("llava_dataset/llava_instruct_150k.json", "llava_instruct_150k.json")
IMAGES = ("coco/train2017", "refer_seg/images/mscoco/images/train2017", "train2017")
PLACEHOLDER = "<image>"


def read_llava_instruct(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    One sample per question and answer; later turns of a conversation stand alone.

    Raises:
        OSError: files are missing. ValueError: a conversation does not alternate.
    """
    root = checked_root(root, dataset)
    path = first_existing(root, FILES)
    require(dataset, root, (path,))
    entries = [entry for entry in read_json(path) if "image" in entry]
    folder = first_existing(root, IMAGES)
    require_images(dataset, root, [folder / entry["image"] for entry in entries])
    return _samples(dataset, split, entries, folder)


def _samples(dataset: str, split: str, entries: list[dict], folder) -> Iterator[Sample]:
    for index, entry in enumerate(entries):
        turns = entry["conversations"]
        roles = [turn["from"] for turn in turns]
        if len(turns) % 2 or roles != ["human", "gpt"] * (len(turns) // 2):
            raise ValueError(f"{dataset}: entry {index} must alternate human and gpt, got {', '.join(roles)}")
        picture = folder / entry["image"]
        size = image_size(picture)
        for number, (asked, answered) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
            yield Sample(
                id=f"{dataset}-{split}-{entry.get('id', index)}-{number}",
                image=str(picture),
                size=size,
                attribute="vqa",
                phrases=(),
                masks=(),
                question=asked["value"].replace(PLACEHOLDER, "").strip(),
                answer=answered["value"].strip(),
            )
