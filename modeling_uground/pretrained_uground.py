"""The base class of our models: how weights begin, and how a checkpoint is loaded or refused."""

import copy

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import initialization as init

from .configuration_uground import UGroundConfig
from .hub_files import HubFilesMixin, check_shard_names
from .layer_policy import LayerPolicy
from .prompts import SimilarityScaling

# Small, and what becomes of their rounding shows in every mask: quantisation leaves them as they are.
UNQUANTIZED = ("mask_decoder", "layer_policy", "segment_projection", "similarity_scaling", "lm_head")


class UGroundPreTrainedModel(HubFilesMixin, PreTrainedModel):
    config: UGroundConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # SAM reads weights of its parts directly, where hooks that fetch them from another device do not see it.
    _no_split_modules = ["MaskDecoder"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LayerPolicy):
            init.zeros_(module.gates)
            init.zeros_(module.reward_ema)
            init.zeros_(module.reward_updates)
        elif isinstance(module, SimilarityScaling) and module.bias is not None:
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Like `PreTrainedModel.from_pretrained`, but a checkpoint that does not fit the model exactly is refused.

        A `quantization_config` is for the LMM: what turns its states into masks stays in the `dtype` of the rest.

        Raises:
            ValueError: tensors are missing, unexpected or of the wrong shape; the sentence names them. Or the index
                names files outside of the folder.
            OSError: there are no weights, or they are truncated or damaged.
        """
        check_shard_names(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_mask_path(kwargs["quantization_config"])
        # Wrong shapes are let through to be reported here with the other two kinds, in one sentence.
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(f"the weights in {pretrained_model_name_or_path} cannot be read: {error}") from error
        problems = [
            f"{kind}: {_name_some(names)}"
            for kind, names in (
                ("missing", info["missing_keys"]),
                ("unexpected", info["unexpected_keys"]),
                ("of the wrong shape", [] if allow_mismatch else info["mismatched_keys"]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit the model; tensors {'; '.join(problems)}"
            )
        # Under ZeRO-3 transformers also keeps renamings that met no weight, and would apply their inverse at saving.
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        return (model, info) if output_loading_info else model


def keep_mask_path(quantization_config):
    """A copy of a quantisation config (object or `dict`) that leaves out what turns layer states into masks."""
    chosen = copy.deepcopy(quantization_config)
    if isinstance(chosen, dict):
        is_bits = chosen.get("quant_method") == "bitsandbytes" or {"load_in_4bit", "load_in_8bit"} & chosen.keys()
        name = "llm_int8_skip_modules" if is_bits else "modules_to_not_convert"
        chosen[name] = [*dict.fromkeys([*(chosen.get(name) or []), *UNQUANTIZED])]
        return chosen
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(chosen, name):
            setattr(chosen, name, [*dict.fromkeys([*(getattr(chosen, name) or []), *UNQUANTIZED])])
            return chosen
    raise ValueError(f"quantization_config must be able to leave modules out, got a {type(chosen).__name__}")


def _name_some(names, at_most: int = 8) -> str:
    """Names of a few tensors, and how many more there are; wrong shapes come as (name, got, expected)."""
    texts = [
        name if isinstance(name, str) else f"{name[0]} (got {tuple(name[1])}, expected {tuple(name[2])})"
        for name in names
    ]
    texts = sorted(texts)
    more = f" and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more


__all__ = ["UGroundPreTrainedModel", "keep_mask_path"]
