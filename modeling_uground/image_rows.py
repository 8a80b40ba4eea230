"""Which row asks about which image, and whether rows and images that were joined or cut still belong together."""

import torch


def resolve_image_index(image_index: torch.Tensor | None, num_rows: int, num_images: int) -> torch.Tensor:
    """
    The image of every row: one image per row in order, or one image for all rows, unless `image_index` says which.

    Returns:
        `(B,)` int64.

    Raises:
        ValueError: `image_index` is needed, or does not name one of the images for every row.
    """
    if image_index is None:
        if num_images not in (1, num_rows):
            raise ValueError(f"image_index is needed: {num_rows} rows ask about {num_images} images")
        return torch.arange(num_rows) if num_images == num_rows else torch.zeros(num_rows, dtype=torch.long)
    is_whole = not (image_index.is_floating_point() or image_index.dtype == torch.bool)
    is_per_row = is_whole and tuple(image_index.shape) == (num_rows,)
    if not is_per_row or (num_rows and not 0 <= image_index.min() <= image_index.max() < num_images):
        raise ValueError(
            f"image_index must name one of {num_images} images for each of {num_rows} rows, got {image_index.tolist()}"
        )
    return image_index


def check_images(
    pixel_values: torch.Tensor | None, sam_pixel_values: torch.Tensor | None, *sizes: torch.Tensor
) -> None:
    """
    See that images were joined along their first axis.

    Args:
        pixel_values (`(I, 3, h, w)`, *optional*), sam_pixel_values (`(I, 3, S, S)`), sizes (each `(I, m)`): of the
            processor; no `pixel_values` where they are not per image.

    Raises:
        ValueError: one has another number of axes, as stacking gives, of images or of channels, or a size is no size.
    """
    named = {"pixel_values": pixel_values, "sam_pixel_values": sam_pixel_values}
    frames = {name: frame for name, frame in named.items() if frame is not None}
    is_flat = all(frame.dim() == 4 for frame in frames.values()) and all(size.dim() == 2 for size in sizes)
    if not is_flat or len({len(value) for value in (*frames.values(), *sizes)}) != 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in (*frames.values(), *sizes))
        raise ValueError(
            f"{' and '.join(frames)} must have 4 axes, their sizes 2, and all as many images; outputs of "
            f"the processor are joined with torch.cat and not stacked, got shapes {shapes}"
        )
    for name, frame in frames.items():
        if frame.shape[1] != 3:
            raise ValueError(f"{name} must have 3 channels, got {frame.shape[1]}")
    if any((size < 1).any() for size in sizes):
        raise ValueError(f"sizes of images must be at least 1, got {[size.tolist() for size in sizes]}")


def check_queries(input_ids: torch.Tensor, image_index: torch.Tensor | None, num_images: int) -> None:
    """
    See that the rows are those of the images.

    `image_index` counts within one output of the processor, so that outputs with it can be neither joined nor cut: of
    what is joined, the images of the second are asked by nobody.

    Args:
        input_ids (`(B, T)`), image_index (`(B,)`, *optional*): of the processor.
        num_images: I.

    Raises:
        ValueError: they are not.
    """
    if input_ids.dim() != 2:
        raise ValueError(
            "input_ids must have the shape (B, T); outputs of the processor are joined with torch.cat and not "
            f"stacked, got the shape {tuple(input_ids.shape)}"
        )
    asked = set(resolve_image_index(image_index, len(input_ids), num_images).tolist())
    unasked = sorted(set(range(num_images)) - asked)
    if unasked:
        raise ValueError(
            f"each of {num_images} images must be asked about, but image_index {image_index.tolist()} does not name "
            f"image {unasked[0]}; several queries per image must come from one call of the processor, uncut"
        )


def check_labels(labels: torch.Tensor | None, input_ids: torch.Tensor) -> None:
    """Raise a `ValueError` unless there is a label for each of `(B, T)` tokens, or none at all."""
    if labels is not None and getattr(labels, "shape", None) != input_ids.shape:
        got = tuple(labels.shape) if isinstance(labels, torch.Tensor) else repr(labels)
        raise ValueError(f"labels must have the shape {tuple(input_ids.shape)} of input_ids, got {got}")


__all__ = ["check_images", "check_labels", "check_queries", "resolve_image_index"]
