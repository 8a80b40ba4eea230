"""`python -m uground`: what it prints, what it writes, and how it refuses."""

import importlib
import json
import re
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor

from uground.processing import GroundingResult

command = importlib.import_module("uground.__main__")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def image(tmp_path):
    Image.fromarray(gradient_image(30, 50)).save(tmp_path / "image.png")
    return str(tmp_path / "image.png")


@pytest.fixture
def found(monkeypatch):
    """Stands in for the model: one segment for the first query, nothing for the others."""
    mask = Image.new("L", (50, 30), 0)
    mask.paste(255, (10, 5, 20, 9))
    segment = {"mask": mask, "score": 0.8125, "label": "the cup", "box": [10, 5, 20, 9], "layer": 3}

    def pipe(image, queries, return_similarity=False, **kwargs):
        extra = {"similarity_map": np.eye(3)} if return_similarity else {}
        about = {"size": (50, 30), "last_layer": 4, "image": image}
        hit = GroundingResult("it is [SEG].", [{**segment, **extra}], queries[0], **about)
        return [hit] + [GroundingResult("[REJ]", [], query, absent=[query], **about) for query in queries[1:]]

    monkeypatch.setattr(command, "load_pipeline", lambda *args: pipe)


def test_text_output_and_overlay(found, image, tmp_path, capsys):
    output = str(tmp_path / "overlay.png")
    assert command.main([image, "the red cup", "a tree", "--output", output]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "> the red cup",
        "it is [SEG].",
        "  1  label 'the cup'  score 0.812  box 10,5,20,9  layer 3  area 40 px",
        "> a tree",
        "[REJ]",
        "  no segment",
        f"overlay written to {output}",
    ]
    assert printed.err == ""
    assert Image.open(output).width == 640 * 2 + 8


def test_json_output_can_be_read_back(found, image, capsys):
    assert command.main([image, "the red cup", "a tree", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["width"], printed["height"]) == (50, 30)
    first, second = printed["results"]
    assert second == {"query": "a tree", "answer": "[REJ]", "absent": ["a tree"], "segments": []}
    (segment,) = first["segments"]
    assert (segment["score"], segment["area"], segment["layer"]) == (0.8125, 40, 3)
    mask = coco_mask.decode(segment["mask"])
    assert mask.shape == (30, 50) and mask[5:9, 10:20].all() and mask.sum() == 40


def test_masks_and_coco_are_written(found, image, tmp_path, capsys):
    masks, coco = tmp_path / "masks", tmp_path / "found.json"
    masks.mkdir()
    assert command.main([image, "the red cup", "a tree", "--masks", str(masks), "--coco", str(coco)]) == 0
    assert capsys.readouterr().out.endswith(f"1 mask written to {masks}\nannotations written to {coco}\n")
    assert [file.name for file in masks.iterdir()] == ["query-001-segment-001.png"]
    mask = np.asarray(Image.open(masks / "query-001-segment-001.png"))
    assert mask.shape == (30, 50) and (mask[5:9, 10:20] == 255).all() and (mask > 0).sum() == 40
    read = COCO(coco)
    assert [read.cats[number]["name"] for number in sorted(read.cats)] == ["the red cup", "a tree"]
    assert read.annToMask(read.anns[1]).sum() == 40 and read.imgs[1]["file_name"] == image
    assert sorted(file.name for file in tmp_path.iterdir()) == ["found.json", "image.png", "masks"]


@pytest.mark.parametrize("name", ["overlay.png", "masks", "found.json"])
def test_what_cannot_be_written_leaves_nothing_behind(name, found, image, tmp_path, monkeypatch):
    option = {"overlay.png": "--output", "masks": "--masks", "found.json": "--coco"}[name]
    (tmp_path / "kept").mkdir()
    if name != "masks":
        (tmp_path / "kept" / name).write_text("earlier")

    def fail(self, *args, **kwargs):
        self_path = args[0] if isinstance(self, Image.Image) else self
        Path(self_path).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setattr(Path, "write_text", fail)
    assert command.main([image, "the red cup", option, str(tmp_path / "kept" / name)]) == 2
    left = list((tmp_path / "kept").iterdir())
    assert [file.name for file in left] == ([] if name == "masks" else [name])
    assert all(file.read_text() == "earlier" for file in left)


def test_standard_input_home_folder_seed_and_version(found, image, tmp_path, monkeypatch, capsys):
    content = Path(image).read_bytes()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(content)))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert command.main(["-", "the red cup", "--json", "--output", "~/overlay.png"]) == 0
    assert json.loads(capsys.readouterr().out)["width"] == 50
    assert Image.open(tmp_path / "overlay.png").width == 640 * 2 + 8
    seeds = []
    monkeypatch.setattr(command.transformers, "set_seed", seeds.append)
    assert command.main(["~/image.png", "the red cup", "--seed", "7"]) == 0
    assert seeds == [7]
    for given, status in ((["--version"], 0), (["image", "query", "--seed", "-1"], 2)):
        with pytest.raises(SystemExit) as stop:
            command.main(given)
        assert stop.value.code == status
    printed = capsys.readouterr()
    assert re.search(r"^uground \d+\.\d+", printed.out, re.MULTILINE) and "a seed must be a whole" in printed.err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(b"no picture")))
    assert command.main(["-", "the red cup"]) == 2
    assert "the image on standard input cannot be read" in capsys.readouterr().err


def test_a_real_checkpoint_quietly(checkpoint, image):
    run = subprocess.run(
        [sys.executable, "-m", "uground", image, "the red cup", "--model", checkpoint, "--max-new-tokens", "3"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("> the red cup\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png", "a"], "the image 'nowhere.png' does not exist"),
        (["IMAGE", " "], "a query must not be empty"),
        (["IMAGE", "a", "--model", "EMPTY"], "is no checkpoint: it holds no config.json"),
        (["IMAGE", "a", "--model", "/no/where"], "the model '/no/where' is neither a folder nor a Hub id"),
        (["IMAGE", "a", "--model", "OTHER"], "must be of type 'uground', got 'llava'"),
        (["IMAGE", "a", "--device", "cuda:99"], "the device 'cuda:99' cannot be used"),
        (["IMAGE", "a", "--layer-selection", "best"], "layer_selection must be one of .* got 'best'"),
        (["IMAGE", "a", "--layer-selection", "17"], "layer_selection must lie in 0..4 for this model, got 17"),
        (["IMAGE", "a", "--threshold", "7"], "--threshold must lie in 0..1, got 7"),
        (["IMAGE", "a", "--output", "picture.xyz"], "--output must end like a picture"),
        (["IMAGE", "a", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["-", "a"], "standard input must be a picture, got nothing"),
        (["~/nowhere.png", "a"], "the image '/.*nowhere.png' does not exist"),
        (["IMAGE", "a", "--output", "FOLDER.png"], "--output must name a file, got the folder "),
        (["IMAGE", "a", "--coco", "FULL"], "--coco must name a file, got the folder "),
        (["IMAGE", "a", "--masks", "FULL"], "--masks must name a new or an empty folder, got "),
        (["IMAGE", "a", "--masks", "IMAGE"], "--masks must name a new or an empty folder, got "),
        (["IMAGE", "a", "--masks", "/no/where/masks"], "the folder of --masks '/no/where/masks' does not exist"),
        (["IMAGE", "a", "--masks", "new", "--coco", "new"], "--masks and --coco must name different places"),
        (["IMAGE", "a", "--output", "/no/where/a.png"], "the folder of --output '/no/where/a.png' does not exist"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments, message, checkpoint, image, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=BytesIO(b"")))
    for name in ("empty", "folder.png", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "of").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    places = {"IMAGE": image, "EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other")}
    places |= {"FULL": str(tmp_path / "full"), "FOLDER.png": str(tmp_path / "folder.png")}
    arguments = [places.get(argument, argument) for argument in arguments]
    arguments += [] if "--model" in arguments else ["--model", checkpoint]
    assert command.main(arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("uground: error: ") and printed.err.count("\n") == 1
    assert re.search(message, printed.err)


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for name in ("IMAGE", "QUERY", "--model", "--output", "--json", "--layer-selection", "--device", "--threshold"):
        assert name in printed
