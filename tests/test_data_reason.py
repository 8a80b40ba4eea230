"""ReasonSeg, LISA++ and MUSE, in miniatures of the original layouts, down to the pixels."""

import numpy as np
import pytest
from miniatures import SIZE, box_mask, box_polygon, compressed_rle, crowd_rle, decoded, save_image, save_json

from uground.training.data.reason_reader import enumerate_phrases, mark_objects, paint_shapes
from uground.training.data.registry import read_samples


def read(dataset, root, split="val"):
    return list(read_samples(dataset, root, split))


def corners(x0, y0, x1, y1):
    """A polygon that paints x0 <= x <= x1 and y0 <= y <= y1."""
    return [[x0, y0], [x1, y0], [x1, y1], [x0, y1]]


SHAPES = [
    # small before large: the file's order must not matter
    {"label": "target", "points": corners(6, 6, 8, 8)},
    {"label": "Ignore_region", "points": corners(4, 4, 12, 12)},
    {"label": "target", "points": corners(2, 2, 20, 16)},
    {"label": "flag", "points": corners(0, 0, 29, 19)},
]


def reason_seg(root, split="val", name="a", **content):
    folder = root / "reason_seg" / "ReasonSeg" / split
    save_image(folder / f"{name}.jpg")
    annotation = {"shapes": SHAPES, "text": ["what holds tea?", "which one is for drinking?"], "is_sentence": True}
    save_json(folder / f"{name}.json", annotation | content)
    return root


def test_shapes_are_painted_from_the_largest():
    labels = paint_shapes(SHAPES, SIZE)
    large, ignored, small = box_mask(2, 2, 21, 17), box_mask(4, 4, 13, 13), box_mask(6, 6, 9, 9)
    np.testing.assert_array_equal(labels == 1, (large & ~ignored) | small)
    np.testing.assert_array_equal(labels == 255, ignored & ~small)


def test_reasonseg_evaluation_asks_the_first_way(tmp_path):
    reason_seg(tmp_path)
    reason_seg(tmp_path, name="b", text=["the cup"], is_sentence=False, shapes=SHAPES[2:3])
    long, short = read("reasonseg", tmp_path)
    assert (long.question, long.phrases, long.subset, long.attribute) == ("what holds tea?",) + (
        ("what holds tea?",),
        "long",
        "rs",
    )
    assert (short.question, short.phrases, short.subset) == (None, ("the cup",), "short")
    assert decoded(long.masks[0])[3, 3] and not decoded(long.masks[0])[5, 5]
    np.testing.assert_array_equal(decoded(long.ignore), box_mask(4, 4, 13, 13) & ~box_mask(6, 6, 9, 9))
    assert short.ignore is None


def test_reasonseg_training_asks_every_way_and_knows_explanations(tmp_path):
    reason_seg(tmp_path, "train", false_premise_QA=[["where is the whale?", True, "There is no whale."]])
    explanatory = tmp_path / "reason_seg" / "ReasonSeg" / "explanatory" / "train.json"
    save_json(explanatory, [{"image": "a.jpg", "query": "q", "outputs": "Because it is hollow."}])
    first, second, false = read("reasonseg", tmp_path, "train")
    assert (first.question, second.question) == ("what holds tea?", "which one is for drinking?")
    assert first.explanation == second.explanation == "Because it is hollow."
    assert (false.attribute, false.masks, false.explanation) == ("fp_res", (None,), "There is no whale.")


def test_reasonseg_half_downloaded(tmp_path):
    with pytest.raises(OSError, match="reasonseg is incomplete under .*; missing: .*val$"):
        read("reasonseg", tmp_path)
    reason_seg(tmp_path)
    folder = tmp_path / "reason_seg" / "ReasonSeg" / "val"
    save_image(folder / "c.jpg")
    with pytest.raises(OSError, match="missing: reason_seg/ReasonSeg/val/c.json"):
        read("reasonseg", tmp_path)
    (folder / "c.jpg").unlink()
    (folder / "a.jpg").unlink()
    with pytest.raises(OSError, match="1 annotated image is absent: reason_seg/ReasonSeg/val/a.jpg"):
        read("reasonseg", tmp_path)
    save_image(folder / "a.jpg")
    save_json(folder / "a.json", {"shapes": [], "text": []})
    with pytest.raises(
        ValueError, match="a.json must have shapes, text and is_sentence, got none of the name is_sent"
    ):
        read("reasonseg", tmp_path)


MASKS = {"7": {}, "8": {}, "9": {}}


@pytest.mark.parametrize(
    ("text", "expected", "ids"),
    [
        ("Use <7|remote> now.", "Use [SEG] now.", ["7"]),
        ("《8|杯子》在这里", "[SEG]在这里", ["8"]),
        ("The [pizza <7>, pizza <9>] are hot.", "The [SEG] and [SEG] are hot.", ["7", "9"]),
        ("Both [<7|cup>, <8|cup>, <9|cup>].", "Both [SEG], [SEG] and [SEG].", ["7", "8", "9"]),
        ("Take [7|cup, 8|mug].", "Take [SEG] and [SEG].", ["7", "8"]),
        # an object nobody drew is left out
        ("A <5|ghost> and the cup<7|cup>.", "A and the cup [SEG].", ["7"]),
        ("No object [at all], 3 < 4.", "No object [at all], 3 < 4.", []),
    ],
)
def test_objects_in_answers_become_segment_tokens(text, expected, ids):
    assert mark_objects(text, MASKS) == (expected, ids)


def test_lists():
    assert [enumerate_phrases(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def lisa_plus(root, file, entry):
    save_image(root / "refer_seg/images/mscoco/images/train2017/000000000009.jpg")
    save_json(root / "reason_seg_plus" / file, [entry])
    return root


OBJECTS = {"7": {"points": [corners(2, 2, 10, 6)], "label name": "remote"}, "8": {"points": []}}


def test_lisa_plus_instances(tmp_path):
    entry = {
        "img_path": "000000000009.jpg",
        "English Question": "Segment the remotes.",
        "ID": [7, 8, 99],
        "points": OBJECTS,
    }
    (sample,) = read("lisa-plus-instance-seg", lisa_plus(tmp_path, "LISA_Plus_Instance_Seg.json", entry), "train")
    assert (sample.question, sample.answer, sample.phrases) == ("Segment the remotes.", None, ("remote",))
    np.testing.assert_array_equal(decoded(sample.masks[0]), box_mask(2, 2, 10, 6))


@pytest.mark.parametrize(
    ("dataset", "file"),
    [("lisa-plus-cot", "LISA_Plus_COT.json"), ("lisa-plus-caption", "LISA_Plus_Caption.json")],
)
def test_lisa_plus_answers(tmp_path, dataset, file):
    info = {"7": {"polygon": box_polygon(2, 2, 10, 6)}, "9": [box_polygon(20, 10, 28, 18)]}
    entry = {"image_path": "000000000009.jpg", "English Question": "Why?", "info": info,
             "English Answer": "The <9|dog> sees <7|remote>."}  # fmt: skip
    (sample,) = read(dataset, lisa_plus(tmp_path, file, entry), "train")
    assert (sample.answer, sample.attribute) == ("The [SEG] sees [SEG].", "multi_rs")
    np.testing.assert_array_equal(decoded(sample.masks[0]), box_mask(20, 10, 28, 18))
    np.testing.assert_array_equal(decoded(sample.masks[1]), box_mask(2, 2, 10, 6))


def test_lisa_plus_conversations(tmp_path):
    output = "<person>: Where is <7|the remote>?<robot>: Here: <7|the remote>.<person>: Thanks<robot>: Welcome."
    entry = {"img_pth": "000000000009.jpg", "output": output, "info": OBJECTS}
    first, second = read(
        "lisa-plus-conversations", lisa_plus(tmp_path, "LISA_Plus_Conversations.json", entry), "train"
    )
    assert (first.question, first.answer, first.attribute) == ("Where is the remote?", "Here: [SEG].", "rs")
    assert (second.question, second.answer, second.masks, second.attribute) == ("Thanks", "Welcome.", (), "vqa")


def muse(root, *parts):
    one = {"segmentation": [box_polygon(2, 2, 10, 6)], "bbox": [2, 2, 8, 4], "category_name": "cup",
           "rephrased_name": "red cup"}  # fmt: skip
    two = {"segmentation": crowd_rle(box_mask(20, 10, 28, 18)), "bbox": [20, 10, 8, 8], "category_name": "dog"}
    three = {**two, "segmentation": compressed_rle(box_mask(0, 0, 30, 3))}
    entry = {"height": SIZE[0], "width": SIZE[1], "ann_list": [one, two], "questions": ["who drinks?", "and now?"],
             "answers": [[one, two], [three]], "text_answers": ["{seg} and {seg} do.", None]}  # fmt: skip
    for number, part in enumerate(parts):
        where = {"coco_url": "http://images.cocodataset.org/val2017/000000000005.jpg"} if number else {
            "file_name": "COCO_train2014_000000000001.jpg"}  # fmt: skip
        save_json(root / "multi_reason_seg" / "MultiReasonSeg" / f"MUSE_{part}.json", [{**entry, **where}])
    images = root / "refer_seg/images/mscoco/images"
    save_image(images / "train2014" / "COCO_train2014_000000000001.jpg")
    save_image(images / "val2017" / "000000000005.jpg")
    return root


def test_muse(tmp_path):
    first, second = read("muse", muse(tmp_path, "val"))
    assert (first.question, first.answer, first.phrases) == ("who drinks?", "[SEG] and [SEG] do.", ("red cup", "dog"))
    np.testing.assert_array_equal(decoded(first.masks[0]), box_mask(2, 2, 10, 6))
    np.testing.assert_array_equal(decoded(first.masks[1]), box_mask(20, 10, 28, 18))
    assert (second.answer, second.attribute, second.subset) == (None, "multi_rs", None)
    np.testing.assert_array_equal(decoded(second.masks[0]), box_mask(0, 0, 30, 3))


def test_muse_test_is_two_files(tmp_path):
    muse(tmp_path, "test_less", "test_many")
    both = read("muse", tmp_path, "test")
    assert [sample.subset for sample in both] == ["less", "less", "many", "many"]
    assert both[2].image.endswith("val2017/000000000005.jpg")
    assert len(read("muse", tmp_path, "test_many")) == 2
    (tmp_path / "multi_reason_seg" / "MultiReasonSeg" / "MUSE_test_many.json").unlink()
    with pytest.raises(OSError, match="muse is incomplete under .*; missing: .*MUSE_test_many.json"):
        read("muse", tmp_path, "test")


def test_muse_with_too_few_answers(tmp_path):
    muse(tmp_path, "val")
    entry = {"height": 20, "width": 30, "file_name": "COCO_train2014_000000000001.jpg", "questions": ["a", "b"],
             "answers": [[]]}  # fmt: skip
    save_json(tmp_path / "multi_reason_seg" / "MultiReasonSeg" / "MUSE_val.json", [entry])
    with pytest.raises(
        ValueError, match="MUSE_val.json entry 0 has 2 questions, so it must have as many answers, got 1"
    ):
        read("muse", tmp_path)
