"""Training and evaluation data: Scenes, readers of published datasets, and the prepared form of both.

Light to import: readers are imported from `uground.training.data.registry`.
"""

from uground.training.data.scene_data import scene_dataset

__all__ = ["scene_dataset"]
