"""Folders of SAM, SAM 2 and SAM 3 of transformers: configuration, names of tensors, and settings of images.

Checkpoints for video hold an image model and more; of these the image model is taken, as `Sam2Model` and
`Sam3TrackerModel` take it.
"""

import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import BaseImageProcessor, PreTrainedConfig, Sam2Config, Sam3TrackerConfig, SamConfig

from uground.hub.weights.weight_files import WeightFiles
from uground.modeling_uground.checkpoint_files import names_config, read_json_object
from uground.modeling_uground.configuration_uground import REFUSED_SAMS
from uground.processing.image_processors import (
    STRETCHING,
    from_sam2_settings,
    letterbox_image_processor,
    sam2_image_processor,
    type_of,
)

# What image models are made of, by the type of a folder.
CONFIGS = {
    "sam": SamConfig,
    "sam2": Sam2Config,
    "sam2_video": Sam2Config,
    "sam3_tracker": Sam3TrackerConfig,
    "sam3_tracker_video": Sam3TrackerConfig,
    "sam3_video": Sam3TrackerConfig,
}
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")
# SAM's position encoding has two names; this one is tied to the other and not written.
TIED_SAM_NAME = "prompt_encoder.shared_embedding.positional_embedding"
# Of tracking things through a video.
_VIDEO_ONLY = (
    r"memory_.*|mask_downsample.*|object_pointer_proj.*|temporal_positional_encoding_projection_layer.*"
    r"|no_memory_positional_encoding|no_object_pointer|occlusion_spatial_embedding_parameter"
)
# Of `sam3_video`, in front and in place of it, one after the other: `Sam3TrackerModel` saves names with more than one
# of them. What else is its detector's goes.
_SAM3_NAMES = (
    ("tracker_model.", ""),
    ("tracker_neck.", "vision_encoder.neck."),
    ("detector_model.vision_encoder.backbone.", "vision_encoder.backbone."),
)
# Mean and standard deviation of SAM 3 in 0..1.
SAM3_MEAN = SAM3_STD = (0.5, 0.5, 0.5)
SETTINGS_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
# Files of Meta's SAM 2 hold one dictionary, `model`, some of whose names begin with these.
META_SAM2_NAMES = ("image_encoder.trunk.", "sam_mask_decoder.", "obj_ptr_proj.", "memory_attention.")


def sam_name(name: str) -> str | None:
    """Name in `SamModel` of a tensor in a file of that model; `None` for the second name of the position encoding."""
    return None if name == TIED_SAM_NAME else name


def sam2_name(name: str) -> str | None:
    """Name in `Sam2Model` or `Sam3TrackerModel`; `None` for what is not of the image model."""
    for prefix, replacement in _SAM3_NAMES:
        if name.startswith(prefix):
            name = replacement + name.removeprefix(prefix)
    return None if re.fullmatch(_VIDEO_ONLY, name) or name.startswith("detector_model.") else name


def read_sam_config(folder: Path) -> PreTrainedConfig:
    """
    The configuration of the image model in a folder.

    Raises:
        OSError: there is none.
        ValueError: it is of another kind.
    """
    content = read_json_object(folder / "config.json")
    kind = content.get("model_type")
    if kind not in CONFIGS:
        raise ValueError(
            f"the SAM {folder} must be of type {', '.join(CONFIGS)}, got {kind}{REFUSED_SAMS.get(kind, '')}"
        )
    config_class = CONFIGS[kind]
    with names_config(folder / "config.json"):
        if kind == config_class.model_type:
            return config_class.from_pretrained(folder)
        described = content.get("tracker_config", content)
        missing = [part for part in PARTS if not isinstance(described.get(part), dict)]
        if missing:
            raise ValueError(f"config.json must describe its {', '.join(missing)}")
        return config_class(**{part: _of_images(described[part], part) for part in PARTS})


def _of_images(described: dict, part: str) -> dict:
    """A part's configuration; those for video have names of their own and the same content."""
    return described if part == "vision_config" else {key: described[key] for key in described if key != "model_type"}


def open_sam_folder(folder: Path) -> tuple[PreTrainedConfig, WeightFiles, Callable[[str], str | None]]:
    """
    Configuration and weights of the image model in a folder, and the function that renames its tensors.

    Raises:
        OSError, ValueError: see [`read_sam_config`]; or the weights cannot be read.
    """
    config = read_sam_config(folder)
    rename = sam_name if isinstance(config, SamConfig) else sam2_name
    return config, WeightFiles(folder, "SAM file"), rename


def sam_frames(config: PreTrainedConfig, side: int, folder: Path | None = None) -> BaseImageProcessor:
    """
    The image processor for a SAM: with the mean and standard deviation of the folder, if it says them.

    Args:
        config: of the SAM.
        side: of its frame in pixels.
        folder: where it comes from; `None` for a single file.

    Raises:
        ValueError: the folder's settings make another frame.
    """
    if isinstance(config, SamConfig):
        return letterbox_image_processor(side)
    settings = {} if folder is None else _image_settings(folder)
    if not settings:
        is_third = isinstance(config, Sam3TrackerConfig)
        return sam2_image_processor(side, SAM3_MEAN, SAM3_STD) if is_third else sam2_image_processor(side)
    found = from_sam2_settings(settings, f"image processor in {folder}")
    if found.size["height"] != side:
        raise ValueError(
            f"the image processor in {folder} must make the frame of {side} pixels that its config.json says, got "
            f"{found.size['height']}"
        )
    return found


def _image_settings(folder: Path) -> dict:
    """What a folder says of its images; nothing if it does not."""
    for name in SETTINGS_FILES:
        path = folder / name
        content = read_json_object(path) if path.is_file() else {}
        for settings in (content, content.get("image_processor")):
            if isinstance(settings, dict) and type_of(_type_in(settings)) in STRETCHING:
                return settings
    return {}


def _type_in(settings: dict) -> str:
    """The kind of an image processor that settings name, without what transformers used to write behind it."""
    return str(settings.get("image_processor_type", ""))


def refuse_metas_sam2(path: Path) -> None:
    """Raise a `ValueError` if a file is one of Meta's own SAM 2; what else it may be is for others to say."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        return
    tensors = content.get("model", content) if isinstance(content, dict) else {}
    if isinstance(tensors, dict) and any(str(name).startswith(META_SAM2_NAMES) for name in tensors):
        raise ValueError(
            f"the SAM checkpoint {path} is one of Meta's SAM 2, expected its folder in the layout of transformers as "
            f"in facebook/sam2.1-hiera-large"
        )
