"""Tensor names of the released UGround checkpoints ⇄ those of `UGroundForReferringSegmentation`.

Renaming is nearly all there is to it: no tensor is reshaped but for the new row of `<image>` in the two vocabulary
matrices. Both sides are complete: a tensor of the source is used or on `IGNORED` with its reason, and every tensor of
the model has a source.
"""

import re
from collections.abc import Collection, Mapping
from enum import Enum

from uground.hub.weights.sam_weights import rename_sam_key

GATES = "ppm._layer_gate_W_similarity"
EMBEDDINGS = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
PROJECTOR = "model.mm_projector"
SAM_PREFIX = "model.visual_model."
# The two matrices that get a row for `<image>`, which the official code keeps outside of the vocabulary.
VOCABULARY = (EMBEDDINGS, LM_HEAD)

# Source names without a counterpart, as patterns, and why nothing is lost.
IGNORED = {
    r"model\.out_mm_projector\.\d\.(weight|bias)": "a second projector, made by the code but never called",
    r"model\.decoder_modules_initialized": "a flag of the training code",
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "a constant, computed from the configuration",
    r"model\.visual_model\.pixel_(mean|std)": "constants of the image processor",
    r"model\.image_newline": "of LLaVA-1.6 tiling, which UGround switches off",
    r"model\.vision_tower\..*": "the frozen CLIP, which is taken from --vision-tower",
}
# The same for the folder of the vision tower: a whole CLIP has a text side too, and older files hold constants.
IGNORED_CLIP = {
    r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)": "the side of CLIP for text",
    r"(vision_model\.)?embeddings\.position_ids": "a constant",
}


class Origin(Enum):
    """Where a tensor of the model comes from."""

    CHECKPOINT = "checkpoint"
    VISION_TOWER = "vision tower"
    NEW = "new"


# Prefixes of our names, and what they are in the official checkpoint.
_PREFIXES = {
    "lmm.model.language_model.": "model.",
    "lmm.lm_head.": "lm_head.",
    "lmm.model.multi_modal_projector.linear_1.": f"{PROJECTOR}.0.",
    "lmm.model.multi_modal_projector.linear_2.": f"{PROJECTOR}.2.",
    "segment_projection.linear_1.": "model.text_hidden_fcs.0.0.",
    "segment_projection.linear_2.": "model.text_hidden_fcs.0.2.",
    "layer_policy.gates": GATES,
}
_CLIP_PREFIX = "lmm.model.vision_tower."
_SAM_PREFIX = "mask_decoder.sam."
# Of the layer policy's critic, which is no part of the model; training reads it from a file of its own beside the
# weights, by the names that stand behind this.
CRITIC_PREFIX = "ppm."
CRITIC = ("ppm.critic.0.weight", "ppm.critic.0.bias", "ppm.critic.2.weight", "ppm.critic.2.bias")
BASELINE_FILE = "reward_baseline.safetensors"


# Of a projector of one layer, and the second layer of ours, which then is the identity.
_ONE_LAYER = {"lmm.model.multi_modal_projector.linear_1.": f"{PROJECTOR}."}
_IDENTITY = "lmm.model.multi_modal_projector.linear_2."


def source_of(name: str, iou_head_depth: int, projector_layers: int = 2) -> tuple[Origin, str]:
    """
    Where a tensor of the model comes from.

    Args:
        name: in the state dict of a `UGroundForReferringSegmentation` with a LLaVA.
        iou_head_depth: number of layers of SAM's IoU head.
        projector_layers: linear layers of the projector, one or two.

    Returns:
        The origin, and the name there; for a vision tower without the prefix "vision_model.".

    Raises:
        ValueError: the official model has nothing of the kind.
    """
    if projector_layers == 1 and name.startswith(_IDENTITY):
        return Origin.NEW, name
    if name.startswith(_CLIP_PREFIX):
        return Origin.VISION_TOWER, name.removeprefix(_CLIP_PREFIX)
    if name.startswith(_SAM_PREFIX):
        return Origin.CHECKPOINT, SAM_PREFIX + rename_sam_key(name.removeprefix(_SAM_PREFIX), iou_head_depth)
    for ours, official in (_PREFIXES | (_ONE_LAYER if projector_layers == 1 else {})).items():
        if name.startswith(ours):
            return Origin.CHECKPOINT, official + name.removeprefix(ours)
    raise ValueError(f"{name!r} has no counterpart in an official UGround checkpoint")


def is_ignored(name: str, patterns: Mapping[str, str] = IGNORED) -> bool:
    """Whether a source tensor is known to be of no use."""
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def clip_name(name: str) -> str | None:
    """Name of a tensor of CLIP's vision part without the prefix that some files have; `None` for what is of no use."""
    return None if is_ignored(name, IGNORED_CLIP) else name.removeprefix("vision_model.")


def looks_like(names: Collection[str], tokens: Collection[str] = ()) -> str:
    """
    A guess in words what a checkpoint that is no official UGround may be.

    Args:
        names: of its tensors.
        tokens: of its tokenizer, as far as known; they tell families apart that share all names.
    """
    names, tokens = set(names), set(tokens)

    def has(prefix: str) -> bool:
        return any(name.startswith(prefix) for name in names)

    if any(".lora_A." in name for name in names):
        return "weights whose LoRA adapter was not merged"
    if "layer_policy.gates" in names:
        return "a checkpoint of this package, which needs no conversion"
    if has("model.grounding_encoder."):
        return "GLaMM"
    if has("model.mask_decoder.") or has("model.image_feature_neck.") or "[SEG0]" in tokens:
        return "PixelLM"
    if has(SAM_PREFIX):
        one_layer = f"{PROJECTOR}.weight" in names
        if "[REJ]" in tokens:
            return "GSVA"
        return "LISA" if one_layer else "READ or SESAME"
    if has("language_model.") or has("model.language_model.") or has("model.multi_modal_projector."):
        return "a LLaVA of transformers, from which uground.hub.assemble makes a UGround"
    if has(f"{PROJECTOR}."):
        return "a LLaVA without a mask decoder"
    if has("image_encoder.") or has("vision_encoder."):
        return "a SAM"
    if has("vision_model."):
        return "a CLIP"
    if EMBEDDINGS in names:
        return "a language model"
    return "nothing known here"
