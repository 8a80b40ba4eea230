"""The REFER family, in miniatures of the original layouts, down to the pixels."""

import numpy as np
import pytest
from miniatures import PIXELS, SIZE, decoded, refer_family, reference, save_pickle

from uground.training.data.refer_reader import LAYOUTS
from uground.training.data.registry import DATASETS, read_samples
from uground.training.evaluation.protocols import PROTOCOLS

FOLDERS = {name: (layout.folder, layout.references[0]) for name, layout in LAYOUTS.items()}


def read(dataset, root, split="val"):
    return list(read_samples(dataset, root, split))


@pytest.mark.parametrize(
    "dataset",
    [
        *("refcoco", "refcoco+", "refcocog", "refcocog-google", "refclef"),
        *("refcoco-unified", "refcoco+-unified", "refcocog-unified"),
    ],
)
def test_single_targets(tmp_path, dataset):
    folder, file = FOLDERS[dataset]
    references = [
        reference(1, 10, "val", "the red cup ", "größte Tasse ☕"),
        reference(2, 11, "train", "the crowd"),
        reference(3, 13, "val", "dog", image_id=2),
    ]
    images = "refer_seg/images/saiapr_tc-12" if dataset == "refclef" else None
    samples = read(dataset, refer_family(tmp_path, folder, file, references, images))
    assert [sample.phrases for sample in samples] == [("the red cup",), ("größte Tasse ☕",), ("dog",)]
    assert {sample.attribute for sample in samples} == {"res"}
    assert len({sample.id for sample in samples}) == 3
    assert samples[0].size == SIZE
    assert samples[0].image.endswith("COCO_train2014_000000000001.jpg")
    assert samples[2].image.endswith("COCO_train2014_000000000002.jpg")
    # overlapping polygons are one mask, counted once; a line beside a polygon is nothing
    np.testing.assert_array_equal(decoded(samples[0].masks[0]), PIXELS[10])
    np.testing.assert_array_equal(decoded(samples[2].masks[0]), PIXELS[13])
    np.testing.assert_array_equal(decoded(read(dataset, tmp_path, "train")[0].masks[0]), PIXELS[11])


def test_the_root_may_be_refer_seg_itself(tmp_path):
    refer_family(tmp_path, "refcoco", "refs(unc).p", [reference(1, 12, "val", "dog")])
    outer, inner = read("refcoco", tmp_path), read("refcoco", tmp_path / "refer_seg")
    assert [sample.id for sample in outer] == [sample.id for sample in inner]
    np.testing.assert_array_equal(decoded(inner[0].masks[0]), PIXELS[12])


def test_test_splits_of_refcoco(tmp_path):
    references = [reference(i, 10, split, "x") for i, split in enumerate(["testA", "testB", "testAB", "val"])]
    refer_family(tmp_path, "refcoco", "refs(unc).p", references)
    ids = {
        split: [sample.id.split("-")[2] for sample in read("refcoco", tmp_path, split)] for split in ("testA", "testB")
    }
    assert ids == {"testA": ["0", "2"], "testB": ["1", "2"]}


@pytest.mark.parametrize("file", ["grefs(unc).json", "grefs(unc).p"])
def test_grefcoco_has_none_one_or_several_targets(tmp_path, file):
    references = [
        reference(1, [10, 12], "val", "both cups"),
        reference(2, [-1], "val", {"sent": "a zebra", "exist": False}),
        reference(3, [11], "val", "the crowd"),
        reference(4, -1, "val", "nothing"),
    ]
    samples = read("grefcoco", refer_family(tmp_path, "grefcoco", file, references))
    assert [sample.attribute for sample in samples] == ["gres"] * 4
    np.testing.assert_array_equal(decoded(samples[0].masks[0]), PIXELS[10] | PIXELS[12])
    assert samples[1].masks == samples[3].masks == (None,)
    np.testing.assert_array_equal(decoded(samples[2].masks[0]), PIXELS[11])


@pytest.mark.parametrize("images", ["refer_seg/refzom/trainval2014", "refer_seg/refzom/val2014"])
def test_ref_zom(tmp_path, images):
    references = [reference(1, [10, 11], "test", "all"), reference(2, [], "test", "none")]
    refer_family(tmp_path, "refzom", "Ref_ZOM.p", references, images)
    samples = read("refzom", tmp_path, "test")
    np.testing.assert_array_equal(decoded(samples[0].masks[0]), PIXELS[10] | PIXELS[11])
    assert samples[1].masks == (None,)
    assert samples[0].image.startswith(str(tmp_path / images))


def test_ref_zom_looks_in_both_halves_of_coco(tmp_path):
    references = [reference(1, [10], "test", "one"), reference(2, [13], "test", "two", image_id=2)]
    refer_family(tmp_path, "refzom", "Ref_ZOM.p", references, "refer_seg/refzom/train2014")
    train, val = tmp_path / "refer_seg/refzom/train2014", tmp_path / "refer_seg/refzom/val2014"
    val.mkdir()
    (train / "COCO_train2014_000000000002.jpg").rename(val / "COCO_train2014_000000000002.jpg")
    assert [sample.image.split("/")[-2] for sample in read("refzom", tmp_path, "test")] == ["train2014", "val2014"]


@pytest.mark.parametrize("dataset", ["r-refcoco", "r-refcoco+", "r-refcocog"])
def test_negative_sentences(tmp_path, dataset):
    sentences = ({"sent": "a cup", "exist": True}, {"sent": "a whale", "exist": False}, {"sent": "cup", "exist": True})
    refer_family(tmp_path, *FOLDERS[dataset], [reference(1, 10, "val", *sentences)])
    samples = read(dataset, tmp_path)
    assert [sample.attribute for sample in samples] == ["res", "fp_res", "res"]
    assert samples[1].masks == (None,)
    np.testing.assert_array_equal(decoded(samples[2].masks[0]), PIXELS[10])


@pytest.mark.parametrize("dataset", ["fprefcoco", "fprefcoco+", "fprefcocog"])
def test_false_premises_know_the_truth(tmp_path, dataset):
    sentences = (
        {"sent": "blue cup", "is_false_premise": True, "gt_sent": "red cup"},
        {"sent": "red cup", "is_false_premise": False, "gt_sent": "red cup"},
    )
    refer_family(tmp_path, *FOLDERS[dataset], [reference(1, 10, "val", *sentences)])
    false, true = read(dataset, tmp_path)
    assert (false.attribute, false.masks, false.correction) == ("fp_res", (None,), "red cup")
    assert (true.attribute, true.correction) == ("res", None)
    np.testing.assert_array_equal(decoded(true.masks[0]), PIXELS[10])


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(OSError, match=r"refcoco is incomplete under .*; missing: refer_seg/refcoco/refs\(unc\)\.p, "):
        read("refcoco", tmp_path)
    refer_family(tmp_path, "refcoco", "refs(unc).p", [reference(1, 10, "val", "cup")])
    (tmp_path / "refer_seg/images/mscoco/images/train2014/COCO_train2014_000000000001.jpg").unlink()
    with pytest.raises(OSError, match="1 annotated image is absent: .*COCO_train2014_000000000001.jpg$"):
        read("refcoco", tmp_path)


def test_what_does_not_fit_is_named(tmp_path):
    root = refer_family(tmp_path, "refcoco", "refs(unc).p", [reference(1, 10, "val", "cup")])
    with pytest.raises(ValueError, match=r"there is no dataset 'refkoko'; there are: refcoco, refcoco\+"):
        read_samples("refkoko", root, "val")
    with pytest.raises(ValueError, match="refcoco has no split 'test'; it has: train, val, testA, testB"):
        read_samples("refcoco", root, "test")
    with pytest.raises(ValueError, match=r"no references in split 'testA'; .*refs\(unc\)\.p holds: val"):
        read("refcoco", root, "testA")
    save_pickle(tmp_path / "refer_seg/refcoco/refs(unc).p", [reference(1, 99, "val", "cup")])
    with pytest.raises(ValueError, match="reference 1 names annotation 99, which does not exist"):
        read("refcoco", root)
    save_pickle(tmp_path / "refer_seg/refcoco/refs(unc).p", [reference(1, 10, "val", "cup", image_id=7)])
    with pytest.raises(ValueError, match="reference 1 is about image 7, which .*instances.json does not list"):
        read("refcoco", root)


def test_every_layout_is_registered_under_protocols_that_exist():
    assert set(LAYOUTS) <= set(DATASETS)
    assert {name for entry in DATASETS.values() for name in entry.protocols} <= set(PROTOCOLS)
    assert DATASETS["muse"].whole_splits == ("train", "val", "test")
