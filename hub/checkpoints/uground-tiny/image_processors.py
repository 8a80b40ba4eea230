"""What the towers see of an image: the image processor of each frame, always on PIL.

- `letterbox`: the longest side fills the frame, zeros behind it; SAM's mean and standard deviation. UGround's LMM, and
  every SAM.
- `centre_crop`: the shortest side fills the frame, the ends of the other are cut off; CLIP's. LISA, SESAME, READ.
- `stretch`: both sides fill the frame; CLIP's.

An LMM that sees images in their own proportions brings its own image processor (`NATIVE`), whose frame is as large as
the image asks for: all of the image, stretched to whole tokens along each axis.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from transformers import BaseImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

# Of pixels in 0..255: rescaling to 0..1 first would round differently from the official code.
SAM_MEAN = [123.675, 116.28, 103.53]
SAM_STD = [58.395, 57.12, 57.375]
# Of pixels in 0..1: those of ImageNet.
SAM2_MEAN, SAM2_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LETTERBOX, CENTRE_CROP, STRETCH = "letterbox", "centre_crop", "stretch"
# By the name that a saved image processor has, without regard to the back-end.
# Those of SAM 2 and 3, which need torchvision: what they make, a CLIP processor makes on PIL.
STRETCHING = ("Sam2ImageProcessor", "Sam3ImageProcessor")
NATIVE = {"Qwen2VLImageProcessor": Qwen2VLImageProcessorPil}
IMAGE_PROCESSORS = {"SamImageProcessor": SamImageProcessorPil, "CLIPImageProcessor": CLIPImageProcessorPil, **NATIVE}
BACKENDS = ("Pil", "Fast")
DEFAULT_TYPE = "SamImageProcessor"


def letterbox_image_processor(size: int) -> SamImageProcessorPil:
    """
    An image processor that scales the longest side to `size` pixels (bilinear, PIL), normalises with SAM's mean and
    standard deviation, and pads with zeros at the bottom and the right to `size` x `size`.

    UGround feeds its LMM and its SAM this way, at two sizes.
    """
    return SamImageProcessorPil(
        size={"longest_edge": size},
        pad_size={"height": size, "width": size},
        do_rescale=False,
        image_mean=SAM_MEAN,
        image_std=SAM_STD,
    )


def crop_image_processor(size: int) -> CLIPImageProcessorPil:
    """
    CLIP's own: the shortest side scaled to `size` pixels (bicubic, PIL), the central `size` x `size` cut out, and
    normalised with CLIP's mean and standard deviation.
    """
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def stretch_image_processor(size: int, **settings: Any) -> CLIPImageProcessorPil:
    """
    As [`crop_image_processor`], but both sides are scaled to `size` pixels and nothing is cut off.

    Args:
        size: side of the frame in pixels.
        settings: of the image processor, such as `image_mean`, in place of CLIP's.
    """
    square = {"height": size, "width": size}
    return CLIPImageProcessorPil(size=square, crop_size=square, do_center_crop=False, **settings)


def sam2_image_processor(
    size: int, image_mean: Sequence[float] = SAM2_MEAN, image_std: Sequence[float] = SAM2_STD
) -> CLIPImageProcessorPil:
    """
    What `Sam2ImageProcessor` and `Sam3ImageProcessor` make of images, without torchvision: both sides scaled to `size`
    pixels, bilinear with a filter as wide as the step, in whole grey levels; then to 0..1, and normalised.

    PIL's resizing and PyTorch's of bytes, which torchvision takes on processors that have AVX2, differ by one grey
    level at most.

    Args:
        size: side of the frame in pixels: 1024 for SAM 2, 1008 for SAM 3.
        image_mean, image_std: of each channel in 0..1; by default those of SAM 2 and 2.1. SAM 3 has 0.5 everywhere.
    """
    scaling = {"resample": Image.Resampling.BILINEAR, "do_convert_rgb": True}
    return stretch_image_processor(size, image_mean=[*image_mean], image_std=[*image_std], **scaling)


MAKERS = {
    LETTERBOX: letterbox_image_processor,
    CENTRE_CROP: crop_image_processor,
    STRETCH: stretch_image_processor,
}


def make_image_processor(frame: str, size: int) -> BaseImageProcessor:
    """The image processor of a frame, `"letterbox"`, `"centre_crop"` or `"stretch"`, of `size` pixels."""
    if frame not in MAKERS:
        raise ValueError(f"image_frame must be one of {', '.join(MAKERS)}, got {frame!r}")
    return MAKERS[frame](size)


def type_of(name: str) -> str:
    """The name of an image processor's class without its back-end."""
    for backend in BACKENDS:
        name = name.removesuffix(backend)
    return name


def on_pil(image_processor: BaseImageProcessor, name: str) -> BaseImageProcessor:
    """
    The same image processor on the PIL back-end.

    Args:
        image_processor: of one of the kinds in `IMAGE_PROCESSORS`, of any back-end.
        name: what to call it.

    Raises:
        ValueError: it is of another kind, or its settings make no frame.
    """
    written = type_of(type(image_processor).__name__)
    if written in STRETCHING:
        return from_sam2_settings(image_processor.to_dict(), name)
    kind = IMAGE_PROCESSORS.get(written)
    if kind is None:
        raise ValueError(
            f"the {name} of a UGroundProcessor must be a {' or '.join(IMAGE_PROCESSORS)}, "
            f"got {type(image_processor).__name__}"
        )
    found = image_processor if isinstance(image_processor, kind) else kind(**image_processor.to_dict())
    frame_of(found, name)
    return found


def from_sam2_settings(settings: dict, name: str) -> CLIPImageProcessorPil:
    """
    Of the settings of a `Sam2ImageProcessor` or `Sam3ImageProcessor`, what makes the same frames.

    Args:
        settings: as they are saved.
        name: what to call it.

    Raises:
        ValueError: they make no square frame, or leave out a step.
    """
    size: dict[str, Any] = settings.get("size") or {}
    sides: set[Any] = {size.get("height"), size.get("width")}
    steps = [step for step in ("do_resize", "do_rescale", "do_normalize") if settings.get(step) is False]
    if len(sides) != 1 or None in sides or steps or settings.get("resample", 2) != Image.Resampling.BILINEAR:
        raise ValueError(
            f"the {name} must scale both sides alike, bilinear, and normalise what it has scaled to 0..1, got size "
            f"{dict(size)}, resample {settings.get('resample')} and without {', '.join(steps) or 'nothing'}"
        )
    return sam2_image_processor(sides.pop(), settings["image_mean"], settings["image_std"])


def is_native(image_processor: BaseImageProcessor) -> bool:
    """Whether frames are as large as images ask for."""
    return isinstance(image_processor, tuple(NATIVE.values()))


def cell_side(image_processor: BaseImageProcessor) -> int:
    """Side of an image token in pixels of the frame, of an image processor whose frames have no fixed size."""
    return image_processor.patch_size * image_processor.merge_size


def frame_of(image_processor: BaseImageProcessor, name: str = "image_processor") -> tuple[str, int | None]:
    """
    What an image processor makes of an image: the kind of frame, and its side in pixels, `None` where that depends on
    the image.

    Raises:
        ValueError: its settings make no square frame.
    """
    if isinstance(image_processor, SamImageProcessorPil):
        return LETTERBOX, image_processor.pad_size["height"]
    if is_native(image_processor):
        return STRETCH, None
    size, crop = image_processor.size, image_processor.crop_size
    if image_processor.do_center_crop:
        sides = {size.get("shortest_edge"), crop.get("height"), crop.get("width")}
        kind = CENTRE_CROP
    else:
        sides, kind = {size.get("height"), size.get("width")}, STRETCH
    if len(sides) != 1 or None in sides or not image_processor.do_resize:
        raise ValueError(
            f"the {name} must scale the shortest side and cut a square of the same side out, or scale both sides "
            f"alike, got size {dict(size)} and crop_size {dict(crop)}"
        )
    return kind, sides.pop()


def read_native(image_processor: BaseImageProcessor, pictures: list, options: dict) -> dict[str, np.ndarray]:
    """
    Frames of an image processor whose frames have no fixed size.

    Args:
        image_processor, pictures, options: as in [`read_frames`].

    Returns:
        What the image processor returns, such as `pixel_values` (patches of all images) and `image_grid_thw`; and
        `valid_sizes` `(I, 2)` int64, rows and columns of each frame, all of which are image.
    """
    features = image_processor(pictures, return_tensors="np", **options)
    found = {name: np.asarray(value) for name, value in features.items()}
    found["pixel_values"] = found["pixel_values"].astype(np.float32, copy=False)
    found["valid_sizes"] = found["image_grid_thw"][:, 1:].astype(np.int64) * image_processor.patch_size
    return found


def read_frames(image_processor: BaseImageProcessor, pictures: list, options: dict) -> tuple[np.ndarray, np.ndarray]:
    """
    Frames of pictures.

    Args:
        image_processor: of one frame.
        pictures: I pictures of PIL.
        options: for the image processor's call.

    Returns:
        `(I, 3, side, side)` float32 pixels, and `(I, 2)` int64 rows and columns of them that are image: all, where
        nothing is padded.

    Raises:
        ValueError: a picture is too elongated for a letterbox.
    """
    kind, side = frame_of(image_processor)
    for picture in pictures:
        if kind == LETTERBOX and int(min(picture.size) * side / max(picture.size) + 0.5) < 1:
            raise ValueError(
                f"an image may not be so elongated that its short side vanishes at {side} pixels, got "
                f"{picture.width} wide and {picture.height} high"
            )
    features = image_processor(pictures, **options)
    pixels = np.stack(features["pixel_values"]).astype(np.float32, copy=False)
    sizes = features["reshaped_input_sizes"] if kind == LETTERBOX else [(side, side)] * len(pictures)
    return pixels, np.asarray(sizes, dtype=np.int64).reshape(-1, 2)


def seen_box(frame: str, image_hw: tuple[int, int]) -> tuple[float, float, float, float] | None:
    """
    The part of an image that a frame shows: x0, y0, x1, y1 in pixels of the image; `None` for all of it.

    Args:
        frame: kind of the frame.
        image_hw: height and width of the image.
    """
    height, width = image_hw
    if frame != CENTRE_CROP or height == width:
        return None
    short = min(height, width)
    left, top = (width - short) / 2, (height - short) / 2
    return left, top, left + short, top + short


__all__ = [
    "cell_side",
    "crop_image_processor",
    "frame_of",
    "is_native",
    "letterbox_image_processor",
    "make_image_processor",
    "on_pil",
    "read_frames",
    "read_native",
    "sam2_image_processor",
    "seen_box",
    "stretch_image_processor",
]
