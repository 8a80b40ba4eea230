"""What the converter refuses, each in one line that names the file or the tensor, and with nothing left behind."""

import errno
import json
import os

import pytest
import torch
from official_case import TINY, convert, official_weights, refused, write_official

from uground.hub.convert.official_names import looks_like
from uground.hub.convert_official import convert_official
from uground.hub.weights import checkpoint_writer

CLIP = TINY / "clip"
OFFICIAL = TINY / "official"


def copy_official(folder):
    """The toy checkpoint with its two pickles and their index."""
    folder.mkdir()
    for path in OFFICIAL.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


SHARD = "pytorch_model-00002-of-00002.bin"


def test_a_missing_shard(tmp_path, capsys):
    source = copy_official(tmp_path / "source")
    (source / SHARD).unlink()
    refused(capsys, f"names {SHARD}, which the folder does not hold", source, CLIP, tmp_path / "out")


def test_an_index_that_is_wrong(tmp_path, capsys):
    source = copy_official(tmp_path / "source")
    path = source / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "elsewhere.bin"
    path.write_text(json.dumps(index))
    refused(capsys, "names elsewhere.bin, which the folder does not hold", source, CLIP, tmp_path / "out")
    index["weight_map"]["lm_head.weight"] = "pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    refused(capsys, "says that lm_head.weight stands in", source, CLIP, tmp_path / "out")
    index["weight_map"]["lm_head.weight"] = "../pytorch_model-00001-of-00002.bin"
    path.write_text(json.dumps(index))
    refused(capsys, "must name files beside it", source, CLIP, tmp_path / "out")
    path.write_text("{}")
    refused(capsys, "is no index of weights", source, CLIP, tmp_path / "out")
    path.write_text("{")
    refused(capsys, "pytorch_model.bin.index.json is no JSON file", source, CLIP, tmp_path / "out")


@pytest.mark.parametrize("layout", ["pickle", "old pickle", "safetensors"])
@pytest.mark.parametrize("share", [0.3, 0.99])
def test_a_truncated_file(tmp_path, capsys, layout, share):
    source = write_official(tmp_path / "source")
    file = source / "model.safetensors"
    if layout != "safetensors":
        file.unlink()
        file = source / "pytorch_model.bin"
        torch.save(official_weights(), file, _use_new_zipfile_serialization=layout == "pickle")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * share)])
    refused(capsys, str(file), source, CLIP, tmp_path / "out")


class Command:
    """Pickles into a call, as an attacker's object would."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_of_more_than_tensors(tmp_path, capsys):
    source = copy_official(tmp_path / "source")
    torch.save({"weight": torch.zeros(1), "other": Command(tmp_path / "was-run")}, source / SHARD)
    refused(capsys, f"{SHARD} holds more than tensors (", source, CLIP, tmp_path / "out")
    assert not (tmp_path / "was-run").exists()
    torch.save({"weight": torch.zeros(1), "epoch": 3}, source / SHARD)
    refused(capsys, f"{SHARD} holds more than tensors by name: epoch", source, CLIP, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "has width 64, but model.mm_projector.0.weight of the checkpoint takes 32"),
        ({"image_size": 224}, "makes 16 x 16 patches of 224 pixels, expected 24 x 24"),
        ({"model_type": "siglip"}, "must be of type clip or clip_vision_model, got siglip"),
        ({"num_hidden_layers": 13}, "missing encoder.layers.12."),
        ({"num_hidden_layers": 11}, "unexpected vision_model.encoder.layers.11."),
        (
            {"intermediate_size": 96},
            "wrong shape of vision_model.encoder.layers.0.mlp.fc1.bias (64,) instead of (96,)",
        ),
    ],
)
def test_a_wrong_vision_tower(tmp_path, capsys, change, message):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip/model.safetensors").write_bytes((CLIP / "model.safetensors").read_bytes())
    config = json.loads((CLIP / "config.json").read_text()) | change
    (tmp_path / "clip/config.json").write_text(json.dumps(config))
    refused(capsys, message, OFFICIAL, tmp_path / "clip", tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": 4}, "says mode 4, which is not supported"),
        ({"mm_projector_type": "linear"}, "says mm_projector_type 'linear'"),
        ({"resize_vision_tower": True}, "says resize_vision_tower True"),
        ({"pad_train_clip_images": False}, "says pad_train_clip_images False"),
        ({"hidden_size": None}, "config.json of the checkpoint lacks hidden_size"),
        ({"num_hidden_layers": 5}, "missing model.layers.4."),
        ({"num_hidden_layers": 3}, "unexpected model.layers.3."),
        ({"baseline_type": "critic"}, "missing ppm.critic.0.bias"),
        ({"hidden_size": 40}, "wrong shape of"),
    ],
)
def test_settings_that_do_not_fit_the_weights(tmp_path, capsys, settings, message):
    refused(capsys, message, write_official(tmp_path / "source", **settings), CLIP, tmp_path / "out")


@pytest.mark.parametrize(
    ("removed", "added", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing model.layers.1.mlp.up_proj.weight"),
        (
            "model.visual_model.mask_decoder.iou_token.weight",
            None,
            "missing model.visual_model.mask_decoder.iou_token",
        ),
        (None, "model.layers.0.self_attn.q_proj.bias", "unexpected model.layers.0.self_attn.q_proj.bias"),
        (
            None,
            "model.visual_model.mask_decoder.more.weight",
            "unexpected model.visual_model.mask_decoder.more.weight",
        ),
        (None, "ppm.critic.0.weight", "unexpected ppm.critic.0.weight"),
    ],
)
def test_tensors_too_few_or_too_many(tmp_path, capsys, removed, added, message):
    weights = official_weights()
    if removed:
        del weights[removed]
    if added:
        weights[added] = torch.zeros(48)
    refused(capsys, message, write_official(tmp_path / "source", weights), CLIP, tmp_path / "out")


def family(name: str) -> dict[str, torch.Tensor]:
    """Names that checkpoints of other projects have, on top of a language model."""
    keep = {
        "LISA": ("model.layers", "model.visual_model", "model.text_hidden_fcs", "lm_head", "model.embed_tokens"),
        "READ or SESAME": ("model.",),
        "PixelLM": ("model.layers", "model.mm_projector", "model.embed_tokens", "model.text_hidden_fcs"),
        "GLaMM": ("model.layers", "model.embed_tokens"),
        "a LLaVA without a mask decoder": ("model.layers", "model.mm_projector", "model.embed_tokens"),
    }[name]
    extra = {
        "LISA": ("model.mm_projector.weight", "model.mm_projector.bias"),
        "PixelLM": ("model.mask_decoder.iou_token.weight", "model.prompt_encoder.no_mask_embed.weight"),
        "GLaMM": ("model.grounding_encoder.mask_decoder.iou_token.weight",),
    }.get(name, ())
    weights = {key: tensor for key, tensor in official_weights().items() if key.startswith(keep)}
    return weights | {key: torch.zeros(1) for key in extra}


@pytest.mark.parametrize("name", ["LISA", "READ or SESAME", "PixelLM", "GLaMM", "a LLaVA without a mask decoder"])
def test_checkpoints_of_other_families_are_told_apart(tmp_path, capsys, name):
    source = write_official(tmp_path / "source", family(name))
    refused(capsys, f"it looks like {name}", source, CLIP, tmp_path / "out")


def test_tokens_tell_families_apart_that_share_all_names(tmp_path, capsys):
    source = write_official(tmp_path / "source", family("LISA"))
    (source / "added_tokens.json").write_text(json.dumps({"[SEG]": 32000, "[REJ]": 32001}))
    refused(capsys, "it looks like GSVA", source, CLIP, tmp_path / "out")
    assert looks_like(["language_model.model.embed_tokens.weight"]).startswith("a LLaVA of transformers")
    assert looks_like(["layer_policy.gates"]).startswith("a checkpoint of this package")
    assert [
        looks_like([name]) for name in ("image_encoder.pos_embed", "vision_model.x", "model.embed_tokens.weight", "x")
    ] == [
        "a SAM",
        "a CLIP",
        "a language model",
        "nothing known here",
    ]


def test_places_that_are_no_checkpoints(tmp_path, capsys):
    refused(capsys, "neither a folder nor a Hub id", tmp_path / "no where", CLIP, tmp_path / "out")
    refused(capsys, "could not be fetched from the Hub", "nobody/nothing", CLIP, tmp_path / "out")
    refused(capsys, "is a file, expected a folder", OFFICIAL / "config.json", CLIP, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    refused(capsys, "holds no config.json", tmp_path / "empty", CLIP, tmp_path / "out")
    (tmp_path / "empty/config.json").write_text("{}")
    refused(capsys, "holds no weights", tmp_path / "empty", CLIP, tmp_path / "out")
    refused(capsys, "holds no config.json", OFFICIAL, tmp_path, tmp_path / "out")


def test_an_output_that_is_in_use(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    assert convert(OFFICIAL, CLIP, tmp_path / "out") == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
    assert convert(OFFICIAL, CLIP, tmp_path / "out/notes.txt") == 2
    assert "is a file, expected a new or empty folder" in capsys.readouterr().err
    (tmp_path / "out/notes.txt").unlink()
    assert convert(OFFICIAL, CLIP, tmp_path / "out") == 0


def failing_save(monkeypatch, error: BaseException, after: int) -> None:
    """Writing a file of weights fails, the first `after` times not."""
    monkeypatch.setattr(checkpoint_writer, "MAX_SHARD_BYTES", 100_000)
    save, calls = checkpoint_writer.save_file, []

    def fail(tensors, path, metadata):
        calls.append(path)
        if len(calls) > after:
            path.write_bytes(b"half of a file")
            raise error
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_writer, "save_file", fail)


def test_a_full_disk(tmp_path, capsys, monkeypatch):
    failing_save(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), after=2)
    output = tmp_path / "new/parents/out"
    refused(capsys, "cannot be written ([Errno 28] No space left on device)", OFFICIAL, CLIP, output)
    assert not list(tmp_path.iterdir())


def test_a_disk_too_small_is_seen_before(tmp_path, capsys, monkeypatch):
    usage = checkpoint_writer.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
    refused(capsys, "there is not enough room for", OFFICIAL, CLIP, tmp_path / "new/out")
    assert not list(tmp_path.iterdir())


def test_an_interruption(tmp_path, capsys, monkeypatch):
    failing_save(monkeypatch, KeyboardInterrupt(), after=1)
    assert convert(OFFICIAL, CLIP, tmp_path / "out") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "convert_official: interrupted, nothing was kept"
    assert not list(tmp_path.iterdir())


def test_while_it_is_written_it_does_not_look_finished(tmp_path, monkeypatch):
    seen, save = [], checkpoint_writer.save_file

    def look(tensors, path, metadata):
        seen.append(sorted(entry.name for entry in tmp_path.iterdir()))
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_writer, "save_file", look)
    convert_official(OFFICIAL, CLIP, tmp_path / "out")
    assert seen and all(len(names) == 1 and names[0].startswith("out.partial-") for names in seen)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
