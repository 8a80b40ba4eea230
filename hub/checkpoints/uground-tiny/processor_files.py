"""The files of a processor, looked at where loading fails and where it would not: what cannot be used is named."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils import cached_file

from .image_processors import DEFAULT_TYPE, IMAGE_PROCESSORS, NATIVE, type_of
from .prompt_format import PLACEHOLDER, PromptFormat

PROCESSOR_FILE, TOKENIZER_FILE, TEMPLATE_FILE = "processor_config.json", "tokenizer.json", "chat_template.jinja"
TOKENIZER_SETTINGS = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER_SETTINGS, "special_tokens_map.json", "added_tokens.json", TOKENIZER_FILE)
# Where loading itself looks for the files of a repository.
PLACE_OPTIONS = ("cache_dir", "revision", "token", "subfolder")
LEGACY_TEMPLATE_FILE = "chat_template.json"
LFS_POINTER = b"version https://git-lfs"
# Pixels of a side; a picture of more would not fit into any memory.
LARGEST_SIDE = 2**15
SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_pad", "do_convert_rgb")
LONGEST_REASON = 240


@contextmanager
def names_broken_files(source: object, **options: Any) -> Iterator[None]:
    """
    While a processor is loaded: an error that its files led to becomes one sentence that names the file.

    Args:
        source: folder or Hub id of the processor.
        options: of `from_pretrained`.

    Raises:
        OSError, ValueError: in place of any other exception.
    """
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:  # tokenizers raises the base class, and transformers whatever a file leads it to
        for name in (PROCESSOR_FILE, LEGACY_TEMPLATE_FILE, TEMPLATE_FILE, *TOKENIZER_FILES):
            path = _find(source, name, options)
            reason = None if path is None else what_is_broken(path)
            if reason is not None:
                raise ValueError(f"{path} {reason}") from error
        said, kind = _one_line(error), OSError if isinstance(error, OSError) else ValueError
        if str(source) in said and isinstance(error, (OSError, ValueError)):
            raise
        if said.startswith((PROCESSOR_FILE, TEMPLATE_FILE, TOKENIZER_SETTINGS)):
            raise kind(f"{source}/{said}") from error
        # The base class alone is what tokenizers raises, of a vocabulary that lacks its unknown token, for one.
        is_of_tokenizer = "tokenizer" in said or type(error) is Exception
        part = (
            f"tokenizer ({TOKENIZER_FILE}, {TOKENIZER_SETTINGS})"
            if is_of_tokenizer
            else f"processor ({PROCESSOR_FILE})"
        )
        raise kind(f"the {part} of {source} cannot be used: {said}") from error


@contextmanager
def names_tokenizer_files(source: object, **options: Any) -> Iterator[None]:
    """While the tokenizer of a processor is loaded: of its files, those that do not fit their kind are named."""
    try:
        yield
    except BaseException as error:  # as above, and a panic of the tokenizers' Rust, which is no `Exception`
        if isinstance(error, OSError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        path = _find(source, TOKENIZER_FILE, options)
        if path is None:
            raise ValueError(f"{source} holds no {TOKENIZER_FILE}") from error
        if (reason := what_is_broken(path)) is not None:
            raise ValueError(f"{path} {reason}") from error
        try:
            PreTrainedTokenizerFast(tokenizer_file=str(path))
        except BaseException as cause:  # as above
            if not (isinstance(cause, Exception) or _is_panic(cause)):
                raise
            raise ValueError(f"{path} is no tokenizer ({_one_line(cause)})") from error
        settings = _find(source, TOKENIZER_SETTINGS, options)
        where = f"the tokenizer of {source}" if settings is None else str(settings)
        if "trust_remote_code" in str(error):
            raise ValueError(f"{where} asks for code of its own (auto_map), which is not run here") from error
        raise ValueError(f"{where} cannot be used ({_one_line(error)})") from error


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def saved_type(settings: dict) -> str:
    """The kind of a saved image processor, a key of `IMAGE_PROCESSORS`; those of release 0.1.0 need not say it."""
    name = settings.get("image_processor_type", DEFAULT_TYPE)
    return type_of(name) if isinstance(name, str) else str(name)


def check_image_settings(settings: dict, name: str) -> None:
    """
    Raise a `ValueError` unless these are settings of a frame; the sentence says which is not.

    Args:
        settings: of one image processor, as `processor_config.json` holds them.
        name: of that image processor.
    """
    if saved_type(settings) not in IMAGE_PROCESSORS:
        raise ValueError(
            f"{PROCESSOR_FILE}: image_processor_type of {name} must be {' or '.join(IMAGE_PROCESSORS)}, "
            f"got {settings['image_processor_type']!r:.60}"
        )
    places, said = _places_of_side(settings)
    found = [settings[key].get(side) if isinstance(settings.get(key), dict) else None for key, side in places]
    if saved_type(settings) in NATIVE:
        _check_native(settings, name)
    elif not all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in found) or len(set(found)) != 1:
        keys = dict.fromkeys(key for key, _ in places)
        got = " and ".join(f"{settings.get(key)!r:.60}" for key in keys)
        raise ValueError(f"{PROCESSOR_FILE}: {name} must have the same side in 1..{LARGEST_SIDE} as {said}, got {got}")
    for key in ("image_mean", "image_std"):
        values = settings.get(key)
        if not isinstance(values, list) or len(values) != 3 or not all(_is_number(value) for value in values):
            raise ValueError(f"{PROCESSOR_FILE}: {key} of {name} must be three numbers, got {values!r:.60}")
    if not all(value > 0 for value in settings["image_std"]):
        raise ValueError(f"{PROCESSOR_FILE}: image_std of {name} must be positive, got {settings['image_std']}")
    for key in SWITCHES:
        if not isinstance(settings.get(key), (bool, type(None))):
            raise ValueError(f"{PROCESSOR_FILE}: {key} of {name} must be true or false, got {settings[key]!r:.60}")
    for key, allowed in (("resample", range(6)), ("rescale_factor", None)):
        value = settings.get(key)
        if value is not None and (not _is_number(value) or (allowed is not None and value not in allowed)):
            raise ValueError(f"{PROCESSOR_FILE}: {key} of {name} must be a number it knows, got {value!r:.60}")


def _check_native(settings: dict, name: str) -> None:
    """Raise a `ValueError` unless patches, and how many pixels an image may have, are whole numbers."""
    for key in ("patch_size", "merge_size", "temporal_patch_size"):
        if type(settings.get(key)) is not int or not 1 <= settings[key] <= LARGEST_SIDE:
            raise ValueError(
                f"{PROCESSOR_FILE}: {key} of {name} must be a whole number in 1..{LARGEST_SIDE}, "
                f"got {settings.get(key)!r:.60}"
            )
    size = settings.get("size")
    limits = [size.get(key) if isinstance(size, dict) else None for key in ("shortest_edge", "longest_edge")]
    if not all(type(limit) is int for limit in limits) or not 1 <= limits[0] <= limits[1]:
        raise ValueError(
            f"{PROCESSOR_FILE}: size of {name} must hold fewest and most pixels as shortest_edge and longest_edge, "
            f"got {size!r:.60}"
        )


def _places_of_side(settings: dict) -> tuple[tuple[tuple[str, str], ...], str]:
    """Where a saved image processor says the side of its frame, and that in words."""
    if saved_type(settings) == DEFAULT_TYPE:
        places = (("size", "longest_edge"), ("pad_size", "height"), ("pad_size", "width"))
        return places, "longest_edge of size and as height and width of pad_size"
    if settings.get("do_center_crop", True):
        places = (("size", "shortest_edge"), ("crop_size", "height"), ("crop_size", "width"))
        return places, "shortest_edge of size and as height and width of crop_size"
    return (("size", "height"), ("size", "width")), "height and width of size"


def check_fields(settings: dict) -> None:
    """Raise a `ValueError` unless what `processor_config.json` holds beside image processors is of its types."""
    for name in ("segment_token", "reject_token", "image_token", "chat_template"):
        if name in settings and not isinstance(settings[name], str):
            raise ValueError(f"{PROCESSOR_FILE}: {name} must be a text, got {settings[name]!r:.60}")
    size = settings.get("patch_size", 1)
    if type(size) is not int or size < 1:
        raise ValueError(f"{PROCESSOR_FILE}: patch_size must be a whole number of at least 1, got {size!r:.60}")


def check_length(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise a `ValueError` unless the longest text of a tokenizer is a number of tokens."""
    longest = tokenizer.model_max_length
    if not _is_number(longest) or longest < 1:
        raise ValueError(f"{TOKENIZER_SETTINGS}: model_max_length must be a number of at least 1, got {longest!r:.60}")


def check_template(processor: ProcessorMixin, source: object, **options: Any) -> None:
    """
    Raise a `ValueError` unless the chat template of a processor can be rendered.

    Args:
        processor: loaded.
        source, options: as for [`names_broken_files`].
    """
    path = _find(source, TEMPLATE_FILE, options)
    if path is not None and (reason := what_is_broken(path)) is not None:
        raise ValueError(f"{path} {reason}")
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PLACEHOLDER}]}
    try:
        processor.apply_chat_template([asked], add_generation_prompt=True)
    except Exception as error:  # of jinja, which is given whatever lies in the file
        raise ValueError(f"{TEMPLATE_FILE} cannot be used ({_one_line(error)})") from error


def check_prompt_format(processor: ProcessorMixin, source: object) -> None:
    """Raise a `ValueError` unless a rendered chat template holds all that a prompt needs; one cut short may not."""
    try:
        first = PromptFormat.of(processor).first
    except ValueError as error:
        raise ValueError(f"{source}/{TEMPLATE_FILE}: {_one_line(error)}") from error
    if first.count(processor.image_token) != 1:
        raise ValueError(
            f"{source}/{TEMPLATE_FILE} must write {processor.image_token} once for an image, got {first[:80]!r}"
        )


def what_is_broken(path: Path) -> str | None:
    """What makes a file of a processor unreadable, as the end of a sentence; `None` for one that is whole."""
    content = path.read_bytes()
    if content.startswith(LFS_POINTER):
        return "is a pointer of Git LFS, fetch the file itself with `git lfs pull`"
    if not content:
        return "is empty"
    try:
        text = content.decode("utf-8")
        if path.suffix != ".json":
            return None
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return f"is no {'JSON' if path.suffix == '.json' else 'text'} file in UTF-8 ({_one_line(error)})"
    return None if isinstance(value, dict) else f"must hold a JSON object, got {type(value).__name__}"


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _find(source, name: str, options: dict) -> Path | None:
    """The file of a folder, or of a repository that was downloaded."""
    found = cached_file(
        source,
        name,
        **{key: options[key] for key in PLACE_OPTIONS if options.get(key) is not None},
        local_files_only=True,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)


def _one_line(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= LONGEST_REASON else f"{said[:LONGEST_REASON]}…"


__all__ = [
    "check_fields",
    "check_image_settings",
    "check_length",
    "check_prompt_format",
    "check_template",
    "names_broken_files",
    "names_tokenizer_files",
    "saved_type",
    "what_is_broken",
]
