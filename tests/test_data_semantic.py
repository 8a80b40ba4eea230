"""Label maps, part annotations, LLaVA-Instruct and Hub copies, in miniatures, down to the pixels."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from miniatures import (
    ANNOTATIONS,
    PIXELS,
    SIZE,
    box_mask,
    box_polygon,
    compressed_rle,
    decoded,
    save_image,
    save_json,
)
from PIL import Image

from uground.training.data.class_names import ADE20K, COCO_STUFF
from uground.training.data.registry import read_samples
from uground.training.data.semantic_reader import part_name

LEFT, MIDDLE = box_mask(0, 0, 10, 20), box_mask(10, 0, 20, 20)


def read(dataset, root, split="train"):
    return list(read_samples(dataset, root, split))


def save_labels(path, left, middle, rest):
    labels = np.full(SIZE, rest, dtype=np.uint8)
    labels[LEFT], labels[MIDDLE] = left, middle
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(labels).save(path)


def test_class_names():
    assert (len(ADE20K), ADE20K[0], ADE20K[149]) == (150, "wall", "flag")
    assert (len(COCO_STUFF), COCO_STUFF[0], COCO_STUFF[9], COCO_STUFF[181]) == (182, "person", "traffic light", "wood")


def test_ade20k_counts_from_one_and_ignores_zero(tmp_path):
    save_image(tmp_path / "ade20k/images/training/a.jpg")
    save_labels(tmp_path / "ade20k/annotations/training/a.png", 1, 150, 0)
    wall, flag = read("ade20k", tmp_path)
    assert (wall.phrases, flag.phrases) == (("wall",), ("flag",))
    np.testing.assert_array_equal(decoded(wall.masks[0]), LEFT)
    np.testing.assert_array_equal(decoded(flag.masks[0]), MIDDLE)
    np.testing.assert_array_equal(decoded(wall.ignore), ~(LEFT | MIDDLE))


def test_coco_stuff_leaves_out_divided_classes(tmp_path):
    save_image(tmp_path / "coco/train2017/000000000009.jpg")
    labels = tmp_path / "cocostuff/train2017/000000000009.png"
    save_labels(labels, 0, COCO_STUFF.index("wall-brick"), 255)
    (person,) = read("cocostuff", tmp_path)
    assert person.phrases == ("person",)
    np.testing.assert_array_equal(decoded(person.masks[0]), LEFT)
    np.testing.assert_array_equal(decoded(person.ignore), ~(LEFT | MIDDLE))
    save_labels(labels, 0, 200, 0)
    with pytest.raises(ValueError, match="000000000009.png holds label 200, but there are 182 classes"):
        read("cocostuff", tmp_path)


def test_mapillary_names_its_own_classes(tmp_path):
    names = [{"name": "animal--bird", "readable": "Bird"}, {"name": "void--unlabeled", "readable": "Unlabeled"}]
    save_json(tmp_path / "mapillary/config_v2.0.json", {"labels": names})
    save_image(tmp_path / "mapillary/training/images/x.jpg")
    save_labels(tmp_path / "mapillary/training/v2.0/labels/x.png", 0, 1, 1)
    (bird,) = read("mapillary", tmp_path)
    assert (bird.phrases, bird.ignore) == (("bird",), None)
    np.testing.assert_array_equal(decoded(bird.masks[0]), LEFT)


def test_label_maps_and_images_must_fit(tmp_path):
    with pytest.raises(
        OSError, match="ade20k is incomplete under .*; missing: .*annotations/training, .*images/train"
    ):
        read("ade20k", tmp_path)
    save_image(tmp_path / "ade20k/images/training/b.jpg", size=(10, 10))
    save_labels(tmp_path / "ade20k/annotations/training/b.png", 1, 2, 3)
    with pytest.raises(
        ValueError, match=r"label map b.png has size \(20, 30\), expected that of its image, \(10, 10\)"
    ):
        read("ade20k", tmp_path)
    (tmp_path / "ade20k/images/training/b.jpg").unlink()
    with pytest.raises(OSError, match="1 annotated image is absent: ade20k/images/training/b.jpg"):
        read("ade20k", tmp_path)


def coco_file(path, file_name, names):
    images = [{"id": i, "file_name": file_name.format(i), "height": SIZE[0], "width": SIZE[1]} for i in (1, 2)]
    categories = [{"id": i, "name": name} for i, name in enumerate(names, start=1)]
    save_json(path, {"images": images, "annotations": ANNOTATIONS, "categories": categories})


def test_paco_unites_the_objects_of_a_class(tmp_path):
    path = tmp_path / "vlpart/paco/annotations/paco_lvis_v1_train.json"
    coco_file(path, "train2017/00{}.jpg", ["mug_(cup)", "dog:hind_leg"])
    for number in (1, 2):
        save_image(tmp_path / f"coco/train2017/00{number}.jpg")
    samples = read("paco-lvis", tmp_path)
    assert [sample.phrases[0] for sample in samples] == ["mug", "the hind leg of the dog", "the hind leg of the dog"]
    np.testing.assert_array_equal(decoded(samples[0].masks[0]), PIXELS[10] | PIXELS[11])
    np.testing.assert_array_equal(decoded(samples[2].masks[0]), PIXELS[13])


def test_pascal_part(tmp_path):
    coco_file(tmp_path / "vlpart/pascal_part/train.json", "2008_00{}.jpg", ["aeroplane:wing", "bottle:cap"])
    images = tmp_path / "vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages"
    for number in (1, 2):
        save_image(images / f"2008_00{number}.jpg")
    wing, cap, _ = read("pascal-part", tmp_path)
    assert wing.phrases == ("the wing of the aeroplane",)
    np.testing.assert_array_equal(decoded(cap.masks[0]), PIXELS[12])
    (images / "2008_002.jpg").unlink()
    with pytest.raises(OSError, match="absent: vlpart/pascal_part/VOCdevkit/VOC2010/JPEGImages/2008_002.jpg"):
        read("pascal-part", tmp_path)


def test_part_names():
    assert part_name("mug_(cup):handle") == "the handle of the mug"
    assert part_name("trash_can") == "trash can"


def test_llava_instruct(tmp_path):
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "A cup. "), ("human", "Red?"), ("gpt", "Yes.")]
    talk = [{"from": role, "value": value} for role, value in turns]
    path = tmp_path / "llava_dataset/llava_instruct_150k.json"
    save_json(path, [{"id": "5", "image": "05.jpg", "conversations": talk}, {"id": "6", "conversations": talk}])
    save_image(tmp_path / "coco/train2017/05.jpg")
    first, second = read("llava-instruct", tmp_path)
    assert (first.question, first.answer, first.attribute, first.masks) == ("What is it?", "A cup.", "vqa", ())
    assert (second.question, second.answer) == ("Red?", "Yes.")
    save_json(path, [{"id": "5", "image": "05.jpg", "conversations": talk[:3]}])
    with pytest.raises(ValueError, match="entry 0 must alternate human and gpt, got human, gpt, human"):
        read("llava-instruct", tmp_path)


def hub_copy(folder, file, **columns):
    """A parquet file with the miniature's picture in every row."""
    data = save_image(folder / "picture.jpg").read_bytes()
    size = len(next(iter(columns.values())))
    images = [{"bytes": data, "path": None}] * size
    (folder / "data").mkdir(exist_ok=True)
    parquet.write_table(pa.table({"image": images, **columns}), folder / "data" / file)
    return folder


def test_hub_copies_with_dense_masks(tmp_path):
    masks = [PIXELS[10].tolist(), PIXELS[12].tolist()]
    hub_copy(tmp_path, "test-00000-of-00001.parquet", text=["What holds tea?", "the dog"], mask=masks, ann_id=[1, 2])
    long, short = read("hub-reasonseg", tmp_path, "test")
    assert (long.question, short.question, short.phrases) == ("What holds tea?", None, ("the dog",))
    np.testing.assert_array_equal(decoded(long.masks[0]), PIXELS[10])
    res, _ = read("hub-refcoco", tmp_path, "test")
    assert (res.attribute, res.phrases, res.question) == ("res", ("What holds tea?",), None)
    with pytest.raises(OSError, match="no parquet files of split 'val' under .*; it holds: test"):
        read("hub-reasonseg", tmp_path, "val")


def test_hub_copies_with_polygons_and_rle(tmp_path):
    polygons = hub_copy(
        tmp_path / "a",
        "val-00000-of-00001.parquet",
        answer=[["red cup", "cup"]],
        segmentation=[box_polygon(2, 2, 10, 6)],
    )
    samples = read("hub-refcoco-lmms", polygons, "val")
    assert [sample.phrases for sample in samples] == [("red cup",), ("cup",)]
    np.testing.assert_array_equal(decoded(samples[1].masks[0]), box_mask(2, 2, 10, 6))
    entry = [{"sentences": ["the L", "corner"], "mask": compressed_rle(PIXELS[10])}]
    samples = read(
        "refcoco-m", hub_copy(tmp_path / "b", "validation-00000-of-00001.parquet", samples=[entry]), "validation"
    )
    assert [sample.phrases for sample in samples] == [("the L",), ("corner",)]
    np.testing.assert_array_equal(decoded(samples[0].masks[0]), PIXELS[10])


def test_hub_copies_that_do_not_fit(tmp_path):
    hub_copy(tmp_path / "a", "test-0.parquet", text=["x"])
    with pytest.raises(
        ValueError, match="must have the columns image, text, mask of hub-refcoco, got none called mask"
    ):
        read("hub-refcoco", tmp_path / "a", "test")
    hub_copy(tmp_path / "b", "test-0.parquet", text=["x"], mask=[PIXELS[10][:5].tolist()])
    with pytest.raises(
        ValueError, match=r"hub-refcoco-test-0: its mask has size \(5, 30\), expected that of the image"
    ):
        read("hub-refcoco", tmp_path / "b", "test")
