"""The base class of our models: how weights begin, and how a checkpoint is loaded or refused."""

import copy
import os
import re
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention_parts import attention_of_parts
from .call_arguments import with_answer_length
from .configuration_uground import MASK_HEADS, UGroundConfig
from .hub_files import HubFilesMixin, check_shard_names
from .layer_policy import LayerPolicy
from .library_compat import hush_hub_kernel
from .lmm_families import LMM_ADAPTERS
from .similarity import SimilarityScaling
from .weight_kinds import dtypes_of, stored_dtypes, wrong_kinds

# What turns layer states into masks, by its attributes on the model.
MASK_PATH = ("mask_decoder", "segment_projection", "layer_policy", "similarity_scaling")
# Small, and what becomes of their rounding shows in every mask: quantisation leaves them as they are. Names from the
# root of the model on.
NEVER_QUANTIZED = tuple(
    dict.fromkeys(
        [*MASK_PATH, *(f"lmm.{name}" for family in LMM_ADAPTERS.values() for name in family.names.never_quantized)]
    )
)
# Where transformers keeps the hooks that collect hidden states, and how a model says that it has them.
CAPTURING_MODULE = "transformers.utils.output_capturing"
CAPTURING_FLAG = "_output_capturing_hooks_installed"


class UGroundPreTrainedModel(HubFilesMixin, PreTrainedModel):
    config: UGroundConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Of release 0.1.0: what training held rewards against lay among the weights.
    _keys_to_ignore_on_load_unexpected = [r"layer_policy\.(reward_ema|reward_updates|critic\..*)"]
    # SAM reads weights of its parts directly, where hooks that fetch them from another device do not see it.
    _no_split_modules = [head.__name__ for head in MASK_HEADS.values()]

    @property
    def is_gradient_checkpointing(self) -> bool:
        """The older name of `is_activation_checkpointing`, which peft and TRL read; transformers warns of it."""
        return self.is_activation_checkpointing

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LayerPolicy):
            init.zeros_(module.gates)
        elif isinstance(module, SimilarityScaling) and module.bias is not None:
            init.zeros_(module.bias)

    def __getstate__(self) -> dict:
        """
        What is pickled. The hooks that transformers puts on in a first pass are functions within a function, which no
        pickle takes: they come off here, and the next pass puts them on anew.
        """
        for module in self.modules():
            module.__dict__.pop(CAPTURING_FLAG, None)
            for key, hook in list(module._forward_hooks.items()):
                if getattr(hook, "__module__", None) == CAPTURING_MODULE:
                    del module._forward_hooks[key]
        return self.__dict__.copy()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """
        Like `PreTrainedModel.from_pretrained`, but a checkpoint that does not fit the model exactly is refused.

        A `quantization_config` is for the LMM: what turns its states into masks stays in the `dtype` of the rest.

        Raises:
            ValueError: tensors are missing, unexpected, of the wrong shape or not of the right kind of number; the
                sentence names them. Or the index names files outside of the folder.
            OSError: there are no weights, or they are truncated or damaged.
        """
        check_shard_names(pretrained_model_name_or_path)
        hush_hub_kernel()
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
        _refuse_misfits(
            pretrained_model_name_or_path,
            ("missing", info["missing_keys"]),
            ("unexpected", info["unexpected_keys"]),
            ("of the wrong shape", [] if allow_mismatch else info["mismatched_keys"]),
        )
        # Under ZeRO-3 transformers also keeps renamings that met no weight, and would apply their inverse at saving.
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        # transformers does not keep it, and what is loaded later must be of the same state of the repository.
        model.revision = kwargs.get("revision")
        # Checkpoints of others, and ours of release 0.1.0, do not say how long an answer may become.
        with_answer_length(model.generation_config)
        return (model, info) if output_loading_info else model

    def set_attn_implementation(self, attn_implementation: str | dict, *args: Any, **kwargs: Any) -> None:
        """Like `PreTrainedModel.set_attn_implementation`; flash attention becomes that of the language model alone."""
        asked: Any = attention_of_parts(attn_implementation)
        super().set_attn_implementation(asked, *args, **kwargs)

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Here the files are known, wherever they came from; the base class casts whatever they hold.
        stored = {} if state_dict is None else dtypes_of(state_dict)
        if state_dict is None:
            for file in checkpoint_files or []:
                stored |= stored_dtypes(file, load_config.weights_only)
        dropped = "|".join(model._keys_to_ignore_on_load_unexpected or ())
        stored = {name: dtype for name, dtype in stored.items() if not re.search(dropped or "$^", name)}
        is_packed = load_config.hf_quantizer is not None and load_config.hf_quantizer.pre_quantized
        # Others may have packed the encoder of images, or left it as it was.
        whole = (*MASK_PATH, model.adapter.names.head)
        misfits = wrong_kinds(model, stored, whole if is_packed else None)
        _refuse_misfits(load_config.pretrained_model_name_or_path, ("of the wrong type", misfits))
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


def keep_mask_path(quantization_config: Any) -> Any:
    """A copy of a quantisation config (object or `dict`) that leaves out what is never quantised."""
    chosen = copy.deepcopy(quantization_config)
    if isinstance(chosen, dict):
        is_bits = chosen.get("quant_method") == "bitsandbytes" or {"load_in_4bit", "load_in_8bit"} & chosen.keys()
        name = "llm_int8_skip_modules" if is_bits else "modules_to_not_convert"
        chosen[name] = [*dict.fromkeys([*(chosen.get(name) or []), *NEVER_QUANTIZED])]
        return chosen
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(chosen, name):
            setattr(chosen, name, [*dict.fromkeys([*(getattr(chosen, name) or []), *NEVER_QUANTIZED])])
            return chosen
    raise ValueError(f"quantization_config must be able to leave modules out, got a {type(chosen).__name__}")


def _refuse_misfits(source, *groups) -> None:
    """Raise a `ValueError` that names all tensors of all groups `(what is wrong, names)`, unless there are none."""
    problems = [f"{wrong}: {_name_some(names)}" for wrong, names in groups if names]
    if problems:
        raise ValueError(f"the weights in {source} do not fit the model; tensors {'; '.join(problems)}")


def _name_some(names, at_most: int = 8) -> str:
    """Names of a few tensors, and how many more there are; some come as (name, got, expected), shapes among them."""

    def say(value) -> str:
        return value if isinstance(value, str) else str(tuple(value))

    texts = sorted(
        name if isinstance(name, str) else f"{name[0]} (got {say(name[1])}, expected {say(name[2])})" for name in names
    )
    more = f" and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more


__all__ = ["MASK_PATH", "NEVER_QUANTIZED", "UGroundPreTrainedModel", "keep_mask_path"]
