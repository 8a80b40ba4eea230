"""Every recipe is read and runs two steps on a tiny stand-in; so does the command, from a user's own file."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor
from transformers import TrainerState
from trl import TrlParser

from uground.hub.publish.card import build_card
from uground.training.finetune import FinetuneArguments, finetune, main
from uground.training.objectives.losses import map_dice_loss, positive_weight
from uground.training.readable_log import ReadableLog, log_line
from uground.training.scenes.pretrain import main as pretrain
from uground.training.trainer import UGroundTrainingConfig

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
ACCELERATE = sorted((Path(__file__).parents[1] / "recipes" / "accelerate").glob("*.yaml"))
# What a stand-in on the CPU cannot follow.
STAND_IN = {
    "max_steps": "2",
    "per_device_train_batch_size": "2",
    "gradient_accumulation_steps": "1",
    "use_cpu": "true",
    "dataloader_num_workers": "0",
    "dataloader_pin_memory": "false",
    "eval_scene_count": "0",
    "eval_strategy": "no",
    "save_strategy": "no",
    "max_length": "200",
    "disable_tqdm": "true",
    "report_to": "none",
    "logging_steps": "1",
    "warmup_steps": "0",
}


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A tiny checkpoint and a JSONL of a user's own images."""
    folder = tmp_path_factory.mktemp("stand-in")
    tiny_model().save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    lines = []
    for number in range(6):
        Image.fromarray(np.roll(gradient_image(40, 48), 5 * number, 1)).save(folder / f"{number}.png")
        square = [2 + number, 2, 20, 2, 20, 30, 2 + number, 30]
        lines.append({"image": f"{number}.png", "query": "the red cup", "masks": [[square]] if number % 3 else []})
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def command(stand_in, output, recipe: Path | None = None, **settings) -> list[str]:
    """Arguments of the command for a stand-in run."""
    chosen = {
        "model": stand_in / "model",
        "train_data": stand_in / "mine.jsonl",
        "output_dir": output,
        **STAND_IN,
        **settings,
    }
    if recipe is not None and "dataloader_prefetch_factor" in recipe.read_text():
        chosen["dataloader_num_workers"] = "1"
    arguments = [] if recipe is None else ["--config", str(recipe)]
    if recipe is None:
        chosen["bf16"] = chosen.get("bf16", "false")
    return arguments + [part for name, value in chosen.items() for part in (f"--{name}", str(value))]


def parse(arguments: list[str]):
    return TrlParser((FinetuneArguments, UGroundTrainingConfig)).parse_args_and_config(arguments)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_on_a_stand_in(stand_in, tmp_path, recipe):
    arguments, config = parse(command(stand_in, tmp_path, recipe))
    trainer = finetune(arguments, config)
    assert trainer.state.global_step == 2
    assert {"loss/text", "loss/mask_dice"} <= set(trainer.state.log_history[0]) | set(trainer.state.log_history[1])
    saved = "adapter_model.safetensors" if arguments.lora_rank else "model.safetensors"
    assert (tmp_path / saved).is_file() and (tmp_path / "processor_config.json").is_file()


def test_read_is_trained_as_official(tmp_path):
    """A READ without [REJ]: adapter, projection and mask decoder move, the prompt encoder stays, no map is judged."""
    (recipe,) = (path for path in RECIPES if path.stem == "read-7b-lora")
    settings = {"image_frame": "centre_crop", "prompts": ("embedding", "points"), "layer_policy": False}
    settings |= {"layer_selection": "last", "reject_token_id": None, "num_points": 5, "similarity_scaling": "minmax"}
    tiny_model(**settings).save_pretrained(tmp_path / "model")
    tiny_processor(frame="centre_crop").save_pretrained(tmp_path / "model")
    Image.fromarray(gradient_image(40, 60)).save(tmp_path / "one.png")
    line = {"image": "one.png", "query": "the red cup", "masks": [[[22, 2, 40, 2, 40, 30, 22, 30]]]}
    (tmp_path / "mine.jsonl").write_text("\n".join([json.dumps(line)] * 4))
    arguments, config = parse(
        command(tmp_path, tmp_path / "out", recipe, model=tmp_path / "model", train_data=tmp_path / "mine.jsonl")
    )
    trainer = finetune(arguments, config)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    for part in ("lora_B", "trainable_tokens_delta", "sam.mask_decoder", "segment_projection"):
        assert any(part in name for name in trained), part
    assert not any("prompt_encoder" in name or "similarity_scaling" in name for name in trained)
    logged = {key for entry in trainer.state.log_history for key in entry}
    assert {"loss/text", "loss/mask_bce", "loss/mask_dice"} <= logged
    assert (config.mask_dice_weight, config.learning_rate, config.warmup_steps) == (0.5, 1e-4, 0)


@pytest.mark.parametrize("name", ["llava-7b-lora", "llava-7b-full-fsdp"])
def test_a_recipe_in_bfloat16_is_evaluated_saved_and_asked(stand_in, tmp_path, name):
    """Frozen weights in bfloat16 beside trained ones in float32, within mixed precision and without."""
    (recipe,) = (path for path in RECIPES if path.stem == name)
    settings = {"eval_strategy": "steps", "eval_steps": "2", "eval_generate_count": "3", "eval_max_new_tokens": "4"}
    settings |= {"eval_data": stand_in / "mine.jsonl", "save_strategy": "steps", "save_steps": "2"}
    trainer = finetune(*parse(command(stand_in, tmp_path, recipe, **settings)))
    assert {"eval_loss", "eval_segment_rate"} <= {key for entry in trainer.state.log_history for key in entry}
    trained = {parameter.dtype for parameter in trainer.model.parameters() if parameter.requires_grad}
    frozen = {parameter.dtype for parameter in trainer.model.parameters() if not parameter.requires_grad}
    assert trained == {torch.float32} and frozen >= ({torch.bfloat16} if "lora" in name else {torch.float32})
    assert (tmp_path / "checkpoint-2" / "complete.json").is_file()


def test_a_run_leaves_a_recipe_that_is_read_again(stand_in, tmp_path):
    (recipe,) = (path for path in RECIPES if path.stem == "llava-7b-lora")
    arguments, config = parse(command(stand_in, tmp_path / "first", recipe))
    finetune(arguments, config)
    written = (tmp_path / "first" / "recipe.yaml").read_text()
    assert str(tmp_path) not in written and str(stand_in) not in written
    reading = ["--config", str(tmp_path / "first" / "recipe.yaml"), "--output_dir", str(tmp_path), "--use_cpu", "true"]
    again, told = parse(reading)
    assert (again.model, again.train_data, again.lora_rank) == ("model", ["mine.jsonl"], 8)
    for name in ("learning_rate", "lr_scheduler_type", "max_steps", "bf16", "mask_dice_weight", "max_length", "optim"):
        assert getattr(told, name) == getattr(config, name), name
    card = build_card(tmp_path / "first").text
    assert "- Data: mine.jsonl" in card and "lora_rank: 8" in card


def test_the_recipes_of_the_issue_are_there_and_keep_the_official_numbers():
    names = {path.stem for path in RECIPES}
    assert {"tiny", "llava-7b-lora", "llava-13b-lora", "llava-7b-qlora", "llava-7b-full-fsdp", "read-7b-lora"} <= names
    for name, rank in (("llava-7b-lora", 8), ("llava-13b-lora", 64)):
        text = (RECIPES[0].parent / f"{name}.yaml").read_text()
        assert f"lora_rank: {rank}\n" in text and "learning_rate: 3.0e-4\n" in text


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_its_configurations(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "bf16"
    if path.stem == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert "LlamaDecoderLayer" in config.fsdp_config["fsdp_transformer_layer_cls_to_wrap"]
    if path.stem.startswith("zero"):
        assert config.deepspeed_config["zero_stage"] == int(path.stem[-1])


def test_tensorboard_gets_scalars_the_layer_histogram_and_overlays(stand_in, tmp_path):
    settings = {
        "report_to": "tensorboard",
        "eval_strategy": "steps",
        "eval_steps": "2",
        "eval_data": stand_in / "mine.jsonl",
        "eval_generate_count": "3",
        "eval_max_new_tokens": "4",
        "eval_overlays": "2",
        "logging_steps": "1",
        "train_weights": "1.0",
        "epoch_size": "4",
    }
    main(command(stand_in, tmp_path, **settings))
    (events,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    written = EventAccumulator(str(events)).Reload().Tags()
    assert {"layers", "answers/0", "answers/1"} <= set(written["images"])
    wanted = {"train/loss/mask_bce", "train/policy/reward", "train/policy/entropy", "train/layer/0"}
    assert wanted | {"eval/segment_rate", "eval/loss"} <= set(written["scalars"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization": "4bit"}, "quantised weights cannot be trained themselves"),
        ({"lora_rank": "4", "adapter": "somewhere"}, "--lora_rank for a new adapter or --adapter for a saved one"),
        ({"train_data": "nowhere.jsonl"}, "the data file nowhere.jsonl does not exist"),
        ({"train_data": "nowhere"}, "nowhere holds no prepared dataset"),
        ({"train_weights": "-1.0"}, "weights of sources must be at least 0"),
        ({"train_layer_selection": "best"}, "train_layer_selection must be one of"),
        ({"seed": str(2**32)}, "seed must lie in 0..4294967295, got 4294967296"),
        ({"scene_seed": "-1"}, "scene_seed must lie in 0..4294967295, got -1"),
    ],
)
def test_the_command_refuses_in_a_sentence(stand_in, tmp_path, settings, message, capsys):
    assert main(command(stand_in, tmp_path, **settings)) == 2
    assert message in refusal(capsys)


def test_a_log_is_one_line_and_a_negative_dice_is_explained_once(capsys):
    logs = {
        "loss": 1.5,
        "loss/text": 0.25,
        "loss/map_dice": -0.1,
        "loss/critic": 0.0,
        "layer/0": 0.5,
        "policy/reward": -0.4,
        "epoch": 1.0,
    }
    assert log_line(logs, 20, 120) == "step 20 of 120: loss 1.5, text 0.25, map_dice -0.1, reward -0.4"
    evaluated = {
        "eval_loss": 1.5,
        "eval_loss/text": 0.25,
        "eval_layer/0": 0.5,
        "eval_segment_rate": 0.75,
        "eval_runtime": 3.0,
    }
    assert log_line(evaluated, 20, 120) == "step 20 of 120, evaluated: loss 1.5, text 0.25, segment_rate 0.75"
    assert log_line({"epoch": 1.0}, 1, 2) == ""
    told, state = ReadableLog(), TrainerState(global_step=20, max_steps=120)
    for _ in range(2):
        told.on_log(None, state, None, logs)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3 and said[1].startswith("map_dice may lie below 0, and lower is better all the same")
    # As said there: the map that is 1 on the object and 0 elsewhere.
    target = torch.zeros(1, 10, 10)
    target[:, :3, :4] = 1
    weight = positive_weight(target, torch.zeros(1, dtype=torch.long))
    perfect = float(map_dice_loss(torch.where(target > 0, 50.0, -50.0), target, weight))
    assert perfect == pytest.approx(float((1 - weight) / (1 + weight)), abs=1e-4) and perfect < -0.7


def test_help_shows_our_settings_first_and_all_of_them_on_request(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main([flag])
        shown[flag] = capsys.readouterr().out
    for name in ("--train_data", "--map_dice_weight", "--learning_rate", "--output_dir", "--help-all"):
        assert name in shown["--help"]
    assert "--deepspeed" not in shown["--help"] and "--deepspeed" in shown["--help-all"]
    assert shown["--help"].index("--train_data") < shown["--help"].index("--learning_rate")
    assert 2 * len(shown["--help"].splitlines()) < len(shown["--help-all"].splitlines())


def test_flags_that_make_no_sense_are_refused_in_a_line(tmp_path, capsys):
    assert main(["--config"]) == 2
    assert refusal(capsys) == "finetune: error: --config must be followed by the path of a recipe, got nothing"
    assert main(["--config", str(tmp_path / "no.yaml")]) == 2
    assert "no.yaml" in refusal(capsys)
    with pytest.raises(SystemExit, match="2"):
        main(["--max_steps", "many"])
    assert "argument --max_steps/--max-steps: invalid int value: 'many'" in refusal(capsys)


def refusal(capsys) -> str:
    """The last line of a command that ended in a sentence."""
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("finetune: error: ")
    return last


def test_a_corrupt_image_stops_the_command_with_its_name(stand_in, tmp_path, capsys):
    broken = stand_in / "broken.png"
    broken.write_bytes((stand_in / "0.png").read_bytes()[:70])
    lines = (stand_in / "mine.jsonl").read_text().splitlines()
    (stand_in / "bad.jsonl").write_text("\n".join([*lines[:2], lines[2].replace("2.png", "broken.png")]))
    settings = {"train_data": stand_in / "bad.jsonl", "dataloader_num_workers": "1"}
    assert main(command(stand_in, tmp_path, **settings)) == 2
    assert "broken.png" in refusal(capsys)
    main(command(stand_in, tmp_path, **settings, on_bad_sample="skip"))
    assert (tmp_path / "model.safetensors").is_file()


def test_a_finished_run_that_was_told_something_else_is_refused(stand_in, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": "2"}
    main(command(stand_in, tmp_path, **settings))
    assert main(command(stand_in, tmp_path, **settings, learning_rate="0.5")) == 2
    assert re.search("error: the run in .* cannot go on from checkpoint-2, because learning_rate", refusal(capsys))


def contents(folder: Path) -> dict:
    """Bytes and time of every file in a folder."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


SAVING = {
    "steps": {"save_strategy": "steps", "save_steps": "1", "save_total_limit": "1"},
    "epochs": {"save_strategy": "epoch", "max_steps": "-1", "num_train_epochs": "1", "report_to": "tensorboard"},
    "at the end only": {"save_strategy": "no"},
    # The steps are so long that the first one is the best, so that the last checkpoint goes. Without draws of layers,
    # which depend on the names of the samples, and these on the folder.
    "the best": {
        "train_layer_selection": "last",
        "save_strategy": "steps",
        "save_steps": "1",
        "save_total_limit": "1",
        "eval_strategy": "steps",
        "eval_steps": "1",
        "load_best_model_at_end": "true",
        "learning_rate": "10.0",
    },
    "adapters": {"save_strategy": "steps", "save_steps": "2", "lora_rank": "2"},
}


@pytest.mark.parametrize("saving", SAVING)
def test_a_finished_run_given_again_says_so_and_writes_nothing(stand_in, tmp_path, saving, capsys):
    arguments = command(stand_in, tmp_path, **SAVING[saving], eval_data=stand_in / "mine.jsonl")
    main(arguments)
    assert saving != "the best" or not (tmp_path / "checkpoint-2").exists()
    assert "fine-tuning on cpu in float32" in capsys.readouterr().out
    before = contents(tmp_path)
    main(arguments)
    steps = 3 if saving == "epochs" else 2
    said = f"the run in {tmp_path} is finished at step {steps}: nothing is trained or written"
    assert capsys.readouterr().out.strip() == said
    assert contents(tmp_path) == before


def test_a_finished_run_comes_back_with_its_weights(stand_in, tmp_path):
    arguments = parse(command(stand_in, tmp_path, learning_rate="0.01"))
    trained = finetune(*arguments).model.state_dict()
    again = finetune(*arguments)
    assert again.state.global_step == 2
    assert all(torch.equal(value, trained[name]) for name, value in again.model.state_dict().items())


def test_a_run_killed_at_its_very_end_is_saved_and_not_trained_further(stand_in, tmp_path):
    arguments = command(stand_in, tmp_path, save_strategy="steps", save_steps="2", save_total_limit="1")
    main(arguments)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "finished.json").unlink()
    (tmp_path / "model.safetensors").unlink()
    main(arguments)
    assert (tmp_path / "model.safetensors").read_bytes() == weights
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (tmp_path / "finished.json").is_file()


def test_a_longer_run_goes_on_where_the_schedule_allows_it(stand_in, tmp_path, capsys):
    settings = {"save_strategy": "steps", "save_steps": "2", "lr_scheduler_type": "constant"}
    main(command(stand_in, tmp_path / "parts", **settings))
    assert "resuming" not in capsys.readouterr().out
    main(command(stand_in, tmp_path / "parts", **settings, max_steps="4"))
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [
        "fine-tuning on cpu in float32",
        f"resuming from step 2 of 4, {tmp_path / 'parts' / 'checkpoint-2'}",
    ]
    lines = [line for line in said if line.startswith("step ")]
    assert [line.split(":")[0] for line in lines] == ["step 3 of 4", "step 4 of 4"]
    for name in ("loss", "text", "mask_bce", "mask_dice", "map_bce", "map_dice", "reward", "lr"):
        assert any(re.search(rf"[:,] {name} -?\d", line) for line in lines), name
    assert said[-1].startswith("trained 4 of 4 steps in ")
    main(command(stand_in, tmp_path / "whole", **settings, max_steps="4"))
    parts, whole = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("parts", "whole"))
    assert parts == whole
    main(command(stand_in, tmp_path / "linear", **{**settings, "lr_scheduler_type": "linear"}))
    longer = command(stand_in, tmp_path / "linear", **{**settings, "lr_scheduler_type": "linear", "max_steps": "4"})
    assert main(longer) == 2
    assert re.search("the run in .* cannot go on .*, because max_steps was 2 and is 4", refusal(capsys))


@pytest.mark.parametrize(
    ("name", "seed", "limit"),
    [("seed", -1, 2**32), ("seed", 2**32, 2**32), ("data_seed", 10**30, 2**63), ("scene_seed", 2**32, 2**32)],
)
def test_a_seed_that_is_too_large_is_refused_in_a_sentence(stand_in, tmp_path, name, seed, limit, capsys):
    assert main(command(stand_in, tmp_path, train_data="scenes", **{name: seed})) == 2
    assert f"seed must lie in 0..{limit - 1}, got {seed}" in refusal(capsys)


def test_the_largest_seeds_train(stand_in, tmp_path):
    seeds = {"seed": 2**32 - 1, "data_seed": 2**63 - 1, "scene_seed": 2**32 - 1}
    main(command(stand_in, tmp_path, train_data="scenes", scene_count="2", max_steps="1", **seeds))
    assert (tmp_path / "model.safetensors").is_file()


def test_a_machine_without_an_accelerator_computes_in_float32_unless_told_otherwise(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    settings = {"output_dir": str(tmp_path), "report_to": "none"}
    for asked in ({}, {"bf16": True}, {"fp16": True}):
        config = UGroundTrainingConfig(**settings, **asked, dataloader_num_workers=1000)
        assert config.use_cpu and not config.bf16 and not config.fp16 and not config.dataloader_pin_memory
        assert 1 <= config.dataloader_num_workers <= os.cpu_count()
    assert UGroundTrainingConfig(**settings, bf16=True, use_cpu=True).bf16
    assert not UGroundTrainingConfig(**settings, use_cpu=True).bf16
    assert not [str(warning.message) for warning in recwarn]


def test_pretraining_refuses_a_seed_that_is_too_large(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        pretrain(["sam", "--output", str(tmp_path / "sam"), "--seed", str(2**64)])
    assert f"--seed: a seed must be a whole number in 0..{2**32 - 1}, got '{2**64}'" in capsys.readouterr().err
