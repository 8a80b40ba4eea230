"""Referring segmentation: RefCOCO and its kin, in the layout of the REFER toolkit.

A pickle (or JSON) of references `{ref_id, ann_id, image_id, split, sentences}`, and `instances.json` in COCO form. One
sentence is one sample. Where the kin differ:

- gRefCOCO and Ref-ZOM: `ann_id` is a list, several objects are one target; `[-1]` or `[]` says none is there.
- R-RefCOCO: a sentence with `exist: False` names nothing in the image.
- FP-RefCOCO: `is_false_premise`, and `gt_sent`, what the sentence should have said.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from uground.training.data.files import checked_root, first_existing, read_json, read_pickle, require, require_images
from uground.training.data.masks import is_empty, read_mask, shown, union_mask
from uground.training.data.records import Record, checked_key, records
from uground.training.data.samples import NO_AREA, NO_TARGET, NO_WORDS, Sample, Skipped

COCO_IMAGES = ("refer_seg/images/mscoco/images/train2014", "images/mscoco/images/train2014", "train2014")
# A reference of a split such as "testAB" belongs to both parts.
PARTS = ("testA", "testB", "testC")


@dataclass(frozen=True)
class ReferLayout:
    """
    Where the files of a dataset lie, and what its sentences are.

    Attributes:
        folder: below `refer_seg/`, or below the root itself.
        references: names of the reference file; the first that exists is read.
        images: places of the pictures below the root; several are searched in turn.
        attribute: of its samples.
    """

    folder: str
    references: tuple[str, ...]
    images: tuple[str, ...] = COCO_IMAGES
    attribute: str = "res"


LAYOUTS = {
    "refcoco": ReferLayout("refcoco", ("refs(unc).p",)),
    "refcoco+": ReferLayout("refcoco+", ("refs(unc).p",)),
    "refcocog": ReferLayout("refcocog", ("refs(umd).p",)),
    # The lists that SESAME and READ train and measure with.
    "refcoco-unified": ReferLayout("refcoco", ("refs(unc_exclude_unified).p",)),
    "refcoco+-unified": ReferLayout("refcoco+", ("refs(unc_exclude_unified).p",)),
    "refcocog-unified": ReferLayout("refcocog", ("refs(umd_exclude_unified).p",)),
    "refcocog-google": ReferLayout("refcocog", ("refs(google).p",)),
    "refclef": ReferLayout(
        "refclef", ("refs(unc).p",), ("refer_seg/images/saiapr_tc-12", "images/saiapr_tc-12", "saiapr_tc-12")
    ),
    "grefcoco": ReferLayout("grefcoco", ("grefs(unc).json", "grefs(unc).p"), attribute="gres"),
    "refzom": ReferLayout(
        "refzom",
        ("Ref_ZOM.p",),
        tuple(
            f"{folder}{part}"
            for part in ("trainval2014", "train2014", "val2014")
            for folder in ("refer_seg/refzom/", "refzom/")
        ),
        "gres",
    ),
    "r-refcoco": ReferLayout("R-refcoco", ("refs(unc_exclude_unified).p",)),
    "r-refcoco+": ReferLayout("R-refcoco+", ("refs(unc_exclude_unified).p",)),
    "r-refcocog": ReferLayout("R-refcocog", ("refs(umd_exclude_unified).p",)),
    "fprefcoco": ReferLayout("fprefcoco", ("refs(berkeley_exclude_unified).p",)),
    "fprefcoco+": ReferLayout("fprefcoco+", ("refs(berkeley_exclude_unified).p",)),
    "fprefcocog": ReferLayout("fprefcocog", ("refs(berkeley_exclude_unified).p",)),
}


def read_refer(dataset: str, root: str | Path, split: str) -> Iterator[Sample | Skipped]:
    """
    Samples of a dataset in `LAYOUTS`.

    A sentence without words is skipped, and so is a reference to objects without area: only sentences marked as false,
    and references to no object in gRefCOCO and Ref-ZOM, ask for what is not there.

    Raises:
        OSError: files or annotated pictures are missing.
        ValueError: an annotation does not make sense, or nothing belongs to the split.
    """
    layout = LAYOUTS[dataset]
    root = checked_root(root, dataset)
    folder = first_existing(root, (f"refer_seg/{layout.folder}", layout.folder))
    reference_file = first_existing(folder, layout.references)
    instances_file = folder / "instances.json"
    require(dataset, root, (reference_file, instances_file))
    chosen = _references(dataset, reference_file, split)
    instances = Record(read_json(instances_file), str(instances_file))
    images = instances.keyed_records("images", "image")
    annotations = instances.keyed_records("annotations", "annotation")
    folders = [root / place for place in layout.images]
    paths = {}
    for reference in chosen:
        image_id = reference.key("image_id")
        if image_id not in images:
            raise ValueError(
                f"{reference.name} is about image {shown(image_id)}, which {instances_file} does not list"
            )
        paths[image_id] = _image_path(folders, images[image_id].filled_text("file_name"))
    require_images(dataset, root, paths.values())
    for reference in chosen:
        for number in _object_ids(reference):
            if number not in annotations:
                raise ValueError(
                    f"{reference.name} names annotation {shown(number)}, which does not exist in {instances_file}"
                )
    return _samples(dataset, split, layout.attribute, chosen, images, annotations, paths)


def _references(dataset: str, path: Path, split: str) -> list[Record]:
    """The references of a split, each called by its `ref_id`."""
    content = read_json(path) if path.suffix == ".json" else read_pickle(path)
    references = []
    for reference in records(content, str(path), "reference number"):
        references.append(Record(reference.value, f"{path} reference {shown(reference.key('ref_id'))}"))
    chosen = [reference for reference in references if _belongs(reference.text("split"), split)]
    if not chosen:
        found = ", ".join(sorted({reference.text("split") for reference in references})) or "none at all"
        raise ValueError(f"{dataset} has no references in split {split!r}; {path} holds: {found}")
    return chosen


def _belongs(reference_split: str, split: str) -> bool:
    if split in PARTS:
        return reference_split.startswith("test") and split[-1] in reference_split[4:]
    if split == "test":
        return reference_split.startswith("test")
    return reference_split == split


def _image_path(folders: Sequence[Path], file_name: str) -> Path:
    """Where a picture lies; where it is expected if it lies nowhere."""
    places = [folder / file_name for folder in folders if folder.is_dir()] or [folders[0] / file_name]
    return places[0] if len(places) == 1 else next((place for place in places if place.exists()), places[0])


def _samples(dataset, split, attribute, references, images, annotations, paths) -> Iterator[Sample | Skipped]:
    for reference in references:
        image_id, ref_id = reference.key("image_id"), reference.key("ref_id")
        size = images[image_id].size()
        ids = _object_ids(reference)
        masks = [read_mask(annotations[key].take("segmentation"), size, annotations[key].name) for key in ids]
        mask = union_mask(masks, size)
        sentences = reference.records("sentences", "sentence")
        if not sentences:
            yield Skipped(reference.name, NO_WORDS)
        for number, sentence in enumerate(sentences):
            phrase = sentence.text("sent")
            false = sentence.flag("is_false_premise") or ("exist" in sentence and not sentence.flag("exist"))
            absent = false or (not ids and attribute == "gres")
            if not phrase:
                yield Skipped(sentence.name, NO_WORDS)
            elif not absent and is_empty(mask):
                yield Skipped(reference.name, NO_AREA if ids else NO_TARGET)
            else:
                sentence_id = sentence.key("sent_id") if "sent_id" in sentence else number
                yield Sample(
                    id=f"{dataset}-{split}-{ref_id}-{sentence_id}",
                    image=str(paths[image_id]),
                    size=size,
                    attribute=_attribute(attribute, false),
                    phrases=(phrase,),
                    masks=(None if absent else mask,),
                    correction=sentence.optional_text("gt_sent") if false else None,
                )


def _attribute(attribute: str, false: bool) -> str:
    # Where an absent target is part of the task itself, as in gRefCOCO, it stays that task.
    return "fp_res" if false and attribute == "res" else attribute


def _object_ids(reference: Record) -> list[int | str]:
    """The annotations a reference is about; -1 stands for none."""
    ids = reference.take("ann_id")
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    ids = [checked_key(number, f"{reference.name}: ann_id") for number in ids]
    return [number for number in ids if number != -1]
