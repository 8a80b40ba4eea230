"""How every command opens a checkpoint: by the installed classes, whatever code the checkpoint brings along."""

import os
import re
from pathlib import Path
from typing import Any

import transformers

from uground.modeling_uground import UGroundConfig, UGroundForReferringSegmentation
from uground.modeling_uground.checkpoint_files import adapter_base, check_model_files, reason_of
from uground.modeling_uground.lmm_families import lmm_adapter
from uground.processing import UGroundProcessor
from uground.processing.image_processors import frame_of
from uground.processing.processor_files import check_prompt_format
from uground.processing.prompt_format import check_image_frame, check_token_ids

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
CONFIG_FILE, ADAPTER_FILE, PROCESSOR_FILE = "config.json", "adapter_config.json", "processor_config.json"


def check_checkpoint(path: str | os.PathLike) -> None:
    """
    Raise an error in one sentence unless this is the folder or the Hub id of a UGround, no code of which is run.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: it is of another kind, or its `config.json` is broken.
    """
    path = os.fspath(path)
    if Path(path).is_dir():
        if not Path(path, CONFIG_FILE).is_file():
            held = f" but an adapter ({ADAPTER_FILE})" if Path(path, ADAPTER_FILE).is_file() else ""
            raise FileNotFoundError(f"the folder {path!r} is no checkpoint: it holds no {CONFIG_FILE}{held}")
    elif Path(path).exists() or not HUB_ID.fullmatch(path):
        raise FileNotFoundError(f"the model {path!r} is neither a folder nor a Hub id")
    try:
        config, _ = UGroundConfig.get_config_dict(path)
    except OSError as error:
        said = next(iter(str(error).splitlines()), error)
        raise OSError(f"the model {path!r} could not be loaded: {said}") from error
    if config.get("model_type") != UGroundConfig.model_type:
        raise ValueError(
            f"the model {path!r} must be of type {UGroundConfig.model_type!r}, got {config.get('model_type')!r}"
        )


def is_adapter(path: str | os.PathLike) -> bool:
    """Whether a folder holds an adapter and not the model that it is of."""
    return Path(path, ADAPTER_FILE).is_file() and not Path(path, CONFIG_FILE).is_file()


def base_of(adapter: str | os.PathLike) -> str:
    """
    Folder or Hub id of the checkpoint that an adapter in a folder is of.

    Raises:
        OSError: the base is not there; the sentence says what to do.
        ValueError: `adapter_config.json` is broken, or the base is no UGround.
    """
    base = adapter_base(adapter)
    # Where training was told a relative path, it meant the folder it was started in.
    beside = Path(adapter, base)
    base = str(beside) if not Path(base).exists() and beside.is_dir() else base
    try:
        check_checkpoint(base)
    except OSError as error:
        raise OSError(
            f"the folder {str(adapter)!r} holds an adapter whose base {base!r} cannot be opened ({reason_of(error)}), "
            f"put the base there, or merge both by `python -m uground.hub.merge_lora {adapter} --base PATH --output O`"
        ) from error
    return base


def load_processor(path: str | os.PathLike) -> UGroundProcessor:
    """
    The processor of a checkpoint that was checked: it is there, of UGround, and its model and processor fit together.

    Args:
        path: folder or Hub id; of an adapter, the folder, whose base lends its processor where there is none.

    Raises:
        OSError, ValueError: something of it is not so, or a file is broken.
    """
    base = base_of(path) if is_adapter(path) else path
    check_checkpoint(base)
    config = UGroundConfig.from_pretrained(base)
    holder = path if Path(path, PROCESSOR_FILE).is_file() else base
    processor = UGroundProcessor.from_pretrained(holder, trust_remote_code=False)
    check_pair(config, processor, holder)
    check_prompt_format(processor, holder)
    return processor


def load_model(path: str | os.PathLike, **settings: Any) -> UGroundForReferringSegmentation:
    """
    The model of a checkpoint, in inference mode; for the folder of an adapter, its base with the adapter on.

    Args:
        path: folder or Hub id, checked by [`load_processor`].
        settings: of `from_pretrained`.

    Raises:
        OSError, ValueError: weights are missing or damaged, or do not fit.
    """
    if not is_adapter(path):
        return _load_weights(path, **settings).eval()
    check_model_files(Path(path), None, UGroundConfig)
    model = _load_weights(base_of(path), **settings)
    try:
        model.load_adapter(os.fspath(path))
    except (MemoryError, OSError):
        raise
    except Exception as error:  # peft and torch raise whatever shapes, names and settings lead them to
        raise ValueError(f"the adapter in {path} does not fit its base ({reason_of(error)})") from error
    return model.eval()


def _load_weights(path: str | os.PathLike, **settings) -> UGroundForReferringSegmentation:
    """The model, without the table that transformers logs of tensors that do not fit: the error names them."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        return UGroundForReferringSegmentation.from_pretrained(path, **settings)
    finally:
        transformers.logging.set_verbosity(level)


def check_pair(config: UGroundConfig, processor: UGroundProcessor, source: object) -> None:
    """
    Compare what the configuration of a model says with what its processor says.

    Args:
        config, processor: of one checkpoint.
        source: what to call it.

    Raises:
        ValueError: an id or a size differs, or an id lies outside of the vocabulary.
    """
    try:
        check_image_frame(config, processor)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    if config.segment_token_id is not None:  # a converted model may not know its token yet
        try:
            check_token_ids(config, processor)
        except ValueError as error:
            raise ValueError(f"{source}/{CONFIG_FILE}: {error}") from error
    vocabulary = config.get_text_config().vocab_size
    if len(processor.tokenizer) > vocabulary:
        raise ValueError(
            f"{source}: the tokenizer has {len(processor.tokenizer)} tokens, the vocabulary of the model {vocabulary}"
        )
    adapter = lmm_adapter(config.lmm_config, config.image_frame)
    side = None if adapter.frame is None else adapter.frame.side
    sizes = (
        ("image_processor", frame_of(processor.image_processor)[1], side),
        ("sam_image_processor", frame_of(processor.sam_image_processor)[1], config.frame_size),
        ("patch_size", processor.patch_size, adapter.cell_side),
    )
    for name, said, expected in sizes:
        if said != expected:
            raise ValueError(
                f"{source}: the side of {name} is {said} pixels in {PROCESSOR_FILE} and {expected} in {CONFIG_FILE}"
            )


__all__ = ["base_of", "check_checkpoint", "check_pair", "is_adapter", "load_model", "load_processor"]
