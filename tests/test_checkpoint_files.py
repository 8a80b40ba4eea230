"""Files of a checkpoint that are cut, foreign, or of another type: one sentence that names the file."""

import importlib
import json
import logging
import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_merge_lora import ROWS, write_adapter
from tiny import tiny_inputs, tiny_model
from tiny_processor import gradient_image, tiny_processor

from uground.checkpoint_loading import load_model, load_processor
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.processing import UGroundProcessor
from uground.training import check_data

command = importlib.import_module("uground.__main__")
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
CONFIG, PROCESSOR, GENERATION = "config.json", "processor_config.json", "generation_config.json"
TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
# Ways to break any JSON file, and the part of the sentence that says so.
BROKEN = {
    "cut": (lambda content: content[: len(content) // 2], "JSON"),
    "empty": (lambda _: b"", "is empty"),
    "pointer": (lambda _: POINTER, "is a pointer of Git LFS, fetch the file itself"),
    "list": (lambda _: b"[1]", "must hold a JSON object, got list"),
    "null": (lambda _: b"null", "must hold a JSON object, got NoneType"),
    "UTF-16": (lambda content: content.decode().encode("utf-16"), "UTF-8"),
    "BOM": (lambda content: b"\xef\xbb\xbf" + content, "BOM"),
    "Latin-1": (lambda _: b'{"a": "\xe9"}', "utf-8"),
    "deep": (lambda _: b"[" * 100_000, "recursion"),
    "huge number": (lambda _: b'{"a": ' + b"9" * 5000 + b"}", "limit"),
}
LOADERS = {
    CONFIG: UGroundConfig.from_pretrained,
    GENERATION: UGroundForReferringSegmentation.from_pretrained,
    WEIGHTS: UGroundForReferringSegmentation.from_pretrained,
    INDEX: UGroundForReferringSegmentation.from_pretrained,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


def spoilt(checkpoint: Path, folder: Path, name: str, content: bytes) -> Path:
    """The checkpoint with other content in one file."""
    for path in checkpoint.iterdir():
        if path.name != name:
            os.link(path, folder / path.name)
    (folder / name).write_bytes(content)
    return folder


def refusal(load, folder: Path, name: str) -> str:
    """The sentence by which a folder is refused; it names the file."""
    with pytest.raises((ValueError, OSError)) as error:
        load(folder)
    said = str(error.value)
    assert "\n" not in said and name in said and str(folder) in said, said
    return said


def edited(checkpoint: Path, name: str, changes: dict) -> bytes:
    """A JSON file with other values at dotted places; `...` takes one away."""
    content = json.loads((checkpoint / name).read_text())
    for place, value in changes.items():
        *path, last = place.split(".")
        inner = content
        for key in path:
            inner = inner[key]
        if value is ...:
            del inner[last]
        else:
            inner[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize("name", [CONFIG, GENERATION, PROCESSOR, TOKENIZER, SETTINGS])
def test_a_broken_json_file(name, way, checkpoint, tmp_path):
    change, message = BROKEN[way]
    folder = spoilt(checkpoint, tmp_path, name, change((checkpoint / name).read_bytes()))
    assert message in refusal(LOADERS.get(name, UGroundProcessor.from_pretrained), folder, name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "float99"}, "dtype must be a dtype of PyTorch to compute in, such as float32, got 'float99'"),
        ({"dtype": "nn"}, "dtype must be a dtype of PyTorch to compute in, such as float32, got 'nn'"),
        ({"lmm_config.dtype": 5}, "lmm_config.dtype must be a dtype of PyTorch to compute in, such as float32, got 5"),
        ({"dtype": "int32"}, "such as float32, got 'int32'"),
        ({"dtype": "float8_e4m3fn"}, "such as float32, got 'float8_e4m3fn'"),
        ({"dtype": "torch.float32"}, "such as float32, got 'torch.float32'"),
        ({"lmm_config.text_config.dtype": "bool"}, "lmm_config.text_config.dtype must be a dtype of PyTorch"),
        ({"lmm_config": ...}, "must describe the model in lmm_config and sam_config, got lmm_config None"),
        ({"lmm_config": {}}, "got lmm_config {}"),
        ({"sam_config": ...}, "must describe the model in lmm_config and sam_config, got sam_config None"),
        ({"sam_config": "sam"}, "got sam_config 'sam'"),
        ({"sam_config": {}}, "got sam_config {}"),
        ({"sam_config": None}, "mask_head 'sam' and a sam_config go together, got mask_head 'sam'"),
        ({"lmm_config.model_type": "nonesuch"}, "model_type that transformers knows, got 'nonesuch'"),
        ({"lmm_config.text_config": ...}, "lmm_config must describe its text_config, got None"),
        ({"lmm_config.vision_config": {}}, "lmm_config must describe its vision_config, got {}"),
        ({"lmm_config.text_config.hidden_size": "16"}, "expected int, got str"),
        ({"lmm_config.text_config.num_attention_heads": 0}, "modulo by zero"),
        ({"num_layer_samples": "8"}, "num_layer_samples must be of type int, got '8'"),
        ({"segment_token_id": 3.5}, "segment_token_id must be of type int | None, got 3.5"),
        ({"prompts": 5}, "prompts must be of type"),
        ({"prompts": "mask"}, "prompts must be of type"),
        ({"point_thresholds": "high"}, "point_thresholds must be of type"),
        ({"num_points": "8"}, "num_points must be of type int, got '8'"),
        ({"layer_policy": "no"}, "layer_policy must be of type bool, got 'no'"),
        ({"layer_selection": 1.5}, "layer_selection must be of type str | int, got 1.5"),
        ({"initializer_range": "x"}, "initializer_range must be of type float, got 'x'"),
        ({"id2label": 5}, "cannot be used"),
        ({"auto_map": 5}, "auto_map must be of type dict | None, got 5"),
        ({"auto_map": ["configuration_uground.UGroundConfig"]}, "auto_map must be of type dict | None, got ["),
    ],
)
def test_a_config_of_other_values(changes, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, CONFIG, edited(checkpoint, CONFIG, changes))
    for load in (UGroundConfig.from_pretrained, UGroundForReferringSegmentation.from_pretrained):
        assert message in refusal(load, folder, CONFIG)


def test_a_float_may_be_written_as_a_whole_number(checkpoint, tmp_path):
    changes = {"initializer_range": 0, "point_thresholds": [1, 0], "prompts": ["points"]}
    folder = spoilt(checkpoint, tmp_path, CONFIG, edited(checkpoint, CONFIG, changes))
    config = UGroundConfig.from_pretrained(folder)
    assert (config.initializer_range, config.point_thresholds) == (0, (1, 0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lmm_config.text_config.hidden_size": 10**30}, "but the weights have"),
        ({"lmm_config.text_config.vocab_size": 10**12}, "shape (1000000000000, 16), but the weights have"),
        ({"lmm_config.text_config.num_hidden_layers": 10**9}, "num_hidden_layers 1000000000, but the weights hold"),
        ({"lmm_config.text_config.vocab_size": -5}, "must lie in the vocabulary of -5 tokens"),
        ({"lmm_config.text_config.hidden_act": "nonesuch"}, "no model can be built of the config.json of"),
        ({"lmm_config.vision_config.patch_size": 0}, "no model can be built of the config.json of"),
    ],
)
def test_a_config_that_no_model_can_be_built_of(changes, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, CONFIG, edited(checkpoint, CONFIG, changes))
    assert message in refusal(UGroundForReferringSegmentation.from_pretrained, folder, CONFIG)


@pytest.mark.parametrize("content", [POINTER, b"", b"no weights", b"\xff" * 100, "cut"], ids=repr)
def test_weights_that_are_none(content, checkpoint, tmp_path):
    content = (checkpoint / WEIGHTS).read_bytes()[:100_000] if content == "cut" else content
    folder = spoilt(checkpoint, tmp_path, WEIGHTS, content)
    assert "cannot be read" in refusal(UGroundForReferringSegmentation.from_pretrained, folder, WEIGHTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"weight_map": {"a": "model-1.safetensors"}}', "metadata must be an object, got None"),
        (b'{"metadata": [], "weight_map": {"a": "model-1.safetensors"}}', "metadata must be an object, got []"),
        (b'{"metadata": {}, "weight_map": {}}', "weight_map must be an object, got {}"),
        (
            b'{"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}',
            "names model-1.safetensors, which",
        ),
        (POINTER, "pointer of Git LFS"),
        (b'{"metadata": {}, "wei', "is no index of weights"),
    ],
)
def test_an_index_that_is_none(content, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, INDEX, content)
    (folder / WEIGHTS).unlink()
    assert message in refusal(UGroundForReferringSegmentation.from_pretrained, folder, INDEX)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be the id of a token, or a list of them, got '</s>'"),
        ({"eos_token_id": 10**6}, "eos_token_id must lie in the vocabulary of 40 tokens, got 1000000"),
        ({"eos_token_id": [2, -1]}, "eos_token_id must lie in the vocabulary of 40 tokens, got -1"),
        ({"suppress_tokens": [1, None]}, "suppress_tokens must be the id of a token"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number of at least 1, got 'many'"),
        ({"num_beams": 0}, "num_beams must be a whole number of at least 1, got 0"),
        ({"cache_implementation": "nonesuch"}, "cannot be used"),
    ],
)
def test_generation_settings_of_other_values(changes, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, GENERATION, edited(checkpoint, GENERATION, changes))
    assert message in refusal(UGroundForReferringSegmentation.from_pretrained, folder, GENERATION)


def test_a_tokenizer_that_is_missing(checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, TOKENIZER, b"")
    (folder / TOKENIZER).unlink()
    assert f"{folder} holds no {TOKENIZER}" in refusal(UGroundProcessor.from_pretrained, folder, TOKENIZER)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (PROCESSOR, {"image_processor": None}, "must have the keys image_processor"),
        (PROCESSOR, {"image_processor.size": {"longest_edge": -32}}, "must have the same side in 1.."),
        (PROCESSOR, {"image_processor.size": {"longest_edge": 10**9}}, "must have the same side in 1.."),
        (PROCESSOR, {"sam_image_processor.pad_size": None}, "must have the same side in 1.."),
        (PROCESSOR, {"image_processor.image_mean": [1.0, 2.0]}, "image_mean of image_processor must be three numbers"),
        (PROCESSOR, {"image_processor.image_std": [0, 0, 0]}, "image_std of image_processor must be positive"),
        (PROCESSOR, {"image_processor.do_rescale": "maybe"}, "do_rescale of image_processor must be true or false"),
        (PROCESSOR, {"patch_size": "8"}, "patch_size must be a whole number of at least 1, got '8'"),
        (PROCESSOR, {"patch_size": 0}, "patch_size must be a whole number of at least 1, got 0"),
        (PROCESSOR, {"segment_token": None}, "segment_token must be a text, got None"),
        (SETTINGS, {"model_max_length": "long"}, "model_max_length must be a number of at least 1, got 'long'"),
        (SETTINGS, {"model_max_length": -1}, "model_max_length must be a number of at least 1, got -1"),
        (SETTINGS, {"pad_token": ...}, "must have a pad_token, got one without"),
        (SETTINGS, {"pad_token": 5}, "has to be either str or AddedToken"),
        (SETTINGS, {"padding_side": "up"}, "up"),
        (TOKENIZER, {"model.type": "Nonesuch"}, "is no tokenizer"),
        (TOKENIZER, {"model.vocab": {}}, "Missing [UNK] token"),
        (TOKENIZER, {"version": "9"}, "Unknown tokenizer version '9'"),
        (TOKENIZER, {"added_tokens": []}, "must read [SEG] as exactly one id"),
    ],
)
def test_a_processor_of_other_values(name, changes, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, name, edited(checkpoint, name, changes))
    assert message in refusal(UGroundProcessor.from_pretrained, folder, name)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json", "chat_template.json"])
@pytest.mark.parametrize("content", [POINTER, b'{"pad', b"[]", b"null"], ids=repr)
def test_files_of_older_processors(name, content, checkpoint, tmp_path):
    refusal(UGroundProcessor.from_pretrained, spoilt(checkpoint, tmp_path, name, content), name)


@pytest.mark.parametrize("content", [POINTER, b"", b"\xff\xfe", b"{{ no.such.thing }}", "cut"], ids=repr)
def test_a_chat_template_that_is_none(content, checkpoint, tmp_path):
    content = (checkpoint / TEMPLATE).read_bytes()[:200] if content == "cut" else content
    refusal(UGroundProcessor.from_pretrained, spoilt(checkpoint, tmp_path, TEMPLATE, content), TEMPLATE)


@pytest.mark.parametrize("text", ["hello ", "{{ messages[0]['content'][1]['text'] }} ASSISTANT :"])
def test_a_chat_template_that_lacks_what_a_prompt_needs(text, checkpoint, tmp_path):
    """As one may that was cut between two of its statements."""
    folder = spoilt(checkpoint, tmp_path, TEMPLATE, text.encode())
    refusal(load_processor, folder, TEMPLATE)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            CONFIG,
            {"segment_token_id": 5},
            "segment_token_id the config says 5, the tokenizer 38, and the vocabulary",
        ),
        (CONFIG, {"segment_token_id": 10**6}, "segment_token_id must lie in the vocabulary of 40 tokens, got 1000000"),
        (CONFIG, {"segment_token_id": -1}, "segment_token_id must lie in the vocabulary of 40 tokens, got -1"),
        (CONFIG, {"reject_token_id": 38}, "segment_token_id and reject_token_id must differ, got 38 for both"),
        (
            CONFIG,
            {"lmm_config.image_token_index": 7},
            "image_token_id the config says 7, the tokenizer 39, and the",
        ),
        (
            PROCESSOR,
            {"patch_size": 4},
            "the side of patch_size is 4 pixels in processor_config.json and 8 in",
        ),
        (
            PROCESSOR,
            {"image_processor.size": {"longest_edge": 64}, "image_processor.pad_size": {"height": 64, "width": 64}},
            "the side of image_processor is 64 pixels in processor_config.json and 32 in config.json",
        ),
    ],
)
def test_a_model_and_a_processor_that_do_not_belong_together(name, changes, message, checkpoint, tmp_path):
    folder = spoilt(checkpoint, tmp_path, name, edited(checkpoint, name, changes))
    assert message in refusal(load_processor, folder, name)


def test_ids_are_held_against_the_vocabulary(checkpoint, tmp_path):
    changes = {"lmm_config.text_config.vocab_size": 38}
    folder = spoilt(checkpoint, tmp_path, CONFIG, edited(checkpoint, CONFIG, changes))
    assert "must lie in the vocabulary of 38 tokens, got 38" in refusal(load_processor, folder, CONFIG)


def test_a_command_says_it_in_one_line(checkpoint, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.fromarray(gradient_image(30, 50)).save(image)
    (tmp_path / "model").mkdir()
    folder = spoilt(checkpoint, tmp_path / "model", WEIGHTS, POINTER)
    assert command.main([str(image), "the cup", "--model", str(folder)]) == 2
    reason = "it is a pointer of Git LFS, fetch the file itself with `git lfs pull`"
    printed = capsys.readouterr().err
    assert printed == f"uground: error: the weights in {folder} cannot be read: {WEIGHTS}: {reason}\n"


def test_checking_data_for_a_model_refuses_it_as_training_does(checkpoint, tmp_path, capsys):
    folder = spoilt(checkpoint, tmp_path, CONFIG, edited(checkpoint, CONFIG, {"segment_token_id": 5}))
    assert check_data.main([str(tmp_path / "mine.jsonl"), "--model", str(folder)]) == 2
    assert "for segment_token_id the config says 5, the tokenizer 38" in capsys.readouterr().err


def test_tensors_that_do_not_fit_are_told_once(checkpoint, tmp_path, caplog, monkeypatch):
    weights = load_file(checkpoint / WEIGHTS)
    del weights["layer_policy.gates"]
    folder = spoilt(checkpoint, tmp_path, WEIGHTS, b"")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    with pytest.raises(ValueError, match="tensors missing: layer_policy.gates"):
        load_model(folder)
    assert not caplog.records


@pytest.fixture
def adapter(checkpoint, tmp_path):
    """An adapter of the checkpoint, and the model that it was trained as."""
    adapted = write_adapter(tmp_path / "adapter", UGroundForReferringSegmentation.from_pretrained(checkpoint))
    return tmp_path / "adapter", adapted


def test_the_folder_of_an_adapter_is_opened_as_its_base_with_the_adapter(adapter, checkpoint):
    folder, adapted = adapter
    assert load_processor(folder).segment_token_id == 38
    inputs = tiny_inputs(ROWS)
    with torch.no_grad():
        found, expected = load_model(folder)(**inputs), adapted(**inputs)
        base = load_model(checkpoint)(**inputs)
    torch.testing.assert_close(found.mask_logits, expected.mask_logits)
    assert (base.mask_logits - expected.mask_logits).abs().max() > 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": "/no/where"}, "whose base '/no/where' cannot be opened"),
        ({"base_model_name_or_path": None}, "must name the base of its adapter in base_model_name_or_path, got None"),
        ({"peft_type": ...}, "peft_type must be a name, got None"),
    ],
)
def test_an_adapter_without_its_base(changes, message, adapter):
    folder, _ = adapter
    (folder / "adapter_config.json").write_bytes(edited(folder, "adapter_config.json", changes))
    with pytest.raises((OSError, ValueError)) as error:
        load_processor(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_an_adapter_that_does_not_fit_is_refused(adapter):
    folder, _ = adapter
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: torch.zeros(1) for name in weights}, path)
    with pytest.raises(ValueError, match="the adapter in .* does not fit its base"):
        load_model(folder)
    path.write_bytes(POINTER)
    with pytest.raises(OSError, match="adapter_model.safetensors: it is a pointer of Git LFS"):
        load_model(folder)


def test_saved_weights_can_be_read_by_those_who_can_read_the_rest(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            tiny_model().save_pretrained(tmp_path / oct(mask))
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / oct(mask)).iterdir()}
        assert set(modes.values()) == {mode}, modes
