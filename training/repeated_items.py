"""Items that a distributed job meets twice: each process gets equally many, so accelerate fills up from the first.

They go through the model, so that all processes do the same, and count for nothing.
"""

import torch

from uground.training.collator import IGNORED_LABEL


def own_images(images: int, dataset_length: int, processes: int, rank: int) -> int:
    """
    How many images of the last batch of an epoch are not repeated; they come first.

    Args:
        images: in this process's batch; alike in all processes.
        dataset_length: items of the dataset, an image each.
        processes, rank: how many there are, and which one this is.
    """
    if processes == 1:
        return images
    left = dataset_length % (images * processes) or images * processes
    return min(max(left - rank * images, 0), images)


def count_only(batch: dict, images: int) -> dict:
    """A batch of the collator in which only the first `images` images have labels and targets."""
    if images >= len(batch["original_sizes"]):
        return batch
    labels, groups = batch["labels"], []
    image_of_row = batch.get("image_index")
    if image_of_row is None:
        image_of_row = torch.arange(len(labels), device=labels.device)
    for group in batch["target_groups"]:
        kept = group["images"] < images
        if kept.any():
            groups.append({name: value[kept] if torch.is_tensor(value) else value for name, value in group.items()})
    count = sum(len(group["segments"]) for group in groups)
    return {
        **batch,
        "labels": labels.masked_fill((image_of_row >= images)[:, None], IGNORED_LABEL),
        "target_groups": groups,
        # Segments lie in the order of their images, as `segments` of the groups says.
        "segment_keys": batch["segment_keys"][:count],
    }
