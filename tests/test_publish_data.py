"""Prepared datasets and Scenes on the Hub: card, one commit, pictures inside."""

import io
import json
import os
import subprocess
import sys

import pyarrow.parquet as parquet
import pytest
import torch
from huggingface_hub import DatasetCard
from loopback_hub import LoopbackHub, connected
from PIL import ExifTags, Image
from safetensors.torch import load_file
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor

from uground.hub.publish_data import main
from uground.training.data.prepared import write_prepared
from uground.training.scenes import scenes

DATA = "someone/data"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path):
        yield server


@pytest.fixture
def prepared(tmp_path):
    """A prepared folder whose pictures lie beside it."""
    folder = tmp_path / "prepared"
    for split, count in (("train", 3), ("validation", 2)):
        examples = []
        for number, example in enumerate(scenes(split, count, seed=0)):
            path = tmp_path / f"{split}-{number}.png"
            example["image"].save(path)
            examples.append({**example, "image": str(path), "subset": None})
        write_prepared(examples, folder, split)
    return folder


def read_published(hub, split: str, tmp_path) -> list[dict]:
    file = hub.repository(DATA, "dataset").head.files[f"data/{split}-00000-of-00001.parquet"]
    (tmp_path / "published.parquet").write_bytes(file.data)
    return parquet.read_table(tmp_path / "published.parquet").to_pylist()


def test_prepared_folder_goes_in_one_commit_with_its_pictures(prepared, tmp_path, hub):
    assert main([str(prepared), "--repo-id", DATA, "--license", "cc-by-4.0"]) == 0
    repository = hub.repository(DATA, "dataset")
    assert len(repository.commits) == 2
    rows = read_published(hub, "train", tmp_path)
    expected = list(scenes("train", 3, seed=0))
    assert [row["query"] for row in rows] == [example["query"] for example in expected]
    assert [row["masks"] for row in rows] == [example["masks"] for example in expected]
    assert rows[0]["image"]["bytes"] == (tmp_path / "train-0.png").read_bytes()
    assert rows[0]["image"]["path"] == "train-0.png", "no path of this machine"

    sent = len(hub.uploads())
    assert main([str(prepared), "--repo-id", DATA, "--license", "cc-by-4.0"]) == 0
    assert len(hub.uploads()) == sent
    assert len(repository.commits) == 2


def test_card_counts_the_examples(prepared, hub):
    assert main([str(prepared), "--repo-id", DATA, "--license", "cc-by-4.0"]) == 0
    card = DatasetCard(hub.repository(DATA, "dataset").head.files["README.md"].data.decode())
    assert card.data.license == "cc-by-4.0"
    assert [entry["split"] for entry in card.data.configs[0]["data_files"]] == ["train", "validation"]
    rows = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in card.text.splitlines() if "|" in line}
    assert rows["train"] == "3"
    assert rows["validation"] == "2"


def test_scenes(hub, tmp_path):
    assert main(["scenes", "--repo-id", DATA, "--count", "2", "--seed", "5"]) == 0
    rows = read_published(hub, "test", tmp_path)
    assert [row["query"] for row in rows] == [example["query"] for example in scenes("test", 2, seed=5)]
    card = hub.repository(DATA, "dataset").head.files["README.md"].data.decode()
    assert "Seed 5." in card
    assert "license: apache-2.0" in card


COMMANDS = """
import contextlib, io, json, sys
from uground.training import evaluate, finetune

model, output = sys.argv[1:]
train = ["--model", model, "--output_dir", output + "/run", "--max_steps", "2", "--report_to", "none"]
train += ["--per_device_train_batch_size", "2", "--bf16", "false", "--save_strategy", "no"]
measure = ["--model", model, "--dataset", "someone/data", "--max-new-tokens", "2"]
said = []
for command, arguments in (
    (finetune, [*train, "--train_data", "someone/data@main:validation"]),
    (evaluate, [*measure, "--split", "validation", "--output", output + "/results"]),
    (finetune, [*train, "--train_data", "someone/nothing"]),
    (evaluate, [*measure, "--split", "testA"]),
):
    with contextlib.redirect_stderr(io.StringIO()) as printed:
        status = command.main(arguments)
    said.append([status, printed.getvalue().splitlines()[-1:] if status else printed.getvalue()])
json.dump(said, open(output + "/said.json", "w"))
"""


def test_a_dataset_of_the_hub_is_trained_and_measured_on_by_its_id(prepared, tmp_path, hub):
    assert main([str(prepared), "--repo-id", DATA]) == 0
    tiny_model(3).save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    environment = {**os.environ, **hub.environment(str(tmp_path / "home")), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMANDS, str(tmp_path / "model"), str(tmp_path)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    trained, measured, nothing, no_split = json.loads((tmp_path / "said.json").read_text())
    assert (trained[0], measured[0]) == (0, 0), (trained, measured)
    sentence = "finetune: error: there is neither a folder nor a dataset on the Hub called 'someone/nothing'"
    assert nothing == [2, [sentence]]
    assert no_split[0] == 2 and no_split[1][0].startswith("evaluate: error: ") and "testA" in no_split[1][0]
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "run"))
    assert any(not torch.equal(after[name], value) for name, value in before.items() if name in after)
    assert json.loads((tmp_path / "results" / "results.json").read_text())["count"] == 2


def test_dry_run_uses_no_network(prepared, monkeypatch, tmp_path, capsys):
    with LoopbackHub() as server, connected(server, monkeypatch, tmp_path, token=None):
        assert main([str(prepared), "--repo-id", DATA, "--dry-run"]) == 0
        assert server.requests == []
    printed = capsys.readouterr().out
    assert "data/train-00000-of-00001.parquet" in printed
    assert "license_name: see-the-original-data" in printed


def test_a_file_of_ones_own(hub, tmp_path, capsys):
    picture = Image.fromarray(gradient_image(30, 50))
    picture.save(tmp_path / "upright.jpg")
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    lines = [
        {"image": "upright.jpg", "query": "the red cup", "masks": [[[5, 5, 30, 5, 30, 20]]], "phrases": ["the cup"]},
        {"image": "turned.jpg", "query": "the boat", "masks": [[[5, 5, 20, 5, 20, 40]]]},
    ]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    assert main([str(file), "--split", "validation", "--repo-id", DATA, "--license", "cc-by-4.0"]) == 0
    upright, second = read_published(hub, "validation", tmp_path)
    assert upright["image"] == {"bytes": (tmp_path / "upright.jpg").read_bytes(), "path": "upright.jpg"}
    assert (upright["query"], upright["answer"], upright["phrases"]) == ("the red cup", "It is [SEG].", ["the cup"])
    # The mask is of the turned picture, so it is what is published.
    assert second["masks"][0]["size"] == [50, 30]
    assert Image.open(io.BytesIO(second["image"]["bytes"])).size == (30, 50)
    file.write_text(
        "\n".join(json.dumps({**line, "split": name}) for line, name in zip(lines, ("train", "val"), strict=True))
    )
    assert main([str(file), "--repo-id", DATA, "--license", "cc-by-4.0"]) == 0
    assert [row["query"] for name in ("train", "val") for row in read_published(hub, name, tmp_path)] == [
        "the red cup",
        "the boat",
    ]
    assert main([str(file), "--split", "test", "--repo-id", DATA, "--dry-run"]) == 2
    assert "--split is for files whose lines name none, those of" in capsys.readouterr().err
    assert main([f"{file}:val", "--repo-id", DATA, "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert "data/val-00000-of-00001.parquet" in listed and "data/train" not in listed
    turns = [{"query": "a", "masks": []}, {"query": "b", "masks": []}]
    file.write_text(json.dumps({"image": "upright.jpg", "turns": turns}))
    assert main([str(file), "--repo-id", DATA, "--dry-run"]) == 2
    assert f"{file}:1: several turns cannot be stored" in capsys.readouterr().err
    assert main([str(file), "--repo-id", DATA, "--dry-run", "--split", "a/b"]) == 2
    assert "--split must be a word of letters" in capsys.readouterr().err


def lose_picture(folder):
    (folder.parent / "train-1.png").unlink()


def lose_data(folder):
    (folder / "data").rename(folder / "elsewhere")


def lose_mask(folder):
    example = next(example for example in scenes("test", 50, seed=0) if example["masks"])
    write_prepared([{**example, "masks": [], "subset": None}], folder, "test")


def lose_column(folder):
    path = next((folder / "data").glob("train-*.parquet"))
    parquet.write_table(parquet.read_table(path).drop_columns(["answer"]), path)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lose_picture, "the picture of example"),
        (lose_data, "holds no prepared dataset"),
        (lose_mask, "must have one mask per [SEG], got 0 for"),
        (lose_column, "lacks the columns answer"),
    ],
)
def test_refused_before_the_first_byte(spoil, expected, prepared, hub, capsys):
    spoil(prepared)
    assert main([str(prepared), "--repo-id", DATA]) != 0
    assert expected in capsys.readouterr().err
    assert hub.requests == []
