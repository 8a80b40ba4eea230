"""Broken records of every reader: a sentence with file and record, or left out with a count, never an absence."""

import copy
import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from miniatures import (
    ANNOTATIONS,
    SIZE,
    box_mask,
    box_polygon,
    compressed_rle,
    instances,
    refer_family,
    reference,
    save_image,
    save_json,
    save_pickle,
)
from PIL import Image

from uground.training.data.registry import read_samples
from uground.training.data.samples import NO_ANSWER, NO_AREA, NO_NAME, NO_TARGET, NO_WORDS, SkipCount

DELETE = object()
LINE, POINT, EMPTY = [[1, 1, 9, 1, 5, 1]], [[1, 1]], {"size": list(SIZE), "counts": [SIZE[0] * SIZE[1]]}
CORNERS = [[2, 2], [10, 2], [10, 6], [2, 6]]


def refcoco(root):
    refer_family(root, "refcoco", "refs(unc).p", [reference(1, 10, "val", "cup")])
    return root / "refer_seg/refcoco/refs(unc).p"


def refcoco_objects(root):
    refcoco(root)
    content = {**instances(), "annotations": ANNOTATIONS[:1]}
    return save_json(root / "refer_seg/refcoco/instances.json", content)


def r_refcoco(root):
    sentences = [{"sent": "a cup", "exist": True}, {"sent": "a whale", "exist": False}]
    refer_family(root, "R-refcoco", "refs(unc_exclude_unified).p", [reference(1, 10, "val", *sentences)])
    return root / "refer_seg/R-refcoco/refs(unc_exclude_unified).p"


def reasonseg(root):
    save_image(root / "train/a.jpg")
    shapes = [{"label": "target", "points": CORNERS}, {"label": "ignore", "points": [[0, 0], [2, 0], [2, 1]]}]
    premise = ["where is the whale?", True, "There is no whale."]
    content = {"shapes": shapes, "text": ["what holds tea?"], "is_sentence": True, "false_premise_QA": [premise]}
    save_json(root / "explanatory/train.json", [{"image": "a.jpg", "outputs": "It is hollow."}])
    return save_json(root / "train/a.json", content)


def lisa_plus(name):
    def make(root):
        save_image(root / "train2017/1.jpg")
        points = {"7": {"points": [CORNERS], "label name": "remote"}, "9": [box_polygon(20, 10, 28, 18)]}
        entry = {
            "LISA_Plus_Instance_Seg": {
                "img_path": "1.jpg", "English Question": "Remotes?", "ID": [7], "points": points},
            "LISA_Plus_COT": {
                "image_path": "1.jpg", "English Question": "Why?", "info": points,
                "English Answer": "The <7|remote>."},
            "LISA_Plus_Conversations": {
                "img_pth": "1.jpg", "info": points, "output": "<person>: Where?<robot>: Here: <7|remote>."},
        }[name]  # fmt: skip
        return save_json(root / f"{name}.json", [entry])

    return make


def muse(root):
    save_image(root / "train2014/1.jpg")
    objects = [{"segmentation": [box_polygon(2, 2, 10, 6)], "category_name": "cup", "rephrased_name": "red cup"},
               {"segmentation": compressed_rle(box_mask(20, 10, 28, 18)), "category_name": "dog"}]  # fmt: skip
    entry = {"height": SIZE[0], "width": SIZE[1], "file_name": "1.jpg", "questions": ["who?"], "answers": [objects],
             "text_answers": ["{seg} and {seg}."]}  # fmt: skip
    return save_json(root / "MUSE_val.json", [entry])


def pascal_part(root):
    save_image(root / "VOCdevkit/VOC2010/JPEGImages/1.jpg")
    image = {"id": 1, "file_name": "1.jpg", "height": SIZE[0], "width": SIZE[1]}
    content = {"images": [image], "annotations": ANNOTATIONS[:1], "categories": [{"id": 1, "name": "cup:handle"}]}
    return save_json(root / "train.json", content)


def llava(root):
    save_image(root / "train2017/1.jpg")
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cup."}]
    return save_json(root / "llava_instruct_150k.json", [{"id": "5", "image": "1.jpg", "conversations": turns}])


MAKERS = {
    "refcoco": ("refcoco", "val", refcoco),
    "objects of refcoco": ("refcoco", "val", refcoco_objects),
    "r-refcoco": ("r-refcoco", "val", r_refcoco),
    "reasonseg": ("reasonseg", "train", reasonseg),
    "lisa instances": ("lisa-plus-instance-seg", "train", lisa_plus("LISA_Plus_Instance_Seg")),
    "lisa answers": ("lisa-plus-cot", "train", lisa_plus("LISA_Plus_COT")),
    "lisa talk": ("lisa-plus-conversations", "train", lisa_plus("LISA_Plus_Conversations")),
    "muse": ("muse", "val", muse),
    "parts": ("pascal-part", "train", pascal_part),
    "llava": ("llava-instruct", "train", llava),
}


def load(path):
    return pickle.loads(path.read_bytes()) if path.suffix == ".p" else json.loads(path.read_text())


def save(path, content):
    if path.suffix == ".p":
        save_pickle(path, content)
    else:
        path.write_text(json.dumps(content))


def changed(content, place, value):
    """The content with another value at a place, a tuple of keys; `DELETE` takes it away."""
    content = copy.deepcopy(content)
    if not place:
        return value
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    if value is DELETE:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return content


def places(content, place=()):
    """Every place in nested lists and dicts, but only the first of a list of numbers."""
    yield place
    if isinstance(content, dict):
        for key, value in content.items():
            yield from places(value, (*place, key))
    elif isinstance(content, list):
        for number, value in enumerate(content if isinstance(content[0], (dict, list, str)) else content[:1]):
            yield from places(value, (*place, number))


def read(dataset, root, split):
    skips = SkipCount()
    return list(read_samples(dataset, root, split, skips)), skips


WRONG = [DELETE, None, 5, -1, 10**400, float("nan"), "", " ", "x", "\ud83d", True, [], {}, [[]], [None], {"a": 1}]


@pytest.mark.parametrize(("dataset", "split", "make"), MAKERS.values(), ids=MAKERS)
def test_no_broken_record_ends_in_another_error_or_in_an_absence(dataset, split, make, tmp_path):
    path = make(tmp_path)
    content = load(path)
    good, skips = read(dataset, tmp_path, split)
    assert good and not skips.counts
    absent = sum(None in sample.masks for sample in good)
    refused = 0
    for place in places(content):
        for value in WRONG:
            if value is DELETE and (not place or isinstance(place[-1], int)):
                continue
            save(path, changed(content, place, value))
            try:
                samples, _ = read(dataset, tmp_path, split)
            except (ValueError, OSError) as error:
                refused += 1
                sentence = str(error)
                assert path.name in sentence or "absent" in sentence or "has no references" in sentence, sentence
                assert "\n" not in sentence and len(sentence) < 600, sentence
                continue
            assert sum(None in sample.masks for sample in samples) <= absent, (place, value)
            for sample in samples:
                words = [*sample.phrases, *filter(lambda text: text is not None, (sample.question, sample.answer))]
                assert words and all(word.strip() for word in words), (place, value, sample)
    assert refused > 20


MISSING = {
    "sent": ("refcoco", (0, "sentences", 0, "sent"), DELETE,
        r"refs\(unc\).p reference 1, sentence 0 must have 'sent'"),
    "split": ("refcoco", (0, "split"), DELETE, r"refs\(unc\).p reference 1 must have 'split', got 'ref_id', 'ann_id'"),
    "split null": ("refcoco", (0, "split"), None, "reference 1: split must be a text, got None"),
    "ref_id": ("refcoco", (0, "ref_id"), DELETE, r"refs\(unc\).p reference number 0 must have 'ref_id'"),
    "a dict": ("refcoco", (), {"a": 1}, r"refs\(unc\).p must be a list, got \{'a': 1\}"),
    "sentences": ("refcoco", (0, "sentences"), "cup", "reference 1: sentences must be a list, got 'cup'"),
    "ann_id": ("refcoco", (0, "ann_id"), 1.5, "reference 1: ann_id must be a whole number or a text, got 1.5"),
    "exist": ("r-refcoco", (0, "sentences", 1, "exist"), "no", "sentence 1: exist must be true or false, got 'no'"),
    "segmentation": (
        "objects of refcoco", ("annotations", 0, "segmentation"), DELETE,
        "instances.json annotation 10 must have 'segmentation'"),
    "height": ("objects of refcoco", ("images", 0, "height"), DELETE, "instances.json image 1 must have 'height'"),
    "width": ("objects of refcoco", ("images", 0, "width"), "30", "instances.json image 1: a size must be whole numb"),
    "far": (
        "objects of refcoco", ("annotations", 0, "segmentation", 0, 0), 1e30,
        "instances.json annotation 10: the polygon's point .* lies far outside of the image"),
    "nan": (
        "objects of refcoco", ("annotations", 0, "segmentation", 0, 0), float("nan"),
        "instances.json annotation 10: the numbers of a polygon must be finite"),
    "short RLE": (
        "objects of refcoco", ("annotations", 0, "segmentation"), {"size": list(SIZE), "counts": [9]},
        "instances.json annotation 10: its RLE counts 9 pixels"),
    "shape": ("reasonseg", ("shapes", 0, "points"), DELETE, "a.json shape 0 must have 'points'"),
    "shape point": ("reasonseg", ("shapes", 0, "points", 0), [1], "a.json shape 0: a polygon must be"),
    "text": ("reasonseg", ("text", 0), None, "a.json: text 0 must be a text, got None"),
    "premise": ("reasonseg", ("false_premise_QA", 0), ["a"], "a.json false_premise_QA 0 must hold a query"),
    "answer": ("lisa answers", (0, "English Answer"), DELETE, "LISA_Plus_COT.json entry 0 must have 'English Answer'"),
    "info": ("lisa answers", (0, "info"), [], "entry 0: info must be an object with named fields"),
    "object": ("muse", (0, "answers", 0, 0, "segmentation"), DELETE, "entry 0, question 0, object 0 must have 'segm"),
    "muse size": ("muse", (0, "height"), DELETE, "MUSE_val.json entry 0 must have 'height'"),
    "category": ("parts", ("annotations", 0, "category_id"), 7, "annotation 10 is of category 7, which .*train.json"),
    "name": ("parts", ("categories", 0, "name"), 3, "train.json category 1: name must be a text, got 3"),
    "value": ("llava", (0, "conversations", 1, "value"), None, "entry 0, turn 1: value must be a text, got None"),
    "half": ("llava", (0, "conversations", 1, "value"), "\ud83d", "turn 1: value must be a text of whole characters"),
}  # fmt: skip


@pytest.mark.parametrize(("maker", "place", "value", "sentence"), MISSING.values(), ids=MISSING)
def test_what_is_missing_or_of_another_kind_is_named(maker, place, value, sentence, tmp_path):
    dataset, split, make = MAKERS[maker]
    path = make(tmp_path)
    save(path, changed(load(path), place, value))
    with pytest.raises(ValueError, match=sentence):
        read(dataset, tmp_path, split)


DEGENERATE = {
    "no words": ("refcoco", (0, "sentences", 0, "sent"), "  ", NO_WORDS),
    "no sentences": ("refcoco", (0, "sentences"), [], NO_WORDS),
    "no object": ("refcoco", (0, "ann_id"), [], NO_TARGET),
    "a line": ("objects of refcoco", ("annotations", 0, "segmentation"), LINE, NO_AREA),
    "a point": ("objects of refcoco", ("annotations", 0, "segmentation"), POINT, NO_AREA),
    "no polygon": ("objects of refcoco", ("annotations", 0, "segmentation"), [], NO_AREA),
    "null": ("objects of refcoco", ("annotations", 0, "segmentation"), None, NO_AREA),
    "an empty RLE": ("objects of refcoco", ("annotations", 0, "segmentation"), EMPTY, NO_AREA),
    "of a true sentence": ("r-refcoco", (0, "ann_id"), -1, NO_TARGET),
    "no question": ("reasonseg", ("text", 0), "", NO_WORDS),
    "no questions": ("reasonseg", ("text",), [], NO_WORDS),
    "no shapes": ("reasonseg", ("shapes",), [], NO_AREA),
    "a shape on a line": ("reasonseg", ("shapes", 0, "points"), [[2, 2], [9, 2], [5, 2]], NO_AREA),
    "an ignored target": ("reasonseg", ("shapes", 0, "label"), "ignored", NO_AREA),
    "a premise": ("reasonseg", ("false_premise_QA", 0, 0), " ", NO_WORDS),
    "a denial": ("reasonseg", ("false_premise_QA", 0, 2), " ", NO_ANSWER),
    "a remote on a line": ("lisa instances", (0, "points", "7", "points"), LINE, NO_AREA),
    "no remote": ("lisa instances", (0, "ID"), [8], NO_TARGET),
    "a thing of an answer": ("lisa answers", (0, "info", "7", "points"), LINE, NO_AREA),
    "a thing nobody drew": ("lisa answers", (0, "info", "7", "points"), [], NO_TARGET),
    "an answer": ("lisa answers", (0, "English Answer"), "", NO_ANSWER),
    "a turn": ("lisa talk", (0, "output"), "<person>: Where?<robot>: ", NO_ANSWER),
    "an object on a line": ("muse", (0, "answers", 0, 1, "segmentation"), LINE, NO_AREA),
    "no objects": ("muse", (0, "answers", 0), [], NO_TARGET),
    "a nameless object": ("muse", (0, "answers", 0, 1, "category_name"), "", NO_NAME),
    "a question": ("muse", (0, "questions", 0), "", NO_WORDS),
    "a class on a line": ("parts", ("annotations", 0, "segmentation"), LINE, NO_AREA),
    "a nameless class": ("parts", ("categories", 0, "name"), "cup: ", NO_NAME),
    "only an image": ("llava", (0, "conversations", 0, "value"), "<image>\n", NO_WORDS),
    "no reply": ("llava", (0, "conversations", 1, "value"), " ", NO_ANSWER),
}


@pytest.mark.parametrize(("maker", "place", "value", "reason"), DEGENERATE.values(), ids=DEGENERATE)
def test_what_asks_for_nothing_is_left_out_with_a_count(maker, place, value, reason, tmp_path):
    dataset, split, make = MAKERS[maker]
    path = make(tmp_path)
    before, _ = read(dataset, tmp_path, split)
    save(path, changed(load(path), place, value))
    after, skips = read(dataset, tmp_path, split)
    assert dict(skips.counts) == {reason: 1}
    assert str(skips).startswith(f"left out: 1 x {reason} (first: ")
    assert path.name in str(skips) or ("reference 1" in str(skips) and path.name == "instances.json")
    kept = {sample.id for sample in after}
    assert len(before) - len(after) == 1 or value == []
    assert kept < {sample.id for sample in before}


def test_a_warning_counts_what_nobody_else_does(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("uground.training.data.registry.logger.propagate", True, raising=False)
    path = refcoco(tmp_path)
    save(path, changed(load(path), (0, "sentences", 0, "sent"), ""))
    warned = []
    monkeypatch.setattr("uground.training.data.registry.logger.warning", warned.append)
    assert list(read_samples("refcoco", tmp_path, "val")) == []
    assert len(warned) == 1 and warned[0].startswith("refcoco, split 'val': left out: 1 x a query without words")


def png(size=SIZE):
    buffer = io.BytesIO()
    Image.new("RGB", (size[1], size[0])).save(buffer, "PNG")
    return buffer.getvalue()


def hub_row(**columns):
    return {
        "image": {"bytes": png(), "path": None},
        "text": "the cup",
        "mask": box_mask(2, 2, 9, 6).tolist(),
        **columns,
    }


HUB_REFUSED = {
    "no picture": ({"image": None}, r"test-0.parquet row 1, hub-refcoco-test-1: image must be an object with named"),
    "no bytes": ({"image": {"bytes": None, "path": "a.png"}}, "hub-refcoco-test-1: its image must hold the bytes"),
    "a cut picture": ({"image": {"bytes": b"nothing", "path": None}}, "hub-refcoco-test-1: its image cannot be read"),
    "no text": ({"text": None}, "hub-refcoco-test-1: text must be a text, got None"),
    "no mask": ({"mask": None}, "hub-refcoco-test-1: mask must be a list, got None"),
    "a torn mask": ({"mask": [[True] * 30] * 19 + [[True]]}, "hub-refcoco-test-1: its mask has size"),
    "a mask with holes": ({"mask": [[None] * 30] * 20}, "hub-refcoco-test-1: its mask must hold true and false"),
}


@pytest.mark.parametrize(("columns", "sentence"), HUB_REFUSED.values(), ids=HUB_REFUSED)
def test_a_row_of_a_hub_copy_is_named(columns, sentence, tmp_path):
    parquet.write_table(pa.Table.from_pylist([hub_row(), hub_row(**columns)]), tmp_path / "test-0.parquet")
    with pytest.raises((ValueError, OSError), match=sentence):
        read("hub-refcoco", tmp_path, "test")


def test_hub_copies_without_words_area_or_rows(tmp_path):
    rows = [hub_row(), hub_row(text=" "), hub_row(mask=box_mask(0, 0, 0, 0).tolist())]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "test-0.parquet")
    samples, skips = read("hub-refcoco", tmp_path, "test")
    assert len(samples) == 1 and dict(skips.counts) == {NO_WORDS: 1, NO_AREA: 1}
    parquet.write_table(pa.Table.from_pylist(rows).slice(0, 0), tmp_path / "test-0.parquet")
    with pytest.raises(ValueError, match="hub-refcoco has no rows in split 'test'"):
        read("hub-refcoco", tmp_path, "test")
    (tmp_path / "test-0.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(OSError, match="test-0.parquet cannot be read as a parquet file"):
        read("hub-refcoco", tmp_path, "test")


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.zeros((*SIZE, 3), np.uint8), r"label map .*a.png must have one whole number per pixel, got uint8"),
        (None, "label map .*a.png cannot be read"),
    ],
)
def test_a_label_map_of_another_kind_is_named(labels, sentence, tmp_path):
    save_image(tmp_path / "images/training/a.jpg")
    folder = tmp_path / "annotations/training"
    folder.mkdir(parents=True)
    if labels is None:
        (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    else:
        Image.fromarray(labels).save(folder / "a.png")
    with pytest.raises((ValueError, OSError), match=sentence):
        read("ade20k", tmp_path, "train")


def test_a_class_without_a_name_is_left_out(tmp_path):
    save_json(tmp_path / "config_v2.0.json", {"labels": [{"readable": "Bird"}, {"readable": " "}]})
    save_image(tmp_path / "training/images/x.jpg")
    labels = np.zeros(SIZE, np.uint8)
    labels[:5] = 1
    (tmp_path / "training/v2.0/labels").mkdir(parents=True)
    Image.fromarray(labels).save(tmp_path / "training/v2.0/labels/x.png")
    samples, skips = read("mapillary", tmp_path, "train")
    assert [sample.phrases for sample in samples] == [("bird",)]
    assert dict(skips.counts) == {NO_NAME: 1} and "x.png label 1" in str(skips)
