"""The files of a checkpoint, looked at before they are used: what is cut, foreign or of another type is named."""

import functools
import json
import os
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.dataclasses import type_validator
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
)

# What Git leaves in place of a large file that was not fetched.
LFS_POINTER = b"version https://git-lfs"
LONGEST_REASON = 240
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PARTS = ("lmm_config", "sam_config")
OPTIONAL_PARTS = ("sam_config",)
DTYPE_KEYS = ("dtype", "torch_dtype")
# Of a generation configuration: counts of at least 1, and ids of tokens, one or several.
COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens", "begin_suppress_tokens")


def reason_of(error: BaseException) -> str:
    """What an exception of a library says, in one line of bounded length."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}…"


def what_it_is_instead(head: bytes) -> str | None:
    """What the first bytes of a file betray about one that cannot be read, if anything."""
    if not head:
        return "it is empty"
    if head.startswith(LFS_POINTER):
        return "it is a pointer of Git LFS, fetch the file itself with `git lfs pull`"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "it is text in UTF-16, expected UTF-8"
    return None


def read_json_object(path: str | Path) -> dict:
    """
    The object in a JSON file.

    Raises:
        OSError: there is no such file, or it is no JSON in UTF-8; the sentence names the file.
        ValueError: it holds another value than an object.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"the folder {str(path.parent)!r} holds no {path.name}")
    content = path.read_bytes()
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = what_it_is_instead(content) or reason_of(error)
        raise OSError(f"{path} is no JSON file: {reason}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def names_config(path: str | Path) -> Iterator[None]:
    """While a configuration is made of a file: whatever its values lead to is a `ValueError` that names it."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # transformers raises whatever a value of another type leads it to
        if isinstance(error, (OSError, ValueError)) and str(path) in str(error):
            raise
        raise ValueError(f"{path} cannot be used ({reason_of(error)})") from error


# What the library writes beside our fields, takes as it is, and needs when a checkpoint is saved again.
ADDED_FIELDS = {"auto_map": dict | None, "architectures": list | None}


def check_config_fields(content: dict, hints: dict[str, object]) -> None:
    """
    Look at the content of a `config.json`: the parts of the model are described, and fields are of their types.

    Args:
        content: of the file.
        hints: type of each field of ours.

    Raises:
        ValueError: names the field, with got and expected.
    """
    for part in PARTS:
        _check_part(content, part)
    _check_dtypes(content, "")
    for name, hint in {**hints, **ADDED_FIELDS}.items():
        # JSON has one kind of number, and a field of floats takes any.
        if name in content and not (hint is float and type(content[name]) is int):
            try:
                type_validator(name, content[name], hint)
            except TypeError as error:
                kind = hint.__name__ if isinstance(hint, type) else str(hint)
                raise ValueError(f"{CONFIG_NAME}: {name} must be of type {kind}, got {content[name]!r:.80}") from error


def _check_part(content: dict, part: str) -> None:
    """Without its description, a part would be built at the size that its class takes for usual, of billions."""
    described = content.get(part)
    # Said outright that there is none: a model without SAM. A file that says nothing of it lacks something.
    is_left_out = part in OPTIONAL_PARTS and part in content and described is None
    if is_left_out or isinstance(described, PreTrainedConfig):
        return
    if not isinstance(described, dict) or not described:
        raise ValueError(f"{CONFIG_NAME} must describe the model in {' and '.join(PARTS)}, got {part} {described!r}")
    kind = described.get("model_type", "sam" if part == "sam_config" else None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(f"{CONFIG_NAME}: {part} must have a model_type that transformers knows, got {kind!r}")
    for name in CONFIG_MAPPING[kind].sub_configs:
        inner = described.get(name)
        if not isinstance(inner, PreTrainedConfig) and (not isinstance(inner, dict) or not inner):
            raise ValueError(f"{CONFIG_NAME}: {part} must describe its {name}, got {inner!r}")


def _check_dtypes(content: dict, place: str) -> None:
    for name, value in content.items():
        if isinstance(value, dict):
            _check_dtypes(value, f"{place}{name}.")
        elif name in DTYPE_KEYS and value is not None and not _is_dtype(value):
            raise ValueError(
                f"{CONFIG_NAME}: {place}{name} must be a dtype of PyTorch to compute in, such as float32, got "
                f"{value!r}"
            )


def _is_dtype(value) -> bool:
    """Whether this is, or names as transformers reads it, a dtype that models are made in."""
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    # Of one byte are those of packed weights.
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1


def own_hints(config_class: type) -> dict[str, object]:
    """Types of the fields that a configuration class adds to those of transformers."""
    hints = config_class.__dict__["__annotations__"]
    return {name: hint for name, hint in hints.items() if typing.get_origin(hint) is not typing.ClassVar}


def refuses_bad_config(init: Callable) -> Callable:
    """For the `__init__` of a model: what its configuration makes impossible is a `ValueError` that says so."""

    @functools.wraps(init)
    def checked(self, config, *args, **kwargs):
        try:
            init(self, config, *args, **kwargs)
        except (MemoryError, torch.OutOfMemoryError, ImportError, ValueError):
            raise
        except Exception as error:  # parts raise whatever sizes of 0, negative or huge ones lead them to
            origin = getattr(config, "name_or_path", None)
            named = f"the {CONFIG_NAME} of {origin}" if origin else "this configuration"
            raise ValueError(f"no model can be built of {named} ({reason_of(error)})") from error

    return checked


class CheckpointFilesMixin:
    """For a `PreTrainedModel`: files of a local checkpoint are looked at before they are loaded."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any) -> Any:
        """
        Like `PreTrainedModel.from_pretrained`.

        Raises:
            OSError, ValueError: a file of the folder is cut, empty, a pointer of Git LFS, or says what it must not.
        """
        folder = Path(pretrained_model_name_or_path or "", kwargs.get("subfolder") or "")
        if pretrained_model_name_or_path is not None and folder.is_dir():
            check_model_files(
                folder, None if kwargs.get("variant") else kwargs.get("config", folder), cls.config_class
            )
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def check_model_files(folder: Path, config: Any, config_class: type) -> None:
    """
    Look at what a folder holds of a model.

    Args:
        folder: of a checkpoint or an adapter.
        config: a configuration, the folder to read it from, or `None` to leave weights aside.
        config_class: reads it.

    Raises:
        OSError, ValueError: names the file that cannot be used.
    """
    if (folder / ADAPTER_CONFIG_NAME).is_file():
        read_adapter_config(folder) if (folder / CONFIG_NAME).is_file() else adapter_base(folder)
        if (folder / ADAPTER_WEIGHTS).is_file():
            _count_tensors(folder / ADAPTER_WEIGHTS)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        check_generation_config(folder / GENERATION_CONFIG_NAME)
    if config is None or not (folder / CONFIG_NAME).is_file():
        return
    config = config if isinstance(config, PreTrainedConfig) else config_class.from_pretrained(config)
    if (folder / GENERATION_CONFIG_NAME).is_file():
        _check_ends(folder / GENERATION_CONFIG_NAME, config.get_text_config().vocab_size)
    files = weight_files(folder)
    counts = [_count_tensors(file) for file in files]
    if files and all(file.suffix == ".safetensors" for file in files):
        _check_extent(folder, config.get_text_config(), sum(counts), sum(file.stat().st_size for file in files))


def read_adapter_config(folder: str | Path) -> dict:
    """
    The `adapter_config.json` of a folder.

    Raises:
        OSError, ValueError: there is none, or it is none of peft.
    """
    path = Path(folder, ADAPTER_CONFIG_NAME)
    content = read_json_object(path)
    if not isinstance(content.get("peft_type"), str):
        raise ValueError(
            f"{path} is no configuration of peft: peft_type must be a name, got {content.get('peft_type')!r}"
        )
    return content


def adapter_base(folder: str | os.PathLike) -> str:
    """
    What the `adapter_config.json` of a folder says that its adapter is of: a folder or a Hub id.

    Raises:
        OSError, ValueError: it says nothing, or cannot be read.
    """
    base = read_adapter_config(folder).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        path = Path(folder, ADAPTER_CONFIG_NAME)
        raise ValueError(f"{path} must name the base of its adapter in base_model_name_or_path, got {base!r}")
    return base


def check_generation_config(path: Path) -> None:
    """
    Raise a `ValueError` unless a `generation_config.json` can be used; transformers passes over one that is cut.
    """
    content = read_json_object(path)
    for name in COUNTS:
        value = content.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{path}: {name} must be a whole number of at least 1, got {value!r}")
    for name in TOKEN_IDS:
        value = content.get(name)
        if value is not None and not all(
            type(token) is int for token in (value if isinstance(value, list) else [value])
        ):
            raise ValueError(f"{path}: {name} must be the id of a token, or a list of them, got {value!r}")
    try:
        GenerationConfig.from_dict(content).validate()
    except Exception as error:  # a wrong type leads anywhere
        raise ValueError(f"{path} cannot be used ({reason_of(error)})") from error


def _check_ends(path: Path, vocabulary: int) -> None:
    """Refuse ends of an answer that no model of this vocabulary writes: its answers would run on, and find more."""
    ends = read_json_object(path).get("eos_token_id")
    outside = [end for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
    outside = [end for end in outside if not 0 <= end < vocabulary]
    if outside:
        raise ValueError(f"{path}: eos_token_id must lie in the vocabulary of {vocabulary} tokens, got {outside[0]}")


def weight_files(folder: Path) -> list[Path]:
    """
    The files of the weights in a folder: those of the index, or the one file; none where there is neither.

    Raises:
        OSError: one that the index names is absent.
        ValueError: the index is none, or names files outside of the folder.
    """
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME):
        if (folder / name).is_file() and folder / name != index:
            return [folder / name]
        if (folder / name).is_file():
            files = [folder / name for name in sorted(set(read_weight_map(index).values()))]
            if absent := [file.name for file in files if not file.is_file()]:
                raise FileNotFoundError(f"{index} names {absent[0]}, which the folder does not hold")
            return files
    return []


def read_weight_map(index: Path, needed: tuple[str, ...] = ("metadata", "weight_map")) -> dict[str, str]:
    """
    Name of tensor to name of file, from an index of weights.

    Args:
        index: the file.
        needed: objects that it must hold; `from_pretrained` of transformers reads `metadata` too.

    Raises:
        OSError, ValueError: it cannot be read, lacks what it needs, or names files outside of its folder.
    """
    try:
        content = read_json_object(index)
    except (OSError, ValueError) as error:
        raise ValueError(f"{index} is no index of weights ({reason_of(error)})") from error
    for key in needed:
        if not isinstance(content.get(key), dict) or (key == "weight_map" and not content[key]):
            raise ValueError(f"{index} is no index of weights: {key} must be an object, got {content.get(key)!r:.80}")
    for name in content["weight_map"].values():
        if not is_inside(name):
            raise ValueError(f"{index} must name files beside it, got {name!r}")
    return content["weight_map"]


def is_inside(name: str) -> bool:
    """Whether a relative path of a repository stays in its folder."""
    if not isinstance(name, str) or not name or "\\" in name:
        return False
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and ":" not in path.parts[0]


def _count_tensors(file: Path) -> int:
    """Number of tensors that the header of a file names; 0 for a pickle, whose content is not looked at."""
    with file.open("rb") as opened:
        instead = what_it_is_instead(opened.read(len(LFS_POINTER)))
    if instead is not None:
        raise OSError(f"the weights in {file.parent} cannot be read: {file.name}: {instead}")
    if file.suffix != ".safetensors":
        return 0
    try:
        with safe_open(file, framework="pt") as tensors:
            return len(tensors.keys())
    except (SafetensorError, OSError) as error:
        reason = f"{file.name} may be cut or damaged ({reason_of(error)})"
        raise OSError(f"the weights in {file.parent} cannot be read: {reason}") from error


def _check_extent(folder: Path, text_config: PreTrainedConfig, num_tensors: int, num_bytes: int) -> None:
    """Refuse sizes that the weights cannot fill before a model of them is begun: it might not fit on the machine."""
    path = folder / CONFIG_NAME
    layers = getattr(text_config, "num_hidden_layers", 0)
    if layers > num_tensors:
        raise ValueError(f"{path} says num_hidden_layers {layers}, but the weights hold {num_tensors} tensors in all")
    embeddings = getattr(text_config, "vocab_size", 0) * getattr(text_config, "hidden_size", 0)
    if embeddings > num_bytes:
        shape = (text_config.vocab_size, text_config.hidden_size)
        raise ValueError(f"{path} says that embeddings have the shape {shape}, but the weights have {num_bytes} bytes")


__all__ = [
    "CheckpointFilesMixin",
    "adapter_base",
    "check_config_fields",
    "check_generation_config",
    "check_model_files",
    "is_inside",
    "names_config",
    "own_hints",
    "read_adapter_config",
    "read_json_object",
    "read_weight_map",
    "reason_of",
    "refuses_bad_config",
    "weight_files",
    "what_it_is_instead",
]
