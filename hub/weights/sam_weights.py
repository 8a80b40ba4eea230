"""Weights of the original Segment Anything ⇄ `transformers.SamModel`.

The original is the state dict of Meta's `segment_anything` package (`sam_vit_b_01ec64.pth` and the like, of any size).
Renaming is all there is to it: no tensor is reshaped, so both directions are exact. Sizes are read off the tensors;
what no tensor tells, the heads of the mask decoder and the layer norm constants, is as the original code has it.

Both directions are strict: every key is used or on `IGNORED_KEYS`, every parameter is filled, every shape fits.
To stream a checkpoint, rename key by key with `rename_original_sam_key` and build the configuration from shapes alone.
"""

import os
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import SamConfig, SamModel

from uground.hub.weights.weight_files import TensorFile, name_some

DECODER_HEADS = 8
"""Attention heads of the mask decoder in every original SAM."""
IGNORED_KEYS = frozenset({"pixel_mean", "pixel_std"})
"""Original keys without a counterpart: the normalisation of images belongs to the image processor."""

ENCODER_NORM_EPS = 1e-6
DECODER_NORM_EPS = 1e-5
"""The original decoder keeps torch's default; that of `SamMaskDecoderConfig`, 1e-6, gives slightly other masks."""

_POSITION_KEY = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
_POSITION_NAMES = (
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
)
_IOU_HEAD = "mask_decoder.iou_prediction_head"


def _decoder_modules() -> dict[str, str]:
    layer = "mask_decoder.transformer.layers.#"
    names = {f"{layer}.norm{i}": f"{layer}.layer_norm{i}" for i in (1, 2, 3, 4)}
    names["mask_decoder.transformer.norm_final_attn"] = "mask_decoder.transformer.layer_norm_final_attn"
    same = ["mask_decoder.iou_token", "mask_decoder.mask_tokens", f"{layer}.mlp.lin1", f"{layer}.mlp.lin2"]
    attentions = [
        f"{layer}.{name}" for name in ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
    ]
    attentions.append("mask_decoder.transformer.final_attn_token_to_image")
    same += [f"{attention}.{projection}_proj" for attention in attentions for projection in ("q", "k", "v", "out")]
    upscaling = ("upscale_conv1", "upscale_layer_norm", "upscale_conv2")
    for index, name in zip((0, 1, 3), upscaling, strict=True):
        names[f"mask_decoder.output_upscaling.{index}"] = f"mask_decoder.{name}"
    mlp = "mask_decoder.output_hypernetworks_mlps.#"
    for index, name in enumerate(("proj_in", "layers.0", "proj_out")):
        names[f"{mlp}.layers.{index}"] = f"{mlp}.{name}"
    return names | {name: name for name in same}


def _encoder_modules() -> dict[str, str]:
    names = {"image_encoder.patch_embed.proj": "vision_encoder.patch_embed.projection"}
    block, layer = "image_encoder.blocks.#", "vision_encoder.layers.#"
    names |= {f"{block}.norm{i}": f"{layer}.layer_norm{i}" for i in (1, 2)}
    names |= {f"{block}.{part}": f"{layer}.{part}" for part in ("attn.qkv", "attn.proj", "mlp.lin1", "mlp.lin2")}
    for index, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2")):
        names[f"image_encoder.neck.{index}"] = f"vision_encoder.neck.{name}"
    return names


def _prompt_modules() -> dict[str, str]:
    names = {"prompt_encoder.point_embeddings.#": "prompt_encoder.point_embed.#"}
    names |= {f"prompt_encoder.{name}": f"prompt_encoder.{name}" for name in ("not_a_point_embed", "no_mask_embed")}
    downscaling = ("conv1", "layer_norm1", "conv2", "layer_norm2", "conv3")
    for index, name in zip((0, 1, 3, 4, 6), downscaling, strict=True):
        names[f"prompt_encoder.mask_downscaling.{index}"] = f"prompt_encoder.mask_embed.{name}"
    return names


# Modules have a weight and perhaps a bias, parameters are tensors by themselves; # stands for the one running number.
_MODULES = _encoder_modules() | _prompt_modules() | _decoder_modules()
_PARAMETERS = {
    "image_encoder.pos_embed": "vision_encoder.pos_embed",
    "image_encoder.blocks.#.attn.rel_pos_h": "vision_encoder.layers.#.attn.rel_pos_h",
    "image_encoder.blocks.#.attn.rel_pos_w": "vision_encoder.layers.#.attn.rel_pos_w",
}
_MODULES_BACK = {new: old for old, new in _MODULES.items()}
_PARAMETERS_BACK = {new: old for old, new in _PARAMETERS.items()}


def _look_up(key: str, modules: Mapping[str, str], parameters: Mapping[str, str]) -> str | None:
    """New name of `key` in the tables, or None."""
    stem, _, leaf = key.rpartition(".")
    name, table, suffix = (stem, modules, f".{leaf}") if leaf in ("weight", "bias") else (key, parameters, "")
    if name in table and "#" not in name:
        return table[name] + suffix
    number = re.search(r"\.(\d+)(?=\.|$)", name)
    if number is None:
        return None
    pattern = f"{name[: number.start()]}.#{name[number.end() :]}"
    return table[pattern].replace("#", number[1]) + suffix if pattern in table else None


def _iou_head_names(depth: int) -> dict[str, str]:
    """Layers of the IoU head: first and last have names of their own in `SamModel`."""
    inner = {f"{_IOU_HEAD}.layers.{i}": f"{_IOU_HEAD}.layers.{i - 1}" for i in range(1, depth - 1)}
    ends = {
        f"{_IOU_HEAD}.layers.0": f"{_IOU_HEAD}.proj_in",
        f"{_IOU_HEAD}.layers.{depth - 1}": f"{_IOU_HEAD}.proj_out",
    }
    return inner | ends


def rename_original_sam_key(key: str, iou_head_depth: int = 3) -> tuple[str, ...]:
    """Names in `SamModel` of one original key.

    Args:
        key: a key of the original state dict, such as "image_encoder.blocks.0.norm1.weight".
        iou_head_depth: number of layers of `mask_decoder.iou_prediction_head`.

    Returns:
        One name as a rule; two for the positional encoding, of which the second is tied to the first and may be left
        out of a file; none for a key of `IGNORED_KEYS`.

    Raises:
        ValueError: a key that no original SAM has.
    """
    if key in IGNORED_KEYS:
        return ()
    if key == _POSITION_KEY:
        return _POSITION_NAMES
    head = _look_up(key, _iou_head_names(iou_head_depth), {})
    name = head if head is not None else _look_up(key, _MODULES, _PARAMETERS)
    if name is None:
        raise ValueError(f"{key!r} is no key of an original SAM checkpoint")
    return (name,)


def rename_sam_key(name: str, iou_head_depth: int = 3) -> str:
    """Original key of one name in `SamModel`; both names of the positional encoding give the same key.

    Raises:
        ValueError: a name that `SamModel` does not have.
    """
    if name in _POSITION_NAMES:
        return _POSITION_KEY
    head_back = {new: old for old, new in _iou_head_names(iou_head_depth).items()}
    head = _look_up(name, head_back, {})
    key = head if head is not None else _look_up(name, _MODULES_BACK, _PARAMETERS_BACK)
    if key is None:
        raise ValueError(f"{name!r} is no name of a transformers SamModel")
    return key


def _shape(state_dict: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
    if key not in state_dict:
        foreign = any(name.startswith("vision_encoder.") for name in state_dict)
        hint = "; its names are those of transformers, so SamModel.from_pretrained reads it" if foreign else ""
        raise ValueError(f"the weights are no original SAM checkpoint, {key} is missing{hint}")
    return tuple(state_dict[key].shape)


def _count(state_dict: Mapping[str, Tensor], prefix: str, default: int = 1) -> int:
    """How many numbered parts follow `prefix`, by the largest number; 1 for none, so that the missing one is named."""
    numbers = [re.match(re.escape(prefix) + r"\.(\d+)\.", key) for key in state_dict]
    return max((int(number[1]) + 1 for number in numbers if number), default=default)


def _vision_sizes(state_dict: Mapping[str, Tensor]) -> dict:
    """Arguments of `SamVisionConfig`."""
    grid = _shape(state_dict, "image_encoder.pos_embed")[1]
    width, channels, _, patch = _shape(state_dict, "image_encoder.patch_embed.proj.weight")
    depth = _count(state_dict, "image_encoder.blocks")
    tables = [_shape(state_dict, f"image_encoder.blocks.{i}.attn.rel_pos_h") for i in range(depth)]
    # A table covers the distances −(n − 1)..n − 1 of n positions: the whole grid where attention is global. A window
    # as large as the grid is the same thing.
    spans = [(length + 1) // 2 for length, _ in tables]
    windows = {span for span in spans if span != grid}
    if len(windows) > 1:
        raise ValueError(f"the weights mix attention windows of {sorted(windows)} tokens, expected one size")
    head_width = tables[0][1]
    if width % head_width:
        raise ValueError(f"heads of width {head_width} do not divide the encoder width {width} of these SAM weights")
    mlp_width = _shape(state_dict, "image_encoder.blocks.0.mlp.lin1.weight")[0]
    return {
        "hidden_size": width,
        "output_channels": _shape(state_dict, "image_encoder.neck.0.weight")[0],
        "num_hidden_layers": depth,
        "num_attention_heads": width // head_width,
        "num_channels": channels,
        "image_size": grid * patch,
        "patch_size": patch,
        "layer_norm_eps": ENCODER_NORM_EPS,
        "qkv_bias": "image_encoder.blocks.0.attn.qkv.bias" in state_dict,
        "mlp_ratio": mlp_width / width,
        "mlp_dim": mlp_width,
        "window_size": windows.pop() if windows else 0,
        "global_attn_indexes": [i for i, span in enumerate(spans) if span == grid],
        "num_pos_feats": _shape(state_dict, _POSITION_KEY)[1],
    }


def _decoder_sizes(state_dict: Mapping[str, Tensor], heads: int) -> dict:
    """Arguments of `SamMaskDecoderConfig`."""
    layer = "mask_decoder.transformer.layers.0"
    mask_tokens, width = _shape(state_dict, "mask_decoder.mask_tokens.weight")
    _shape(state_dict, f"{_IOU_HEAD}.layers.1.weight")  # one layer alone would be first and last at once
    inner = _shape(state_dict, f"{layer}.cross_attn_token_to_image.q_proj.weight")[0]
    if inner % heads:
        raise ValueError(f"the mask decoder attends with width {inner}, which {heads} heads do not divide")
    return {
        "hidden_size": width,
        "mlp_dim": _shape(state_dict, f"{layer}.mlp.lin1.weight")[0],
        "num_hidden_layers": _count(state_dict, "mask_decoder.transformer.layers"),
        "num_attention_heads": heads,
        "attention_downsample_rate": width // inner,
        "num_multimask_outputs": mask_tokens - 1,
        "iou_head_depth": _count(state_dict, f"{_IOU_HEAD}.layers"),
        "iou_head_hidden_dim": _shape(state_dict, f"{_IOU_HEAD}.layers.0.weight")[0],
        "layer_norm_eps": DECODER_NORM_EPS,
    }


def sam_config_from_state_dict(state_dict: Mapping[str, Tensor], decoder_heads: int = DECODER_HEADS) -> SamConfig:
    """Configuration of the `SamModel` that an original state dict belongs to.

    Args:
        state_dict: original names to tensors, on any device; only shapes are looked at, so meta tensors do.
        decoder_heads: attention heads of the mask decoder, the one size that no tensor shows.

    Raises:
        ValueError: a tensor the sizes are read from is missing, or the sizes do not fit together.
    """
    vision = _vision_sizes(state_dict)
    prompt = {
        "hidden_size": _shape(state_dict, "prompt_encoder.no_mask_embed.weight")[1],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "mask_input_channels": _shape(state_dict, "prompt_encoder.mask_downscaling.3.weight")[0],
        "num_point_embeddings": _count(state_dict, "prompt_encoder.point_embeddings"),
        "layer_norm_eps": ENCODER_NORM_EPS,
    }
    decoder = _decoder_sizes(state_dict, decoder_heads)
    return SamConfig(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)


def _check_complete(state_dict: Mapping[str, Tensor]) -> int:
    """Hold an original state dict against the model its sizes describe; returns the depth of the IoU head."""
    config = sam_config_from_state_dict(state_dict, decoder_heads=1)
    depth = config.mask_decoder_config.iou_head_depth
    with torch.device("meta"):
        parameters = SamModel(config).state_dict()
    expected = {rename_sam_key(name, depth): tuple(tensor.shape) for name, tensor in parameters.items()}
    found = set(state_dict) - IGNORED_KEYS
    problems = []
    if missing := expected.keys() - found:
        problems.append(f"missing {name_some(missing)}")
    if unexpected := found - expected.keys():
        problems.append(f"unexpected {name_some(unexpected)}")
    misshapen = [
        f"{key} {tuple(state_dict[key].shape)} instead of {expected[key]}"
        for key in found & expected.keys()
        if tuple(state_dict[key].shape) != expected[key]
    ]
    if misshapen:
        problems.append(f"wrong shape of {name_some(misshapen)}")
    if problems:
        raise ValueError(f"the weights do not make up an original SAM: {'; '.join(problems)}")
    return depth


def sam_from_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict for `SamModel` from an original one; the tensors are the same objects.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, by name.
    """
    depth = _check_complete(state_dict)
    return {name: tensor for key, tensor in state_dict.items() for name in rename_original_sam_key(key, depth)}


def sam_to_original(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Original state dict from that of a `SamModel`; the tensors are the same objects.

    Either name of the positional encoding may be absent, as in saved files.

    Raises:
        ValueError: missing, unexpected or wrongly shaped tensors, or two positional encodings that differ.
    """
    encodings = [state_dict[name] for name in _POSITION_NAMES if name in state_dict]
    if len(encodings) == 2 and not torch.equal(*encodings):
        raise ValueError(f"{_POSITION_NAMES[0]} and {_POSITION_NAMES[1]} differ, but original SAM has one for both")
    depth = _count(state_dict, f"{_IOU_HEAD}.layers", default=0) + 2
    original = {rename_sam_key(name, depth): tensor for name, tensor in state_dict.items()}
    _check_complete(original)
    return original


def read_original_sam(path: str | os.PathLike) -> dict[str, Tensor]:
    """Tensors by name from a `.pth`, `.pt`, `.bin` or `.safetensors` file, on the CPU, running no code of the file.

    Raises:
        OSError: the file is absent, a folder, truncated or damaged.
        ValueError: the file holds anything but tensors by name.
    """
    with TensorFile(path, "SAM checkpoint") as tensors:
        # Copied out of the mapped file, which may change while the tensors are in use.
        return {name: tensor.clone() for name, tensor in tensors.items()}


def load_original_sam(path: str | os.PathLike, decoder_heads: int = DECODER_HEADS) -> SamModel:
    """`SamModel` in evaluation mode with the weights of an original SAM file, in the dtype of the file, on the CPU.

    Args:
        path: a `.pth` of Meta's, or the same tensors as `.safetensors`.
        decoder_heads: attention heads of the mask decoder, the one size that no tensor shows.

    Raises:
        OSError: the file is absent, truncated or damaged.
        ValueError: it holds something else, or tensors are missing, unexpected or wrongly shaped.
    """
    original = read_original_sam(path)
    try:
        weights = sam_from_original(original)
        config = sam_config_from_state_dict(original, decoder_heads)
    except ValueError as error:
        raise ValueError(f"SAM checkpoint {os.fspath(path)} cannot be used: {error}") from error
    with torch.device("meta"):
        model = SamModel(config)
    # The tensors of the file become the parameters, so that a large model is in memory once.
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model.eval()
