"""Reading a checkpoint folder before it goes anywhere: its configuration, its weights, or an adapter's."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from uground.checkpoint_loading import check_checkpoint, load_model
from uground.hub.weights.weight_files import first_line, name_some
from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.checkpoint_files import read_adapter_config

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def read_config(folder: str | os.PathLike) -> UGroundConfig:
    """
    The configuration of a checkpoint folder.

    Raises:
        OSError: there is no folder, or no `config.json` in it.
        ValueError: it is not one of UGround.
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{str(folder)!r} is no folder")
    check_checkpoint(folder)
    return UGroundConfig.from_pretrained(folder)


def load_checkpoint(folder: str | os.PathLike) -> UGroundForReferringSegmentation:
    """
    The model of a folder by the installed code, if every tensor is there and finite.

    Raises:
        OSError: there are no safetensors, or they are damaged.
        ValueError: tensors are missing, unexpected, wrongly shaped or not finite; the sentence names them.
    """
    folder = Path(folder)
    _require_safetensors(folder, "model*.safetensors", "model.safetensors")
    model = load_model(folder, dtype="auto")
    _require_finite(folder, model.state_dict().items())
    return model


def check_adapter(folder: str | os.PathLike) -> dict:
    """
    The configuration of an adapter whose weights are there and finite.

    Raises:
        OSError: a file is missing or damaged.
        ValueError: a tensor is not finite, there is none, or it is no adapter that peft can load.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    _require_safetensors(folder, ADAPTER_WEIGHTS, ADAPTER_WEIGHTS)
    try:
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as weights:
            names = list(weights.keys())
            _require_finite(folder, ((name, weights.get_tensor(name)) for name in names))
    except SafetensorError as error:
        raise OSError(f"{folder / ADAPTER_WEIGHTS} cannot be read: {first_line(error)}") from error
    if not names:
        raise ValueError(f"{folder / ADAPTER_WEIGHTS} holds no tensor")
    return config


def _require_safetensors(folder: Path, pattern: str, name: str) -> None:
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for path in folder.glob("*.bin"))
    held = f", only {name_some(pickles)}, which could run code when read" if pickles else ""
    raise FileNotFoundError(f"the folder {str(folder)!r} holds no {name}{held}")


def _require_finite(folder: Path, tensors) -> None:
    broken = [name for name, tensor in tensors if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"the weights in {str(folder)!r} are not finite: {name_some(broken)}")
