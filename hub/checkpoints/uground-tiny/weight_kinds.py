"""Whether each stored tensor is of the kind of number that the model has there: loading casts one to the other."""

import os
import re

import torch
from safetensors import safe_open
from transformers.modeling_utils import load_state_dict

# By the names of dtypes in PyTorch and in safetensors. Floats of eight bits and fewer are none that a parameter may be
# stored in: they come with scales, which only a quantised model reads.
KINDS = {"float": r"b?f(loat)?(16|32|64)", "integer": r"u?int\d+|[iu]\d+", "bool": r"bool"}


def kind_of(dtype: str) -> str:
    """`"float"`, `"integer"` or `"bool"`; where it is none of these, the name of the dtype itself."""
    return next((kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, dtype.lower())), dtype)


def stored_dtypes(file: str | os.PathLike, weights_only: bool = True) -> dict[str, str]:
    """
    Name of the dtype of every tensor of a file of weights, which are not read; of a file that is none, nothing.

    Raises:
        SafetensorError: the file is truncated or damaged.
    """
    if str(file).endswith(".safetensors"):
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    if str(file).endswith((".bin", ".pt")):
        return dtypes_of(load_state_dict(file, map_location="meta", weights_only=weights_only))
    return {}


def dtypes_of(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Name of the dtype of every tensor."""
    return {name: str(value.dtype).removeprefix("torch.") for name, value in tensors.items()}


def wrong_kinds(
    model: torch.nn.Module, stored: dict[str, str], only_under: tuple[str, ...] | None = None
) -> list[tuple[str, str, str]]:
    """
    Tensors of a checkpoint that are not of the kind that the model has there.

    Files may name a tensor otherwise than the model, but for the last part of its name, and no weight is called what
    buffers of integers are. So what is not called like one of these is a weight.

    Args:
        model: as it is before its weights are read.
        stored: name of the dtype of each tensor in the files.
        only_under (*optional*): names of modules; tensors outside of them, which a quantisation packs, do not count.

    Returns:
        Name, dtype and expected kind of each.
    """
    # A quantisation packs parameters, so that only buffers tell what is an integer by design.
    counters = {name.rsplit(".")[-1]: kind_of(dtype) for name, dtype in dtypes_of(dict(model.named_buffers())).items()}
    found = []
    for name, dtype in stored.items():
        *modules, leaf = name.split(".")
        if only_under is not None and not set(modules) & set(only_under):
            continue
        expected = counters.get(leaf, "float")
        if kind_of(dtype) != expected:
            found.append((name, dtype, expected))
    return found


__all__ = ["dtypes_of", "stored_dtypes", "wrong_kinds"]
