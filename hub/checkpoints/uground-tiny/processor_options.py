"""The keywords of a processor's call, as transformers groups them: which are taken, and what they may be."""

from dataclasses import dataclass, field

from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil
from transformers.utils import logging

from .argument_checks import check_number, check_one_of, check_whole

logger = logging.get_logger(__name__)

# What may be changed of how pixels are read; both frames are changed alike.
IMAGE_OPTIONS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "resample",
    "rescale_factor",
)
# Keywords of image processors that would change what pixels a frame holds, which is the models' to say.
FRAME_OPTIONS = tuple(
    sorted(set(SamImageProcessorPil.valid_kwargs.__annotations__) - {"return_tensors", *IMAGE_OPTIONS})
)
TEXT_OPTIONS = (
    "add_special_tokens",
    "max_length",
    "pad_to_multiple_of",
    "padding",
    "padding_side",
    "return_offsets_mapping",
    "truncation",
)
# `apply_chat_template` of transformers asks for this too; an image expands here without moving any offset.
PASSED_OVER = ("return_text_replacement_offsets",)
# It hands these on as well, `None` where there are none.
OTHER_INPUTS = ("videos", "audio")
CHANNELS = 3
# Keywords of `from_pretrained`: where files are looked for, what automatic classes and pipelines hand on, and what
# the tokenizers of transformers take, which no signature of theirs names.
LOADING_OPTIONS = frozenset(
    (
        *("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "code_revision"),
        *("subfolder", "token", "trust_remote_code", "user_agent", "adapter_kwargs", "return_unused_kwargs"),
        *("backend", "use_fast", "config", "tokenizer_type", "dtype", "torch_dtype"),
    )
)
TOKENIZER_OPTIONS = frozenset(
    (
        *PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES,
        *("add_bos_token", "add_eos_token", "add_prefix_space", "additional_special_tokens", "chat_template"),
        *("clean_up_tokenization_spaces", "extra_special_tokens", "fix_mistral_regex", "gguf_file", "legacy"),
        *("model_input_names", "model_max_length", "padding_side", "split_special_tokens", "tokenizer_file"),
        *("truncation_side", "verbose", "vocab", "vocab_file", "merges", "merges_file"),
        *("added_tokens_decoder", "model_specific_special_tokens", "tokenizer_object", "tokenizer_class"),
    )
)
COMMON = "common_kwargs"
GROUPS = {
    "text_kwargs": TEXT_OPTIONS,
    "images_kwargs": IMAGE_OPTIONS,
    "videos_kwargs": (),
    "audio_kwargs": (),
    COMMON: ("return_tensors", *TEXT_OPTIONS, *IMAGE_OPTIONS),
}
# How rows are padded or cut, by every name that transformers has for it.
PADDINGS = {True: "longest", "longest": "longest", "max_length": "max_length", False: None, "do_not_pad": None}
TRUNCATIONS = {True: True, "longest_first": True, "only_first": True, False: False, "do_not_truncate": False}
# What the keywords of a call may be, but for numbers of tokens.
ALLOWED = {
    "return_tensors": ("pt", "np", None),
    "padding": tuple(PADDINGS),
    "truncation": tuple(TRUNCATIONS),
    "padding_side": ("left", "right"),
    "add_special_tokens": (True, False),
    "return_offsets_mapping": (True, False),
}


@dataclass
class CallOptions:
    """
    The keywords of one call.

    Attributes:
        return_tensors: `"pt"`, `"np"` or `None`.
        padding: `"longest"`, `"max_length"` or `None`.
        padding_side: `"left"` or `"right"`.
        pad_to_multiple_of, max_length: a number of tokens, or `None`.
        truncation: whether what is longer than `max_length` loses its end.
        add_special_tokens: as in a tokenizer's call, or `None` to go by the prompt.
        return_offsets_mapping: whether offsets are returned.
        images: for the image processors.
    """

    return_tensors: str | None = "pt"
    padding: str | None = "longest"
    padding_side: str = "left"
    pad_to_multiple_of: int | None = None
    max_length: int | None = None
    truncation: bool = False
    add_special_tokens: bool | None = None
    return_offsets_mapping: bool = False
    images: dict = field(default_factory=dict)


def read_options(given: dict) -> CallOptions:
    """
    The keywords of a call, flat and grouped, as one.

    Raises:
        TypeError: a keyword is not known, or a group is no dictionary.
        ValueError: a keyword is given twice, or its value is none that it may have.
    """
    if any(given.get(name) is not None for name in OTHER_INPUTS):
        raise ValueError("a UGroundProcessor takes images and text only, got videos or audio")
    others = (*GROUPS, *PASSED_OVER, *OTHER_INPUTS)
    flat = {name: value for name, value in given.items() if name not in others}
    _refuse_unknown(flat, ("return_tensors", *TEXT_OPTIONS, *IMAGE_OPTIONS), "")
    for group, known in GROUPS.items():
        grouped = given.get(group) or {}
        if not isinstance(grouped, dict):
            raise TypeError(f"{group} must be a dictionary, got {type(grouped).__name__}")
        grouped = {name: value for name, value in grouped.items() if name not in PASSED_OVER}
        _refuse_unknown(grouped, known, f" in {group}")
        twice = sorted(flat.keys() & grouped.keys())
        if twice and group != COMMON:
            raise ValueError(f"{twice[0]} must be given once, got it twice, as a keyword and in {group}")
        # What is common to texts and images gives way to what is said of either.
        flat = grouped | flat
    images = _image_options({name: flat.pop(name) for name in IMAGE_OPTIONS if name in flat})
    flat = {name: value for name, value in flat.items() if value is not None or name == "return_tensors"}
    for name, value in flat.items():
        if name in ALLOWED:
            check_one_of(name, value, ALLOWED[name])
        else:
            check_whole(name, value)
    for name, meaning in (("padding", PADDINGS), ("truncation", TRUNCATIONS)):
        if name in flat:
            flat[name] = meaning[flat[name]]
    return CallOptions(**flat, images=images)


def take_image_options(given: dict) -> dict:
    """
    Of the keywords of `from_pretrained`, those for the image processors.

    Raises:
        ValueError: a value is none that it may have, or would change what pixels a frame holds.
    """
    _refuse_frame(given)
    return _image_options({name: given[name] for name in IMAGE_OPTIONS if name in given})


def warn_of_unknown(given: dict, own: tuple[str, ...]) -> None:
    """
    Log a warning that names the keywords of `from_pretrained` that nothing reads.

    A warning only: other releases of transformers may hand on keywords that this one does not know.

    Args:
        given: the keywords; private ones, of transformers itself, are passed over.
        own: arguments of the processor's class.
    """
    known = {*LOADING_OPTIONS, *TOKENIZER_OPTIONS, *IMAGE_OPTIONS, *FRAME_OPTIONS, *own}
    unknown = sorted(name for name in given if name not in known and not name.startswith("_"))
    if unknown and not given.get("return_unused_kwargs"):
        logger.warning(f"a UGroundProcessor does not know {', '.join(unknown)}, which changes nothing")


def _image_options(given: dict) -> dict:
    """Keywords for image processors as these take them, `None` left out; refuses values that none may have."""
    options = {name: value for name, value in given.items() if value is not None}
    for name, value in options.items():
        if name.startswith("do_"):
            check_one_of(name, value, (True, False))
        elif name in ("image_mean", "image_std"):
            values = value if isinstance(value, (list, tuple)) else [value] * CHANNELS
            if len(values) != CHANNELS:
                raise ValueError(f"{name} must be one number or one per channel, {CHANNELS}, got {len(values)}")
            for number in values:
                check_number(name, number)
            if name == "image_std" and 0 in values:
                raise ValueError(f"image_std must not be 0, as pixels are divided by it, got {value!r}")
            options[name] = [float(number) for number in values]
        elif name == "resample":
            check_one_of(name, value, tuple(Image.Resampling))
        else:
            check_number(name, value)
    return options


def _refuse_unknown(given: dict, known: tuple[str, ...], place: str) -> None:
    """Name the keywords that are not known, those about frames by themselves."""
    _refuse_frame({name: value for name, value in given.items() if name not in known})
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise TypeError(
            f"a UGroundProcessor does not know {', '.join(map(str, unknown))}{place}; it takes "
            f"{', '.join((*TEXT_OPTIONS, *IMAGE_OPTIONS, 'return_tensors'))} and {', '.join(GROUPS)}"
        )


def _refuse_frame(given: dict) -> None:
    for name in FRAME_OPTIONS:
        if given.get(name) is not None:
            raise ValueError(
                f"{name} may not be changed, as the models fix their frames; expected no {name}, got {given[name]!r}"
            )


__all__ = ["IMAGE_OPTIONS", "CallOptions", "read_options", "take_image_options"]
