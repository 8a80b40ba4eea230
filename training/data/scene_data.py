"""Scenes as a `datasets.Dataset` whose items the collator takes."""

from functools import partial

from datasets import Dataset

from uground.training.scenes import scene_group


def scene_dataset(
    split: str,
    scene_count: int,
    seed: int,
    queries: int = 1,
    attributes: dict[str, float] | None = None,
    pairs: int = 0,
) -> Dataset:
    """
    Scenes as a dataset: nothing is stored, an item is drawn when it is read.

    Args:
        split, seed, attributes: as for `uground.training.scenes.scenes`.
        scene_count: number of items.
        queries: queries per scene.
        pairs: minimal pairs among them.

    Returns:
        A dataset of items `{"image", "examples"}`, see [`GroundingCollator`].
    """
    draw = partial(_draw_scenes, split=split, seed=seed, queries=queries, attributes=attributes, pairs=pairs)
    return Dataset.from_dict({"index": list(range(scene_count))}).with_transform(draw)


def _draw_scenes(
    rows: dict[str, list[int]], split: str, seed: int, queries: int, attributes, pairs: int
) -> dict[str, list]:
    groups = [scene_group(split, seed, index, queries, attributes, pairs) for index in rows["index"]]
    return {"image": [image for image, _ in groups], "examples": [examples for _, examples in groups]}
