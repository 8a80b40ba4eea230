"""Annotations as JSONL: label maps, CVAT, Label Studio, data sets in columns, and what a model annotated."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conversions import convert, drawn, overlap
from datasets import Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from miniatures import HEIGHT, SIZE, WIDTH, box_mask, box_polygon, compressed_rle, decoded, save_image, save_json
from PIL import Image

from uground.training.data.jsonl import JsonlSource
from uground.training.data.to_jsonl import to_jsonl

# Label maps


def label_map(*regions, size=SIZE) -> np.ndarray:
    """Numbers over boxes `(x0, y0, x1, y1)`."""
    values = np.zeros(size, dtype=np.uint8)
    for number, box in regions:
        values[box_mask(*box, size)] = number
    return values


def save_palette(path, values: np.ndarray, colours: dict[int, tuple[int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values, mode="P")
    picture.putpalette([level for number in range(256) for level in colours.get(number, (number, 0, 9))])
    picture.save(path)


CUP, TREE = (2, 2, 8, 8), (15, 5, 25, 18)


@pytest.fixture
def voc(tmp_path):
    values = label_map((1, CUP), (2, TREE), (255, (0, 19, 30, 20)))
    save_palette(tmp_path / "SegmentationClass" / "a.png", values, {1: (128, 0, 0), 2: (0, 128, 0)})
    save_palette(tmp_path / "SegmentationClass" / "b.png", label_map((1, CUP), (1, TREE)), {1: (128, 0, 0)})
    save_palette(tmp_path / "SegmentationClass" / "c.png", label_map(), {})
    for name in "abc":
        save_image(tmp_path / "JPEGImages" / f"{name}.jpg")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    (lists / "val.txt").write_text("b\n")
    (lists / "trainval.txt").write_text("a\nb\n")
    return tmp_path


def test_the_export_of_labelme_in_the_form_of_voc(voc):
    (voc / "SegmentationClass").rename(voc / "SegmentationClassPNG")
    (voc / "SegmentationClass").mkdir()
    (voc / "SegmentationClass" / "a.npy").write_bytes(b"")
    (voc / "class_names.txt").write_text("_background_\ncup\ntree\n")
    lines, _ = convert("voc", voc, voc / "mine.jsonl")
    assert set(lines) == {"train a cup", "train a tree", "val b cup"}


@pytest.mark.parametrize(
    "names",
    [
        "background\ncup\ntree\n",
        "1: cup\n2: tree\n",
        "128 0 0: cup\n0,128,0: tree\n",
        "#800000 cup\n#008000 tree\n",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncup:128,0,0::\ntree:0,128,0::\n",
        "__ignore__\n_background_\ncup\ntree\n",
    ],
)
def test_voc_by_numbers_or_colours(voc, names):
    (voc / "names.txt").write_text(names)
    # By colour, VOC's own for what is not certain.
    by_colour = "128" in names or "#80" in names
    if by_colour:
        values = label_map((1, CUP), (2, TREE), (255, (0, 19, 30, 20)))
        colours = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 255: (224, 224, 192)}
        save_palette(voc / "SegmentationClass" / "a.png", values, colours)
        save_palette(voc / "SegmentationClass" / "b.png", label_map((1, CUP), (1, TREE)), colours)
    lines, table = convert("voc", voc, voc / "mine.jsonl", names=voc / "names.txt", negatives=1)
    assert (lines["train a cup"]["decoded"][0] == box_mask(*CUP)).all()
    assert (lines["train a tree"]["decoded"][0] == box_mask(*TREE)).all()
    assert (decoded(lines["train a cup"]["example"]["ignore"]) == box_mask(0, 19, 30, 20)).all()
    assert (lines["val b cup"]["decoded"][0] == box_mask(*CUP) | box_mask(*TREE)).all()
    assert lines["val b tree"]["masks"] == [] and len(lines) == 4
    assert lines["val b cup"]["image"] == "JPEGImages/b.jpg"
    assert "1  a map that no list of ImageSets/Segmentation names" in table
    assert "1  what is ignored: 255 or what is called so" in table


def test_voc_tells_objects_apart_where_it_has_them(voc):
    (voc / "names.txt").write_text("1 cup\n2 tree\n")
    save_palette(voc / "SegmentationObject" / "b.png", label_map((1, CUP), (2, TREE)), {})
    lines, _ = convert("voc", voc, voc / "mine.jsonl", names=voc / "names.txt", several="each", split="all")
    assert (lines["all b cup"]["decoded"][0] == box_mask(*CUP)).all()
    assert (lines["all b cup 2"]["decoded"][0] == box_mask(*TREE)).all()


def test_label_maps_of_other_modes_beside_their_pictures(tmp_path):
    save_image(tmp_path / "a.jpg")
    (tmp_path / "classes.txt").write_text("cup\ntree\n")
    values = label_map((1, TREE))
    wide = Image.fromarray(values.astype(np.uint16))
    grey = Image.fromarray(np.stack([values] * 3, axis=-1))
    for picture in (Image.fromarray(values), wide, grey):
        picture.save(tmp_path / "a.png")
        lines, _ = convert("voc", tmp_path, tmp_path / "mine.jsonl")
        assert (lines["a tree"]["decoded"][0] == box_mask(*TREE)).all()
        assert (lines["a cup"]["decoded"][0] == ~box_mask(*TREE)).all(), "0 has a name here"


def test_a_label_map_of_the_stored_picture_is_turned(tmp_path):
    save_image(tmp_path / "a.jpg", exif=6)
    Image.fromarray(label_map((1, CUP))).save(tmp_path / "a.png")
    (tmp_path / "classes.txt").write_text("1: cup\n")
    lines, table = convert("voc", tmp_path, tmp_path / "mine.jsonl")
    assert (lines["a cup"]["decoded"][0] == np.rot90(box_mask(*CUP), -1)).all()
    assert "turned as EXIF says" in table


@pytest.mark.parametrize(
    ("values", "names", "message"),
    [
        (label_map((7, CUP)), "cup\ntree", r"a\.png, the value 7 has no name in .*classes\.txt"),
        (label_map((1, CUP)), "255 0 0: cup", r"a\.png, the colour 1 1 1 has no name"),
        (np.zeros((5, 6), np.uint8), "cup", "of a picture 6 wide and 5 high, but .* is 30 wide and 20 high"),
        (np.full((*SIZE, 3), (9, 8, 7), np.uint8), "cup", "holds colours, but .* names none of these"),
        (label_map((1, CUP)), "1 cup\ntree", "some lines begin with a number or colour, and 'tree' does not"),
        (
            np.zeros((*SIZE, 2), np.uint8),
            "cup",
            r"^the label map \S*a\.png must hold numbers or colours, got the mode LA",
        ),
        (label_map((1, CUP)), "300 0 0: cup", "must be named by whole numbers, by R G B of 0..255"),
        (label_map((1, CUP)), "", "holds no names"),
        (label_map((1, CUP)), None, "holds no names of classes: name a list of numbers or colours with --names"),
    ],
)
def test_a_bad_label_map_is_named(tmp_path, values, names, message):
    save_image(tmp_path / "a.jpg")
    Image.fromarray(values).save(tmp_path / "a.png")
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(ValueError, match=message):
        to_jsonl("voc", tmp_path, tmp_path / "mine.jsonl", quiet=True)


# CVAT


def cvat(shapes: str, image: str = f'name="a.png" width="{WIDTH}" height="{HEIGHT}"', tail: str = "") -> str:
    labels = "".join(f"<label><name>{name}</name><type>any</type></label>" for name in ("cup", "tree", "dog"))
    return (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><labels>{labels}'
        f'</labels></task></meta><image id="3" {image}>{shapes}</image>{tail}</annotations>'
    )


def cvat_points(polygon) -> str:
    return ";".join(f"{x:.2f},{y:.2f}" for x, y in zip(polygon[::2], polygon[1::2], strict=True))


def cvat_mask(label: str, mask: np.ndarray, z_order: int = 0) -> str:
    """A mask as runs, row by row, within the box around it; the first run is off."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    inner = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    runs, value = [0], False
    for pixel in inner.ravel():
        if pixel != value:
            runs.append(0)
            value = pixel
        runs[-1] += 1
    height, width = inner.shape
    return (
        f'<mask label="{label}" source="manual" occluded="0" rle="{", ".join(map(str, runs))}" left="{columns[0]}" '
        f'top="{rows[0]}" width="{width}" height="{height}" z_order="{z_order}"></mask>'
    )


def cvat_polygon(label: str, box, more: str = 'z_order="0"') -> str:
    points = cvat_points(box_polygon(*box))
    return f'<polygon label="{label}" source="manual" occluded="0" points="{points}" {more}></polygon>'


def test_cvat_shapes_of_every_kind(tmp_path):
    save_image(tmp_path / "photos" / "a.png")
    ring = box_mask(3, 4, 12, 13) & ~box_mask(5, 6, 8, 9)
    shapes = (
        cvat_polygon("polygon", (2, 3, 9, 8))
        + '<box label="box" xtl="12" ytl="4" xbr="20" ybr="15" z_order="0"></box>'
        + '<box label="turned" xtl="8" ytl="6" xbr="22" ybr="14" rotation="30.0" z_order="0"></box>'
        + cvat_mask("mask", ring)
        + '<ellipse label="ellipse" cx="15" cy="10" rx="8" ry="5" z_order="0"></ellipse>'
        + '<ellipse label="tilted" cx="15" cy="10" rx="9" ry="4" rotation="90" z_order="0"></ellipse>'
        + '<polyline label="dog" points="1,1;5,5;9,1" z_order="0"></polyline>'
        + cvat_polygon("group", (0, 0, 3, 3), 'group_id="2" z_order="0"')
        + cvat_polygon("group", (20, 0, 23, 3), 'group_id="2" z_order="0"')
    )
    image = f'name="photos/a.png" width="{WIDTH}" height="{HEIGHT}" subset="Train"'
    (tmp_path / "annotations.xml").write_text(cvat(shapes, image))
    lines, table = convert("cvat", tmp_path / "annotations.xml", tmp_path / "mine.jsonl", several="each", negatives=9)
    found = {line["query"][4:]: line["decoded"][0] for line in lines.values() if line["masks"]}
    assert (found["polygon"] == box_mask(2, 3, 9, 8)).all()
    assert (found["box"] == box_mask(12, 4, 20, 15)).all()
    assert (found["mask"] == ring).all()
    assert (found["group"] == (box_mask(0, 0, 3, 3) | box_mask(20, 0, 23, 3))).all()
    assert overlap(found["ellipse"], drawn("ellipse", 7, 5, 23, 15)) > 0.95
    assert overlap(found["tilted"], drawn("ellipse", 11, 1, 19, 19)) > 0.95
    # Clockwise: the right end of a wide box goes down.
    corners = [(15 + x * 0.8660 - y * 0.5, 10 + x * 0.5 + y * 0.8660) for x, y in ((-7, -4), (7, -4), (7, 4), (-7, 4))]
    assert overlap(found["turned"], drawn("polygon", *[number for corner in corners for number in corner])) > 0.93
    assert {line["query"] for line in lines.values() if not line["masks"]} == {"the cup", "the tree"}
    assert {line["split"] for line in lines.values()} == {"Train"}
    assert "1  a polyline, which has no mask" in table and "2  a box, filled as if it were a mask" in table


def test_cvat_shapes_above_hide_those_below(tmp_path):
    save_image(tmp_path / "a.png")
    shapes = cvat_polygon("tree", (0, 0, 20, 20)) + cvat_mask("cup", box_mask(5, 5, 10, 10), z_order=2)
    shapes += cvat_polygon("dog", (0, 0, 8, 8))
    (tmp_path / "a.xml").write_text(cvat(shapes))
    lines, table = convert("cvat", tmp_path / "a.xml", tmp_path / "mine.jsonl")
    assert (lines["a.png tree"]["decoded"][0] == (box_mask(0, 0, 20, 20) & ~box_mask(5, 5, 10, 10))).all()
    assert (lines["a.png cup"]["decoded"][0] == box_mask(5, 5, 10, 10)).all()
    assert "2  a mask cut where one of a higher z_order lies over it" in table


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            cvat("", tail='<track id="0" label="cup"></track>'),
            "holds tracks of a video, expected an export as CVAT for",
        ),
        ("<html></html>", "must be a file of CVAT for images, <annotations>, got <html>"),
        ("<annotations>", "must be a whole XML file, but"),
        (cvat("", 'name="a.png" width="x" height="20"'), "image 3: width must be a number, got 'x'"),
        (cvat("", 'name="a.png" width="60" height="40"'), "image 3: the annotations are of a picture 60 wide"),
        (cvat('<polygon points="1,1;2,2"></polygon>'), "polygon 0 must have the attribute label"),
        (cvat('<polygon label="cup" points="1,1;2"></polygon>'), "polygon 0: points must be x,y;x,y"),
        (cvat('<box label="cup" xtl="9" ytl="1" xbr="2" ybr="3"></box>'), "box 0: its bottom right .* must not lie"),
        (
            cvat('<mask label="cup" rle="0, 4" left="1" top="1" width="3" height="2"></mask>'),
            "mask 0: rle must be runs of whole numbers that add up to 6 pixels, got '0, 4', 4 in all",
        ),
        (
            cvat('<mask label="cup" rle="0, 6" left="28" top="1" width="3" height="2"></mask>'),
            r"mask 0: its 3x2 pixels at \(28, 1\) reach outside of the picture",
        ),
    ],
)
def test_a_bad_file_of_cvat_is_named(tmp_path, content, message):
    save_image(tmp_path / "a.png")
    (tmp_path / "a.xml").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.xml.*{message}"):
        to_jsonl("cvat", tmp_path / "a.xml", tmp_path / "mine.jsonl", quiet=True)


# Label Studio


def brush_rle(mask: np.ndarray) -> list[int]:
    """A brush as Label Studio writes it: red, green, blue and opacity of each pixel, in runs and single values."""
    values = np.repeat((mask * 255).astype(np.uint8).ravel(), 4).tolist()
    sizes = (3, 4, 8, 16)
    bits = f"{len(values):032b}{7:05b}" + "".join(f"{size - 1:04b}" for size in sizes)
    at = 0
    while at < len(values):
        same = next((n for n in range(at, len(values)) if values[n] != values[at]), len(values)) - at
        repeats = same > 2
        length = min(same if repeats else 2, 2**16, len(values) - at)
        chosen = next(place for place, size in enumerate(sizes) if length <= 2**size)
        bits += f"{int(repeats)}{chosen:02b}{length - 1:0{sizes[chosen]}b}"
        bits += "".join(f"{value:08b}" for value in values[at : at + (1 if repeats else length)])
        at += length
    bits += "0" * (-len(bits) % 8)
    return [int(bits[place : place + 8], 2) for place in range(0, len(bits), 8)]


def region(kind: str, label: str | None, size=SIZE, **value) -> dict:
    labels = {} if label is None else {kind: [label]}
    return {
        "id": f"r{len(value)}{label}",
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": size[1],
        "original_height": size[0],
        "image_rotation": 0,
        "value": {**value, **labels},
    }


def share_points(polygon) -> list[list[float]]:
    points = zip(polygon[::2], polygon[1::2], strict=True)
    return [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points]


def task(*regions, number: int = 1, **fields) -> dict:
    data = {"image": f"/data/upload/7/ab12cd34-a{number}.png", "note": "anything"}
    return {"id": number, "data": data, "annotations": [{"id": 5, "result": list(regions)}], **fields}


@pytest.fixture
def studio(tmp_path):
    for number in (1, 2, 3):
        save_image(tmp_path / f"a{number}.png")
    return tmp_path


def studio_regions() -> list[dict]:
    rng = np.random.default_rng(1)
    speckled = box_mask(3, 4, 20, 15) & (rng.random(SIZE) > 0.3)
    bare = region("brush", None, format="rle", rle=brush_rle(box_mask(1, 1, 5, 5)))
    bare["id"] = "own"
    return [
        region("brushlabels", "brush", format="rle", rle=brush_rle(speckled)),
        region("polygonlabels", "polygon", points=share_points(box_polygon(2, 3, 9, 8)), closed=True),
        region("rectanglelabels", "rectangle", x=40, y=20, width=20, height=50, rotation=0),
        region("rectanglelabels", "turned", x=50, y=10, width=40, height=30, rotation=40),
        region("ellipselabels", "ellipse", x=50, y=50, radiusX=30, radiusY=25, rotation=0),
        region("keypointlabels", "dog", x=50, y=50, width=1),
        bare,
        {**region("labels", "bare"), "id": "own"},
    ]


def check_studio(found: dict[str, np.ndarray]) -> None:
    speckled = box_mask(3, 4, 20, 15) & (np.random.default_rng(1).random(SIZE) > 0.3)
    assert (found["brush"] == speckled).all()
    assert (found["polygon"] == box_mask(2, 3, 9, 8)).all()
    assert (found["rectangle"] == box_mask(12, 4, 18, 14)).all()
    assert overlap(found["ellipse"], drawn("ellipse", 6, 5, 24, 15)) > 0.95
    # Turned clockwise around its corner at the top left, in pixels: 12 wide, 6 high, from (15, 2).
    c, s = np.cos(np.deg2rad(40)), np.sin(np.deg2rad(40))
    corners = [(15 + x * c - y * s, 2 + x * s + y * c) for x, y in ((0, 0), (12, 0), (12, 6), (0, 6))]
    assert overlap(found["turned"], drawn("polygon", *[number for corner in corners for number in corner])) > 0.9


def test_label_studio_regions_of_every_type(studio):
    save_json(studio / "export.json", [task(*studio_regions())])
    lines, table = convert("labelstudio", studio / "export.json", studio / "mine.jsonl", several="each")
    found = {line["query"][4:]: line["decoded"][0] for line in lines.values()}
    check_studio(found)
    assert (found["bare"] == box_mask(1, 1, 5, 5)).all()
    assert lines["a1.png brush"]["image"] == "a1.png"
    assert "1  a region of the type keypointlabels, which has no mask" in table
    assert "2  a box, filled as if it were a mask" in table


def test_label_studio_in_its_short_form(studio):
    regions = [one for one in studio_regions() if one["type"].endswith("labels") and one["type"] != "labels"]
    keys = ("original_width", "original_height", "image_rotation")
    flat = [{**one["value"], **{key: one[key] for key in keys}} for one in regions]
    tasks = [
        {"image": "/data/local-files/?d=my%20set/a1.png", "id": 1, "label": flat},
        {"image": "/data/local-files/?d=my%20set/a2.png", "id": 2, "annotator": 1, "annotation_id": 7},
        {"image": "/data/local-files/?d=my%20set/a3.png", "id": 3},
    ]
    save_json(studio / "min.json", tasks)
    lines, table = convert("labelstudio", studio / "min.json", studio / "mine.jsonl", negatives=1)
    check_studio({line["query"][4:]: line["decoded"][0] for line in lines.values() if line["masks"]})
    assert "a1.png polygon" in lines, "the file is named, not the address of its server"
    denied = {line["image"] for line in lines.values() if not line["masks"]}
    assert denied == {"a2.png"}, "an annotation without a region denies, and none does not"
    assert "1  a picture that nobody annotated" in table and "an ellipse" in table


def test_one_annotation_of_label_studio_counts(studio):
    def square(size: int) -> dict:
        return region("polygonlabels", "cup", points=share_points(box_polygon(0, 0, size, size)))

    first = {"id": 1, "result": [square(4)], "updated_at": "2026-01-02T00:00:00Z"}
    later = {"id": 2, "result": [square(5)], "updated_at": "2026-01-03T00:00:00Z"}
    cancelled = {"id": 3, "result": [square(6)], "was_cancelled": True, "updated_at": "2026-01-04T00:00:00Z"}
    predicted = [{"id": 4, "score": 0.9, "result": [square(7)]}, {"id": 5, "score": 0.2, "result": [square(8)]}]
    tasks = [
        task(annotations=[later, first, cancelled], predictions=predicted),
        task(number=2, annotations=[{**first, "ground_truth": True}, later]),
        task(number=3, annotations=[], predictions=predicted),
    ]
    save_json(studio / "export.json", tasks)
    lines, table = convert("labelstudio", studio / "export.json", studio / "mine.jsonl", negatives=1)
    areas = {line["image"]: int(line["decoded"][0].sum()) for line in lines.values()}
    assert areas == {"a1.png": 25, "a2.png": 16}, "nothing is said, nor denied, of a picture that nobody annotated"
    assert "2  another annotation of a picture" in table and "1  an annotation that was cancelled" in table
    assert "4  a prediction (--predictions" in table and "1  a picture that nobody annotated" in table
    where = {"predictions": True, "least_score": 0.5}
    lines, table = convert("labelstudio", studio / "export.json", studio / "mine.jsonl", **where)
    areas = {line["image"]: int(line["decoded"][0].sum()) for line in lines.values()}
    assert areas == {"a1.png": 25, "a2.png": 16, "a3.png": 49}
    assert "1  a prediction of a score below 0.5" in table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": {"rle": [1, 2, 300], "brushlabels": ["cup"]}}, "rle must be a list of whole numbers in 0..255"),
        ({"value": {"rle": [0, 0, 0, 9, 60], "brushlabels": ["cup"]}}, "its rle ends too early, after 5 bytes"),
        (
            {"value": {"rle": brush_rle(np.ones((4, 4), bool)), "brushlabels": ["cup"]}},
            "its rle holds 64 values, expected 2400: 4 for each of 30x20 pixels",
        ),
        ({"value": {"rle": brush_rle(np.eye(20, 30) > 0)[:-4], "brushlabels": ["cup"]}}, "its rle ends too early"),
        ({"type": ["brushlabels"]}, "type must be a text, got"),
        ({"original_width": 60}, "the annotations are of a picture 60 wide and 20 high, but"),
        ({"original_width": None}, r"a size must be whole numbers of pixels, \[height, width\], got \[20, None\]"),
        ({"type": "rectanglelabels", "value": {"rectanglelabels": ["cup"], "x": "a"}}, "x must be a number, got 'a'"),
        ({"type": "polygonlabels", "value": {"polygonlabels": ["cup"], "points": [[1]]}}, "points must be pairs of x"),
    ],
)
def test_a_bad_region_of_label_studio_is_named(studio, change, message):
    good = region("brushlabels", "cup", rle=brush_rle(box_mask(1, 1, 5, 5)))
    save_json(studio / "export.json", [task({**good, **change})])
    with pytest.raises(ValueError, match=rf"export\.json task 1, annotation 0, region 0.*{message}"):
        to_jsonl("labelstudio", studio / "export.json", studio / "mine.jsonl", quiet=True)


def test_a_task_of_two_pictures_is_refused(studio):
    two = task(region("polygonlabels", "cup", points=share_points(CUP * 2)))
    two["data"]["right"] = "b.png"
    save_json(studio / "export.json", [two])
    with pytest.raises(ValueError, match=r"task 1: data must name one picture, got '/data.*a1\.png' and 'b\.png'"):
        to_jsonl("labelstudio", studio / "export.json", studio / "mine.jsonl", quiet=True)


# Data sets in columns


def picture_bytes(value: int = 90, mask: np.ndarray | None = None) -> dict:
    buffer = io.BytesIO()
    picture = Image.new("RGB", (WIDTH, HEIGHT), (value, 40, 200)) if mask is None else Image.fromarray(mask)
    picture.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def rows_of(masks: list, texts: list, feature) -> Dataset:
    features = Features({"image": ImageFeature(), "text": Value("string"), "mask": feature})
    columns = {"image": [picture_bytes()] * len(masks), "text": texts, "mask": masks}
    return Dataset.from_dict(columns, features=features)


AREA = box_mask(*CUP)
RLE = {"size": Sequence(Value("int32")), "counts": Value("string")}
FORMS = {
    "pictures": (picture_bytes(mask=AREA), ImageFeature()),
    "rows": (AREA.tolist(), Sequence(Sequence(Value("bool")))),
    "numbers": ((AREA * 255).tolist(), Sequence(Sequence(Value("int32")))),
    "rle": (compressed_rle(AREA), RLE),
    "polygons": ([box_polygon(*CUP)], Sequence(Sequence(Value("float32")))),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_data_set_with_columns(tmp_path, form):
    mask, feature = FORMS[form]
    data = rows_of([mask, mask], ["the red cup", " "], feature)
    data.to_parquet(tmp_path / "train-00000-of-00001.parquet")
    lines, table = convert("hub", tmp_path, tmp_path / "out" / "mine.jsonl")
    (line,) = lines.values()
    assert (line["decoded"][0] == AREA).all() and line["query"] == "the red cup" and line["split"] == "train"
    assert line["image"].startswith("mine-images/") and "1  a row without text" in table
    assert (tmp_path / "out" / line["image"]).read_bytes() == picture_bytes()["bytes"]


def test_a_saved_data_set_with_columns_of_other_names(tmp_path):
    data = rows_of([AREA.tolist(), np.zeros(SIZE, bool).tolist()], ["the cup", "the tree"], FORMS["rows"][1])
    data = data.rename_columns({"image": "photo", "text": "phrase"})
    DatasetDict(train=data, val=data).save_to_disk(tmp_path / "saved")
    columns = ("photo", "phrase", "mask")
    lines, table = convert("hub", tmp_path / "saved", tmp_path / "mine.jsonl", columns=columns)
    assert [line["split"] for line in lines.values()] == ["train", "val"]
    assert "2  a mask without a pixel" in table
    (tmp_path / "mine.jsonl").unlink()
    lines, _ = convert("hub", tmp_path / "saved", tmp_path / "one.jsonl", columns=columns, split="val")
    assert [line["split"] for line in lines.values()] == ["val"]
    with pytest.raises(ValueError, match="has no split 'test'; it has: train, val"):
        to_jsonl("hub", tmp_path / "saved", tmp_path / "x.jsonl", columns=columns, split="test", quiet=True)
    with pytest.raises(ValueError, match="has no column 'image', it has: photo, phrase, mask"):
        to_jsonl("hub", tmp_path / "saved", tmp_path / "x.jsonl", quiet=True)
    with pytest.raises(ValueError, match="--negatives needs a list of names, which hub has not"):
        to_jsonl("hub", tmp_path / "saved", tmp_path / "x.jsonl", negatives=1, quiet=True)
    with pytest.raises(OSError, match="Couldn't reach 'no/where' on the Hub"):
        to_jsonl("hub", "no/where", tmp_path / "x.jsonl", quiet=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ((AREA * 3).tolist(), "its mask must hold true and false, 1 and 0, or 255 and 0, got other values"),
        (label_map((1, CUP), (2, TREE)).tolist(), "its mask must hold true and false"),
        ([[1, 0], [1]], "a polygon must be x, y pairs of numbers"),
        ([[2, 2, 300, 2, 8, 8]], r"the polygon's point \(300\.0, 2\.0\) lies far outside"),
    ],
)
def test_a_mask_that_may_mean_several_things_is_refused(tmp_path, mask, message):
    rows_of([mask], ["the cup"], Sequence(Sequence(Value("float32")))).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=rf"train row 0: {message}"):
        to_jsonl("hub", tmp_path, tmp_path / "mine.jsonl", quiet=True)


def test_pictures_of_files_that_other_libraries_wrote(tmp_path):
    for image in (picture_bytes(), picture_bytes()["bytes"]):
        table = pa.table({"image": [image], "text": ["the cup"], "mask": [AREA.tolist()]})
        (tmp_path / "data").mkdir(exist_ok=True)
        parquet.write_table(table, tmp_path / "data" / "train.parquet")
        lines, _ = convert("hub", tmp_path / "data", tmp_path / f"{type(image).__name__}.jsonl")
        (line,) = lines.values()
        assert (line["decoded"][0] == AREA).all()


def test_a_mask_of_another_size_names_its_row(tmp_path):
    rows_of([np.ones((4, 5), bool).tolist()], ["x"], FORMS["rows"][1]).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match="train row 0: the annotations are of a picture 5 wide and 4 high"):
        to_jsonl("hub", tmp_path, tmp_path / "mine.jsonl", quiet=True)


# What annotate wrote


def test_what_a_model_annotated_becomes_training_data(tmp_path):
    save_image(tmp_path / "photos" / "a.png")

    def segment(score: float) -> dict:
        return {"label": "cup", "score": score, "box": [2, 2, 8, 8], "layer": 1, "mask": compressed_rle(AREA)}

    rows = [
        {"query": "the cup", "answer": "It is [SEG].", "segments": [segment(0.9)], "error": None},
        {"query": "a cup", "answer": "Sure, [SEG].", "segments": [segment(0.3)], "error": None},
        {"query": "the dog", "answer": "It is [REJ].", "segments": [], "error": None},
        {"query": "?", "answer": None, "segments": None, "error": "too long"},
    ]
    rows = [{"image": "a.png", "query_index": place, **row} for place, row in enumerate(rows)]
    (tmp_path / "annotated").mkdir()
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "annotated" / "part-00000000.parquet")
    where = {"images": tmp_path / "photos", "least_score": 0.5}
    lines, table = convert("annotated", tmp_path / "annotated", tmp_path / "mine.jsonl", **where)
    assert [(line["query"], line["answer"], len(line["masks"])) for line in lines.values()] == [
        ("the cup", "It is [SEG].", 1),
        ("the dog", "It is [REJ].", 0),
    ]
    assert (lines["a.png the cup"]["decoded"][0] == AREA).all()
    assert "1  an answer with a score below 0.5" in table and "1  a query that was not answered" in table


def test_pictures_with_and_without_a_split_do_not_mix(tmp_path):
    for place in ("train", "other"):
        save_image(tmp_path / place / "a.png")
        content = {"shapes": [], "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
        content["shapes"] = [{"label": "cup", "points": [[1, 1], [9, 1], [9, 9]], "shape_type": "polygon"}]
        save_json(tmp_path / place / "a.json", content)
    with pytest.raises(ValueError, match=r"some pictures belong to a split \(train\) and others to none; name one"):
        to_jsonl("labelme", tmp_path, tmp_path / "mine.jsonl", quiet=True)
    lines, _ = convert("labelme", tmp_path, tmp_path / "mine.jsonl", split="train")
    assert len(lines) == 2
    # By hand such a file can come about all the same: the line is refused, whatever split is read.
    records = [{key: lines[name][key] for key in ("id", "image", "query", "masks")} for name in lines]
    records[0]["split"] = "train"
    (tmp_path / "mixed.jsonl").write_text("\n".join(map(json.dumps, records)))
    source = JsonlSource(tmp_path / "mixed.jsonl", "train")
    with pytest.raises(ValueError, match=r"mixed\.jsonl:2: the line has no split, but others have: train"):
        source[1]
