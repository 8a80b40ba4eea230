"""What calls take beside their tensors: keywords that nobody knows are refused, and how long an answer may become."""

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import GenerationMode

from .known_names import nearest_name

# Length of an answer where neither the call nor the checkpoint says one: room for a dozen segments with their names.
# The default of transformers cuts at 20.
MAX_NEW_TOKENS = 128
# Either says how long an answer may become.
LIMITS = ("max_new_tokens", "max_length")
# All else would reorder, repeat or split the passes whose states are read.
SUPPORTED_MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
SUPPORTED_SETTINGS = {"num_return_sequences": 1, "prefill_chunk_size": None, "use_cache": True}
# Of `generate`, besides its parameters and the fields of a `GenerationConfig`: what rules that stop at words need.
GENERATION_EXTRAS = ("tokenizer", "assistant_tokenizer")


class UnknownKeywordError(TypeError, ValueError):
    """A keyword that a call does not know: a `TypeError` in Python, and a `ValueError` in transformers' `generate`."""


def refuse_unknown(method: Callable, given: Iterable[str], more: Sequence[str] = (), generates: bool = False) -> None:
    """
    Raise an [`UnknownKeywordError`] unless all that came as the `**` of a method is known.

    Args:
        method: what was called; its parameters are what it takes.
        given: names that its `**` holds.
        more: names that may be in there.
        generates: whether what transformers' `generate` takes may be in there too, which is too much to list.
    """
    unlisted = generation_keywords() if generates else set()
    unknown = sorted(set(given) - set(more) - unlisted)
    if not unknown:
        return
    parameters = inspect.signature(method).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD] + [*more]
    near = nearest_name(unknown[0], {*known, *unlisted})
    nearest = f" (nearest is {near})" if near else ""
    also = " and settings of generation" if generates else ""
    raise UnknownKeywordError(
        f"{method.__name__} does not know {', '.join(unknown)}{nearest}; it takes {', '.join(known)}{also}"
    )


def generation_keywords() -> set[str]:
    """What `generate` of transformers takes beside tensors: its own parameters, and fields of a `GenerationConfig`."""
    parameters = set(inspect.signature(GenerationMixin.generate).parameters) - {"self", "inputs", "kwargs"}
    return {*vars(GenerationConfig()), *parameters, *GENERATION_EXTRAS}


def with_answer_length(settings: GenerationConfig) -> GenerationConfig:
    """The same settings, which now say how long an answer may become if they did not."""
    if all(getattr(settings, name) is None for name in LIMITS):
        settings.max_new_tokens = MAX_NEW_TOKENS
    return settings


def merge_settings(defaults: GenerationConfig, generate_kwargs: dict) -> tuple[GenerationConfig, dict]:
    """
    One config of all settings of a call, and the arguments that are none (streamers, logits processors …).

    Args:
        defaults: of the model; they hold where the call says nothing.
        generate_kwargs: of the call: `generation_config`, settings by name, and the rest.
    """
    others = {name: value for name, value in generate_kwargs.items() if name not in LIMITS or value is not None}
    settings = copy.deepcopy(others.pop("generation_config", None) or GenerationConfig())
    values = with_answer_length(copy.deepcopy(defaults)).to_dict()
    if any(name in others or getattr(settings, name) is not None for name in LIMITS):
        # One limit at a time: of two, transformers takes the one and warns of the other.
        values = {name: value for name, value in values.items() if name not in LIMITS}
    settings.update(**values, defaults_only=True, allow_custom_entries=True)
    return settings, settings.update(**others)


def check_supported(settings: GenerationConfig, others: dict) -> None:
    """Raise a `ValueError` unless tokens are written one after the other, each once."""
    mode = settings.get_generation_mode(others.get("assistant_model"))
    if mode not in SUPPORTED_MODES:
        supported = " or ".join(mode.value for mode in SUPPORTED_MODES)
        raise ValueError(f"segment writes by {supported} only, got settings of {mode.value}")
    for name, only in SUPPORTED_SETTINGS.items():
        value = getattr(settings, name)
        if value not in (None, only):
            raise ValueError(f"segment supports only {name}={only}, got {value}")


def rows_finished(
    sequences: torch.Tensor,
    prompt_length: int,
    settings: GenerationConfig,
    others: dict,
    end_tokens: int | list[int] | torch.Tensor | None,
) -> torch.Tensor:
    """
    Which answers came to their end, and were not cut by the limit of tokens or of time: `(B,)` bool.

    Args:
        sequences (`(B, T)`): prompts and what was written after them.
        prompt_length: columns that are prompt.
        settings, others: of [`merge_settings`].
        end_tokens (`int`, list of them or `None`): ids that end an answer.
    """
    written = sequences[:, prompt_length:]
    ends = torch.as_tensor([] if end_tokens is None else end_tokens, dtype=written.dtype, device=written.device)
    finished = torch.isin(written, ends.flatten()).any(1)
    if settings.stop_strings is None and not others.get("stopping_criteria") or settings.max_time is not None:
        return finished
    # A rule of the call ended a row if there was room for more, or if padding stands where it would have gone on.
    limit = settings.max_length - prompt_length if settings.max_new_tokens is None else settings.max_new_tokens
    if written.shape[1] < limit:
        return torch.ones_like(finished)
    return finished | (written[:, -1] == settings.pad_token_id)


__all__ = [
    "MAX_NEW_TOKENS",
    "UnknownKeywordError",
    "check_supported",
    "merge_settings",
    "refuse_unknown",
    "rows_finished",
    "with_answer_length",
]
