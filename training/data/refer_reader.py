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
from uground.training.data.masks import is_empty, read_mask, union_mask
from uground.training.data.samples import Sample

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


def read_refer(dataset: str, root, split: str) -> Iterator[Sample]:
    """
    Samples of a dataset of the REFER family.

    Args:
        dataset: a name in `LAYOUTS`.
        root: the folder that holds `refer_seg/`, or what `refer_seg/` holds.
        split: as in the reference file: `"train"`, `"val"`, `"test"`, `"testA"`, …

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
    references = read_json(reference_file) if reference_file.suffix == ".json" else read_pickle(reference_file)
    chosen = [reference for reference in references if _belongs(reference["split"], split)]
    if not chosen:
        found = ", ".join(sorted({reference["split"] for reference in references}))
        raise ValueError(f"{dataset} has no references in split {split!r}; {reference_file} holds: {found}")
    instances = read_json(instances_file)
    images = {image["id"]: image for image in instances["images"]}
    annotations = {annotation["id"]: annotation for annotation in instances["annotations"]}
    folders = [root / place for place in layout.images]
    paths = {}
    for reference in chosen:
        if reference["image_id"] not in images:
            raise ValueError(
                f"{dataset}: reference {reference['ref_id']} is about image {reference['image_id']}, "
                f"which {instances_file} does not list"
            )
        paths[reference["image_id"]] = _image_path(folders, images[reference["image_id"]]["file_name"])
    require_images(dataset, root, paths.values())
    return _samples(dataset, split, layout.attribute, chosen, images, annotations, paths)


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


def _samples(dataset, split, attribute, references, images, annotations, paths) -> Iterator[Sample]:
    for reference in references:
        image = images[reference["image_id"]]
        size = (int(image["height"]), int(image["width"]))
        mask = _target(dataset, reference, annotations, size)
        for number, sentence in enumerate(reference["sentences"]):
            phrase = sentence["sent"].strip()
            false = bool(sentence.get("is_false_premise", False)) or sentence.get("exist") is False
            there = not false and not is_empty(mask)
            yield Sample(
                id=f"{dataset}-{split}-{reference['ref_id']}-{sentence.get('sent_id', number)}",
                image=str(paths[reference["image_id"]]),
                size=size,
                attribute=_attribute(attribute, false),
                phrases=(phrase,),
                masks=(mask if there else None,),
                correction=(sentence.get("gt_sent") or None) if false else None,
            )


def _attribute(attribute: str, false: bool) -> str:
    # Where an absent target is part of the task itself, as in gRefCOCO, it stays that task.
    return "fp_res" if false and attribute == "res" else attribute


def _target(dataset: str, reference: dict, annotations: dict, size: tuple[int, int]) -> dict:
    """The union of the objects a reference is about."""
    ids = reference["ann_id"]
    ids = [ids] if not isinstance(ids, (list, tuple)) else ids
    masks = []
    for annotation_id in ids:
        if annotation_id == -1:
            continue
        if annotation_id not in annotations:
            raise ValueError(
                f"{dataset}: reference {reference['ref_id']} names annotation {annotation_id}, which does not exist"
            )
        name = f"{dataset}: annotation {annotation_id}"
        masks.append(read_mask(annotations[annotation_id]["segmentation"], size, name))
    return union_mask(masks, size)
