"""Scenes drawn ahead and kept on disk, for pretraining: drawing one costs as much as a step with it.

A scene may be used more than once, each time cut and mirrored otherwise: `sample` gives batch number `step` of a run,
which depends on the seed and on that number alone, so that a run that goes on sees what it would have seen.
"""

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from uground.training.scenes.drawing import COLOURS, IMAGE_SIZES, KINDS, SIZES, TEXTURES
from uground.training.scenes.world import scene
from uground.whole_files import write_whole

PROPERTIES = {"kind": tuple(KINDS), "colour": tuple(COLOURS), "texture": tuple(TEXTURES), "size": tuple(SIZES)}
FRAME = max(max(size) for size in IMAGE_SIZES)  # scenes lie in the upper left corner of it
MAX_OBJECTS = 8
SHARD = 500  # scenes: 100 MB of pixels
CUT = 24  # pixels that a random cut takes off at most, above and on the left


@dataclass
class DrawnBatch:
    """
    Some scenes.

    Attributes:
        images (`(B, F, F, 3)`, uint8): padded with 0 below and to the right.
        objects (`(B, F, F)`, uint8): number of the object that a pixel shows, from 1 on; 0 where there is none.
        sizes (`(B, 2)`, int64): height and width.
        properties (`(B, MAX_OBJECTS, 4)`, int64): class numbers in the order of `PROPERTIES`; -1 of no object.
    """

    images: torch.Tensor
    objects: torch.Tensor
    sizes: torch.Tensor
    properties: torch.Tensor

    def masks(self) -> torch.Tensor:
        """`(B, n, F, F)` bool masks of the objects, for the most objects n that a scene of the batch has."""
        count = max(1, int((self.properties[..., 0] >= 0).sum(1).max()))
        return self.objects[:, None] == torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None]

    def inside(self) -> torch.Tensor:
        """`(B, F, F)` bool: what is image and not padding."""
        places = torch.arange(FRAME)
        return (places[:, None] < self.sizes[:, 0, None, None]) & (places < self.sizes[:, 1, None, None])


class SceneStore:
    """
    Scenes 0 … count-1 of a stream, in shards in a folder; what is missing there is drawn first.

    Args:
        folder: for the shards, 0.26 MB a scene; several stores may share it.
        split, seed: of the stream, see [`scene`].
        count: of scenes, rounded up to whole shards.
        processes: that draw.
    """

    def __init__(self, folder: str | Path, split: str, seed: int, count: int, processes: int = 2):
        self.folder, self.split, self.seed = Path(folder), split, seed
        self.shards = -(-count // SHARD)
        self.folder.mkdir(parents=True, exist_ok=True)
        missing = [number for number in range(self.shards) if not self._path(number).exists()]
        if missing:
            with ProcessPoolExecutor(processes) as pool:
                drawn = pool.map(self._draw, missing)
                for _ in tqdm(drawn, f"drawing {split} scenes", len(missing), unit_scale=SHARD, unit=" scenes"):
                    pass

    def __len__(self) -> int:
        return self.shards * SHARD

    def _path(self, shard: int) -> Path:
        return self.folder / f"{self.split}-{self.seed}-{shard:04d}.npy"

    def _draw(self, shard: int) -> None:
        """Draw a shard, and let it appear whole."""
        records = np.zeros(SHARD, dtype=RECORD)
        records["properties"] = -1
        for record, index in zip(records, range(shard * SHARD, (shard + 1) * SHARD), strict=True):
            drawn = scene(self.split, self.seed, index)
            height, width = drawn.image.height, drawn.image.width
            record["size"] = height, width
            record["image"][:height, :width] = np.asarray(drawn.image)
            for number, thing in enumerate(drawn.objects):
                record["objects"][:height, :width][thing.mask] = number + 1
                classes = [names.index(getattr(thing, name)) for name, names in PROPERTIES.items()]
                record["properties"][number] = classes
        write_whole(self._path(shard), lambda place: np.save(place, records))

    def read(self, indices: np.ndarray) -> DrawnBatch:
        """Scenes by number, as they were drawn."""
        records = np.empty(len(indices), dtype=RECORD)
        for place, index in enumerate(indices):
            shard, row = divmod(int(index), SHARD)
            records[place] = np.load(self._path(shard), mmap_mode="r")[row]
        return DrawnBatch(
            torch.from_numpy(records["image"].copy()),
            torch.from_numpy(records["objects"].copy()),
            torch.from_numpy(records["size"].astype(np.int64)),
            torch.from_numpy(records["properties"].astype(np.int64)),
        )

    def sample(self, step: int, batch_size: int, seed: int) -> DrawnBatch:
        """Batch number `step` of a run with a seed: random scenes, each cut on two sides and perhaps mirrored."""
        rng = np.random.default_rng((seed, step))
        batch = self.read(rng.integers(len(self), size=batch_size))
        for number in range(batch_size):
            top, left = (int(cut) for cut in rng.integers(0, CUT + 1, 2))
            _cut(batch, number, top, left, mirrored=rng.random() < 0.5)
        return batch


RECORD = np.dtype(
    [
        ("image", np.uint8, (FRAME, FRAME, 3)),
        ("objects", np.uint8, (FRAME, FRAME)),
        ("size", np.int16, 2),
        ("properties", np.int8, (MAX_OBJECTS, len(PROPERTIES))),
    ]
)


def _cut(batch: DrawnBatch, number: int, top: int, left: int, mirrored: bool) -> None:
    """Take rows above and columns on the left off a scene of a batch, in place, and perhaps mirror it."""
    height, width = batch.sizes[number].tolist()
    for pixels in (batch.images[number], batch.objects[number]):
        kept = pixels[top:height, left:width].clone()
        pixels.zero_()
        pixels[: height - top, : width - left] = kept.flip(1) if mirrored else kept
    batch.sizes[number] = torch.tensor([height - top, width - left])
