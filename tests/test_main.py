"""`python -m uground`: what it prints, what it writes, and how it refuses."""

import importlib
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor

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
        hit = {"answer": "it is [SEG].", "segments": [{**segment, **extra}]}
        return [hit] + [{"answer": "[REJ]", "segments": []}] * (len(queries) - 1)

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
    assert second == {"query": "a tree", "answer": "[REJ]", "segments": []}
    (segment,) = first["segments"]
    assert (segment["score"], segment["area"], segment["layer"]) == (0.8125, 40, 3)
    mask = coco_mask.decode(segment["mask"])
    assert mask.shape == (30, 50) and mask[5:9, 10:20].all() and mask.sum() == 40


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
        (["IMAGE", "a", "--output", "/no/where/a.png"], "the folder of --output '/no/where/a.png' does not exist"),
    ],
)
def test_refusals_are_one_line_and_exit_code_2(arguments, message, checkpoint, image, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llava"}')
    places = {"IMAGE": image, "EMPTY": str(tmp_path / "empty"), "OTHER": str(tmp_path / "other")}
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
