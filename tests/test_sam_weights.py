"""Original SAM weights in `SamModel`, held against the `segment_anything` package with the same weights."""

import argparse
import importlib
import importlib.util
import sys
import types
from functools import partial

import pytest
import torch
from safetensors.torch import save_file
from transformers import SamModel

from uground.hub.weights.sam_weights import (
    load_original_sam,
    read_original_sam,
    rename_original_sam_key,
    rename_sam_key,
    sam_config_from_state_dict,
    sam_from_original,
    sam_to_original,
)


def original_package(module):
    """A module of `segment_anything`, under another package name: its own __init__ imports torchvision."""
    name = "segment_anything_alone"
    if name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = list(importlib.util.find_spec("segment_anything").submodule_search_locations)
        sys.modules[name] = package
    return importlib.import_module(f"{name}.{module}")


def original_sam(window=3, global_blocks=(1,), iou_depth=3, grid=8):
    """A tiny random original SAM: 8-pixel patches, width 32, four heads."""
    modeling = original_package("modeling")
    torch.manual_seed(0)
    sam = modeling.Sam(
        image_encoder=modeling.ImageEncoderViT(
            img_size=8 * grid,
            patch_size=8,
            embed_dim=32,
            depth=3,
            num_heads=4,
            mlp_ratio=2,
            out_chans=32,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=window,
            global_attn_indexes=global_blocks,
        ),
        prompt_encoder=modeling.PromptEncoder(
            embed_dim=32, image_embedding_size=(grid, grid), input_image_size=(8 * grid, 8 * grid), mask_in_chans=8
        ),
        mask_decoder=modeling.MaskDecoder(
            transformer_dim=32,
            transformer=modeling.TwoWayTransformer(depth=2, embedding_dim=32, num_heads=8, mlp_dim=48),
            iou_head_depth=iou_depth,
            iou_head_hidden_dim=24,
        ),
    )
    with torch.no_grad():
        for parameter in sam.parameters():
            # Zero-initialised tables and unit norms would hide a wrong name; products stay of order 1.
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return sam.eval()


def saved(sam, path):
    """The file a user would have, normalisation buffers included as in some releases."""
    torch.save(sam.state_dict() | {"pixel_mean": sam.pixel_mean, "pixel_std": sam.pixel_std}, path)
    return path


# 1e-4 is asked for; 1.5e-6 is measured, and a wrong layer norm constant shows only below 1e-4.
TOLERANCE = 1e-5

POINTS = torch.tensor([[[10.0, 20.0], [40.0, 30.0]], [[60.0, 5.0], [1.0, 1.0]], [[33.0, 33.0], [20.0, 50.0]]])
LABELS = torch.tensor([[1, 0], [1, 1], [0, 1]])
BOXES = torch.tensor([[5.0, 6.0, 30.0, 40.0], [0.0, 0.0, 63.0, 63.0], [20.0, 10.0, 50.0, 20.0]])
PROMPTS = {
    "points": (POINTS, None, False),
    "boxes": (None, BOXES, False),
    "points and boxes": (POINTS, BOXES, False),
    "mask": (None, None, True),
    "points and mask": (POINTS, None, True),
}


@torch.no_grad()
def both_outputs(original, converted, prompts, multimask):
    """Low-resolution mask logits and IoU estimates of the original and of `SamModel`."""
    points, boxes, with_mask = PROMPTS[prompts]
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 64, generator=generator)
    mask = torch.randn(1, 1, 32, 32, generator=generator) * 4 if with_mask else None
    sparse, dense = original.prompt_encoder((points, LABELS) if points is not None else None, boxes, mask)
    masks, scores = original.mask_decoder(
        image_embeddings=original.image_encoder(image),
        image_pe=original.prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=multimask,
    )
    result = converted(
        pixel_values=image,
        input_points=None if points is None else points[None],
        input_labels=None if points is None else LABELS[None],
        input_boxes=None if boxes is None else boxes[None],
        input_masks=mask,
        multimask_output=multimask,
    )
    return masks, scores, result.pred_masks[0], result.iou_scores[0]


@pytest.fixture(scope="module")
def original():
    return original_sam()


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    return load_original_sam(saved(original, tmp_path_factory.mktemp("sam") / "sam.pth"))


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("multimask", [False, True])
def test_same_masks_as_segment_anything(original, converted, prompts, multimask):
    masks, scores, converted_masks, converted_scores = both_outputs(original, converted, prompts, multimask)
    assert masks.std() > 0.05
    assert scores.numel() == 1 or scores.std() > 1e-3
    torch.testing.assert_close(converted_masks, masks, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(converted_scores, scores, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(
    "sizes", [{"window": 14}, {"window": 8}, {"global_blocks": (0, 1, 2)}, {"global_blocks": ()}, {"iou_depth": 5}]
)
def test_same_masks_in_other_sizes(sizes, tmp_path):
    original = original_sam(**sizes)
    outputs = both_outputs(original, load_original_sam(saved(original, tmp_path / "sam.pth")), "points", True)
    torch.testing.assert_close(outputs[2], outputs[0], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(outputs[3], outputs[1], atol=TOLERANCE, rtol=0)


def test_sizes_are_read_off_the_tensors(converted):
    vision = converted.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (32, 3, 4)
    assert (vision.image_size, vision.patch_size, vision.window_size) == (64, 8, 3)
    assert (vision.mlp_dim, vision.output_channels, vision.global_attn_indexes) == (64, 32, [1])
    assert converted.config.prompt_encoder_config.mask_input_channels == 8
    decoder = converted.config.mask_decoder_config
    assert (decoder.mlp_dim, decoder.num_attention_heads, decoder.iou_head_hidden_dim) == (48, 8, 24)
    assert (decoder.num_multimask_outputs, decoder.attention_downsample_rate) == (3, 2)


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads", "global_blocks"),
    [
        ("vit_b", 768, 12, 12, [2, 5, 8, 11]),
        ("vit_l", 1024, 24, 16, [5, 11, 17, 23]),
        ("vit_h", 1280, 32, 16, [7, 15, 23, 31]),
    ],
)
def test_released_sizes_are_recognised_and_complete(name, width, depth, heads, global_blocks):
    with torch.device("meta"):
        weights = original_package("build_sam").sam_model_registry[name]().state_dict()
    config = sam_config_from_state_dict(weights)
    vision, decoder = config.vision_config, config.mask_decoder_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads) == (width, depth, heads)
    assert (vision.window_size, vision.global_attn_indexes, vision.mlp_dim) == (14, global_blocks, 4 * width)
    assert (vision.image_size, vision.patch_size, vision.output_channels, vision.num_pos_feats) == (1024, 16, 256, 128)
    assert (decoder.mlp_dim, decoder.num_hidden_layers, decoder.iou_head_depth) == (2048, 2, 3)
    with torch.device("meta"):
        expected = SamModel(config).state_dict()
    renamed = sam_from_original(weights)
    assert {key: value.shape for key, value in renamed.items()} == {key: v.shape for key, v in expected.items()}


def test_round_trip_is_exact(original, converted):
    weights = original.state_dict()
    back = sam_to_original(converted.state_dict())
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    del (alone := converted.state_dict())["prompt_encoder.shared_embedding.positional_embedding"]
    assert sam_to_original(alone).keys() == weights.keys()


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_every_key_streams_alone(depth):
    weights = original_sam(iou_depth=depth).state_dict()
    streamed = {name: key for key in weights for name in rename_original_sam_key(key, depth)}
    assert streamed.keys() == sam_from_original(weights).keys()
    assert all(rename_sam_key(name, depth) == key for name, key in streamed.items())
    assert rename_original_sam_key("pixel_mean") == ()


@pytest.mark.parametrize(
    "key",
    [
        "image_encoder.blocks.0.norm3.weight",
        "image_encoder.blocks.x.norm1.weight",
        "image_encoder.blocks.#.norm1.weight",
        "image_encoder.pos_embed.weight",
        "image_encoder.neck.0",
        "image_encoder.blocks.0.attn.qkv.lora.weight",
        "mask_decoder.output_hypernetworks_mlps.0.layers.3.weight",
        "mask_decoder.iou_prediction_head.layers.3.weight",
        "vision_encoder.pos_embed",
    ],
)
def test_unknown_keys_are_refused(key):
    with pytest.raises(ValueError, match="is no key of an original SAM checkpoint"):
        rename_original_sam_key(key)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="is no name of a transformers SamModel"):
        rename_sam_key("image_encoder.pos_embed")


def test_positional_encoding_is_tied_and_survives_saving(original, converted, tmp_path):
    assert converted.prompt_encoder.shared_embedding.positional_embedding is (
        converted.shared_image_embedding.positional_embedding
    )
    converted.save_pretrained(tmp_path)
    reloaded, info = SamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    weights = original.state_dict()
    back = sam_to_original(reloaded.state_dict())
    assert all(torch.equal(back[key], weights[key]) for key in weights)
    assert reloaded.config.mask_decoder_config.layer_norm_eps == 1e-5


def test_safetensors_and_half_precision_files(original, tmp_path):
    weights = {key: value.half() for key, value in original.state_dict().items()}
    save_file(weights, tmp_path / "sam.safetensors")
    model = load_original_sam(tmp_path / "sam.safetensors")
    assert model.dtype == torch.float16
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.vision_encoder.pos_embed, weights["image_encoder.pos_embed"])


def changed(weights, **changes):
    """A copy with keys replaced, or dropped where the value is None."""
    weights = weights | {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in weights.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_decoder__iou_token__weight": None}, "missing mask_decoder.iou_token.weight"),
        ({"prompt_encoder__extra__weight": torch.ones(1)}, "unexpected prompt_encoder.extra.weight"),
        (
            {"image_encoder__neck__1__bias": torch.ones(7)},
            r"wrong shape of image_encoder.neck.1.bias \(7,\) instead of \(32,\)",
        ),
        ({"image_encoder__pos_embed": None}, "image_encoder.pos_embed is missing"),
        ({"image_encoder__blocks__1__attn__rel_pos_h": None}, "image_encoder.blocks.1.attn.rel_pos_h is missing"),
        ({"image_encoder__blocks__0__attn__rel_pos_h": torch.ones(9, 8)}, r"attention windows of \[3, 5\] tokens"),
        ({"image_encoder__blocks__0__attn__rel_pos_h": torch.ones(5, 7)}, "width 7 do not divide"),
    ],
)
def test_incomplete_or_foreign_weights_are_named(original, changes, message):
    with pytest.raises(ValueError, match=message):
        sam_from_original(changed(original.state_dict(), **changes))


def test_many_problems_are_cut_short(original):
    weights = {key: value for key, value in original.state_dict().items() if not key.endswith(".bias")}
    with pytest.raises(ValueError, match="missing .* and [0-9]+ more") as caught:
        sam_from_original(weights)
    assert len(str(caught.value)) < 500


def test_weights_of_transformers_are_recognised(converted):
    with pytest.raises(ValueError, match="SamModel.from_pretrained reads it"):
        sam_from_original(converted.state_dict())


def test_decoder_heads_must_fit(original):
    with pytest.raises(ValueError, match="width 16, which 5 heads do not divide"):
        sam_config_from_state_dict(original.state_dict(), decoder_heads=5)
    assert sam_config_from_state_dict(original.state_dict(), 4).mask_decoder_config.num_attention_heads == 4


def test_back_conversion_refuses_two_encodings(converted):
    weights = dict(converted.state_dict())
    weights["shared_image_embedding.positional_embedding"] = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="differ, but original SAM has one for both"):
        sam_to_original(weights)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 100, -50])
def test_truncated_files(original, tmp_path, suffix, kept):
    path = tmp_path / f"sam{suffix}"
    save = torch.save if suffix == ".pth" else save_file
    save({key: value.contiguous() for key, value in original.state_dict().items()}, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(OSError, match=f"sam{suffix} cannot be read, it may be truncated or damaged") as caught:
        load_original_sam(path)
    assert "\n" not in str(caught.value)


def test_absent_files_and_other_content(original, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pth is not a file"):
        load_original_sam(tmp_path / "nowhere.pth")
    (tmp_path / "page.pth").write_text("<!DOCTYPE html>")
    with pytest.raises(OSError, match="page.pth is no file of torch tensors"):
        load_original_sam(tmp_path / "page.pth")
    torch.save(torch.ones(2), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="tensor.pth holds a Tensor, expected tensors by name"):
        load_original_sam(tmp_path / "tensor.pth")
    torch.save({"model": original.state_dict(), "epoch": 3}, tmp_path / "training.pth")
    with pytest.raises(ValueError, match="training.pth holds more than tensors by name: epoch, model"):
        load_original_sam(tmp_path / "training.pth")
    torch.save(original.state_dict() | {"args": argparse.Namespace(lr=1)}, tmp_path / "objects.pth")
    with pytest.raises(ValueError, match=r"objects.pth holds more than tensors \(argparse.Namespace\)"):
        read_original_sam(tmp_path / "objects.pth")


def test_the_file_is_named_when_its_tensors_do_not_fit(original, tmp_path):
    torch.save(changed(original.state_dict(), mask_decoder__iou_token__weight=None), tmp_path / "sam.pth")
    with pytest.raises(ValueError, match="sam.pth cannot be used: .*missing mask_decoder.iou_token.weight"):
        load_original_sam(tmp_path / "sam.pth")
