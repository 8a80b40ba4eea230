"""LoRA and QLoRA through peft: what is adapted, what is trained in full beside it, and what is never quantised."""

import re
from collections.abc import Collection
from importlib.util import find_spec

import torch
from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from transformers import BitsAndBytesConfig, PreTrainedModel

from uground.modeling_uground.pretrained_uground import MASK_PATH, NEVER_QUANTIZED
from uground.processing import UGroundProcessor

# Of the language model only, as in the official scripts.
OFFICIAL_TARGETS = ("q_proj", "v_proj")
# Tokens that were added to the language model's vocabulary; only their rows are trained.
NEW_TOKENS = ("<im_start>", "<im_end>")
QUANTIZATIONS = ("none", "4bit", "8bit")


def lora_config(
    model: PreTrainedModel,
    processor: UGroundProcessor,
    rank: int,
    alpha: int = 16,
    dropout: float = 0.05,
    targets: list[str] | str | None = OFFICIAL_TARGETS,
    frozen: Collection[str] = (),
) -> LoraConfig:
    """
    What peft is to adapt in a UGround model.

    Args:
        model: a `UGroundForReferringSegmentation`.
        processor: its processor, which knows the new tokens.
        rank: of the adapter: 8 for 7B and 64 for 13B in the official scripts.
        alpha, dropout: of the adapter.
        targets: linear layers of the language model by the ends of their names.
        frozen: parts of names of modules that are not trained beside the adapter, of those of [`trained_in_full`].

    Raises:
        ValueError: no layer of the language model bears such a name, or no such module is trained.
    """
    ends, names = tuple(targets), model.adapter.names
    adapted = rf"lmm\.{re.escape(names.language_model)}\..*\.({'|'.join(map(re.escape, ends))})"
    if not any(re.fullmatch(adapted, name) for name, _ in model.named_modules()):
        raise ValueError(f"no layer of the language model is called {' or '.join(ends)}: nothing to adapt")
    whole = trained_in_full(model)
    for part in frozen:
        if not any(part in name for name in whole):
            raise ValueError(f"lora_frozen must name modules of {', '.join(whole)}, got {part!r}")
    ids = {processor.segment_token_id, processor.reject_token_id}
    ids |= {
        processor.tokenizer.convert_tokens_to_ids(token)
        for token in NEW_TOKENS
        if token in processor.tokenizer.get_vocab()
    }
    rows = sorted(token for token in ids if token is not None)
    new_rows = {names.embeddings: rows}
    if not model.lmm.config.tie_word_embeddings:
        new_rows[names.head] = list(rows)
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=adapted,
        modules_to_save=[name for name in whole if not any(part in name for part in frozen)],
        trainable_token_indices=new_rows,
    )


def trained_in_full(model: PreTrainedModel) -> list[str]:
    """Names of the modules that are trained whole beside an adapter: what turns layer states into masks."""
    names = []
    for part in MASK_PATH:
        below = getattr(getattr(model, part), "trained_in_full", None)
        names += [part] if below is None else [f"{part}.{name}" for name in below]
    modules = dict(model.named_modules())
    return [name for name in names if name in modules and any(True for _ in modules[name].parameters())]


def with_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with a new adapter; what is trained is held in float32, whatever the rest is."""
    return trainable_in_float32(get_peft_model(model, config))


def with_saved_adapter(model: PreTrainedModel, path: str) -> PeftModel:
    """The model with an adapter that was saved before, to train it further."""
    adapted = trainable_in_float32(PeftModel.from_pretrained(model, path, is_trainable=True))
    # Once more: what is trained in full had the dtype of the base when it was read, and was rounded.
    set_peft_model_state_dict(adapted, load_peft_weights(path, device="cpu"))
    return adapted


def trainable_in_float32(model: PeftModel) -> PeftModel:
    """The model, with what is trained turned to float32 in place: small steps vanish in bfloat16."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return model


def quantization_config(quantization: str) -> BitsAndBytesConfig | None:
    """
    How to load the frozen weights of a model.

    Args:
        quantization: `"none"`, `"4bit"` (NF4, twice quantised, computed in bfloat16) or `"8bit"`.

    Returns:
        For `from_pretrained(quantization_config=…)`; what draws masks stays as it is.

    Raises:
        ValueError: no such quantisation, or bitsandbytes, which does it, is not installed.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS}, got {quantization!r}")
    if quantization == "none":
        return None
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"quantization {quantization} needs bitsandbytes, which is not installed; expected none")
    skipped = list(NEVER_QUANTIZED)
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=skipped,
    )
