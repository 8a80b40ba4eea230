"""`UGroundConfig` of a released UGround checkpoint, from its `config.json` and the shapes of its tensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from uground.hub.official_names import EMBEDDINGS, GATES, PROJECTOR, SAM_PREFIX, looks_like
from uground.hub.sam_weights import sam_config_from_state_dict
from uground.modeling_uground import UGroundConfig
from uground.modeling_uground.checkpoint_files import names_config, read_json_object

# The official code lays the image tokens out on this grid, whatever the vision tower.
GRID_SIDE = 24
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


def check_family(source, shapes: Mapping[str, tuple], tokens=()) -> None:
    """
    Raise a `ValueError` that says what the checkpoint looks like, unless it is a UGround.

    Args:
        source: what to call it.
        shapes: name to shape of its tensors.
        tokens: of its tokenizer, as far as known.
    """
    for name in (GATES, f"{SAM_PREFIX}image_encoder.pos_embed", f"{PROJECTOR}.2.weight", EMBEDDINGS):
        if name not in shapes:
            raise ValueError(
                f"{source} is no official UGround checkpoint, it lacks {name}; it looks like "
                f"{looks_like(shapes, tokens)}."
            )


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
        raise ValueError(f"The vision tower {folder} must be of type clip or clip_vision_model, got {kind}.")
    with names_config(folder / "config.json"):
        return CLIPVisionConfig(**{name: value for name, value in config.items() if name != "model_type"})


def check_vision_tower(folder: Path, vision: CLIPVisionConfig, config: dict, shapes: Mapping[str, tuple]) -> None:
    """Raise a `ValueError` unless the vision tower is one that the checkpoint can have been trained with."""
    width = shapes[f"{PROJECTOR}.0.weight"][1]
    if vision.hidden_size != width:
        raise ValueError(
            f"The vision tower {folder} has width {vision.hidden_size}, but {PROJECTOR}.0.weight of the checkpoint "
            f"takes {width}; it was trained with {config.get('mm_vision_tower')}."
        )
    side = vision.image_size // vision.patch_size
    if side != GRID_SIDE:
        raise ValueError(
            f"The vision tower {folder} makes {side} x {side} patches of {vision.image_size} pixels, expected "
            f"{GRID_SIDE} x {GRID_SIDE} as in {config.get('mm_vision_tower')}."
        )


def _check_settings(config: dict) -> None:
    """Refuse settings that other branches of the official code would be needed for."""
    for name, default, expected in (
        ("mm_projector_type", "mlp2x_gelu", ("mlp2x_gelu",)),
        ("mm_vision_select_feature", "patch", ("patch",)),
        ("strategy", "policy_walker", ("policy_walker",)),
        ("mode", 3, tuple(EMBEDDING_LAYERS)),
        ("baseline_type", "ema", ("ema", "critic")),
        ("resize_vision_tower", False, (False,)),
        ("vision_tower_for_mask", False, (False,)),
        ("pad_train_clip_images", True, (True,)),
        ("tie_word_embeddings", False, (False,)),
    ):
        if config.get(name, default) not in expected:
            raise ValueError(
                f"config.json of the checkpoint says {name} {config[name]!r}, which is not supported; expected "
                f"{' or '.join(map(repr, expected))}."
            )
    missing = [name for name in REQUIRED_KEYS if not isinstance(config.get(name), int)]
    if missing:
        raise ValueError(f"config.json of the checkpoint lacks {', '.join(missing)}.")


def official_layer_selection(config: dict) -> str:
    """
    How the official evaluation picks a layer.

    Every shipped script evaluates with `eval_legacy` or mode 1, at the last layer; only without them would the
    official code sample from the policy.
    """
    return "last" if config.get("eval_legacy", True) or config.get("mode", 3) == 1 else "sample"


def build_config(
    config: dict,
    shapes: Mapping[str, tuple],
    vision: CLIPVisionConfig,
    segment_token_id: int | None,
    reject_token_id: int | None,
    layer_selection: str | int | None = None,
) -> UGroundConfig:
    """
    Our configuration of an official checkpoint.

    Args:
        config: its `config.json`.
        shapes: name to shape of its tensors; SAM's and the critic's sizes and the vocabulary are read off them.
        vision: of the vision tower.
        segment_token_id, reject_token_id: ids of `[SEG]` and `[REJ]`, or `None` where they are not known.
        layer_selection: default rule of the converted model; `None` for that of the official evaluation.

    Raises:
        ValueError: a setting is not supported, or sizes do not fit together.
    """
    _check_settings(config)
    vocab_size = shapes[EMBEDDINGS][0]
    text = {name: config[name] for name in TEXT_KEYS if config.get(name) is not None}
    if config.get("rope_scaling") is not None:
        text["rope_scaling"] = config["rope_scaling"]
    lmm_config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text, vocab_size=vocab_size + 1, pad_token_id=PAD_TOKEN_ID),
        image_token_index=vocab_size,
        image_seq_length=GRID_SIDE**2,
        vision_feature_layer=config.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    sam = {
        name.removeprefix(SAM_PREFIX): torch.empty(shape, device="meta")
        for name, shape in shapes.items()
        if name.startswith(SAM_PREFIX)
    }
    critic = shapes.get("ppm.critic.0.weight", (config.get("critic_hidden_dim", 128),))
    return UGroundConfig(
        lmm_config=lmm_config,
        sam_config=sam_config_from_state_dict(sam),
        segment_token_id=segment_token_id,
        reject_token_id=reject_token_id,
        prompts=("embedding", "mask"),
        similarity_scaling="minmax",
        layer_selection=official_layer_selection(config) if layer_selection is None else layer_selection,
        embedding_layer=EMBEDDING_LAYERS[config.get("mode", 3)],
        policy_baseline=config.get("baseline_type", "ema"),
        policy_ema_decay=0.9,
        critic_hidden_size=critic[0],
    )
