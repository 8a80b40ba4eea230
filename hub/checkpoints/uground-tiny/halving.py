"""What is done where memory runs out: the batch is halved."""

import gc

import torch


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on whatever device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return "out of memory" in text or "not enough memory" in text or "can't allocate memory" in text


def release_memory() -> None:
    """Hand memory that nothing uses back to the device."""
    gc.collect()
    empty_cache = getattr(torch.get_device_module(), "empty_cache", None)
    if empty_cache is not None:
        empty_cache()


def halve_batch(inputs: dict) -> list[dict]:
    """
    A processor's output as two batches: half of the images each, or half of the queries of the only image.

    Returns:
        Two batches with the rows in order; one, the given, where there is a single query.
    """
    num_rows, images = len(inputs["input_ids"]), len(inputs["original_sizes"])
    by_image = images > 1
    count = images if by_image else num_rows
    if count < 2:
        return [inputs]
    # Without `image_index` each image has one row.
    numbers = inputs["image_index"] if by_image and "image_index" in inputs else torch.arange(num_rows)
    halves = []
    for low, high in ((0, count // 2), (count // 2, count)):
        rows = (numbers >= low) & (numbers < high)
        half = {}
        for name, value in inputs.items():
            if name in ("input_ids", "attention_mask", "image_index"):
                half[name] = value[rows.to(value.device)]
            else:
                half[name] = value[low:high] if by_image else value
        if "image_index" in half:
            half["image_index"] = half["image_index"] - (low if by_image else 0)
        halves.append(half)
    return halves


__all__ = ["halve_batch", "is_out_of_memory", "release_memory"]
