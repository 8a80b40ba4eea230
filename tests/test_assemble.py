"""A fresh UGround from a LLaVA and a SAM: every tensor in its place, two new tokens, and it can be trained."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from official_case import converted_weights
from pycocotools import mask as coco_mask
from safetensors.torch import load_file, save_file
from tiny import IMAGE_TOKEN, tiny_config
from tiny_processor import gradient_image, tiny_tokenizer
from transformers import (
    AutoModel,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    SamModel,
)

from uground.hub.assemble import build_parser, extend_vocabulary, main, open_sam
from uground.hub.weights import checkpoint_writer
from uground.hub.weights.sam_weights import sam_to_original
from uground.modeling_uground import UGroundForReferringSegmentation
from uground.training.trainer import UGroundTrainer, UGroundTrainingConfig

NUM_WORDS, NUM_ROWS = 38, 64


def random_weights(model):
    """The model with every parameter drawn anew, so that no zero or one hides a mistake."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2)
    return model


def write_llava(folder, kind=LlavaForConditionalGeneration, num_rows=NUM_ROWS, **saving):
    """A tiny LLaVA of transformers: 37 words and `<image>`, in a vocabulary rounded up."""
    torch.manual_seed(0)
    config = tiny_config().lmm_config
    config.image_token_index = NUM_WORDS - 1
    config.text_config.vocab_size = num_rows
    if kind is LlavaNextForConditionalGeneration:
        settings = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = LlavaNextConfig(**settings, image_grid_pinpoints=[[32, 64]])
    model = random_weights(kind(config))
    model.save_pretrained(folder, **saving)
    tiny_tokenizer(tokens=()).save_pretrained(folder)
    return model


def write_sam(folder):
    torch.manual_seed(1)
    sam = random_weights(SamModel(tiny_config().sam_config))
    sam.tie_weights()
    sam.save_pretrained(folder)
    return sam


def assemble(lmm, sam, output, *flags) -> int:
    return main([*map(str, ("--lmm", lmm, "--sam", sam, "--output", output, *flags))])


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders and models of both sources."""
    folder = tmp_path_factory.mktemp("parts")
    return {
        "folder": folder,
        "lmm": folder / "lmm",
        "sam": folder / "sam",
        "lmm_model": write_llava(folder / "lmm"),
        "sam_model": write_sam(folder / "sam"),
    }


@pytest.fixture(scope="module")
def fresh(parts):
    assert assemble(parts["lmm"], parts["sam"], parts["folder"] / "fresh") == 0
    return parts["folder"] / "fresh"


def test_every_tensor_is_in_its_place(parts, fresh):
    model = UGroundForReferringSegmentation.from_pretrained(fresh)
    for name, tensor in parts["lmm_model"].state_dict().items():
        found = model.lmm.state_dict()[name]
        if "embed_tokens" in name or "lm_head" in name:
            found, tensor = found[:NUM_WORDS], tensor[:NUM_WORDS]
        assert torch.equal(found, tensor), name
    for name, tensor in parts["sam_model"].state_dict().items():
        assert torch.equal(model.mask_decoder.sam.state_dict()[name], tensor), name


def test_new_tokens_begin_as_the_mean_of_the_old(parts, fresh):
    model = UGroundForReferringSegmentation.from_pretrained(fresh)
    assert (model.config.segment_token_id, model.config.reject_token_id) == (NUM_WORDS, NUM_WORDS + 1)
    for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        old, new = parts["lmm_model"].state_dict()[name], model.lmm.state_dict()[name]
        assert new.shape == old.shape
        mean = old[:NUM_WORDS].mean(0)
        torch.testing.assert_close(new[NUM_WORDS : NUM_WORDS + 2], mean.expand(2, -1))
        assert torch.equal(new[NUM_WORDS + 2 :], old[NUM_WORDS + 2 :])


def test_extended_vocabulary_by_hand():
    matrix = torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 9.0]])
    assert extend_vocabulary(matrix, num_old=2, num_tokens=4, num_rows=4).tolist() == [[1, 0], [3, 2], [2, 1], [2, 1]]
    assert extend_vocabulary(matrix, num_old=3, num_tokens=3, num_rows=3).tolist() == matrix.tolist()
    tight = extend_vocabulary(matrix.bfloat16(), num_old=1, num_tokens=2, num_rows=3)
    assert tight.dtype == torch.bfloat16 and tight.tolist() == [[1, 0], [1, 0], [9, 9]]


def test_a_vocabulary_without_room_grows(tmp_path, parts):
    write_llava(tmp_path / "lmm", num_rows=NUM_WORDS)
    assert assemble(tmp_path / "lmm", parts["sam"], tmp_path / "out") == 0
    model = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().weight.shape[0] == NUM_WORDS + 2
    assert model.config.get_text_config().vocab_size == NUM_WORDS + 2


def test_new_parts_are_those_of_an_untrained_model(fresh, parts):
    model = UGroundForReferringSegmentation.from_pretrained(fresh)
    assert not any(tensor.any() for tensor in model.layer_policy.state_dict().values())
    assert not model.similarity_scaling.bias.any()
    for linear in (model.segment_projection.linear_1, model.segment_projection.linear_2):
        assert not linear.bias.any() and 0.01 < linear.weight.std() < 0.03
    assert assemble(parts["lmm"], parts["sam"], parts["folder"] / "other", "--seed", "1") == 0
    other = UGroundForReferringSegmentation.from_pretrained(parts["folder"] / "other")
    assert not torch.equal(other.segment_projection.linear_1.weight, model.segment_projection.linear_1.weight)


def test_settings(fresh):
    model = AutoModel.from_pretrained(fresh, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(fresh, trust_remote_code=True)
    assert model.config.similarity_scaling == "scaled"
    assert model.generation_config.suppress_tokens == [model.config.image_token_id]
    assert (processor.image_token_id, processor.segment_token_id) == (NUM_WORDS - 1, NUM_WORDS)
    sizes = (processor.image_processor.pad_size["height"], processor.sam_image_processor.pad_size["height"])
    assert sizes == (32, 64) and processor.patch_size == 8 and processor.tokenizer.model_max_length == 200
    tokenizer = processor.tokenizer
    assert tokenizer.padding_side == "left"
    ids = tokenizer("it is [SEG] .", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["it", "is", "[SEG]", "."]


def test_flags(tmp_path, parts):
    flags = ("--dtype", "bfloat16", "--similarity-scaling", "minmax")
    assert assemble(parts["lmm"], parts["sam"], tmp_path / "out", *flags) == 0
    model = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.similarity_scaling == "minmax"
    stored = {name: tensor.dtype for name, tensor in converted_weights(tmp_path / "out").items()}
    assert set(stored.values()) == {torch.bfloat16}


@pytest.mark.parametrize("original_names", [False, True])
@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_llava_of_either_kind_and_either_naming(tmp_path, parts, fresh, kind, original_names):
    """LLaVA-1.6 is taken without its tiling; names are those of transformers 4 and 5."""
    write_llava(tmp_path / "lmm", kind, save_original_format=original_names)
    assert assemble(tmp_path / "lmm", parts["sam"], tmp_path / "out") == 0
    expected, found = converted_weights(fresh), converted_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    # LLaVA-1.6 has one tensor more, so its other tensors are drawn in another order.
    if kind is LlavaForConditionalGeneration:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    model = UGroundForReferringSegmentation.from_pretrained(tmp_path / "out")
    assert isinstance(model.lmm, LlavaForConditionalGeneration)


def test_old_names_of_the_vision_tower(tmp_path, parts, fresh):
    """Files of transformers 4 have another prefix there, and constants that are no longer stored."""
    weights = load_file(parts["lmm"] / "model.safetensors")
    prefix = "vision_tower."
    weights = {
        name.replace(prefix, f"{prefix}vision_model.", 1) if name.startswith(prefix) else name: tensor
        for name, tensor in weights.items()
    }
    weights["vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    source = copy_folder(parts["lmm"], tmp_path / "lmm")
    save_file(weights, source / "model.safetensors")
    assert assemble(source, parts["sam"], tmp_path / "out") == 0
    expected, found = converted_weights(fresh), converted_weights(tmp_path / "out")
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def copy_folder(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_original_sam(tmp_path, parts, fresh):
    """A file of Meta's gives the same tensors, and a config with the constants of the original code."""
    original = sam_to_original(parts["sam_model"].state_dict())
    torch.save(original | {"pixel_mean": torch.ones(3, 1, 1)}, tmp_path / "sam.pth")
    config, _, rename = open_sam(tmp_path / "sam.pth")[:3]
    # Heads are no size that a tensor shows; those of the tiny model are fewer than in any original.
    assert config.mask_decoder_config.num_attention_heads == 8
    assert rename("pixel_mean") is None and rename("nothing.weight") == "nothing.weight"
    assert assemble(parts["lmm"], tmp_path / "sam.pth", tmp_path / "out") == 0
    expected, found = converted_weights(fresh), converted_weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def example(index: int) -> dict:
    mask = np.zeros((48, 40), dtype=np.uint8, order="F")
    mask[4 + 8 * index : 30, 6:25] = 1
    encoded = coco_mask.encode(mask)
    return {
        "id": str(index),
        "image": gradient_image(48, 40),
        "query": "the red cup",
        "answer": "it is [SEG] .",
        "masks": [{"size": list(map(int, encoded["size"])), "counts": encoded["counts"].decode()}],
        "ignore": None,
    }


def examples(batch: dict) -> dict:
    """A column of examples in the common schema for each key."""
    found = [example(index) for index in batch["index"]]
    return {key: [entry[key] for entry in found] for key in found[0]}


def test_one_training_step(tmp_path, fresh):
    """It can be trained as it is: the rows of the new tokens, the policy and the projection move."""
    model = UGroundForReferringSegmentation.from_pretrained(fresh)
    processor = AutoProcessor.from_pretrained(fresh, trust_remote_code=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = {"report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True}
    config = UGroundTrainingConfig(
        output_dir=str(tmp_path / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        activation_checkpointing=False,
        loss_size=64,
        **settings,
    )
    dataset = Dataset.from_dict({"index": [0, 1]}).with_transform(examples)
    trainer = UGroundTrainer(model=model, args=config, processing_class=processor, train_dataset=dataset)
    trainer.train()
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {"layer_policy.gates", "segment_projection.linear_1.weight", "similarity_scaling.bias"} <= moved
    rows = after["lmm.lm_head.weight"] - before["lmm.lm_head.weight"]
    assert rows[NUM_WORDS].any()
    assert all(torch.isfinite(tensor).all() for tensor in after.values())


# --------------------------------------------------------------------------------------------------------- bad input


def refused(capsys, message: str, *arguments) -> None:
    assert assemble(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("assemble: error: ") and error.count("\n") == 1 and message in error, error
    assert not list(arguments[2].parent.glob(f"{arguments[2].name}*"))


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_lmm_that_is_none(tmp_path, capsys, parts):
    out = tmp_path / "out"
    source = copy_folder(parts["lmm"], tmp_path / "lmm")
    refused(capsys, "must be of type llava or llava_next, got sam", parts["sam"], parts["sam"], out)
    edit_config(source, vision_feature_select_strategy="full")
    refused(capsys, "must drop the class token", source, parts["sam"], out)
    (source / "config.json").write_text(json.dumps({"model_type": "llava", "mm_vision_tower": "clip"}))
    refused(capsys, "is in the layout of the LLaVA code", source, parts["sam"], out)
    refused(capsys, "neither a folder nor a Hub id", tmp_path / "no where", parts["sam"], out)


def test_a_tokenizer_that_does_not_fit(tmp_path, capsys, parts):
    source = copy_folder(parts["lmm"], tmp_path / "lmm")
    edit_config(source, image_token_index=IMAGE_TOKEN)
    message = f"<image> is number {NUM_WORDS - 1} in the tokenizer"
    refused(capsys, message, source, parts["sam"], tmp_path / "out")
    for path in source.glob("tokenizer*"):
        path.unlink()
    refused(capsys, "the tokenizer in", source, parts["sam"], tmp_path / "out")


def test_an_lmm_with_other_tensors(tmp_path, capsys, parts):
    source = copy_folder(parts["lmm"], tmp_path / "lmm")
    weights = load_file(source / "model.safetensors")
    del weights["language_model.model.norm.weight"]
    save_file(weights | {"more.weight": torch.ones(1)}, source / "model.safetensors")
    message = "missing model.language_model.norm.weight; unexpected more.weight"
    refused(capsys, message, source, parts["sam"], tmp_path / "out")


def test_a_sam_that_is_none(tmp_path, capsys, parts):
    out = tmp_path / "out"
    refused(capsys, "sam3_video, got llava", parts["lmm"], parts["lmm"], out)
    torch.save({"weight": torch.ones(1)}, tmp_path / "sam.pth")
    refused(capsys, "the weights are no original SAM checkpoint", parts["lmm"], tmp_path / "sam.pth", out)
    original = sam_to_original(parts["sam_model"].state_dict())
    torch.save(original | {"more.weight": torch.ones(1)}, tmp_path / "sam.pth")
    refused(capsys, "unexpected more.weight", parts["lmm"], tmp_path / "sam.pth", out)
    (tmp_path / "sam.pth").write_bytes((tmp_path / "sam.pth").read_bytes()[:1000])
    refused(capsys, "SAM checkpoint", parts["lmm"], tmp_path / "sam.pth", out)


def test_a_full_disk(tmp_path, capsys, parts, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half of a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_writer, "save_file", fail)
    refused(capsys, "No space left on device", parts["lmm"], parts["sam"], tmp_path / "out")


def test_help_explains_itself(capsys):
    with pytest.raises(SystemExit):
        build_parser().parse_args(["--help"])
    said = capsys.readouterr().out
    assert all(flag in said for flag in ("--lmm", "--sam", "--output", "--dtype", "--similarity-scaling", "--seed"))


@pytest.mark.parametrize(
    ("part", "place", "value"),
    [("lmm", "text_config", {"hidden_size": "16"}), ("lmm", "vision_config", 3), ("sam", "vision_config", "large")],
)
def test_a_config_of_other_values_is_named(part, place, value, parts, tmp_path, capsys):
    for name in ("lmm", "sam"):
        shutil.copytree(parts[name], tmp_path / name)
    path = tmp_path / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), place: value}))
    assert assemble(tmp_path / "lmm", tmp_path / "sam", tmp_path / "out") == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"assemble: error: {path} cannot be used (") and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()
