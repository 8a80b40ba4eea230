"""Masks in picture files of every kind: which pixels are the object, and which files must say it themselves."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from uground.training.data.mask_pictures import read_mask_picture

SIZE = (40, 60)
OBJECT = np.zeros(SIZE, bool)
OBJECT[10:30, 20:45] = True
RED, GREEN = (255, 0, 0), (0, 128, 0)


def grey(on: int = 255, off: int = 0, kind=np.uint8) -> Image.Image:
    return Image.fromarray(np.where(OBJECT, on, off).astype(kind))


def plain(value: int, mode: str = "L") -> Image.Image:
    return Image.new(mode, SIZE[::-1], value)


def coloured(on=RED, off=(0, 0, 0), edge=None) -> Image.Image:
    pixels = np.where(OBJECT[..., None], on, off).astype(np.uint8)
    if edge is not None:
        pixels[:10] = edge
    return Image.fromarray(pixels)


def palette(colours: list[int], first: int = 0) -> Image.Image:
    picture = Image.fromarray(OBJECT.astype(np.uint8) + first).convert("L")
    picture = Image.frombytes("P", picture.size, picture.tobytes())
    picture.putpalette([0] * 3 * first + colours)
    return picture


def label_map(*values: int) -> Image.Image:
    """A class on the object and another one above it."""
    pixels = np.where(OBJECT, values[1], 0).astype(np.uint8)
    pixels[:10] = values[0]
    return Image.fromarray(pixels)


def cut_out() -> Image.Image:
    photo = np.random.default_rng(0).integers(1, 255, (*SIZE, 3), dtype=np.uint8)
    return Image.fromarray(np.dstack([photo, np.where(OBJECT, 255, 0).astype(np.uint8)]))


def read(folder, picture: Image.Image, choice: dict | None = None, name: str = "m.png", **saved) -> np.ndarray:
    picture.save(folder / name, **saved)
    given = name if choice is None else {"png": name, **choice}
    rle = read_mask_picture(given, SIZE, folder, "f.jsonl:3: mask 1")
    return coco_mask.decode(rle).astype(bool)


WHITE_ALPHA = Image.merge("LA", (plain(255), grey()))
BLACK_ALPHA = Image.merge("LA", (plain(0), grey()))
BLACK_WHITE, WHITE_BLACK = [0, 0, 0, 255, 255, 255], [255, 255, 255, 0, 0, 0]


@pytest.mark.parametrize(
    ("picture", "choice", "saved"),
    [
        (grey(), None, {}),
        (grey(1), None, {}),
        (grey(7), None, {}),
        (grey().convert("1"), None, {}),
        (grey().convert("1"), {"value": 1}, {}),
        (grey(65535, kind=np.uint16), None, {}),
        (grey(1, kind=np.uint16), None, {}),
        (grey(300, 256, np.uint16), {"value": 300}, {}),
        (grey(65535, 30000, np.uint16), {"channel": "grey"}, {}),
        (grey().convert("RGB"), None, {}),
        (grey().convert("RGB"), {"value": 255}, {}),
        (coloured(), None, {}),
        (coloured(), {"channel": "red", "value": 255}, {}),
        (coloured(edge=GREEN), {"channel": "red"}, {}),
        (label_map(1, 2), {"value": 2}, {}),
        (grey(0, 255), {"value": 0}, {}),
        # alpha is no white, and what it hides no object
        (Image.merge("LA", (grey(), plain(255))), None, {}),
        (Image.merge("LA", (grey(), grey())), None, {}),
        (Image.merge("RGBA", (grey(), grey(), grey(), plain(255))), None, {}),
        (BLACK_ALPHA, {"channel": "alpha"}, {}),
        (WHITE_ALPHA, {"channel": "alpha"}, {}),
        (cut_out(), {"channel": "alpha"}, {}),
        # of a palette colours count, whatever their numbers
        (palette(BLACK_WHITE), None, {}),
        (palette(BLACK_WHITE, first=3), None, {}),
        (palette([0, 0, 0, *RED]), None, {}),
        (palette(BLACK_WHITE), None, {"transparency": 0}),
        (palette([*RED, *GREEN], first=3), {"value": 4}, {}),
        (palette([255] * 6), {"channel": "alpha"}, {"transparency": 0}),
        # edges of lossy formats
        (grey(), None, {"name": "m.jpg", "quality": 30}),
        (grey(), None, {"name": "m.jpg", "quality": 90}),
        (grey().convert("RGB"), None, {"name": "m.jpg", "quality": 75}),
        (coloured(), None, {"name": "m.jpg", "quality": 75}),
        (grey().convert("RGB"), None, {"name": "m.webp", "quality": 50}),
    ],
)
def test_the_object_is_found(tmp_path, picture, choice, saved):
    np.testing.assert_array_equal(read(tmp_path, picture, choice, **saved), OBJECT)


def test_the_colours_of_a_palette_may_be_the_other_way_round(tmp_path):
    np.testing.assert_array_equal(read(tmp_path, palette(WHITE_BLACK)), ~OBJECT)


@pytest.mark.parametrize(
    ("picture", "choice", "message"),
    [
        (
            label_map(1, 2),
            None,
            r'holds 3 values \(0, 1, 2\), expected black and one more; write {"png": "…", "value"',
        ),
        (grey(2, 1), None, r"holds 2 values \(1, 2\), expected black and one more"),
        (coloured(edge=GREEN), None, r"holds 3 colours \(#000000, #008000, #ff0000\), expected black and one more"),
        (palette([*RED, *GREEN], first=3), None, r"holds 2 colours \(#008000, #ff0000\)"),
        (
            cut_out(),
            None,
            'holds 2400 colours .* write {"png": "…", "channel": "alpha"} if its alpha channel is the object',
        ),
        (
            BLACK_ALPHA,
            None,
            'is black, its alpha channel alone holds an object; write {"png": "…", "channel": "alpha"}',
        ),
        (WHITE_ALPHA, None, "is transparent where its colours show an object"),
        (plain(255), None, "is not black on 100% of the image, expected at most 95%"),
        (Image.merge("LA", (plain(255), plain(255))), None, "is not black on 100% of the image"),
        (grey(), {"channel": "alpha"}, "has no channel alpha: it holds grey without alpha"),
        (coloured(), {"channel": "grey"}, "has no channel grey: it holds colours without alpha"),
        (coloured(), {"value": 255}, "has colours, so a value needs a channel as well: red, green, blue"),
        (label_map(1, 2), {"value": 3}, r"has no pixel of the value 3, it holds 3 values \(0, 1, 2\)"),
        (coloured(), {"channel": "blue"}, r"has no pixel of at least half of white, it holds 1 value \(0\)"),
    ],
)
def test_a_picture_of_several_readings_is_refused_by_name(tmp_path, picture, choice, message):
    with pytest.raises(ValueError, match=r"^f\.jsonl:3: mask 1: the mask .*m\.png " + message):
        read(tmp_path, picture, choice)


@pytest.mark.parametrize("picture", [label_map(100, 200), label_map(1, 2), coloured(edge=(0, 255, 0))])
@pytest.mark.parametrize("quality", [50, 90])
def test_a_label_map_stays_one_when_it_is_lossy(tmp_path, picture, quality):
    with pytest.raises(ValueError, match=r"m\.jpg holds .*, expected black and one more"):
        read(tmp_path, picture, name="m.jpg", quality=quality)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"value": True}, "value must be a whole number of at least 0, got True"),
        ({"value": -1}, "value must be a whole number of at least 0, got -1"),
        ({"value": "2"}, "value must be a whole number of at least 0, got '2'"),
        ({"value": 2.0}, "value must be a whole number of at least 0, got 2.0"),
        ({"channel": "blau"}, "channel must be one of red, green, blue, grey, alpha, got 'blau'"),
        ({"channel": ["red"]}, "channel must be one of"),
        ({"colour": 1}, r"a mask picture has the keys \['channel', 'png', 'value'\], got \['colour'\] as well"),
        ({"png": 5}, "png must be the path of a picture, got 5"),
    ],
)
def test_a_choice_that_is_none_is_refused(tmp_path, choice, message):
    with pytest.raises(ValueError, match="^f.jsonl:3: mask 1: " + message):
        read(tmp_path, grey(), choice)


def test_a_mask_is_turned_as_its_picture_says(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    np.testing.assert_array_equal(read(tmp_path, grey().rotate(90, expand=True), exif=turned), OBJECT)
    with pytest.raises(
        ValueError, match=r"has size \[60, 40\], expected .* \[40, 60\]; it looks drawn on the picture be"
    ):
        read(tmp_path, grey().rotate(90, expand=True))


def test_files_that_cannot_be_read_are_named(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_bytes(b"mask")
    for name, message in (
        ("no.png", "does not exist"),
        ("text.png", "no known image format"),
        (".", "cannot be read"),
    ):
        with pytest.raises(OSError, match="^f:1: the mask file .*" + message):
            read_mask_picture(name, SIZE, tmp_path, "f:1")
    grey().save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"^f:1: the mask file .*bomb\.png is too large"):
        read_mask_picture("bomb.png", SIZE, tmp_path, "f:1")
