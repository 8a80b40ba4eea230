"""No command runs code that a checkpoint, or a part to build one of, brings along."""

import builtins
import importlib
import json
import shutil
from pathlib import Path

import pytest
from official_case import TINY
from PIL import Image
from test_assemble import write_llava, write_sam
from test_merge_lora import write_adapter
from tiny import tiny_config, tiny_model
from tiny_processor import gradient_image, tiny_processor
from transformers import CLIPVisionModel

from uground.apps import annotate
from uground.hub import assemble, card, closure, convert_official, merge_lora
from uground.hub.publish import publishing as publish
from uground.training import evaluate, finetune
from uground.training.scenes import tiny_model as tiny_model_command

command = importlib.import_module("uground.__main__")
AUTO_CLASSES = (
    "AutoConfig",
    "AutoModel",
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoProcessor",
    "AutoImageProcessor",
    "AutoTokenizer",
)
MODULES = ("configuration_uground", "modeling_uground", "processing_uground", "pipeline_uground", "foreign")


def plant(folder: Path, mark: Path) -> Path:
    """Let every file of a folder that can name code name code that leaves a mark."""
    source = f"open({str(mark)!r}, 'a').write(__name__)\nclass Foreign: pass\n"
    for module in MODULES:
        (folder / f"{module}.py").write_text(source)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(source + "def generate(*a, **k): pass\n")
    named = dict.fromkeys(AUTO_CLASSES, "foreign.Foreign")
    named["AutoTokenizer"] = ["foreign.Foreign", "foreign.Foreign"]
    for name in ("config.json", "processor_config.json", "tokenizer_config.json", "generation_config.json"):
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            for part in _objects(content):
                part["auto_map"] = named
            (folder / name).write_text(json.dumps(content))
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": named}))
    return folder


def _objects(content: dict) -> list[dict]:
    """An object and those in it that are configurations of something."""
    inner = [
        value for name, value in content.items() if isinstance(value, dict) and name.endswith(("config", "processor"))
    ]
    return [content, *(deeper for value in inner for deeper in _objects(value))]


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folders of everything that a command opens, with foreign code in all of them, and where it leaves its mark."""
    folder = tmp_path_factory.mktemp("planted")
    mark = folder / "mark"
    model = tiny_model()
    model.save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    base = model.from_pretrained(folder / "model")
    write_adapter(folder / "adapter", base)
    tiny_processor().save_pretrained(folder / "adapter")
    write_llava(folder / "llava")
    write_sam(folder / "sam")
    CLIPVisionModel(tiny_config().lmm_config.vision_config).save_pretrained(folder / "vision")
    for name in ("official", "clip"):
        shutil.copytree(TINY / name, folder / name)
    for name in ("model", "adapter", "llava", "sam", "vision", "official", "clip"):
        plant(folder / name, mark)
    Image.fromarray(gradient_image(30, 50)).save(folder / "image.png")
    (folder / "queries.txt").write_text("the red cup\n")
    line = {"image": "image.png", "query": "the red cup", "masks": [[[5, 5, 30, 5, 30, 20]]]}
    (folder / "mine.jsonl").write_text(json.dumps(line) + "\n")
    return folder, mark


def training(folder: Path, out: Path, *flags) -> list:
    data = [
        "--train_data",
        folder / "mine.jsonl",
        "--output_dir",
        out,
        "--save_steps",
        "1",
        "--save_strategy",
        "steps",
    ]
    plain = ["--bf16", "false", "--use_cpu", "true", "--report_to", "none", "--gradient_checkpointing", "false"]
    sizes = ["--loss_size", "16", "--gaussian_kernel_size", "3", "--per_device_train_batch_size", "1"]
    return [*data, *plain, *sizes, "--lr_scheduler_type", "constant", *flags]


def calls(folder: Path, out: Path) -> list[tuple]:
    """Every command that opens a checkpoint or parts of one: its `main` and its arguments."""
    model, image = folder / "model", folder / "image.png"
    few = ["--max-new-tokens", "2"]
    measured = ["--dataset", folder / "mine.jsonl", *few]
    return [
        (command.main, [image, "the cup", "--model", model, *few]),
        (command.main, [image, "the cup", "--model", folder / "adapter", *few]),
        (
            annotate.main,
            ["--input", image, "--queries", folder / "queries.txt", "--output", out / "a", "--model", model, *few],
        ),
        (evaluate.main, ["--model", model, *measured, "--output", out / "e"]),
        (evaluate.main, ["--model", folder / "adapter", *measured]),
        (finetune.main, training(folder, out / "f", "--model", model, "--max_steps", "1")),
        # once more, from the checkpoint of the first, in which foreign code lies too
        (finetune.main, training(folder, out / "f", "--model", model, "--max_steps", "2")),
        (
            finetune.main,
            training(folder, out / "l", "--model", model, "--max_steps", "1", "--adapter", folder / "adapter"),
        ),
        (merge_lora.main, [folder / "adapter", "--base", model, "--output", out / "m"]),
        (publish.main, [model, "--repo-id", "someone/cups", "--dry-run"]),
        (card.main, [model]),
        (assemble.main, ["--lmm", folder / "llava", "--sam", folder / "sam", "--output", out / "s"]),
        (convert_official.main, [folder / "official", "--vision-tower", folder / "clip", "--output", out / "c"]),
        # last, as it puts our code in place of the foreign
        (closure.main, [model, "--replace-card"]),
    ]


def test_no_command_runs_code_of_a_checkpoint(planted, tmp_path, monkeypatch, capsys):
    folder, mark = planted
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a command asked whether it may run foreign code"))
    for main, arguments in calls(folder, tmp_path):
        if (tmp_path / "f" / "checkpoint-1").is_dir() and not (
            tmp_path / "f" / "checkpoint-1" / "foreign.py"
        ).exists():
            _plant_in_training(tmp_path / "f" / "checkpoint-1", mark)
        status = main(list(map(str, arguments)))
        assert not mark.exists(), f"{main.__module__} {arguments} ran code of {mark.read_text()}"
        assert status == 0, (main.__module__, arguments, capsys.readouterr().err)


def _plant_in_training(checkpoint: Path, mark: Path) -> None:
    """Foreign code in a checkpoint of a run, which stays complete by the sizes of its files."""
    plant(checkpoint, mark)
    complete = checkpoint / "complete.json"
    sizes = json.loads(complete.read_text())
    complete.write_text(json.dumps({name: (checkpoint / name).stat().st_size for name in sizes}))


def test_parts_of_the_bundled_checkpoint_are_read_by_their_classes(planted, tmp_path, monkeypatch):
    folder, mark = planted
    arguments = ["--sam", str(folder / "sam"), "--vision", str(folder / "vision"), "--output", str(tmp_path / "t")]

    # What comes behind opening them takes half a minute.
    def opened():
        raise KeyError("both parts were opened")

    monkeypatch.setattr(tiny_model_command, "train_tokenizer", opened)
    with pytest.raises(KeyError, match="both parts were opened"):
        tiny_model_command.main(arguments)
    assert not mark.exists()


@pytest.mark.parametrize(
    "main", [command.main, evaluate.main, annotate.main, finetune.main], ids=lambda main: main.__module__
)
def test_a_tokenizer_that_needs_its_own_code_is_refused(main, tmp_path, monkeypatch, capsys):
    mark, folder = tmp_path / "mark", tmp_path / "model"
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a command asked whether it may run foreign code"))
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    plant(folder, mark)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "ForeignTokenizer"}))
    Image.fromarray(gradient_image(30, 50)).save(tmp_path / "image.png")
    (tmp_path / "queries.txt").write_text("the red cup\n")
    arguments = {
        command.main: [tmp_path / "image.png", "the cup"],
        annotate.main: [
            "--input",
            tmp_path / "image.png",
            "--queries",
            tmp_path / "queries.txt",
            "--output",
            tmp_path / "o",
        ],
        evaluate.main: ["--count", "1"],
        finetune.main: ["--output_dir", tmp_path / "o", "--bf16", "false", "--use_cpu", "true"],
    }[main]
    assert main(list(map(str, [*arguments, "--model", folder]))) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith("tokenizer_config.json asks for code of its own (auto_map), which is not run here")
    assert not mark.exists()
