"""Shared helpers of the readers: pickles that cannot run code, masks of all forms, images that fit their masks."""

import os
import pickle
from collections import OrderedDict

import numpy as np
import pytest
from miniatures import (
    SIZE,
    box_mask,
    box_polygon,
    compressed_rle,
    crowd_rle,
    decoded,
    save_image,
    save_pickle,
)
from PIL import Image
from tiny_processor import gradient_image

from uground.processing.text_lines import read_lines
from uground.training.data.files import (
    checked_root,
    image_size,
    open_image,
    read_json,
    read_pickle,
    require,
    require_images,
)
from uground.training.data.masks import encode_mask, paint_polygon, read_mask, union_mask


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_of_plain_values_is_read(tmp_path, protocol):
    content = {"a": [1, 2.5, -1, None, True, "größe 🐟"], 3: ({"x"}, b"raw"), "o": OrderedDict(k=(1, 2))}
    content = content if protocol > 2 else {**content, 3: ({"x"}, "raw")}
    assert read_pickle(save_pickle(tmp_path / "x.p", content, protocol)) == content


def test_a_python_2_pickle_is_read(tmp_path):
    # cPickle.dumps({'sent': 'caf\xc3\xa9'}, 2) of Python 2: byte strings without an encoding
    (tmp_path / "x.p").write_bytes(b"\x80\x02}q\x01U\x04sentq\x02U\x05caf\xc3\xa9q\x03s.")
    assert read_pickle(tmp_path / "x.p") == {"sent": "café"}


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_and_does_not(tmp_path):
    (tmp_path / "x.p").write_bytes(pickle.dumps([Harmful(str(tmp_path / "made"))]))
    with pytest.raises(ValueError, match=r"plain containers, numbers and strings, but it names (posix|nt|os)\.mkdir"):
        read_pickle(tmp_path / "x.p")
    assert not (tmp_path / "made").exists()


def test_files_that_are_cut_off_are_named(tmp_path):
    whole = pickle.dumps(list(range(1000)))
    (tmp_path / "x.p").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.p must be a whole pickle"):
        read_pickle(tmp_path / "x.p")
    (tmp_path / "x.json").write_text('{"images": [1, 2')
    with pytest.raises(ValueError, match=r"x\.json must be a whole JSON file"):
        read_json(tmp_path / "x.json")


def test_json_of_windows_is_read(tmp_path):
    (tmp_path / "x.json").write_bytes('{"text": "the café’s door"}'.encode("cp1252"))
    assert read_json(tmp_path / "x.json") == {"text": "the café’s door"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"[" * 100_000, "must be a whole JSON file, but maximum recursion depth"),
        (b"9" * 5000, "must be a whole JSON file, but Exceeds the limit"),
        ('{"a": 1}'.encode("utf-16"), "looks like UTF-16 or UTF-32, expected JSON in UTF-8"),
        ('{"a": 1}'.encode("utf-16-be"), "looks like UTF-16 or UTF-32, expected JSON in UTF-8"),
    ],
)
def test_json_that_cannot_be_read_is_named(tmp_path, data, message):
    (tmp_path / "x.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.json " + message):
        read_json(tmp_path / "x.json")


def test_bytes_that_are_no_pickle_are_named(tmp_path):
    draw = np.random.default_rng(0)
    whole = pickle.dumps({"a": [1, 2.5, "b"]})
    for _ in range(200):
        data = bytearray(whole)
        data[int(draw.integers(len(data)))] = int(draw.integers(256))
        (tmp_path / "x.p").write_bytes(data)
        try:
            read_pickle(tmp_path / "x.p")
        except ValueError as error:
            assert "x.p must be a whole pickle" in str(error)


def test_lines_end_where_line_ends_say(tmp_path):
    path = tmp_path / "x.txt"
    for end in ("\n", "\r\n"):
        written = ["a\u2028b\u2029c\x85d", "", "\x0be\x0cf\x1cg", "h\ri"]
        for last in ("", end):
            path.write_bytes((end.join(written) + last).encode())
            assert read_lines(path) == written
    path.write_bytes("\ufeffa\nb".encode())
    assert read_lines(path) == ["a", "b"]
    path.write_bytes(b"")
    assert read_lines(path) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\n".encode("utf-16"), ":1: the file looks like UTF-16 or UTF-32, expected UTF-8"),
        ("a\n".encode("utf-16-be"), ":1: the file looks like UTF-16 or UTF-32, expected UTF-8"),
        ("a\n".encode("utf-32"), ":1: the file looks like UTF-16 or UTF-32, expected UTF-8"),
        (b"a\rb\rc\r", r":1: the lines of the file end with \\r only, expected \\n or \\r\\n"),
        (b"a\ncaf\xe9\n", ":2: the line is not UTF-8, got the byte 0xe9 at place 4"),
    ],
)
def test_text_that_is_no_utf_8_is_named(tmp_path, data, message):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(ValueError, match=r"x\.txt" + message):
        read_lines(tmp_path / "x.txt")


def test_missing_things_are_listed_up_to_ten(tmp_path):
    with pytest.raises(ValueError, match="name the folder that holds them with --root"):
        checked_root(None, "refcoco")
    with pytest.raises(OSError, match=r"--root .*nowhere is not a folder"):
        checked_root(tmp_path / "nowhere", "refcoco")
    with pytest.raises(OSError, match=r"x is incomplete under .*; missing: a, b$"):
        require("x", tmp_path, [tmp_path / "a", tmp_path / "b"])
    save_image(tmp_path / "i" / "00.jpg")
    with pytest.raises(OSError, match="12 annotated images are absent: i/01.jpg, .*i/10.jpg and 2 more$"):
        require_images("x", tmp_path, [tmp_path / "i" / f"{n:02d}.jpg" for n in range(13)])


L_SHAPE = box_mask(2, 2, 10, 6) | box_mask(2, 4, 6, 16)


@pytest.mark.parametrize(
    ("segmentation", "expected"),
    [
        ([box_polygon(2, 2, 10, 6), box_polygon(2, 4, 6, 16)], L_SHAPE),
        (box_polygon(2, 2, 10, 6), box_mask(2, 2, 10, 6)),
        ([[2, 2], [10, 2], [10, 6], [2, 6]], box_mask(2, 2, 10, 6)),
        ([[[2, 2], [10, 2], [10, 6], [2, 6]]], box_mask(2, 2, 10, 6)),
        (crowd_rle(L_SHAPE), L_SHAPE),
        (crowd_rle(box_mask(0, 0, 4, 4)), box_mask(0, 0, 4, 4)),
        (compressed_rle(L_SHAPE), L_SHAPE),
        (compressed_rle(L_SHAPE, text=False), L_SHAPE),
        ([compressed_rle(box_mask(0, 0, 4, 4)), compressed_rle(box_mask(2, 2, 6, 6))],
         box_mask(0, 0, 4, 4) | box_mask(2, 2, 6, 6)),
        # two points hold no area, and four numbers are no box
        ([[1, 1, 20, 19]], box_mask(0, 0, 0, 0)),
        ([[1, 1, 20, 19], box_polygon(2, 2, 10, 6)], box_mask(2, 2, 10, 6)),
        ([], box_mask(0, 0, 0, 0)),
        (None, box_mask(0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_masks_of_all_forms(segmentation, expected):
    rle = read_mask(segmentation, SIZE, "x")
    assert rle["size"] == list(SIZE)
    assert isinstance(rle["counts"], str)
    np.testing.assert_array_equal(decoded(rle), expected)


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        (compressed_rle(np.ones((4, 5), bool)), r"ann 7: its mask has size \[4, 5\], expected that of the image"),
        ({"size": list(SIZE), "counts": [10, 5]}, "ann 7: its RLE counts 15 pixels, expected 600"),
        ({"counts": "x"}, "ann 7: an RLE must have size and counts"),
        ([[1, 2, 3, 4, 5, 6, 7]], "ann 7: a polygon must be x, y pairs of numbers, got 7 values"),
        ("mask.png", "ann 7: a mask must be polygons or RLE, got str"),
    ],
)
def test_masks_that_make_no_sense(segmentation, message):
    with pytest.raises(ValueError, match=message):
        read_mask(segmentation, SIZE, "ann 7")


def test_union_and_painting():
    union = union_mask([encode_mask(box_mask(0, 0, 4, 4)), encode_mask(box_mask(2, 2, 6, 6))], SIZE)
    np.testing.assert_array_equal(decoded(union), box_mask(0, 0, 4, 4) | box_mask(2, 2, 6, 6))
    assert not decoded(union_mask([], SIZE)).any()
    canvas = np.zeros(SIZE, dtype=np.uint8)
    paint_polygon(canvas, [[2.9, 2.2], [10.7, 2.2], [10.7, 6.9], [2.9, 6.9]], 255)
    # points are cut to whole pixels, and the outline belongs to the polygon
    np.testing.assert_array_equal(canvas == 255, box_mask(2, 2, 11, 7))


def test_an_image_is_opened_in_the_orientation_of_its_masks(tmp_path):
    path = save_image(tmp_path / "turned.jpg", size=(20, 30), exif=6)
    assert image_size(path) == (30, 20)
    upright, stored = open_image(str(path), (30, 20), "x"), open_image(str(path), (20, 30), "x")
    assert (upright.size, stored.size) == ((20, 30), (30, 20))
    assert not stored.getexif() and not upright.getexif()
    inside = open_image({"bytes": path.read_bytes(), "path": None}, (30, 20), "x")
    np.testing.assert_array_equal(np.asarray(inside), np.asarray(upright))
    assert open_image(Image.new("L", (30, 20)), SIZE, "x").mode == "RGB"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 200, 65535])
def test_the_header_and_the_pixels_of_an_image_agree(tmp_path, form, orientation):
    pixels = gradient_image(*SIZE)
    path, tags = tmp_path / "a.picture", Image.Exif()
    tags[0x0112] = orientation
    Image.fromarray(pixels).save(path, form, exif=tags, **({"lossless": True} if form == "WEBP" else {}))
    upright = open_image(str(path), None, "x")
    assert image_size(path) == (upright.height, upright.width) == (SIZE[::-1] if 5 <= orientation <= 8 else SIZE)
    for image in (str(path), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        stored = open_image(image, SIZE, "x")
        if form != "JPEG" and orientation not in (2, 3, 4):
            np.testing.assert_array_equal(np.asarray(stored), pixels)


def test_an_image_that_does_not_fit_or_open_is_named(tmp_path):
    path = save_image(tmp_path / "a.jpg", size=(20, 30))
    with pytest.raises(ValueError, match="sample 3: masks of 21x30 pixels do not fit its image of 20x30"):
        open_image(str(path), (21, 30), "sample 3")
    with pytest.raises(ValueError, match="sample 3: masks of 30x20 pixels"):
        open_image(str(path), (30, 20), "sample 3")
    with pytest.raises(OSError, match=r"gone\.jpg' does not exist"):
        open_image(str(tmp_path / "gone.jpg"), SIZE, "sample 3")
    with pytest.raises(OSError, match="sample 3: its image cannot be read"):
        open_image({"bytes": b"nothing", "path": None}, SIZE, "sample 3")
    for nothing in (None, {"bytes": None, "path": None}, {}):
        with pytest.raises(ValueError, match="the image of sample 3 must be a PIL image, an array, .* got NoneType"):
            open_image(nothing, SIZE, "sample 3")


def test_an_image_of_too_many_pixels_is_named(tmp_path, monkeypatch):
    path = save_image(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"the image .*a\.png is too large"):
        image_size(path)
    with pytest.raises(ValueError, match="sample 3: its image is too large"):
        open_image({"bytes": path.read_bytes(), "path": None}, SIZE, "sample 3")
    with pytest.raises(ValueError, match=r"a\.png' is too large"):
        open_image(str(path), SIZE, "sample 3")
