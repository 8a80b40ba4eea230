"""Scenes: a drawn world with exact queries, answers and masks, made from a seed; see [`world`]."""

from uground.training.scenes.world import (
    SPLITS,
    WORD_LIMIT,
    SceneGroups,
    allowed_pairs,
    corpus,
    example_scene,
    held_out,
    main,
    preview,
    scene,
    scene_examples,
    scene_group,
    scene_queries,
    scenes,
    tinted,
)

__all__ = [
    "SPLITS",
    "WORD_LIMIT",
    "SceneGroups",
    "allowed_pairs",
    "corpus",
    "example_scene",
    "held_out",
    "main",
    "preview",
    "scene",
    "scene_examples",
    "scene_group",
    "scene_queries",
    "scenes",
    "tinted",
]
