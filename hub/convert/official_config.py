"""`UGroundConfig` of a released checkpoint, from its `config.json` and the shapes of its tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from uground.hub.convert.official_names import EMBEDDINGS, SAM_PREFIX
from uground.hub.convert.official_systems import OfficialSystem, PointArguments
from uground.hub.weights.sam_weights import sam_config_from_state_dict
from uground.modeling_uground import UGroundConfig
from uground.modeling_uground.checkpoint_files import names_config, read_json_object

# "mode" of the official code: which state prompts the mask decoder, the one of the last layer or of the chosen one.
EMBEDDING_LAYERS = {1: "last", 2: "last", 3: "selected"}
# What LlamaConfig is told of the official configuration; anything else keeps its default.
TEXT_KEYS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
)
REQUIRED_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# The official scripts pad with the unknown token.
PAD_TOKEN_ID = 0


def vision_config(folder: Path) -> CLIPVisionConfig:
    """
    The configuration of the vision tower in a folder that holds it alone or a whole CLIP.

    Raises:
        OSError: there is no `config.json`.
        ValueError: it belongs to something else.
    """
    config = read_json_object(folder / "config.json")
    kind = config.get("model_type")
    if kind == "clip":
        config = config.get("vision_config") or {}
    elif kind != "clip_vision_model":
        raise ValueError(f"the vision tower {folder} must be of type clip or clip_vision_model, got {kind}")
    with names_config(folder / "config.json"):
        return CLIPVisionConfig(**{name: value for name, value in config.items() if name != "model_type"})


def check_vision_tower(
    folder: Path, vision: CLIPVisionConfig, config: dict, shapes: Mapping[str, tuple], system: OfficialSystem
) -> None:
    """Raise a `ValueError` unless the vision tower is one that the checkpoint can have been trained with."""
    name, named = system.projector_weight, config.get("mm_vision_tower") or config.get("vision_tower")
    width = shapes[name][1]
    if vision.hidden_size != width:
        raise ValueError(
            f"the vision tower {folder} has width {vision.hidden_size}, but {name} of the checkpoint "
            f"takes {width}; it was trained with {named}"
        )
    # The official code lays the image tokens out on a grid of its own, whatever the vision tower.
    side, expected = vision.image_size // vision.patch_size, system.grid_side
    if side != expected:
        raise ValueError(
            f"the vision tower {folder} makes {side} x {side} patches of {vision.image_size} pixels, expected "
            f"{expected} x {expected} as in {named}"
        )


def _check_settings(config: dict, system: OfficialSystem) -> None:
    """Refuse settings that other branches of the official code would be needed for."""
    # Without the key UGround pads; the others know no padding.
    pads = system.frame == "letterbox"
    projector = "mlp2x_gelu" if system.projector_layers == 2 else "linear"
    for name, default, expected in (
        ("mm_projector_type", projector, (projector,)),
        ("mm_vision_select_feature", "patch", ("patch",)),
        ("strategy", "policy_walker", ("policy_walker",)),
        ("mode", 3, tuple(EMBEDDING_LAYERS)),
        ("baseline_type", "ema", ("ema", "critic")),
        ("resize_vision_tower", False, (False,)),
        ("vision_tower_for_mask", False, (False,)),
        ("pad_train_clip_images", pads, (pads,)),
        ("tie_word_embeddings", False, (False,)),
    ):
        if config.get(name, default) not in expected:
            raise ValueError(
                f"config.json of the checkpoint says {name} {config[name]!r}, which is not supported; expected "
                f"{' or '.join(map(repr, expected))}"
            )
    missing = [name for name in REQUIRED_KEYS if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"config.json of the checkpoint lacks {', '.join(missing)}")


def official_layer_selection(config: dict, system: OfficialSystem) -> str:
    """
    How the official evaluation picks a layer.

    Every shipped script evaluates with `eval_legacy` or mode 1, at the last layer; only without them would the
    official code sample from the policy.
    """
    if not system.has_policy:
        return "last"
    return "last" if config.get("eval_legacy", True) or config.get("mode", 3) == 1 else "sample"


def build_config(
    config: dict,
    shapes: Mapping[str, tuple],
    vision: CLIPVisionConfig,
    system: OfficialSystem,
    segment_token_id: int | None,
    reject_token_id: int | None,
    layer_selection: str | int | None = None,
    points: PointArguments | None = None,
) -> UGroundConfig:
    """
    Our configuration of an official checkpoint.

    Args:
        config: its `config.json`.
        shapes: name to shape of its tensors; SAM's sizes and the vocabulary are read off them.
        vision: of the vision tower.
        system: which one it is.
        segment_token_id, reject_token_id: ids of `[SEG]` and `[REJ]`, or `None` where they are not known.
        layer_selection: default rule of the converted model; `None` for that of the official evaluation.
        points: what was said of how points are picked.

    Raises:
        ValueError: a setting is not supported, or sizes do not fit together.
    """
    _check_settings(config, system)
    vocab_size = shapes[EMBEDDINGS][0]
    text = {name: config[name] for name in TEXT_KEYS if config.get(name) is not None}
    if config.get("rope_scaling") is not None:
        text["rope_scaling"] = config["rope_scaling"]
    lmm_config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text, vocab_size=vocab_size + 1, pad_token_id=PAD_TOKEN_ID),
        image_token_index=vocab_size,
        image_seq_length=system.grid_side**2,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        # One layer is the first of two, behind which the second changes nothing.
        projector_hidden_act="gelu" if system.projector_layers == 2 else "linear",
    )
    sam = {
        name.removeprefix(SAM_PREFIX): torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if name.startswith(SAM_PREFIX)
    }
    return UGroundConfig(
        lmm_config=lmm_config,
        sam_config=sam_config_from_state_dict(sam),
        segment_token_id=segment_token_id,
        reject_token_id=reject_token_id,
        image_frame=system.frame,
        prompts=system.prompts,
        layer_policy=system.has_policy,
        **((points or PointArguments()).settings(config["num_hidden_layers"]) if "points" in system.prompts else {}),
        similarity_scaling="minmax",
        layer_selection=official_layer_selection(config, system) if layer_selection is None else layer_selection,
        embedding_layer=EMBEDDING_LAYERS[config.get("mode", 3)],
    )
