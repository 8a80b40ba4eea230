"""READ, SESAME and LISA through the converter: what tells them apart, what is written, what is refused."""

import json

import pytest
import torch
from official_case import DATA, TINY, convert, official_weights, refused, write_llama_tokenizer
from safetensors.torch import load_file, save_file
from tiny_processor import gradient_image

from uground.checkpoint_loading import load_model, load_processor
from uground.hub.convert import official_systems
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

READ = DATA / "read_tiny"
CLIP = READ / "clip"
POINTS = ("--num-points", 30, "--point-thresholds", 0.8, 0.2, "--point-downsample", 2)


def write_source(folder, weights=None, **settings):
    """READ's toy checkpoint in one file, with other weights or settings."""
    folder.mkdir()
    save_file(official_weights(READ / "official") if weights is None else weights, folder / "model.safetensors")
    config = json.loads((READ / "official/config.json").read_text()) | settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def lisa(tmp_path_factory):
    """A LISA v1: one linear layer as projector, and a CLIP of 224 pixels."""
    folder = tmp_path_factory.mktemp("lisa")
    weights = official_weights(READ / "official")
    kept = {name: tensor for name, tensor in weights.items() if "mm_projector" not in name}
    first = weights["model.mm_projector.0.weight"]
    kept |= {"model.mm_projector.weight": first, "model.mm_projector.bias": torch.randn(len(first))}
    config = json.loads((READ / "official/config.json").read_text())
    dropped = ("mm_projector_type", "image_aspect_ratio", "use_mm_proj")
    config = {name: value for name, value in config.items() if name not in dropped}
    source = write_source(folder / "source", kept)
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["LISAForCausalLM"]}))
    write_llama_tokenizer(source, 116, ("<im_patch>", "<im_start>", "<im_end>", "[SEG]"))
    (folder / "clip").mkdir()
    clip = json.loads((CLIP / "config.json").read_text())
    (clip.get("vision_config") or clip)["image_size"] = 224
    (folder / "clip/config.json").write_text(json.dumps(clip))
    tower = load_file(CLIP / "model.safetensors")
    (name,) = (name for name in tower if name.endswith("position_embedding.weight"))
    save_file(tower | {name: tower[name][: 16 * 16 + 1].clone()}, folder / "clip/model.safetensors")
    return source, folder / "clip", kept


def test_lisa_with_its_projector_of_one_layer(lisa, tmp_path, capsys):
    source, clip, weights = lisa
    assert convert(source, clip, tmp_path / "out", "--system", "lisa") == 0
    model, processor = load_model(tmp_path / "out"), load_processor(tmp_path / "out")
    config = model.config
    assert (config.image_frame, config.prompts, config.layer_selection) == ("centre_crop", ("embedding",), "last")
    assert (config.token_grid_hw, model.layer_policy, config.reject_token_id) == ((16, 16), None, None)
    # By name: behind the three that LLaVA's tokenizer holds already.
    assert (config.segment_token_id, processor.num_image_tokens, processor.image_frame) == (119, 256, "centre_crop")
    features = torch.randn(5, 32)
    expected = features @ weights["model.mm_projector.weight"].T + weights["model.mm_projector.bias"]
    assert (model.lmm.model.multi_modal_projector(features) - expected).abs().max() <= 1e-6
    outputs = model.segment(**processor(gradient_image(40, 60), "the red"), max_new_tokens=2)
    assert len(outputs.sequences) == 1


def test_projection_of_one_layer_is_exact_in_bfloat16_too(lisa, tmp_path):
    source, clip, _ = lisa
    assert convert(source, clip, tmp_path / "out", "--system", "lisa", "--dtype", "bfloat16") == 0
    projector = UGroundForReferringSegmentation.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16
    ).lmm.model.multi_modal_projector
    features = torch.randn(5, 32).bfloat16()
    assert torch.equal(projector(features), projector.linear_1(features))


def test_sesame_is_a_read_without_points(tmp_path):
    assert convert(READ / "official", CLIP, tmp_path / "out", "--system", "sesame", "--segment-token-id", 110) == 0
    config = UGroundConfig.from_pretrained(tmp_path / "out")
    assert (config.image_frame, config.prompts, config.layer_policy) == ("centre_crop", ("embedding",), False)
    assert load_model(tmp_path / "out").config.similarity_scaling == "minmax"


def test_points_are_as_told(tmp_path, capsys):
    told = ("--num-points", 60, "--point-thresholds", 0.6, 0.2, "--point-downsample", 1)
    assert convert(READ / "official", CLIP, tmp_path / "out", "--system", "read", *told) == 0
    config = UGroundConfig.from_pretrained(tmp_path / "out")
    assert (config.num_points, config.point_thresholds, config.point_downsample) == (60, (0.6, 0.2), 1)
    said = capsys.readouterr().out
    assert "picks 60 points" in said and "layers" not in said.split("picks")[1]


def test_points_follow_from_the_number_of_layers_and_that_is_said(tmp_path, capsys, monkeypatch):
    assert official_systems.READ_POINTS == {32: (30, (0.8, 0.2), 2), 40: (60, (0.6, 0.2), 1)}
    monkeypatch.setitem(official_systems.READ_POINTS, 4, (7, (0.7, 0.3), 3))
    flags = ("--system", "read", "--num-points", 9)
    assert convert(READ / "official", CLIP, tmp_path / "out", *flags) == 0
    config = UGroundConfig.from_pretrained(tmp_path / "out")
    assert (config.num_points, config.point_thresholds, config.point_downsample) == (9, (0.7, 0.3), 3)
    assert "where not said as READ's code has it for 4 layers" in capsys.readouterr().out


def test_the_processor_shows_the_centre_crop(tmp_path):
    source = write_source(tmp_path / "source")
    write_llama_tokenizer(source, 117, ("[SEG]", "<im_start>", "<im_end>"))
    assert convert(source, CLIP, tmp_path / "out", "--system", "read", *POINTS) == 0
    processor = load_processor(tmp_path / "out")
    assert (processor.image_frame, processor.segment_token_id, processor.reject_token_id) == ("centre_crop", 117, None)
    saved = json.loads((CLIP / "preprocessor_config.json").read_text())
    for name in ("image_mean", "image_std", "resample", "rescale_factor"):
        found = getattr(processor.image_processor, name)
        assert (list(found) if isinstance(found, (list, tuple)) else found) == saved[name], name
    assert processor.tokenizer.decode(processor(gradient_image(9, 9), "the")["input_ids"][0]).count("<im_start>") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "lacks ppm._layer_gate_W_similarity; name another system with --system; it looks like READ or SESAME"),
        (("--system", "uground"), "no official UGround checkpoint, it lacks ppm._layer_gate_W_similarity; it looks"),
        (("--system", "lisa"), "no official LISA checkpoint, it lacks model.mm_projector.weight; it looks like READ"),
        (("--system", "read"), "follows from 32 or 40 layers, got 4: name --num-points"),
        (("--system", "read", "--num-points", 5), "follows from 32 or 40 layers, got 4"),
        (("--system", "sesame", *POINTS), "are READ's, and SESAME has no points"),
        (("--system", "read", *POINTS, "--num-points", 0), "--num-points must be at least 1, got 0"),
        (("--system", "read", *POINTS, "--point-downsample", 5), "must divide the 24 x 24 token grid, got 5"),
        (("--system", "read", *POINTS, "--point-thresholds", 0.2, 0.8), "--point-thresholds must be two numbers"),
        (("--system", "read", *POINTS, "--point-thresholds", 0.8, -1), "--point-thresholds must be two numbers"),
        (("--system", "read", *POINTS, "--layer-selection", "argmax"), "'argmax' needs a layer policy"),
    ],
)
def test_what_does_not_fit_the_system(tmp_path, capsys, flags, message):
    refused(capsys, message, READ / "official", CLIP, tmp_path / "out", *flags)


def test_a_uground_is_no_read_and_has_no_points(tmp_path, capsys):
    clip = TINY / "clip"
    refused(
        capsys,
        "no official READ checkpoint, it holds ppm._layer_gate_W_similarity of a layer policy",
        *(TINY / "official", clip, tmp_path / "out", "--system", "read"),
    )
    refused(capsys, "UGround has no points", TINY / "official", clip, tmp_path / "out", "--num-points", 5)


def test_settings_of_other_code_are_refused(tmp_path, capsys):
    """The key is absent of a released READ: UGround's own variant of it pads, and picks points in another way."""
    source = write_source(tmp_path / "source", pad_train_clip_images=True)
    message = "says pad_train_clip_images True, which is not supported; expected False"
    refused(capsys, message, source, CLIP, tmp_path / "out", "--system", "read", *POINTS)


def test_a_tower_of_another_grid(lisa, tmp_path, capsys):
    source, clip, _ = lisa
    message = "makes 24 x 24 patches of 336 pixels, expected 16 x 16"
    refused(capsys, message, source, CLIP, tmp_path / "out", "--system", "lisa")
    message = "makes 16 x 16 patches of 224 pixels, expected 24 x 24"
    refused(capsys, message, READ / "official", clip, tmp_path / "out", "--system", "read", *POINTS)
