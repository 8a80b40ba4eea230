"""Annotations as JSONL: what all formats share, and COCO, labelme and YOLO."""

import base64
import io
import json

import numpy as np
import pytest
from conversions import convert, drawn, overlap, png_text, refused
from miniatures import (
    HEIGHT,
    SIZE,
    WIDTH,
    box_mask,
    box_polygon,
    compressed_rle,
    crowd_rle,
    decoded,
    save_image,
    save_json,
)
from PIL import Image, ImageOps
from tiny_processor import gradient_image, tiny_processor

from uground.processing.drawing import segment_color
from uground.training.check_data import check_data, contact_sheet, mask_panels
from uground.training.check_data import main as check_main
from uground.training.data.jsonl import JsonlSource
from uground.training.data.prepare import main as prepare
from uground.training.data.prepared import prepared_dataset
from uground.training.data.to_jsonl import main, to_jsonl
from uground.training.evaluation.datasets import evaluation_data
from uground.training.finetune import FinetuneArguments, open_source

# COCO


def coco(annotations, images=None, categories=("cup", "tree", "dog")) -> dict:
    images = images or [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}]
    return {
        "images": images,
        "annotations": [{"id": number, "iscrowd": 0, **one} for number, one in enumerate(annotations, start=10)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(categories, start=1)],
    }


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "a.png")
    save_image(tmp_path / "b.png")
    return tmp_path


def test_coco_in_all_its_forms(folder):
    parts = [box_polygon(0, 0, 4, 4), box_polygon(10, 10, 14, 14)]
    content = coco(
        [
            {"image_id": 1, "category_id": 1, "segmentation": parts},
            {"image_id": 1, "category_id": 1, "segmentation": compressed_rle(box_mask(20, 2, 25, 9))},
            {"image_id": 1, "category_id": 1, "segmentation": crowd_rle(box_mask(0, 0, 30, 10)), "iscrowd": 1},
            {"image_id": 1, "category_id": 2, "segmentation": crowd_rle(box_mask(5, 5, 9, 9))},
            {"image_id": 2, "category_id": 2, "segmentation": [box_polygon(1, 1, 6, 6)]},
            {"image_id": 2, "category_id": 3, "bbox": [1, 2, 3, 4]},
            {"image_id": 2, "category_id": 3, "segmentation": [[1, 1, 5, 5, 9, 9]]},
            {"image_id": 2, "category_id": 1, "segmentation": crowd_rle(box_mask(0, 0, 3, 3)), "iscrowd": 1},
        ],
        [{"id": n, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH} for n, name in ((1, "a"), (2, "b"))],
        ("cup", "tree", "dog", "boat"),
    )
    save_json(folder / "instances_train2017.json", content)
    lines, table = convert("coco", folder / "instances_train2017.json", folder / "mine.jsonl", negatives=2)
    cups = lines["train a.png cup"]
    two = box_mask(0, 0, 4, 4) | box_mask(10, 10, 14, 14) | box_mask(20, 2, 25, 9)
    assert (cups["decoded"][0] == two).all() and len(cups["decoded"]) == 1
    assert (cups["query"], cups["phrases"], cups["attribute"], cups["split"]) == ("the cup", ["cup"], "gres", "train")
    assert (decoded(cups["example"]["ignore"]) == (box_mask(0, 0, 30, 10) & ~two)).all()
    tree = lines["train a.png tree"]
    assert (tree["decoded"][0] == box_mask(5, 5, 9, 9)).all()
    assert tree["example"]["ignore"] is None, "a crowd of cups says nothing about a tree"
    # What was left out is there all the same: no dog is denied in b, nor a cup.
    denied = {name for name, line in lines.items() if not line["masks"]}
    assert denied == {"train a.png dog", "train a.png boat", "train b.png boat"}
    for said in (
        "2  an object of polygons",
        "2  a run-length mask",
        "2  a crowd, ignored in queries for its class",
        "1  a box without a mask",
        "1  a mask without a pixel",
        "1  a class of which a picture holds nothing but what is ignored (first: b.png, cup)",
        "1  a negative: the picture lacks too few names (first: b.png)",
    ):
        assert said in table


def test_several_objects_become_one_mask_or_a_list_or_a_line_each(folder):
    squares = [(0, 0, 4, 4), (10, 10, 14, 14)]
    save_json(
        folder / "c.json",
        coco([{"image_id": 1, "category_id": 1, "segmentation": [box_polygon(*one)]} for one in squares]),
    )
    listed, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", several="list")
    (line,) = listed.values()
    assert [mask.tolist() for mask in line["decoded"]] == [box_mask(*one).tolist() for one in squares]
    each, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", several="each")
    assert list(each) == ["a.png cup", "a.png cup 2"]
    for square, line in zip(squares, each.values(), strict=True):
        assert (line["decoded"][0] == box_mask(*square)).all()


def test_queries_are_drawn_from_the_templates(folder):
    names = [f"thing {number}" for number in range(20)]
    content = coco(
        [{"image_id": 1, "category_id": n, "segmentation": [box_polygon(0, 0, n, n)]} for n in range(1, 20)],
        categories=names,
    )
    save_json(folder / "c.json", content)
    templates = ("the {name}", "where is the {name}?")
    lines, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", queries=templates)
    queries = {line["query"] for line in lines.values()}
    assert {query.split()[0] for query in queries} == {"the", "where"}
    again, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", queries=templates)
    assert {line["query"] for line in again.values()} == queries


def test_boxes_of_coco_are_taken_on_request(folder):
    save_json(folder / "c.json", coco([{"image_id": 1, "category_id": 1, "bbox": [2, 3, 4, 5], "segmentation": []}]))
    lines, table = convert("coco", folder / "c.json", folder / "mine.jsonl", boxes=True)
    assert (lines["a.png cup"]["decoded"][0] == box_mask(2, 3, 6, 8)).all()
    assert "1  a box, filled as if it were a mask" in table


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, 5, 6, 7, 8])
def test_masks_follow_a_picture_that_exif_turns(tmp_path, orientation):
    """Of a picture that lies on its side the size tells on which pixels its masks were drawn."""
    save_image(tmp_path / "a.jpg", exif=orientation)
    stored = box_mask(2, 3, 9, 7)
    images = [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}]
    save_json(
        tmp_path / "c.json", coco([{"image_id": 1, "category_id": 1, "segmentation": crowd_rle(stored)}], images)
    )
    lines, table = convert("coco", tmp_path / "c.json", tmp_path / "mine.jsonl")
    (mask,) = lines["a.jpg cup"]["decoded"]
    if orientation >= 5:
        buffer = io.BytesIO()
        with Image.open(tmp_path / "a.jpg") as picture:
            Image.fromarray(stored).convert("L").save(buffer, format="PNG", exif=picture.getexif())
        expected = np.asarray(ImageOps.exif_transpose(Image.open(buffer))) > 0
        assert (mask == expected).all() and "turned as EXIF says" in table
    else:
        assert (mask == stored).all()
        assert ("taken as seen" in table) == (orientation > 1)


def test_lvis_says_itself_what_is_absent(folder):
    images = [
        {
            "id": 1,
            "coco_url": "http://images.org/train2017/a.png",
            "height": HEIGHT,
            "width": WIDTH,
            "neg_category_ids": [3],
            "not_exhaustive_category_ids": [2],
        }
    ]
    content = coco([{"image_id": 1, "category_id": 1, "segmentation": [box_polygon(1, 1, 6, 6)]}], images)
    save_json(folder / "lvis.json", content)
    lines, _ = convert("coco", folder / "lvis.json", folder / "mine.jsonl", negatives=3)
    assert set(lines) == {"a.png cup", "a.png dog"} and lines["a.png dog"]["masks"] == []


def test_what_is_there_under_another_name_is_not_denied(folder):
    content = coco([{"image_id": 1, "category_id": 2, "segmentation": [box_polygon(1, 1, 6, 6)]}])
    names = ("things", "cup", "Cup", "Background", "dog")
    content["categories"] = [
        {"id": number, "name": name, "supercategory": "none" if name == "things" else "things"}
        for number, name in enumerate(names, start=1)
    ]
    save_json(folder / "c.json", content)
    lines, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", negatives=5)
    assert set(lines) == {"a.png cup", "a.png dog"}


def test_a_folder_keeps_its_splits(tmp_path):
    for split in ("train", "valid"):
        save_image(tmp_path / split / "a.png")
        one = {"image_id": 1, "category_id": 1, "segmentation": [box_polygon(1, 1, 6, 6)]}
        save_json(tmp_path / split / "_annotations.coco.json", coco([one]))
    lines, _ = convert("coco", tmp_path, tmp_path / "mine.jsonl")
    assert {name: line["image"] for name, line in lines.items()} == {
        "train a.png cup": "train/a.png",
        "valid a.png cup": "valid/a.png",
    }
    assert len(JsonlSource(tmp_path / "mine.jsonl", "valid")) == 1
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, valid"):
        JsonlSource(tmp_path / "mine.jsonl", "test")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 9}, r"annotation 10 is about image 9, which .*c\.json does not list"),
        ({"category_id": 9}, r"annotation 10 is of category 9, which .*c\.json does not list"),
        ({"segmentation": [[0.1, 0.2, 0.3, 0.4, 0.9, 0.1]]}, "annotation 10: all numbers .* lie within 0..1"),
        ({"segmentation": [[1, 1, 500, 1, 9, 9]]}, r"annotation 10: the polygon's point \(500, 1\) lies far outside"),
        ({"segmentation": crowd_rle(box_mask(0, 0, 3, 3, (9, 9)))}, r"annotation 10: its mask has size \[9, 9\]"),
        ({"segmentation": "garbage"}, "annotation 10: a mask must be polygons or RLE, got str"),
        ({"iscrowd": 7}, "annotation 10: iscrowd must be true or false, got 7"),
        ({"segmentation": [], "bbox": [1, 2, -3, 4]}, r"annotation 10: bbox must be \[x, y, width, height\], got"),
        ({"image_id": None}, "annotation 10: image_id must be a whole number or a text"),
    ],
)
def test_a_bad_annotation_of_coco_is_named_and_nothing_is_written(folder, change, message):
    one = {"image_id": 1, "category_id": 1, "segmentation": [box_polygon(1, 1, 5, 5)]}
    save_json(folder / "c.json", coco([{**one, **change}, one]))
    with pytest.raises(ValueError, match=message):
        to_jsonl("coco", folder / "c.json", folder / "mine.jsonl", boxes=True, quiet=True)
    assert sorted(path.name for path in folder.iterdir()) == ["a.png", "b.png", "c.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": {}}, "images must be a list, got {}"),
        (
            {"categories": [{"id": 1, "name": "cup"}, {"id": 1, "name": "mug"}]},
            "lists the id 1 twice among its categories",
        ),
        ({"images": [{"id": 1, "file_name": "a.png"}, {"id": 1, "file_name": "b.png"}]}, "twice among its images"),
        (
            {"categories": [{"id": 1, "name": "a [SEG]"}]},
            r"annotation 10: its name must name an object, got 'a \[SEG\]'",
        ),
        ({"images": [{"id": 1, "file_name": "a.png", "height": 20}]}, "image 1 must have 'width'"),
        ({"images": [{"id": 1, "file_name": "a.png", "neg_category_ids": [[1]]}]}, "neg_category_ids must be a whole"),
    ],
)
def test_a_bad_file_of_coco_is_named(folder, change, message):
    one = {"image_id": 1, "category_id": 1, "segmentation": [box_polygon(1, 1, 5, 5)]}
    save_json(folder / "c.json", {**coco([one]), **change})
    with pytest.raises(ValueError, match=rf"c\.json.*{message}"):
        to_jsonl("coco", folder / "c.json", folder / "mine.jsonl", quiet=True)


def test_names_that_end_in_numbers_do_not_share_an_id(folder):
    names = ("cup 2", "cup")
    one = {"image_id": 1, "segmentation": [box_polygon(1, 1, 5, 5)]}
    save_json(folder / "c.json", coco([{**one, "category_id": n} for n in (1, 2, 2)], categories=names))
    lines, _ = convert("coco", folder / "c.json", folder / "mine.jsonl", several="each")
    assert [line["phrases"] for line in lines.values()] == [["cup 2"], ["cup"], ["cup"]]


def test_what_cannot_be_used_is_skipped_on_request_and_counted(folder):
    images = [{"id": n, "file_name": f"{name}.png"} for n, name in ((1, "a"), (2, "gone"))]
    one = {"category_id": 1, "segmentation": [box_polygon(1, 1, 5, 5)]}
    save_json(folder / "c.json", coco([{**one, "image_id": 2}, {**one, "image_id": 1}], images))
    with pytest.raises(FileNotFoundError, match=r"image 2: the image 'gone\.png' is not below"):
        to_jsonl("coco", folder / "c.json", folder / "mine.jsonl", quiet=True)
    lines, table = convert("coco", folder / "c.json", folder / "mine.jsonl", on_bad="skip")
    assert set(lines) == {"a.png cup"}
    assert "1  a picture that cannot be used (first: " in table and "gone.png" in table
    assert "1  an object of polygons" in table


def test_the_command_closes_with_a_table_and_says_mistakes_in_one_line(folder, capsys):
    one = {"image_id": 1, "category_id": 1, "segmentation": [box_polygon(1, 1, 5, 5)]}
    source = save_json(folder / "c.json", coco([one]))
    assert main(["coco", str(source), "--images", str(folder), "--output", str(folder / "mine.jsonl")]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("taken") and "left out  0" in printed
    assert printed[-1] == f"1 lines in {folder / 'mine.jsonl'} (no split: 1 res)"
    before = (folder / "mine.jsonl").read_bytes()
    out = ("--output", folder / "mine.jsonl")
    assert "--output must end in .jsonl, got" in refused(capsys, "coco", source, "--output", folder / "mine.json")
    assert "the source" in refused(capsys, "coco", folder / "no.json", *out)
    assert "--images" in refused(capsys, "coco", source, "--images", folder / "no", *out)
    assert "--query must hold {name}" in refused(capsys, "coco", source, "--query", "the cup", *out)
    (folder / "all.zip").write_bytes(b"PK")
    assert "all.zip is an archive: unpack it" in refused(capsys, "coco", folder / "all.zip", *out)
    (folder / "broken.json").write_text("{")
    assert "must be a whole JSON file" in refused(capsys, "coco", folder / "broken.json", *out)
    save_json(folder / "empty.json", coco([]))
    assert "holds nothing that can be asked for" in refused(capsys, "coco", folder / "empty.json", *out)
    assert (folder / "mine.jsonl").read_bytes() == before
    with pytest.raises(SystemExit):
        main(["csv", str(source), "--output", "x.jsonl"])
    assert "invalid choice: 'csv'" in capsys.readouterr().err


def test_coco_comes_back_as_it_was(folder):
    """JSONL to COCO, written here, and back: the same masks, queries, splits and pixels to ignore."""
    rng = np.random.default_rng(0)
    masks = rng.random((4, *SIZE)) > 0.6
    masks[3] &= ~masks[2]
    lines = [
        {"image": "a.png", "query": "the cup", "masks": [compressed_rle(masks[0])], "split": "train"},
        {"image": "b.png", "query": "the cup", "masks": [compressed_rle(masks[1])], "split": "train"},
        {"image": "b.png", "query": "the dog", "masks": [compressed_rle(masks[2])], "split": "train"},
    ]
    lines[2]["ignore"] = compressed_rle(masks[3])
    (folder / "first.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source, annotations = JsonlSource(folder / "first.jsonl"), []
    for index in range(len(source)):
        (example,) = source[index]["examples"]
        about = {
            "image_id": 1 + "ab".index(lines[index]["image"][0]),
            "category_id": 1 + 2 * ("dog" in example["query"]),
        }
        annotations += [{**about, "segmentation": mask} for mask in example["masks"]]
        if example["ignore"] is not None:
            annotations.append({**about, "segmentation": example["ignore"], "iscrowd": 1})
    images = [
        {"id": n, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH} for n, name in ((1, "a"), (2, "b"))
    ]
    save_json(folder / "instances_train.json", coco(annotations, images))
    back, _ = convert("coco", folder / "instances_train.json", folder / "second.jsonl")
    assert list(back) == ["train a.png cup", "train b.png cup", "train b.png dog"]
    for line, found, mask in zip(lines, back.values(), masks[:3], strict=True):
        assert [found[key] for key in ("image", "query", "split")] == [
            line[key] for key in ("image", "query", "split")
        ]
        assert (found["decoded"][0] == mask).all()
    assert (decoded(back["train b.png dog"]["example"]["ignore"]) == masks[3]).all()


# labelme


def labelme(shapes, **fields) -> dict:
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": [
            {"group_id": None, "description": "", "shape_type": "polygon", "flags": {}, "mask": None, **shape}
            for shape in shapes
        ],
        "imagePath": "a.png",
        "imageData": None,
        "imageHeight": HEIGHT,
        "imageWidth": WIDTH,
    }
    return {**content, **fields}


def pairs(numbers) -> list[list[float]]:
    return [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def test_labelme_shapes_of_every_type(folder):
    ring = np.zeros((6, 8), dtype=bool)
    ring[1:5, 2:6] = True
    shapes = [
        {"label": "polygon", "points": pairs(box_polygon(2, 3, 9, 8))},
        {"label": "rectangle", "points": [[20, 15], [12, 4]], "shape_type": "rectangle"},
        {"label": "circle", "points": [[15, 10], [15, 16]], "shape_type": "circle"},
        {"label": "mask", "points": [[3, 5], [10, 10]], "shape_type": "mask", "mask": png_text(ring)},
        {"label": "line", "points": [[3, 5], [10, 10], [12, 1]], "shape_type": "linestrip"},
        {"label": "group", "points": pairs(box_polygon(0, 0, 3, 3)), "group_id": 4},
        {"label": "group", "points": pairs(box_polygon(20, 0, 23, 3)), "group_id": 4},
        {"label": "other", "points": pairs(box_polygon(0, 10, 3, 13)), "group_id": 4},
        {"label": "turned", "points": [[10, 2], [22, 8], [18, 16], [6, 10]], "shape_type": "rotation"},
        {"label": "__ignore__", "points": pairs(box_polygon(25, 15, 30, 20))},
        {"label": "_background_", "points": pairs(box_polygon(25, 15, 30, 20))},
    ]
    save_json(folder / "a.json", labelme(shapes))
    save_json(folder / "notes.json", {"by": "me"})
    lines, table = convert("labelme", folder, folder / "out" / "mine.jsonl", several="each", negatives=9)
    found = {name.removeprefix("a "): line["decoded"][0] for name, line in lines.items() if line["masks"]}
    assert set(found) == {"polygon", "rectangle", "circle", "mask", "group", "other", "turned"}
    assert (found["polygon"] == box_mask(2, 3, 9, 8)).all()
    assert (found["rectangle"] == box_mask(12, 4, 20, 15)).all()
    assert (found["mask"] == box_mask(5, 6, 9, 10)).all()
    assert (found["group"] == (box_mask(0, 0, 3, 3) | box_mask(20, 0, 23, 3))).all()
    assert (found["other"] == box_mask(0, 10, 3, 13)).all()
    assert overlap(found["circle"], drawn("ellipse", 9, 4, 21, 16)) > 0.95
    assert overlap(found["turned"], drawn("polygon", 10, 2, 22, 8, 18, 16, 6, 10)) > 0.93
    for line in lines.values():
        ignored = decoded(line["example"]["ignore"])
        assert (ignored == box_mask(25, 15, 30, 20)).all()
    assert lines["a polygon"]["image"] == "../a.png"
    assert "a line" not in lines, "a name that is drawn, though as a line, is not denied"
    for said in (
        "1  a linestrip, which has no area",
        "1  a shape called _background_",
        "1  a JSON file without shapes",
        "2  a box, filled as if it were a mask",
    ):
        assert said in table
    left, table = convert("labelme", folder / "a.json", folder / "mine.jsonl", boxes=False)
    assert "a rectangle" not in left and "2  a box without a mask" in table


def test_labelme_pictures_come_from_beside_the_file_or_from_inside_it(folder):
    (folder / "labels").mkdir()
    shape = {"label": "cup", "points": pairs(box_polygon(2, 3, 9, 8))}
    save_json(folder / "labels" / "a.json", labelme([shape], imagePath="..\\a.png"))
    lines, _ = convert("labelme", folder / "labels", folder / "mine.jsonl")
    assert lines["a cup"]["image"] == "a.png"
    content = base64.b64encode((folder / "a.png").read_bytes()).decode()
    save_json(folder / "labels" / "a.json", labelme([shape], imagePath="C:\\gone.png", imageData=content))
    lines, table = convert("labelme", folder / "labels", folder / "mine.jsonl")
    assert lines["a cup"]["image"] == "mine-images/gone.png" and "taken from the imageData" in table
    assert (folder / "mine-images" / "gone.png").read_bytes() == (folder / "a.png").read_bytes()
    with pytest.raises(FileExistsError, match="mine-images, which exists already"):
        to_jsonl("labelme", folder / "labels", folder / "mine.jsonl", quiet=True)
    save_json(folder / "labels" / "a.json", labelme([shape], imagePath="gone.png", imageData="%%%"))
    with pytest.raises(ValueError, match=r"a\.json: imageData must be the file of a picture in base64"):
        to_jsonl("labelme", folder / "labels", folder / "new.jsonl", quiet=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": [[1, 2, 3]]}, r"shape 0: point 1 must be \[x, y\], got \[1, 2, 3\]"),
        ({"points": [["x", 2]]}, "shape 0: point 1 must be a number, got 'x'"),
        ({"points": [[1, 2]], "shape_type": "circle"}, "shape 0: a circle must have 2 points, got 1"),
        ({"points": [[1, 2], [1e300, 2]], "shape_type": "circle"}, "shape 0: the polygon's point .* far outside"),
        ({"points": [[0.1, 0.2], [0.5, 0.2], [0.5, 0.7]]}, "shape 0: all numbers of its polygons lie within 0..1"),
        (
            {"points": [[0, 0], [4, 4]], "shape_type": "mask", "mask": png_text(np.ones((3, 3), bool))},
            "shape 0: its mask is 3 wide and 3 high, expected 5 and 5",
        ),
        ({"points": [[0, 0], [4, 4]], "shape_type": "mask", "mask": "AAAA"}, "shape 0: mask cannot be read"),
        ({"label": 5}, "shape 0: label must be a text, got 5"),
    ],
)
def test_a_bad_shape_of_labelme_is_named(folder, change, message):
    save_json(folder / "a.json", labelme([{"label": "cup", "points": pairs(box_polygon(2, 3, 9, 8)), **change}]))
    with pytest.raises((OSError, ValueError), match=rf"a\.json.*{message}"):
        to_jsonl("labelme", folder / "a.json", folder / "mine.jsonl", quiet=True)


def test_a_size_that_is_not_the_picture_s_is_refused(folder):
    shape = {"label": "cup", "points": pairs(box_polygon(2, 3, 9, 8))}
    save_json(folder / "a.json", labelme([shape], imageHeight=40, imageWidth=60))
    with pytest.raises(ValueError, match="of a picture 60 wide and 40 high, but .* is 30 wide and 20 high"):
        to_jsonl("labelme", folder / "a.json", folder / "mine.jsonl", quiet=True)


@pytest.mark.parametrize("name", ["../..", "."])
def test_an_image_path_of_labelme_that_is_no_file_s_is_refused(folder, name):
    shape = {"label": "cup", "points": pairs(box_polygon(2, 3, 9, 8))}
    inside = base64.b64encode((folder / "a.png").read_bytes()).decode()
    save_json(folder / "a.json", labelme([shape], imagePath=name, imageData=inside))
    with pytest.raises(ValueError, match=r"a\.json: imagePath must name a file, got "):
        to_jsonl("labelme", folder / "a.json", folder / "mine.jsonl", quiet=True)


# YOLO


def yolo_line(label: int, polygon) -> str:
    shares = [number / side for number, side in zip(polygon, (WIDTH, HEIGHT) * (len(polygon) // 2), strict=True)]
    return " ".join(map(str, [label, *shares]))


@pytest.fixture
def yolo(tmp_path):
    for split, name in (("train", "a"), ("train", "b"), ("val", "a")):
        save_image(tmp_path / "images" / split / f"{name}.jpg")
    labels = tmp_path / "labels"
    (labels / "train").mkdir(parents=True)
    (labels / "val").mkdir()
    box = "1 0.5 0.5 0.4 0.5"
    (labels / "train" / "a.txt").write_text("\n".join([yolo_line(0, box_polygon(3, 2, 12, 8)), "", box, ""]))
    (labels / "val" / "a.txt").write_text(yolo_line(1, box_polygon(0, 0, 6, 6)))
    data = "path: .\ntrain: images/train\nval: images/val\nnames:\n  0: cup\n  1: tree\n"
    (tmp_path / "data.yaml").write_text(data)
    return tmp_path


def test_yolo_by_its_data_file(yolo):
    lines, table = convert("yolo", yolo / "data.yaml", yolo / "mine.jsonl", negatives=1)
    assert (lines["train images/train/a.jpg cup"]["decoded"][0] == box_mask(3, 2, 12, 8)).all()
    assert (lines["val images/val/a.jpg tree"]["decoded"][0] == box_mask(0, 0, 6, 6)).all()
    assert {name for name, line in lines.items() if not line["masks"]} < {
        "train images/train/b.jpg cup",
        "train images/train/b.jpg tree",
        "val images/val/a.jpg cup",
    }, "a tree of which only a box is known is not denied"
    assert "1  a box without a mask" in table and "a.txt:3" in table
    assert "1  a picture without a file of labels" in table
    lines, _ = convert("yolo", yolo, yolo / "mine.jsonl", boxes=True)
    assert (lines["train images/train/a.jpg tree"]["decoded"][0] == box_mask(9, 5, 21, 15)).all()


def test_names_of_digits_are_read_as_yolo_reads_them(yolo):
    (yolo / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [7, 8]\n")
    lines, _ = convert("yolo", yolo / "data.yaml", yolo / "mine.jsonl")
    assert {line["query"] for line in lines.values()} == {"the 7", "the 8"}


def test_yolo_by_folders_with_a_list_of_names(yolo):
    (yolo / "names.txt").write_text("cup\ntree\n")
    where = {"images": yolo / "images", "names": yolo / "names.txt"}
    lines, _ = convert("yolo", yolo / "labels", yolo / "mine.jsonl", **where)
    assert set(lines) == {"train train/a cup", "val val/a tree"}
    (yolo / "data.yaml").unlink()
    (yolo / "names.txt").rename(yolo / "classes.txt")
    lines, table = convert("yolo", yolo, yolo / "mine.jsonl")
    assert set(lines) == {"train train/a cup", "val val/a tree"} and "in another folder" not in table
    (yolo / "labels" / "classes.txt").write_text("mug\noak\n")
    lines, _ = convert("yolo", yolo / "labels", yolo / "mine.jsonl", images=yolo / "images")
    assert [line["phrases"] for line in lines.values()] == [["mug"], ["oak"]]
    (yolo / "labels" / "classes.txt").unlink()
    with pytest.raises(ValueError, match="holds numbers of classes and no names: name a list of them, or data.yaml"):
        to_jsonl("yolo", yolo / "labels", yolo / "mine.jsonl", images=yolo / "images", quiet=True)


def test_yolo_as_roboflow_and_lists_of_pictures_have_it(yolo):
    data = yolo / "data.yaml"
    data.write_text("train: ../images/train\nval: val.txt\nnc: 2\nnames: ['cup', 'tree']\n")
    (yolo / "val.txt").write_text("./images/val/a.jpg\n")
    lines, _ = convert("yolo", data, yolo / "mine.jsonl")
    assert set(lines) == {"train images/train/a.jpg cup", "val images/val/a.jpg tree"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("2 0 0 1 0 1 1", r"a\.txt:1 is of class 2, which has no name; there are 2 names"),
        ("0.5 0 0 1 0 1 1", r"a\.txt:1 is of class 0\.5"),
        ("0 0.1 0.2", r"a\.txt:1 must hold a class and 4 numbers of a box, .* got 2 numbers behind the class"),
        ("0 0.5 0.5 0.1 0.1 0.9", "got 5 numbers behind the class; leave out confidences"),
        ("0 3 2 12 2 12 8", r"a\.txt:1 must hold shares of the picture in 0\.\.1, got 12"),
        ("0 x 0 1 0 1 1", r"a\.txt:1: field 2 must be a number, got 'x'"),
        ("0 nan 0 1 0 1 1", r"a\.txt:1: field 2 must be a number"),
    ],
)
def test_a_bad_line_of_yolo_is_named(yolo, content, message):
    (yolo / "labels" / "train" / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        to_jsonl("yolo", yolo / "data.yaml", yolo / "mine.jsonl", quiet=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: images/train\n", "must have 'names', got 'train'"),
        ("names:\ntrain: images/train\n", "names must be a list, or an object of a number or colour each, got None"),
        ("names: [cup]\n", "must have train, val or test, got none of them"),
        ("names: [cup]\ntrain: nowhere\n", "train names .*nowhere, which does not exist"),
        ("names: [cup]\ntrain: images/train\nkpt_shape: [17, 3]\n", r"about key points \(kpt_shape\)"),
        ("names: [cup\n", "must be a whole YAML file, but"),
        ("names: {a: cup}\ntrain: images/train\n", "names must be named by whole numbers, .* got 'a'"),
    ],
)
def test_a_bad_data_file_of_yolo_is_named(yolo, content, message):
    (yolo / "data.yaml").write_text(content)
    with pytest.raises((OSError, ValueError), match=rf"data\.yaml.*{message}"):
        to_jsonl("yolo", yolo / "data.yaml", yolo / "mine.jsonl", quiet=True)


# What reads the file


def test_training_evaluation_and_prepared_data_take_a_split_of_the_file(yolo, capsys):
    convert("yolo", yolo / "data.yaml", yolo / "mine.jsonl", boxes=True)
    file = str(yolo / "mine.jsonl")
    arguments = FinetuneArguments()
    assert [len(open_source(name, arguments)[0]) for name in (file, f"{file}:train", f"{file}:val")] == [2, 2, 1]
    with pytest.raises(ValueError, match="has no split 'validation'; it has: train, val"):
        open_source(file, arguments, "validation")
    data = evaluation_data(f"{file}:val", None, "test", None, 0)
    assert (data.size, data.split, data.example(0)["phrases"]) == (1, "val", ["tree"])
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, val"):
        evaluation_data(file, None, "test", None, 0)
    out = str(yolo / "prepared")
    assert prepare([file, "--output", out, "--embed-images"]) == 0
    assert "train: 2 examples" in capsys.readouterr().out
    assert [len(prepared_dataset(out, name)) for name in ("train", "val")] == [2, 1]
    assert prepared_dataset(out, "val")[0]["query"] == "the tree"
    assert prepare([file, "--output", out, "--split", "test"]) == 2
    assert "has no split 'test'; it has: train, val" in capsys.readouterr().err
    assert [check_data(name, quiet=True).lines for name in (file, f"{file}:val", out, f"{out}:train")] == [3, 1, 3, 2]
    assert check_data(out, quiet=True).shown[2].place == f"{out}:val row 0"
    (yolo / "images" / "val" / "a.jpg").unlink()
    assert prepare([file, "--output", str(yolo / "by path")]) == 2
    assert "mine.jsonl:3: the image" in capsys.readouterr().err


def test_the_sheet_leaves_objects_their_colours_and_marks_the_rest(folder):
    picture = Image.fromarray(gradient_image(*SIZE))
    picture.save(folder / "a.png")
    line = {
        "image": "a.png",
        "query": "cup and spoon",
        "phrases": ["the cup", "the spoon"],
        "masks": [[box_polygon(3, 4, 12, 10)], None],
        "ignore": [box_polygon(18, 4, 28, 16)],
    }
    (folder / "mine.jsonl").write_text(json.dumps(line))
    (shown,) = check_data(folder / "mine.jsonl", quiet=True, processor=tiny_processor()).shown
    assert shown.absent == ["the spoon"] and shown.place.endswith("mine.jsonl:1")
    plain, marked = (np.asarray(panel).astype(int) for panel in mask_panels(shown.example))
    scale = plain.shape[1] / WIDTH
    inner = np.s_[round(4 * scale) + 2 : round(10 * scale) - 2, round(3 * scale) + 2 : round(12 * scale) - 2]
    assert (plain[inner] == marked[inner]).all(), "an object keeps its colours"
    far = np.s_[round(15 * scale) :, : round(12 * scale)]
    assert marked[far].mean() < 0.5 * plain[far].mean()
    ignored = marked[round(5 * scale) : round(15 * scale), round(19 * scale) : round(27 * scale)]
    white = (ignored == 255).all(-1).mean()
    assert 0.05 < white < 0.5
    rim = marked[round(6 * scale), round(3 * scale) - 1]
    assert (rim == segment_color(0)).all()
    sheet = contact_sheet([shown])
    assert sheet.width > 2 * plain.shape[1]


def test_a_sheet_that_cannot_be_written_is_refused_before_the_data_are_read(folder, capsys):
    (folder / "mine.jsonl").write_text("{")
    for sheet, message in (
        (folder / "no" / "s.png", "No such file"),
        (folder / "s.txt", "--sheet must end as a picture"),
    ):
        assert check_main([str(folder / "mine.jsonl"), "--sheet", str(sheet)]) == 2
        printed = capsys.readouterr()
        assert message in printed.err and not printed.out
    assert not (folder / "s.txt").exists()
