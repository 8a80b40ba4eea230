"""Saving and loading: exact round trips, refused checkpoints, the config, and a Python without `uground`."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SEGMENT_TOKEN, tiny_config, tiny_inputs, tiny_model
from transformers import AutoConfig, AutoModel

from uground import modeling_uground
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation

ROWS = [[5, 6, SEGMENT_TOKEN, 9], [7, 8, SEGMENT_TOKEN, 11, SEGMENT_TOKEN], [4]]
WEIGHTS = "model.safetensors"


def load(folder, **settings):
    return UGroundForReferringSegmentation.from_pretrained(folder, **settings)


def load_with_auto_class(folder):
    return AutoModel.from_pretrained(folder, trust_remote_code=True)


@torch.no_grad()
def outputs_of(model):
    return model(**tiny_inputs(ROWS))


def assert_identical(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(path)
    return path


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def edit_weights(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"similarity_scaling": "minmax"},
        {"prompts": ("mask",)},
        {"prompts": ("embedding", "points"), "num_points": 7, "image_frame": "centre_crop"},
        {"layer_policy": False, "layer_selection": "last"},
        {"sam_config": None},
        {"num_segment_tokens": 3},
    ],
    ids=["default", "minmax", "mask only", "points", "no policy", "no SAM", "three ids"],
)
def test_a_round_trip_is_exact(settings, tmp_path):
    model = tiny_model(**settings)
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert_identical(loaded.state_dict(), model.state_dict())
    assert_identical(outputs_of(loaded), outputs_of(model))
    assert not loaded.training
    for name in set(UGroundConfig.__annotations__) - {"lmm_config", "sam_config", "sub_configs_defaults"}:
        assert getattr(loaded.config, name) == getattr(model.config, name), name
    assert (loaded.config.sam_config is None) == (model.config.sam_config is None)
    assert {name.split(".")[0] for name in loaded.state_dict()} == {
        "lmm",
        *(["layer_policy"] if loaded.config.layer_policy else []),
        *(["mask_decoder"] if loaded.config.mask_head else []),
        *(["segment_projection"] if "embedding" in loaded.config.prompts else []),
        *(["similarity_scaling"] if loaded.config.similarity_scaling == "scaled" else []),
    }


def with_earlier_tensors(tensors):
    """What release 0.1.0 saved beside the gates."""
    tensors["layer_policy.reward_ema"] = torch.tensor(-1.25)
    tensors["layer_policy.reward_updates"] = torch.tensor(1)
    tensors["layer_policy.critic.0.weight"] = torch.ones(8, 5)
    tensors["layer_policy.critic.2.bias"] = torch.ones(1)


def test_what_training_held_rewards_against_is_dropped(copied, tmp_path):
    """Tensors and settings of release 0.1.0; neither is saved again."""
    edit_weights(copied, with_earlier_tensors)
    config = json.loads((copied / "config.json").read_text())
    earlier = {"policy_baseline": "critic", "policy_ema_decay": 0.5, "critic_hidden_size": 8}
    (copied / "config.json").write_text(json.dumps({**config, **earlier}))
    loaded, expected = load(copied), tiny_model()
    assert_identical(loaded.state_dict(), expected.state_dict())
    assert_identical(outputs_of(loaded), outputs_of(expected))
    assert not any(hasattr(loaded.config, name) for name in earlier)
    loaded.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / WEIGHTS).keys() == load_file(copied / WEIGHTS).keys() - {
        "layer_policy.reward_ema",
        "layer_policy.reward_updates",
        "layer_policy.critic.0.weight",
        "layer_policy.critic.2.bias",
    }
    assert not earlier.keys() & json.loads((tmp_path / "again" / "config.json").read_text()).keys()


def test_shards_are_put_together_again(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_identical(load(tmp_path).state_dict(), model.state_dict())


def test_tied_embeddings_stay_tied(tmp_path):
    config = tiny_config()
    config.lmm_config.tie_word_embeddings = config.lmm_config.text_config.tie_word_embeddings = True
    torch.manual_seed(0)
    model = UGroundForReferringSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lmm.lm_head.weight is loaded.get_input_embeddings().weight
    assert_identical(outputs_of(loaded), outputs_of(model))


def test_a_resized_vocabulary_round_trips(tmp_path):
    model = tiny_model()
    model.resize_token_embeddings(44)
    model.save_pretrained(tmp_path)
    assert_identical(load(tmp_path).state_dict(), model.state_dict())


def test_generation_settings_round_trip(tmp_path):
    model = tiny_model()
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path)
    assert load(tmp_path).generation_config.max_new_tokens == 7
    assert load(tmp_path).generate(**tiny_inputs([[5]])).shape[1] <= 18 + 7


@pytest.mark.parametrize(
    "settings", [{"dtype": torch.bfloat16}, {"device_map": "auto"}, {"attn_implementation": "eager"}]
)
def test_loading_options(folder, settings):
    model, inputs = load(folder, **settings), tiny_inputs(ROWS)
    dtype = settings.get("dtype", torch.float32)
    assert {value.dtype for value in model.parameters()} == {dtype}
    assert model.lmm.config._attn_implementation == settings.get("attn_implementation", "sdpa")
    with torch.no_grad():
        outputs = model(**inputs)
    assert outputs.logits.dtype == dtype
    assert outputs.mask_logits.dtype == torch.float32
    tolerance = {"atol": 0.1, "rtol": 0.1} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    seen, expected = inputs["attention_mask"].bool(), outputs_of(load(folder))
    torch.testing.assert_close(outputs.logits[seen].float(), expected.logits[seen], **tolerance)
    if dtype == torch.float32:
        torch.testing.assert_close(outputs.mask_logits, expected.mask_logits, **tolerance)
    assert model.segment(**inputs, max_new_tokens=2).sequences.shape == (3, 24)


def test_a_model_larger_than_the_memory_keeps_sam_and_moves_layers_of_the_lmm(folder, tmp_path):
    whole = load(folder)
    sam_bytes = sum(value.numel() * 4 for value in whole.mask_decoder.parameters())
    model = load(folder, device_map="auto", max_memory={"cpu": sam_bytes + 50000}, offload_folder=tmp_path)
    assert model.hf_device_map["mask_decoder"] == "cpu"
    assert model.lmm.lm_head.weight.is_meta and not model.lmm.model.vision_tower.embeddings.class_embedding.is_meta
    assert_identical(outputs_of(model), outputs_of(whole))
    inputs = tiny_inputs(ROWS)
    expected = whole.segment(**inputs, max_new_tokens=3).sequences
    assert torch.equal(model.segment(**inputs, max_new_tokens=3).sequences, expected)


def test_sam_is_never_split(folder, tmp_path):
    """It reads weights of its parts directly, which then would have to lie on one device."""
    sam_bytes = sum(value.numel() * 4 for value in load(folder).mask_decoder.parameters())
    model = load(folder, device_map="auto", max_memory={"cpu": sam_bytes // 2}, offload_folder=tmp_path)
    assert [name for name in model.hf_device_map if name.startswith("mask_decoder.")] == []


LOADERS = pytest.mark.parametrize("loader", [load, load_with_auto_class], ids=["class", "auto class"])


@LOADERS
@pytest.mark.parametrize(
    "name",
    [
        "layer_policy.gates",
        "segment_projection.linear_2.weight",
        "segment_projection.linear_1.bias",
        "similarity_scaling.bias",
    ],
)
def test_a_missing_tensor_is_named(copied, loader, name):
    edit_weights(copied, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"weights in .* do not fit the model; tensors missing: {name}$"):
        loader(copied)


@LOADERS
def test_an_unexpected_tensor_is_named(copied, loader):
    edit_weights(copied, lambda tensors: tensors.update({"ppm.gates": torch.zeros(2)}))
    with pytest.raises(ValueError, match="do not fit the model; tensors unexpected: ppm.gates$"):
        loader(copied)


@LOADERS
def test_a_wrongly_shaped_tensor_is_named(copied, loader):
    edit_weights(copied, lambda tensors: tensors.update({"layer_policy.gates": torch.zeros(2, 3)}))
    sentence = r"tensors of the wrong shape: layer_policy.gates \(got \(2, 3\), expected \(5, 16\)\)$"
    with pytest.raises(ValueError, match=sentence):
        loader(copied)


def test_tensors_of_lmm_and_sam_are_named_too(copied):
    """The file has other names for some of them than the model."""

    def lose(tensors):
        for part in ("lm_head", "vision_tower.embeddings.patch_embedding", "iou_token"):
            (name,) = (name for name in tensors if part in name)
            del tensors[name]

    edit_weights(copied, lose)
    with pytest.raises(ValueError) as raised:
        load(copied)
    assert str(raised.value).endswith(
        "tensors missing: lmm.lm_head.weight, lmm.model.vision_tower.embeddings.patch_embedding.weight, "
        "mask_decoder.sam.mask_decoder.iou_token.weight"
    )


RETYPED = {
    "mask path": ("segment_projection.linear_1.weight", torch.int32, "I32", "float"),
    "policy": ("layer_policy.gates", torch.int64, "I64", "float"),
    "bytes": ("similarity_scaling.bias", torch.int8, "I8", "float"),
    "truth": ("mask_decoder.sam.mask_decoder.iou_token.weight", torch.bool, "BOOL", "float"),
    "language model": ("lmm.language_model.model.norm.weight", torch.uint8, "U8", "float"),
    "eight bits": ("segment_projection.linear_2.weight", torch.float8_e4m3fn, "F8_E4M3", "float"),
    "complex": ("layer_policy.gates", torch.complex64, "C64", "float"),
}


@pytest.mark.parametrize("name, dtype, got, expected", RETYPED.values(), ids=RETYPED)
def test_a_tensor_of_another_kind_of_number_is_named(copied, name, dtype, got, expected):
    edit_weights(copied, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    sentence = (
        rf"weights in .* do not fit the model; tensors of the wrong type: {name} \(got {got}, expected {expected}\)$"
    )
    with pytest.raises(ValueError, match=sentence):
        load(copied)


def test_a_tensor_of_another_kind_is_named_in_shards_pickles_and_state_dicts(folder, tmp_path):
    def retype(tensors):
        return {**tensors, "layer_policy.gates": tensors["layer_policy.gates"].int()}

    wrong = r"wrong type: layer_policy.gates \(got I32, expected float\)$"
    model = load(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    for shard in (tmp_path / "shards").glob("*.safetensors"):
        tensors = load_file(shard)
        if "layer_policy.gates" in tensors:
            save_file(retype(tensors), shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=wrong):
        load(tmp_path / "shards")
    plain = shutil.copytree(folder, tmp_path / "pickle")
    tensors = load_file(plain / WEIGHTS)
    (plain / WEIGHTS).unlink()
    torch.save(tensors, plain / "pytorch_model.bin")
    assert_identical(load(plain).state_dict(), model.state_dict())
    torch.save(retype(tensors), plain / "pytorch_model.bin")
    wrong = wrong.replace("I32", "int32")
    with pytest.raises(ValueError, match=wrong):
        load(plain)
    with pytest.raises(ValueError, match=wrong):
        load(None, config=model.config, state_dict=retype(tensors))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_precisions_are_no_other_kind(copied, dtype):
    edit_weights(
        copied, lambda tensors: tensors.update({"layer_policy.gates": tensors["layer_policy.gates"].to(dtype)})
    )
    assert load(copied).layer_policy.gates.dtype == torch.float32


def test_all_problems_are_told_at_once(copied):
    def edit(tensors):
        del tensors["segment_projection.linear_1.bias"]
        tensors["layer_policy.gates"] = torch.zeros(1)
        tensors.update({f"extra.{number}": torch.zeros(1) for number in range(10)})

    edit_weights(copied, edit)
    with pytest.raises(ValueError) as raised:
        load(copied)
    sentence = str(raised.value)
    assert "missing: segment_projection.linear_1.bias;" in sentence
    assert "unexpected: extra.0, extra.1" in sentence and "extra.7 and 2 more;" in sentence
    assert "of the wrong shape: layer_policy.gates (got (1,), expected (5, 16))" in sentence
    assert "\n" not in sentence


def test_wrong_shapes_may_be_allowed_on_purpose(copied):
    edit_weights(copied, lambda tensors: tensors.update({"layer_policy.gates": torch.ones(2, 3)}))
    assert torch.equal(load(copied, ignore_mismatched_sizes=True).layer_policy.gates, torch.zeros(5, 16))


def test_loading_info_is_still_to_be_had(folder):
    model, info = load(folder, output_loading_info=True)
    assert isinstance(model, UGroundForReferringSegmentation)
    assert not any(info.values())


@pytest.mark.parametrize("kept", [0, 100, 20000])
def test_truncated_weights_are_an_os_error(copied, kept):
    (copied / WEIGHTS).write_bytes((copied / WEIGHTS).read_bytes()[:kept])
    with pytest.raises(OSError, match=f"the weights in {copied} cannot be read: "):
        load(copied)


@LOADERS
def test_a_folder_without_weights_is_no_checkpoint(copied, loader):
    (copied / WEIGHTS).unlink()
    with pytest.raises(OSError, match=f"no file named model.safetensors.* found in directory {copied}"):
        loader(copied)


@LOADERS
def test_an_empty_folder_is_no_checkpoint(tmp_path, loader):
    with pytest.raises((OSError, ValueError), match=str(tmp_path)):
        loader(tmp_path)


@LOADERS
def test_a_broken_config_is_an_os_error(copied, loader):
    (copied / "config.json").write_text('{"model_type": ')
    with pytest.raises(OSError, match="config.json'? is (no|not a valid) JSON file"):
        loader(copied)


def test_a_saved_config_says_where_the_code_is(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "uground"
    assert config["architectures"] == ["UGroundForReferringSegmentation"]
    assert config["auto_map"] == {
        "AutoConfig": "configuration_uground.UGroundConfig",
        "AutoModel": "modeling_uground.UGroundForReferringSegmentation",
        "AutoModelForImageTextToText": "modeling_uground.UGroundForReferringSegmentation",
    }
    assert config["custom_pipelines"] == {
        "referring-segmentation": {
            "impl": "pipeline_uground.ReferringSegmentationPipeline",
            "pt": ["AutoModel"],
            "type": "multimodal",
        }
    }


def code_files():
    return {path.name: path for path in Path(modeling_uground.__path__[0]).glob("*.py") if path.name != "__init__.py"}


def test_the_code_of_the_model_comes_with_it(folder):
    assert {path.name for path in folder.glob("*.py")} >= set(code_files())
    for name, path in code_files().items():
        assert (folder / name).read_text() == path.read_text()


def test_every_file_is_reached_from_the_entry_file_and_from_nowhere_else():
    """What the Hub gets is what the entry file imports, and what these import."""
    files = code_files()
    reached, waiting = set(), {"modeling_uground.py"}
    while waiting:
        name = waiting.pop()
        reached.add(name)
        imports = [node for node in ast.walk(ast.parse(files[name].read_text())) if isinstance(node, ast.ImportFrom)]
        assert all(node.level <= 1 and (node.level or not node.module.startswith("uground")) for node in imports)
        waiting |= {f"{node.module}.py" for node in imports if node.level} - reached
    assert reached == set(files)


SETTINGS = {
    "prompts": ("mask", "points"),
    "layer_selection": 2,
    "num_layer_samples": 3,
    "similarity_scaling": "minmax",
    "embedding_layer": "last",
    "image_frame": "stretch",
    "mask_head": "sam",
    "num_points": 9,
    "point_thresholds": (0.6, 0.1),
    "point_downsample": 4,
    "layer_policy": False,
    "num_segment_tokens": 3,
    "initializer_range": 0.1,
    "reject_token_id": None,
}


def test_the_config_round_trips(tmp_path):
    config = tiny_config(**SETTINGS)
    config.save_pretrained(tmp_path)
    for loaded in (
        UGroundConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path, trust_remote_code=True),
    ):
        assert {name: getattr(loaded, name) for name in SETTINGS} == SETTINGS
        assert loaded.lmm_config.to_dict() == config.lmm_config.to_dict()
        assert loaded.sam_config.to_dict() == config.sam_config.to_dict()
        assert loaded.num_layers == 5
        assert loaded.token_grid_hw == (4, 4)
        assert loaded.frame_size == 64
        assert loaded.image_token_id == 39


def test_a_config_in_memory_knows_its_pipeline_too():
    """transformers asks every config for the length of this."""
    assert list(tiny_config().custom_pipelines) == ["referring-segmentation"]
    other = {"other": {"impl": "a.B", "pt": ["AutoModel"], "type": "multimodal"}}
    assert tiny_config(custom_pipelines=other).custom_pipelines == other


def test_sub_configs_may_be_dictionaries():
    config = tiny_config()
    rebuilt = UGroundConfig(lmm_config=config.lmm_config.to_dict(), sam_config=config.sam_config.to_dict())
    assert rebuilt.lmm_config.text_config.num_hidden_layers == 4
    assert rebuilt.sam_config.vision_config.image_size == 64


WRONG_SETTINGS = {
    "prompts": (
        ("mask", "points", "box"),
        r"prompts must be of \('embedding', 'mask', 'points'\), .* got \('mask', 'points', 'box'\)",
    ),
    "prompts text": ("mask", "prompts must be of .*, got 'mask'"),
    "prompts twice": (("mask", "mask"), r"prompts must be of .*, each at most once, got \('mask', 'mask'\)"),
    "no prompts": ((), r"a mask head needs prompts of \('embedding', 'mask', 'points'\), got \(\)"),
    "layer_selection": ("best", "layer_selection must be one of .* or a layer number, got 'best'"),
    "layer_selection float": (1.5, "layer_selection must be one of .* or a layer number, got 1.5"),
    "layer_selection bool": (True, "layer_selection must be one of .* or a layer number, got True"),
    "layer_selection high": (5, "layer_selection must lie in 0..4 for this model, got 5"),
    "layer_selection low": (-1, "layer_selection must lie in 0..4 for this model, got -1"),
    "similarity_scaling": ("cosine", r"similarity_scaling must be one of \('minmax', 'scaled'\), got 'cosine'"),
    "embedding_layer": ("first", r"embedding_layer must be one of \('selected', 'last'\), got 'first'"),
    "num_layer_samples": (0, "num_layer_samples must be at least 1, got 0"),
    "num_segment_tokens": (0, "num_segment_tokens must be at least 1, got 0"),
    "num_segment_tokens bool": (True, "num_segment_tokens must be at least 1, got True"),
    "num_points": (0, "num_points must be at least 1, got 0"),
    "point_downsample": (0, "point_downsample must be at least 1, got 0"),
    "point_thresholds order": (
        (0.2, 0.8),
        r"point_thresholds must be two numbers in 0..1, .* of positive points above .*, got \(0.2, 0.8\)",
    ),
    "point_thresholds equal": ((0.5, 0.5), r"point_thresholds must be two numbers .*, got \(0.5, 0.5\)"),
    "point_thresholds range": ((1.2, 0.1), r"point_thresholds must be two numbers in 0..1.*, got \(1.2, 0.1\)"),
    "point_thresholds nan": ((float("nan"), 0.1), r"point_thresholds must be two numbers in 0..1.*, got \(nan"),
    "point_thresholds one": ((0.5,), r"point_thresholds must be two numbers in 0..1.*, got \(0.5,\)"),
    "image_frame": ("tiles", r"image_frame must be one of \('letterbox', 'centre_crop', 'stretch'\), got 'tiles'"),
    "mask_head": ("queries", r"mask_head must be one of \(None, 'sam', 'sam2'\), got 'queries'"),
    "point_thresholds number": (0.5, "point_thresholds must be two numbers in 0..1.*, got 0.5"),
    "point_thresholds text": (("a", "b"), r"point_thresholds must be two numbers in 0..1.*, got \('a', 'b'\)"),
    "sam_config": (None, r"prompts are for a mask head, which needs a sam_config, got \('mask',\) without one"),
    "layer_policy text": ("no", "layer_policy must be True or False, got 'no'"),
    "layer_policy": (
        False,
        "layer_selection 'argmax' needs a layer policy, which this model has not; expected 'last' or a layer number$",
    ),
}
# What else a config says, where a mistake needs it.
BESIDE = {"sam_config": {"prompts": ("mask",)}}


@pytest.mark.parametrize("case", WRONG_SETTINGS)
def test_wrong_settings_are_refused(case):
    value, sentence = WRONG_SETTINGS[case]
    name = case.split()[-1 if case == "no prompts" else 0]
    with pytest.raises(ValueError, match=sentence) as raised:
        tiny_config(**{name: value, **BESIDE.get(case, {})})
    assert "\n" not in str(raised.value)


def test_points_need_cells_that_fill_the_token_grid():
    with pytest.raises(ValueError, match="point_downsample must divide the 4 x 4 token grid, got 3"):
        tiny_config(point_downsample=3, prompts=("points",))


def test_a_mask_head_and_its_sam_go_together():
    with pytest.raises(ValueError, match="mask_head 'sam' and a sam_config go together, got mask_head 'sam'"):
        tiny_config(sam_config=None, mask_head="sam")


def test_the_sam_must_have_patches_of_16_pixels():
    config = tiny_config()
    config.sam_config.vision_config.patch_size = 8
    with pytest.raises(ValueError, match="patches of 16 pixels, got 8"):
        UGroundConfig(lmm_config=config.lmm_config, sam_config=config.sam_config)


STRANGER = """
import sys
sys.modules["uground"] = None
import torch, transformers
from transformers import AutoConfig, AutoModel
transformers.logging.set_verbosity_error()
folder, broken, data = sys.argv[1:]
try:
    import uground
except ImportError:
    pass
else:
    raise SystemExit("uground can be imported")
case = torch.load(data)
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).segment_token_id == case["segment_token_id"]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
with torch.no_grad():
    outputs = model(**case["inputs"])
for name, expected in case["outputs"].items():
    assert torch.equal(outputs[name], expected), name
written = model.segment(**case["inputs"], max_new_tokens=3)
assert torch.equal(written.sequences, case["sequences"])
try:
    AutoModel.from_pretrained(broken, trust_remote_code=True)
except ValueError as error:
    print(error)
"""


def test_a_plain_folder_loads_where_uground_is_not_installed(folder, copied, tmp_path):
    edit_weights(copied, lambda tensors: tensors.pop("layer_policy.gates"))
    model, inputs = load(folder), tiny_inputs(ROWS)
    sequences = model.segment(**inputs, max_new_tokens=3).sequences
    case = {"inputs": inputs, "outputs": dict(outputs_of(model)), "sequences": sequences}
    torch.save({**case, "segment_token_id": SEGMENT_TOKEN}, tmp_path / "case.pt")
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder), str(copied), str(tmp_path / "case.pt")],
        cwd=tmp_path,
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith("do not fit the model; tensors missing: layer_policy.gates")
