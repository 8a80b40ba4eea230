"""What check_data passes, training takes; what training refuses, check_data names: over many lines, good and bad."""

import json
import re

import numpy as np
import pytest
from miniatures import box_mask, crowd_rle
from PIL import Image
from tiny_processor import gradient_image, tiny_processor

from uground.training.check_data import check_data, contact_sheet
from uground.training.collator import GroundingCollator
from uground.training.data.jsonl import JsonlSource
from uground.training.data.mixture import Mixture
from uground.training.finetune import FinetuneArguments, training_data

SIZE = (20, 30)
SQUARE = [2, 2, 10, 2, 10, 10, 2, 10]
ONE = {"masks": [[SQUARE]]}
LONG = "the cup " * 300
NESTED = "[" * 100_000

GOOD = [
    ONE,
    {"masks": []},
    {"masks": [None]},
    {"masks": [[SQUARE], None], "phrases": ["a", "b"], "boxes": [[2, 2, 10, 10], None]},
    {**ONE, "boxes": None, "phrases": None, "ignore": None, "turns": None, "answer": None, "id": None},
    {"masks": ["mask.png", {"png": "map.png", "value": 2}, crowd_rle(box_mask(0, 0, 9, 9))], "ignore": "mask.png"},
    {"masks": [], "id": 7, "attribute": "mine"},
    {"answer": "it is\nnice\x0c, \u2028 and \x85."},
    {"masks": [], "query": "a\nb 🐟"},
    {"query": None, "turns": [{"query": " the cup ", **ONE}, {"query": "its tree", "masks": []}]},
]
# Each with a piece of the sentence that names it.
BAD_RECORDS = [
    ({**ONE, "phrases": 5}, "phrases must be a list with one phrase per mask, got 5"),
    ({**ONE, "phrases": "c"}, "phrases must be a list with one phrase per mask, got 'c'"),
    ({**ONE, "phrases": [None]}, "phrase 1 must be a text that is not empty, got None"),
    ({**ONE, "phrases": [3]}, "phrase 1 must be a text that is not empty, got 3"),
    ({**ONE, "phrases": ["a [SEG]"]}, r"phrase 1 must name an object, got 'a \[SEG\]'"),
    ({**ONE, "boxes": [[None] * 4]}, "box 1 must be .x0, y0, x1, y1."),
    ({**ONE, "boxes": [None]}, "box 1 must be .x0, y0, x1, y1., .* got None"),
    ({**ONE, "boxes": [[10**400, 1, 2, 3]]}, "box 1 must be .x0, y0, x1, y1."),
    ({**ONE, "boxes": [["2", 2, 10, 10]]}, "box 1 must be .x0, y0, x1, y1."),
    ({**ONE, "boxes": [[True, 2, 10, 10]]}, "box 1 must be .x0, y0, x1, y1."),
    ({**ONE, "boxes": 5}, "boxes must be a list with one box per mask"),
    ({**ONE, "boxes": [[0.1, 0.1, 0.3, 0.5]]}, "it looks like shares of the image, expected pixels"),
    ({"masks": [None], "boxes": [[2, 2, 10, 10]]}, "box 1 must be null as its mask is"),
    ({"masks": [{"size": None, "counts": [600]}]}, "mask 1: a size must be whole numbers of pixels"),
    ({"masks": [{"size": [20.9, 30.9], "counts": [300, 300]}]}, "mask 1: a size must be whole numbers of pixels"),
    ({"masks": [{"size": [20, 30], "counts": "garbage"}]}, "mask 1: the counts of an RLE must be compressed"),
    ({"masks": [{"size": [20, 30], "counts": "09"}]}, "mask 1: its RLE counts 9 pixels, expected 600"),
    ({"masks": [{"size": [20, 30], "counts": [6.5, 593.5]}]}, "mask 1: the counts of an RLE must be whole numbers"),
    (
        {"masks": [{"size": [30, 20], "counts": [300, 300]}]},
        "it looks drawn on the picture before its EXIF orientation",
    ),
    ({"masks": [{}]}, "mask 1: an RLE must have size and counts"),
    ({"masks": [[[2, 2, 10**400, 2, 9, 9]]]}, "mask 1: the polygon's point .* lies outside of the image"),
    ({"masks": [[[2, 2, 1e300, 2, 9, 9]]]}, r"mask 1: the polygon's point \(1e\+300, 2\) lies outside of the image"),
    ({"masks": [[[2, 25, 9, 25, 9, 29]]]}, "it looks drawn on the picture before its EXIF orientation turned it"),
    ({"masks": [[[2, 2, 10, 2, 18, 2]]]}, "mask 1: a polygon holds no area, all its points lie on one line"),
    ({"masks": [[SQUARE, [2, 2, 4, 4, 8, 8]]]}, "mask 1: a polygon holds no area"),
    ({"masks": [[[0.1, 0.2, 0.3, 0.4, 0.9, 0.1]]]}, "within 0..1, as YOLO writes them, .* multiply x by the width 30"),
    ({"masks": [SQUARE]}, r"a level of lists is missing, write \[\[x, y, …\]\]"),
    ({"masks": SQUARE}, r"two levels of lists are missing, write \[\[\[x, y, …\]\]\]"),
    ({"masks": [[[2, 2], [10, 2], [10, 10]]]}, "it looks like a list of points"),
    ({"masks": [[[[2, 2], [10, 2], [10, 10]]]]}, "it looks like a list of points"),
    ({"masks": [[[True, 2, 10, 2, 10, 10]]]}, "a polygon must be a flat list of numbers"),
    ({"masks": [[["2", 2, 10, 2, 10, 10]]]}, "a polygon must be a flat list of numbers"),
    ({"masks": [[]]}, "a mask of polygons must hold at least one"),
    ({"masks": [True]}, "a mask must be polygons, a COCO RLE or the path of a PNG, got True"),
    ({"masks": "mask.png"}, "masks must be a list with one entry per object"),
    ({"masks": ["a.png"]}, r"a\.png holds 600 colours .*, expected black and one more"),
    ({"masks": ["map.png"]}, r"map\.png holds 3 values \(0, 1, 2\), expected black and one more"),
    ({"masks": ["folder"]}, "the mask file .*folder cannot be read"),
    ({"masks": ["black.png"]}, "mask 1 covers no pixel"),
    ({"masks": ["\ud83d.png"]}, "the path of a mask holds .*, half of a character"),
    ({**ONE, "ignore": "no.png"}, "ignore: the mask file .*no.png does not exist"),
    ({**ONE, "ignore": {"size": None, "counts": "a"}}, "ignore: a size must be whole numbers"),
    ({**ONE, "turns": [{"query": "x", **ONE}], "query": None}, "with turns, masks must stand within a turn"),
    ({"query": None, "turns": [{"query": "x", "colour": 1}]}, r"turn 1: unknown keys \['colour'\]"),
    ({"query": None, "turns": [5]}, "turns must be a list of objects"),
    ({"query": LONG, "masks": []}, "query 1 is too long: .* it may have 200 tokens, got"),
    ({"answer": LONG}, "query 1 is too long"),
    ({"query": "<image> the cup", "masks": []}, "text 1 holds <image>"),
    ({"answer": "a <image>"}, "an answer must be text without an image"),
    ({"query": "a\ud83d", "masks": []}, "query holds .*, half of a character that JSON writes as two"),
    ({"answer": "a\udc1f"}, "answer holds .*, half of a character that JSON writes as two"),
    ({"query": ["x"], "masks": []}, r"query must be a text that is not empty, got \['x'\]"),
    ({"query": "\u2003", "masks": []}, "query must be a text that is not empty"),
    ({**ONE, "answer": "[SEG] [SEG]"}, r"holds 2 \[SEG\], expected one for each of its 1 masks"),
    ({"image": None, "masks": []}, "image must be the path of a picture, got None"),
    ({"image": "folder", "masks": []}, "folder' does not exist or is not a file"),
    ({"image": "x" * 5000, "masks": []}, "does not exist or is not a file"),
    ({"image": "a\ud83d.png", "masks": []}, "image holds .*, half of a character"),
    ({"image": "thin.png", "masks": []}, "an image may not be so elongated"),
    ({"image": "pixel.png", "masks": []}, "must be at least 2 pixels wide and high"),
    ({"id": True, "masks": []}, "id must be a text that is not empty, got True"),
    ({"id": [1], "masks": []}, r"id must be a text that is not empty, got \[1\]"),
    ({"id": "7", "masks": []}, "the id '7' stands in an earlier line too"),
    ({"attribute": 5, "masks": []}, "attribute must be a text that is not empty, got 5"),
    ({"attribute": "overall", "masks": []}, "attribute must name a part of the data"),
]
BAD_LINES = [
    ("{", "the line is not JSON"),
    ("null", "a line must be a JSON object, got NoneType"),
    ("[1]", "a line must be a JSON object, got list"),
    ('{"image": "a.png", "query": "x", "masks": []},', "it looks like part of a JSON array"),
    ('{"image": "a.png", "query": "x", "masks": [], "masks": []}', "the key 'masks' stands twice"),
    ('{"image": "a.png", "query": "x", "masks": [[[NaN, 2, 9, 2, 9, 9]]]}', "NaN is no number of JSON"),
    ('{"image": "a.png", "query": "x", "masks": [[[1e999, 2, 9, 2, 9, 9]]]}', r"the polygon's point \(inf, 2\)"),
    ('{"image": "a.png", "id": ' + "9" * 5000 + "}", "the line is not JSON: Exceeds the limit"),
    (NESTED, "nested too deep"),
    ('{"image": "a.png", "masks": ' + NESTED + "}", "nested too deep"),
    ('{"image": "a.png", "query": "x", "masks": ' + "[" * 300 + "]" * 300 + "}", "a polygon must be a flat list"),
    (b'{"image": "a.png", "query": "caf\xe9", "masks": []}', "the line is not UTF-8, got the byte 0xe9"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    Image.fromarray(gradient_image(*SIZE)).save(folder / "a.png")
    mask = np.zeros(SIZE, np.uint8)
    mask[5:9, 20:30] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    mask[5:9, :] = 1
    mask[5:7, 20:30] = 2
    Image.fromarray(mask).save(folder / "map.png")
    for name, size in (("black", (30, 20)), ("thin", (3000, 2)), ("pixel", (1, 1))):
        Image.new("L", size).save(folder / f"{name}.png")
    (folder / "folder").mkdir()
    return folder


def write(folder, lines, name: str = "data.jsonl") -> str:
    lines = [
        line if isinstance(line, bytes) else line.encode()
        for line in (
            line if isinstance(line, (str, bytes)) else json.dumps({"image": "a.png", "query": "the cup", **line})
            for line in lines
        )
    ]
    (folder / name).write_bytes(b"\n".join(lines))
    return str(folder / name)


@pytest.fixture(scope="module")
def lines(folder) -> tuple[str, dict[int, str]]:
    """A file of good and bad lines in turn, and by number of line what is wrong with the bad ones."""
    everything = [(line, None) for line in GOOD] + BAD_RECORDS + BAD_LINES
    order = np.random.default_rng(0).permutation(len(everything) - len(GOOD)) + len(GOOD)
    shuffled = everything[: len(GOOD)] + [everything[place] for place in order]
    wrong = {number: message for number, (_, message) in enumerate(shuffled, start=1) if message is not None}
    return write(folder, [line for line, _ in shuffled]), wrong


def test_every_bad_line_is_named_with_its_reason(lines):
    path, wrong = lines
    report = check_data(path, quiet=True, processor=tiny_processor())
    named = {int(problem.removeprefix(f"{path}:").split(":")[0]): problem for problem in report.problems}
    assert named.keys() == wrong.keys() and len(report.problems) == len(named)
    for number, message in wrong.items():
        assert re.match(rf"{re.escape(path)}:{number}: .*{message}", named[number]), named[number]
        assert "\n" not in named[number]
    assert report.lines == len(GOOD) + len(wrong) and sum(report.attributes.values()) == len(GOOD)
    assert contact_sheet(report.shown).size[0] > 0


def test_training_takes_what_passes_and_refuses_the_rest(lines):
    path, wrong = lines
    collator, source = GroundingCollator(tiny_processor(), 8), JsonlSource(path)
    mixture = Mixture([source])
    places = {int(item): place for place, item in enumerate(mixture.plan(0)[1])}
    for index in range(len(source)):
        if index + 1 in wrong:
            # The collator knows an example by its id, which here is file and line but in one.
            with pytest.raises((OSError, ValueError), match=f"^(example )?{re.escape(path)}:{index + 1}: "):
                collator([mixture[places[index]]])
        else:
            assert len(collator([mixture[places[index]]])["example_ids"]) == 1


def test_skipping_skips_all_of_them_and_counts(folder, lines):
    path, wrong = lines
    lines_of = (folder / "data.jsonl").read_bytes().split(b"\n")
    collator = GroundingCollator(tiny_processor(), 8)
    # A good line behind each bad one: more than a few bad ones in a row are no accident.
    mixed, bad = [], 0
    for number in sorted(wrong):
        if b'"id": "7"' not in lines_of[number - 1]:
            mixed += [lines_of[number - 1], json.dumps({"image": "a.png", "query": "the cup", **ONE})]
            bad += 1
    name = write(folder, mixed, "mixed.jsonl")
    arguments = FinetuneArguments(train_data=[name], on_bad_sample="skip")
    _, mixture, _ = training_data(arguments, 0, collator.check)
    for place in range(len(mixture)):
        assert len(collator([mixture[place]])["target_groups"]) == 1
    assert mixture.skipped == bad
    refusing = Mixture([JsonlSource(name)], check=collator.check)
    assert refusing.check is None, "without skipping, the batch itself refuses"


def test_max_length_cuts_here_as_in_training(folder):
    path = write(folder, [{"answer": LONG}], "long.jsonl")
    processor = tiny_processor()
    assert len(check_data(path, quiet=True, processor=processor).problems) == 1
    assert not check_data(path, quiet=True, processor=processor, max_length=100).problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"image": "a.png"}]', ":1: the file looks like one JSON array, expected one JSON object per line"),
        ('[\n{"image": "a.png"},\n{"image": "b.png"}\n]', ":1: the file looks like one JSON array"),
        ('{"images": [], "annotations": []}', ":1: the file looks like annotations of COCO, expected one JSON object"),
        ('{\n"images": [],\n"annotations": []\n}', ":1: the file looks like annotations of COCO"),
        ('\n{\n"image": "a.png"\n}', ":2: the file looks like one JSON object over several lines"),
        ('{"image": "a.png"}\r{"image": "b.png"}\r', ":1: the lines of the file end with"),
        ("", " is empty, expected one JSON object per line"),
        ("\n \n\t\r\n", " is empty, expected one JSON object per line"),
    ],
)
def test_a_file_of_another_form_is_told_from_json_lines(folder, content, message):
    path = folder / "other.jsonl"
    path.write_bytes(content.encode())
    with pytest.raises(ValueError, match=r"other\.jsonl" + message):
        check_data(path, quiet=True, processor=tiny_processor())


def test_a_file_in_utf_16_is_told_from_json_lines(folder):
    (folder / "wide.jsonl").write_bytes(json.dumps({"image": "a.png"}).encode("utf-16"))
    with pytest.raises(ValueError, match=r"wide\.jsonl:1: the file looks like UTF-16 or UTF-32, expected UTF-8"):
        JsonlSource(folder / "wide.jsonl")


def test_lines_of_a_file_may_end_in_any_common_way(folder):
    lines = [json.dumps({"image": "a.png", "query": "a\u2028b\x0c", "masks": []}, ensure_ascii=False)] * 2
    for end, last in (("\n", ""), ("\r\n", "\r\n"), ("\n", "\n\n")):
        (folder / "ends.jsonl").write_bytes(("\ufeff" + end.join(lines) + last).encode())
        source = JsonlSource(folder / "ends.jsonl")
        assert [source[index]["examples"][0]["query"] for index in range(len(source))] == ["a\u2028b\x0c"] * 2
    with pytest.raises(FileNotFoundError, match="the data file .* is a folder"):
        JsonlSource(folder)
