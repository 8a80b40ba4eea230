"""Released checkpoints of any layout become ours, every tensor of them."""

import json

import pytest
import torch
from official_case import TINY, convert, converted_weights, official_weights, write_official
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, CLIPConfig, CLIPModel, SamConfig

from uground.hub.convert.official_names import IGNORED, VOCABULARY, Origin, is_ignored, source_of
from uground.hub.convert_official import build_parser, convert_official
from uground.hub.weights import checkpoint_writer
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.training.objectives.reward_baseline import BASELINE_FILE, BaselineTraining, RewardBaseline

CLIP = TINY / "clip"
OFFICIAL = TINY / "official"
SEGMENT_ID = 110
VOCAB_SIZE = 120


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The toy checkpoint, converted without any flag."""
    output = tmp_path_factory.mktemp("plain") / "converted"
    assert convert(OFFICIAL, CLIP, output) == 0
    return output


def test_every_tensor_is_its_source_and_every_source_is_used(plain):
    source = official_weights()
    clip = {
        name.removeprefix("vision_model."): tensor for name, tensor in load_file(CLIP / "model.safetensors").items()
    }
    found = converted_weights(plain)
    model = UGroundForReferringSegmentation.from_pretrained(plain)
    assert model.config.image_token_id == VOCAB_SIZE
    used = set()
    for name, tensor in model.state_dict().items():
        origin, key = source_of(name, iou_head_depth=3)
        expected = (clip if origin.value == "vision tower" else source)[key]
        if key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert not tensor[-1].any() and tensor.shape[0] == VOCAB_SIZE + 1
            tensor = tensor[:-1]
        assert torch.equal(tensor, expected), name
        used.add(key)
    assert {key for key in source if not is_ignored(key)} == used & set(source)
    assert set(clip) == used & set(clip)
    tied = "mask_decoder.sam.prompt_encoder.shared_embedding.positional_embedding"
    assert set(found) == set(model.state_dict()) - {tied}


def test_settings_are_those_of_the_official_evaluation(plain):
    model = UGroundForReferringSegmentation.from_pretrained(plain)
    config = model.config
    assert (config.similarity_scaling, config.layer_selection, config.embedding_layer) == (
        "minmax",
        "last",
        "selected",
    )
    assert not (plain / BASELINE_FILE).exists(), "nothing of training is known without a critic"
    assert config.prompts == ("embedding", "mask")
    assert config.lmm_config.vision_feature_layer == -2
    assert config.sam_config.vision_config.window_size == 14
    assert config.sam_config.vision_config.global_attn_indexes == [1]
    assert config.sam_config.mask_decoder_config.layer_norm_eps == 1e-5
    assert model.generation_config.suppress_tokens == [VOCAB_SIZE]
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"mode": 2}, ("last", "last")),
        ({"mode": 1}, ("last", "last")),
        ({"mode": 3, "eval_legacy": False}, ("sample", "selected")),
    ],
)
def test_modes(tmp_path, settings, expected):
    convert_official(write_official(tmp_path / "source", **settings), CLIP, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["layer_selection"], config["embedding_layer"]) == expected


def test_flags(tmp_path):
    flags = ("--dtype", "bfloat16", "--layer-selection", "argmax", "--segment-token-id", "110")
    assert convert(OFFICIAL, CLIP, tmp_path / "out", *flags, "--reject-token-id", "111") == 0
    model = AutoModel.from_pretrained(tmp_path / "out", dtype="auto", trust_remote_code=True)
    assert model.dtype == torch.bfloat16 and model.config.layer_selection == "argmax"
    assert (model.config.segment_token_id, model.config.reject_token_id) == (110, 111)
    gates = official_weights()["ppm._layer_gate_W_similarity"]
    assert torch.equal(model.layer_policy.gates, gates.bfloat16())


def test_a_layer_can_be_named(tmp_path):
    assert convert(OFFICIAL, CLIP, tmp_path / "out", "--layer-selection", "2") == 0
    assert json.loads((tmp_path / "out/config.json").read_text())["layer_selection"] == 2


def test_without_a_tokenizer_the_model_says_what_it_lacks(tmp_path, capsys):
    assert convert(OFFICIAL, CLIP, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "it has no processor, because no tokenizer was found" in said
    assert "it does not know its [SEG] token; pass --tokenizer or --segment-token-id" in said
    assert not (tmp_path / "out/processor_config.json").exists()
    model = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    with pytest.raises(ValueError, match="segment_token_id is not set"):
        model._segment_token_id()


def write_shards(folder, suffix: str, weights: dict) -> None:
    """Three shards and an index, as safetensors or pickles."""
    names = list(weights)
    stem, ending = ("model", "safetensors") if suffix == "safetensors" else ("pytorch_model", "bin")
    weight_map = {}
    for number in range(3):
        file = f"{stem}-{number + 1:05d}-of-00003.{ending}"
        part = {name: weights[name] for name in names[number::3]}
        (save_file if suffix == "safetensors" else torch.save)(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_layout(folder, layout: str) -> None:
    weights = official_weights()
    (folder / "model.safetensors").unlink()
    if layout == "one pickle":
        torch.save(weights, folder / "pytorch_model.bin")
    elif layout == "old pickle":
        torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    else:
        write_shards(folder, layout, weights)


@pytest.mark.parametrize("layout", ["one pickle", "old pickle", "safetensors", "pickles"])
def test_layouts_of_the_source(tmp_path, plain, layout):
    source = write_official(tmp_path / "source")
    write_layout(source, layout)
    convert_official(source, CLIP, tmp_path / "out")
    expected = converted_weights(plain)
    found = converted_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def whole_clip(folder, pickled: bool):
    """A CLIP with its text side around the toy vision tower, as OpenAI's repositories hold it."""
    vision = json.loads((CLIP / "config.json").read_text())
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=32))
    weights = {**model.state_dict(), **load_file(CLIP / "model.safetensors")}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    weights["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    folder.mkdir()
    model.config.save_pretrained(folder)
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["no prefix", "whole", "whole, pickled"])
def test_layouts_of_the_vision_tower(tmp_path, plain, kind):
    if kind == "no prefix":
        (tmp_path / "clip").mkdir()
        weights = load_file(CLIP / "model.safetensors")
        save_file(
            {name.removeprefix("vision_model."): t for name, t in weights.items()}, tmp_path / "clip/model.safetensors"
        )
        (tmp_path / "clip/config.json").write_text((CLIP / "config.json").read_text())
    else:
        whole_clip(tmp_path / "clip", kind.endswith("pickled"))
    convert_official(OFFICIAL, tmp_path / "clip", tmp_path / "out")
    expected = converted_weights(plain)
    found = converted_weights(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    configs = [
        json.loads((folder / "config.json").read_text())["lmm_config"]["vision_config"]
        for folder in (plain, tmp_path / "out")
    ]
    assert {**configs[0], "_name_or_path": ""} == {**configs[1], "_name_or_path": ""}


def test_extras_of_other_trunks_are_ignored_by_name(tmp_path, plain):
    """LLaVA-1.6's newline, a vision tower that was left in, constants of SAM and of rotary embeddings."""
    extras = {
        "model.image_newline": torch.ones(48),
        "model.vision_tower.vision_tower.vision_model.post_layernorm.weight": torch.ones(32),
        "model.visual_model.pixel_mean": torch.ones(3, 1, 1),
        "model.visual_model.pixel_std": torch.ones(3, 1, 1),
    }
    source = write_official(tmp_path / "source", {**official_weights(), **extras})
    convert_official(source, CLIP, tmp_path / "out")
    expected, found = converted_weights(plain), converted_weights(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(reason for reason in IGNORED.values())


def critic_weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"0.weight": (24, 5), "0.bias": (24,), "2.weight": (1, 24), "2.bias": (1,)}
    critic = {f"ppm.critic.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**official_weights(), **critic}


def test_a_critic_comes_along(tmp_path):
    """Of any width, whatever the config says of it."""
    weights = critic_weights()
    convert_official(write_official(tmp_path / "source", weights, baseline_type="critic"), CLIP, tmp_path / "out")
    UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    baseline = RewardBaseline(5, "critic", critic_hidden_size=24)
    assert BaselineTraining(baseline).load(tmp_path / "out")
    for name, tensor in baseline.critic.state_dict().items():
        assert torch.equal(tensor, weights[f"ppm.critic.{name}"])
    assert baseline.reward_updates == 0 and baseline.moving_average() == 0
    logits = torch.randn(3, 5)
    hidden = (logits.softmax(-1).mean(0) @ weights["ppm.critic.0.weight"].T + weights["ppm.critic.0.bias"]).relu()
    expected = hidden @ weights["ppm.critic.2.weight"][0] + weights["ppm.critic.2.bias"][0]
    assert_close(baseline.batch_value(logits), expected)


def model_of_other_sizes() -> UGroundForReferringSegmentation:
    """Nothing in it is as large as in the toy or in a released checkpoint, but for the grid of image tokens."""
    text = {"vocab_size": 51, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    text |= {"model_type": "llama", "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 700}
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14}
    frame = {"image_size": 128, "patch_size": 16}
    sam = SamConfig(
        vision_config={"hidden_size": 24, "output_channels": 32, "num_hidden_layers": 3, "num_attention_heads": 3}
        | {"window_size": 3, "global_attn_indexes": [0, 2], "mlp_ratio": 2.0, "num_pos_feats": 16, **frame},
        prompt_encoder_config={"hidden_size": 32, "mask_input_channels": 8, **frame},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 48, "iou_head_depth": 4, "iou_head_hidden_dim": 20},
    )
    config = UGroundConfig(
        lmm_config={"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": 50},
        sam_config=sam,
        similarity_scaling="minmax",
    )
    model = UGroundForReferringSegmentation(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def write_as_official(model: UGroundForReferringSegmentation, folder) -> None:
    """Checkpoint and vision tower of a model in the official layout."""
    config, parts = model.config, {origin: {} for origin in Origin}
    for name, tensor in model.state_dict().items():
        origin, key = source_of(name, config.sam_config.mask_decoder_config.iou_head_depth)
        parts[origin][key] = (tensor[:-1] if key in VOCABULARY else tensor).contiguous()
    settings = config.get_text_config().to_dict() | {"model_type": "llava"}
    settings |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    write_official(folder / "source", parts[Origin.CHECKPOINT], **settings)
    (folder / "clip").mkdir()
    save_file(parts[Origin.VISION_TOWER], folder / "clip/model.safetensors")
    config.lmm_config.vision_config.save_pretrained(folder / "clip")


def test_any_sizes(tmp_path):
    """Whatever the toy does not vary: grouped heads, depths, widths, window, frame, head of the IoU."""
    torch.manual_seed(0)
    model = model_of_other_sizes()
    write_as_official(model, tmp_path)
    assert convert(tmp_path / "source", tmp_path / "clip", tmp_path / "out", "--segment-token-id", "46") == 0
    found = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        rows = slice(None, -1) if source_of(name, 4)[1] in VOCABULARY else slice(None)
        if tensor.ndim:
            assert torch.equal(found.state_dict()[name][rows], tensor[rows]), name
    text, sam = found.config.get_text_config(), found.config.sam_config
    assert text.rope_parameters["rope_theta"] == 5000.0 and text.rope_parameters["rope_type"] == "linear"
    assert (text.num_attention_heads, text.num_key_value_heads, text.vocab_size) == (6, 2, 51)
    assert (sam.vision_config.window_size, sam.vision_config.global_attn_indexes) == (3, [0, 2])
    assert (found.config.frame_size, sam.mask_decoder_config.iou_head_depth) == (128, 4)


def test_a_large_checkpoint_is_written_in_shards(tmp_path, monkeypatch):
    """At no time more than one shard is held; the index is as transformers writes it."""
    monkeypatch.setattr(checkpoint_writer, "MAX_SHARD_BYTES", 100_000)
    monkeypatch.setattr(checkpoint_writer, "SMALL_SHARD_BYTES", 10_000)
    saved, save = [], checkpoint_writer.save_file

    def record(tensors, path, metadata):
        saved.append(sum(tensor.nbytes for tensor in tensors.values()))
        save(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_writer, "save_file", record)
    assert convert(OFFICIAL, CLIP, tmp_path / "out", "--segment-token-id", str(SEGMENT_ID)) == 0
    largest = max(tensor.nbytes for tensor in converted_weights(tmp_path / "out").values())
    assert len(saved) > 10 and max(saved) <= max(100_000, largest)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{number + 1:05d}-of-{len(saved):05d}.safetensors" for number in range(len(saved))]
    assert index["metadata"]["total_size"] == sum(saved)
    assert sorted(set(index["weight_map"].values())) == files
    UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit) as stop:
        build_parser().parse_args(["--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert all(
        flag in said for flag in ("SRC", "--vision-tower", "--output", "--tokenizer", "--dtype", "--layer-selection")
    )
