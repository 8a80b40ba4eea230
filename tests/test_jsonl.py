"""A user's JSONL: what a line may say, what is wrong with a bad one, mixtures of sources, and the check command."""

import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_processor import gradient_image
from tiny_training import rle

from uground.training.check_data import check_data, contact_sheet, main
from uground.training.data.jsonl import JsonlSource, read_line
from uground.training.data.mixture import Mixture

SQUARE = [2, 2, 10, 2, 10, 10, 2, 10]


@pytest.fixture
def folder(tmp_path):
    Image.fromarray(gradient_image(20, 30)).save(tmp_path / "a.png")
    mask = np.zeros((20, 30), np.uint8)
    mask[5:9, 20:30] = 7
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    return tmp_path


def read(folder, **record) -> dict:
    return read_line(json.dumps({"image": "a.png", "query": "the cup", **record}), folder, "data.jsonl:3")


def test_masks_come_as_polygons_rle_or_files(folder):
    area = np.zeros((20, 30), bool)
    area[15:, :3] = True
    example = read(folder, masks=[[SQUARE], [SQUARE, [20, 15, 24, 15, 24, 19]], rle(area), "mask.png"])
    decoded = [coco_mask.decode(mask).astype(bool) for mask in example["masks"]]
    assert decoded[0][2:10, 2:10].all() and decoded[0].sum() == 64
    assert decoded[1].sum() > 64 and (decoded[2] == area).all()
    assert decoded[3][5:9, 20:].all() and decoded[3].sum() == 40
    assert example["answer"] == "They are [SEG], [SEG], [SEG] and [SEG]."
    assert example["image"].size == (30, 20) and example["attribute"] == "multi_rs"


def test_answers_are_made_of_phrases(folder):
    two = read(folder, masks=[[SQUARE], None], phrases=["the cup", "the spoon"])
    assert two["answer"] == "the cup is [SEG] and the spoon is [REJ]."
    assert two["phrases"] == ["the cup"] and len(two["masks"]) == 1
    assert read(folder, masks=[[SQUARE]])["answer"] == "It is [SEG]."
    nothing = read(folder, masks=[])
    assert nothing["answer"] == "It is [REJ]." and nothing["attribute"] == "fp_res"
    said = read(folder, answer="A red cup.", id="x")
    assert (said["answer"], said["masks"], said["attribute"], said["id"]) == ("A red cup.", [], "vqa", "x")


def test_turns_keep_their_masks_in_order(folder):
    second = {"query": "and?", "masks": ["mask.png"], "boxes": [[20, 5, 30, 9]]}
    turns = [{"query": "the cup", "masks": [[SQUARE]]}, second]
    line = json.dumps({"image": "a.png", "turns": turns, "ignore": "mask.png"})
    example = read_line(line, folder, "data.jsonl:3")
    assert example["query"] == "and?" and example["history"] == [{"query": "the cup", "answer": "It is [SEG]."}]
    assert [int(coco_mask.area(mask)) for mask in example["masks"]] == [64, 40]
    assert int(coco_mask.area(example["ignore"])) == 40


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"masks": [[[2, 2, 10, 2]]]}, "mask 1: a polygon must have at least 3 points of x and y, got 4 numbers"),
        ({"masks": [[[2, 2, 40, 2, 40, 9]]]}, r"mask 1: the polygon's point \(40, 2\) lies outside of the image"),
        ({"masks": [SQUARE]}, "mask 1: a polygon must be a flat list of numbers"),
        ({"masks": [rle(np.ones((5, 5), bool))]}, r"mask 1: its mask has size \[5, 5\], expected that of the image"),
        ({"masks": ["no.png"]}, "mask 1: the mask file .*no.png does not exist"),
        ({"masks": ["broken.png"]}, "mask 1: the mask file .*broken.png cannot be read"),
        ({"masks": [rle(np.zeros((20, 30), bool))]}, "mask 1 covers no pixel; write null for an object that is not"),
        ({"masks": [[SQUARE]], "answer": "Here."}, r"holds 0 \[SEG\], expected one for each of its 1 masks"),
        ({"masks": [[SQUARE]], "phrases": ["a", "b"]}, "2 phrases name 1 masks, expected one phrase per mask"),
        ({"masks": [[SQUARE]], "boxes": [[20, 2, 30, 10]]}, "box 1 .* does not lie around its mask"),
        ({"masks": [[SQUARE]], "boxes": [[10, 2, 2, 10]]}, "box 1 must be .x0, y0, x1, y1., x0 < x1"),
        ({}, "masks or an answer are needed, got neither"),
        ({"query": " ", "masks": []}, "query must be a text that is not empty, got ' '"),
        ({"masks": [], "colour": "red"}, r"unknown keys \['colour'\], expected some of"),
        ({"masks": [], "image": "no.png"}, "no.png"),
        ({"masks": [], "image": "broken.png"}, "broken.png"),
        ({"masks": [], "image": 3}, "image must be the path of a picture, got 3"),
    ],
)
def test_a_bad_line_says_where_and_why(folder, record, message):
    with pytest.raises((ValueError, OSError), match="^data.jsonl:3.*" + message):
        read(folder, **record)


def write_lines(folder, *records) -> str:
    path = folder / "data.jsonl"
    lines = [record if isinstance(record, str) else json.dumps({"image": "a.png", **record}) for record in records]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_the_check_names_every_bad_line(folder, capsys):
    good = {"query": "the cup", "masks": [[SQUARE]]}
    path = write_lines(folder, good, "{", "", {"query": "x", "masks": []}, {**good, "image": "broken.png"})
    assert main([path, "--sheet", str(folder / "sheet.png")]) == 1
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[1] for line in printed[:2]] == ["2", "5"]
    assert printed[2] == "2 of 4 lines are good (1 fp_res, 1 res), with 1 masks"
    assert printed[3] == f"2 of them are drawn in {folder / 'sheet.png'}"
    assert Image.open(folder / "sheet.png").size == contact_sheet(check_data(path, quiet=True).shown).size
    report = check_data(write_lines(folder, {**good, "id": "a"}, {**good, "id": "a"}), quiet=True)
    assert report.problems == [f"{path}:2: the id 'a' stands in an earlier line too"]
    assert contact_sheet(report.shown).size[0] < Image.open(folder / "sheet.png").size[0]


def test_a_file_without_lines_or_no_file_is_refused(folder):
    with pytest.raises(FileNotFoundError, match="nowhere.jsonl does not exist"):
        JsonlSource("nowhere.jsonl")
    with pytest.raises(ValueError, match="is empty, expected one JSON object per line"):
        JsonlSource(write_lines(folder, ""))


def test_the_record_of_a_file_changes_with_its_lines(folder):
    first = JsonlSource(write_lines(folder, {"query": "a", "masks": []})).record()
    assert JsonlSource(write_lines(folder, {"query": "b", "masks": []})).record() != first


def test_a_broken_sample_stops_or_is_skipped_and_counted(folder):
    good = {"query": "the cup", "masks": [[SQUARE]]}
    path = write_lines(folder, good, {**good, "image": "broken.png"}, good)
    with pytest.raises(OSError, match="broken.png"):
        Mixture([JsonlSource(path)])({"index": [0, 1, 2]})
    mixture = Mixture([JsonlSource(path)], on_bad_sample="skip")
    found = mixture({"index": [0, 1, 2]})
    assert len(found["image"]) == 3 and mixture.skipped == 1
    hopeless = Mixture([JsonlSource(write_lines(folder, {**good, "image": "no.png"}))], on_bad_sample="skip")
    with pytest.raises(ValueError, match="20 samples in a row are bad, the last one because: .*no.png"):
        hopeless[0]


class Numbers:
    """A source of items that say who they are."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"image": gradient_image(8, 8), "examples": [{"id": f"{self.name}{index}"}]}


def ids(mixture: Mixture, epoch: int) -> list[str]:
    mixture.set_epoch(epoch)
    return [mixture[place]["examples"][0]["id"] for place in range(len(mixture))]


def test_sources_are_mixed_by_weight_and_drawn_anew():
    mixture = Mixture([Numbers("a", 10), Numbers("b", 3)], [1, 3], epoch_size=8, seed=5)
    first, second = ids(mixture, 0), ids(mixture, 1)
    for epoch in (first, second):
        assert sum(name.startswith("a") for name in epoch) == 2
    assert first != second and ids(mixture, 0) == first
    seen = [name for epoch in range(5) for name in ids(mixture, epoch) if name.startswith("a")]
    assert len(set(seen)) == 10, "a source goes on where it stopped"
    assert {name for name in first if name.startswith("b")} == {"b0", "b1", "b2"}
    whole = Mixture([Numbers("a", 10), Numbers("b", 3)])
    assert len(set(ids(whole, 0))) == len(whole) == 13
    for arguments, message in (
        ({"weights": [1]}, "expected 2, got 1"),
        ({"weights": [0, 0]}, "not all 0"),
        ({"epoch_size": 0}, "at least 1 item"),
        ({"on_bad_sample": "ignore"}, "on_bad_sample must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture([Numbers("a", 1), Numbers("b", 1)], **arguments)
