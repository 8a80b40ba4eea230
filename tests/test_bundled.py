"""The bundled checkpoint does the main job, carries the code of this package, and runs where the package is not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModel, AutoProcessor, pipeline

import uground
from uground.__main__ import main
from uground.hub.weights.code_files import code_files
from uground.training.evaluation.counts import intersection_union
from uground.training.scenes import example_scene

ROOT = Path(__file__).resolve().parents[1]
BLOCKED = """
import json, sys
sys.modules["uground"] = None
from transformers import AutoConfig, AutoModel, AutoProcessor, pipeline
path, image = sys.argv[1:]
AutoConfig.from_pretrained(path, trust_remote_code=True)
model = AutoModel.from_pretrained(path, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
found = processor.post_process_instance_segmentation(model.segment(**processor(image, "the small red boat")))[0]
pipe = pipeline("referring-segmentation", model=path, trust_remote_code=True)
result = pipe(image, "the small red boat")
print(json.dumps([found["boxes"].tolist(), [segment["box"] for segment in result["segments"]]]))
"""


@pytest.fixture(scope="module")
def pipe():
    return pipeline("referring-segmentation", model=uground.tiny_checkpoint(), trust_remote_code=True)


def test_the_example_image_is_the_drawn_scene():
    drawn = np.asarray(example_scene().image)
    with uground.processing.image_reading.Image.open(ROOT / "examples" / "scene.png") as image:
        assert np.array_equal(np.asarray(image.convert("RGB")), drawn)


def test_it_finds_the_right_object(pipe):
    scene = example_scene()
    target = next(
        thing for thing in scene.objects if (thing.colour, thing.kind, thing.size) == ("red", "boat", "small")
    )
    result = pipe(scene.image, "the small red boat")
    assert len(result["segments"]) == 1
    segment = result["segments"][0]
    intersection, union = intersection_union(np.asarray(segment["mask"]) > 0, target.mask)
    assert intersection / union > 0.6
    assert 0.5 < segment["score"] <= 1.0


def test_it_says_no_to_what_is_absent(pipe):
    for result in pipe(example_scene().image, ["the yellow car", "the small purple fish"]):
        assert result["segments"] == []
        assert "[REJ]" in result["answer"]


def test_several_things_are_told_apart(pipe):
    scene = example_scene()
    result = pipe(scene.image, "the tree and the fish")
    assert [segment["label"] for segment in result["segments"]] == ["the tree", "the fish"]
    for segment in result["segments"]:
        target = next(thing for thing in scene.objects if thing.kind == segment["label"].removeprefix("the "))
        intersection, union = intersection_union(np.asarray(segment["mask"]) > 0, target.mask)
        assert intersection / union > 0.6


def test_the_auto_classes_give_the_installed_ones():
    path = uground.tiny_checkpoint()
    assert type(AutoModel.from_pretrained(path, trust_remote_code=True)) is uground.UGroundForReferringSegmentation
    assert type(AutoProcessor.from_pretrained(path, trust_remote_code=True)) is uground.UGroundProcessor


def test_it_carries_the_code_of_this_package():
    """Mend with `python -m uground.hub.closure hub/checkpoints/uground-tiny`."""
    for name, source in code_files().items():
        assert (Path(uground.tiny_checkpoint()) / name).read_bytes() == source.read_bytes(), name


def test_it_runs_where_the_package_is_not(tmp_path):
    command = [sys.executable, "-c", BLOCKED, uground.tiny_checkpoint(), str(ROOT / "examples" / "scene.png")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    direct, piped = json.loads(done.stdout.splitlines()[-1])
    assert len(direct) == len(piped) == 1
    assert direct[0] == piped[0]


def test_importing_is_quiet_and_brings_no_training_library():
    program = (
        "import sys, uground\n"
        "heavy = {'trl', 'peft', 'datasets', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""


def test_the_checkpoint_is_small_and_its_card_tells_its_figures():
    folder = Path(uground.tiny_checkpoint())
    assert (folder / "model.safetensors").stat().st_size <= 20e6
    figures = json.loads((folder / "results.json").read_text())["figures"]["argmax"]["overall"]
    card = (folder / "README.md").read_text()
    assert f"{figures['ciou']:.3f}" in card or f"{100 * figures['ciou']:.1f}" in card
    assert "OSU-NLP-Group/UGround" in card


def test_the_command_of_the_readme_answers(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    queries = ["the tree and whatever can swim", "the yellow car"]
    assert main(["examples/scene.png", *queries, "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert [len(result["segments"]) for result in results] == [2, 0]
