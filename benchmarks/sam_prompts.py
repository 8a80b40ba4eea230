"""How well a checkpoint's SAM follows points, boxes and coarse masks, and finds everything, on test scenes.

    python benchmarks/sam_prompts.py [--model PATH] [--scenes 500] [--store FOLDER]

PATH is a UGround checkpoint or a SAM of `uground.training.scenes.pretrain`. One object a scene is asked for; of a
single point also with three masks, of which SAM's own estimate picks one. `everything`: a grid of points, three masks
of each, kept by estimate and stability and thinned out by overlap; the share of objects that some mask meets with an
IoU of 0.5. One JSON line.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import SamModel

from uground import tiny_checkpoint
from uground.checkpoint_loading import load_model
from uground.processing import masks_to_boxes
from uground.training.scenes import sam_stage
from uground.training.scenes.sam_stage import Prompted
from uground.training.scenes.scene_store import FRAME, DrawnBatch, SceneStore
from uground.training.scenes.vision_stage import frame_pixels

SEED = 900  # of scenes that nothing was trained on
BATCH = 25
GRID = 16  # points along each axis
LEAST_IOU, LEAST_STABILITY, MOST_OVERLAP = 0.6, 0.8, 0.7
STABILITY_MARGIN = 1.0  # logits
FOUND = 0.5


def sam_of(path: str) -> SamModel:
    """The SAM of a checkpoint, or of a folder of its own."""
    if json.loads((Path(path) / "config.json").read_text())["model_type"] == "uground":
        return load_model(path).mask_decoder.sam
    return SamModel.from_pretrained(path).eval()


def overlaps(masks: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU `(n, m)` of bool masks `(n, F, F)` and `(m, F, F)`; 0 of two empty ones."""
    first, second = masks.flatten(1).float(), others.flatten(1).float()
    both = first @ second.T
    return both / (first.sum(1)[:, None] + second.sum(1) - both).clamp_min(1)


def full_size(logits: torch.Tensor) -> torch.Tensor:
    """Mask logits `(n, F/4, F/4)` as bool masks `(n, F, F)`."""
    return F.interpolate(logits[:, None], size=(FRAME, FRAME), mode="bilinear", align_corners=False)[:, 0] > 0


def asked(batch: DrawnBatch) -> dict[str, Prompted]:
    """One object of each scene, asked for in every form."""
    masks = batch.masks()
    targets = masks[torch.arange(len(masks)), sam_stage.random_objects(batch, masks)]
    points = sam_stage.random_pixels(targets, 3)[:, None]
    labels = torch.ones(points.shape[:3], dtype=torch.long)
    return {
        "one point": Prompted(targets, points[:, :, :1], labels[:, :, :1]),
        "one point, three masks": Prompted(targets, points[:, :, :1], labels[:, :, :1], several=True),
        "three points": Prompted(targets, points, labels),
        "box": Prompted(targets, boxes=masks_to_boxes(targets)[:, None]),
        "coarse mask": Prompted(targets, mask=sam_stage.coarse_logits(targets)),
    }


def followed(sam: SamModel, images: torch.Tensor, prompted: Prompted) -> list[float]:
    """IoU of each prompt's mask, the one with the best estimate, with its target."""
    logits, estimates = sam_stage.decode(sam, images, prompted)
    best = logits[torch.arange(len(logits)), estimates.argmax(1)]
    return [
        overlaps(mask[None], target[None]).item()
        for mask, target in zip(full_size(best), prompted.targets, strict=True)
    ]


def everything(sam: SamModel, image: torch.Tensor, size_hw: tuple[int, int]) -> torch.Tensor:
    """Masks `(n, F, F)` of all that a grid of points finds in an image embedding `(1, C, h, w)`."""
    height, width = size_hw
    rows, columns = ((torch.arange(GRID) + 0.5) * side / GRID for side in (height, width))
    points = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), -1).view(-1, 1, 1, 2)
    prompted = Prompted(torch.empty(0), points, torch.ones(len(points), 1, 1, dtype=torch.long), several=True)
    logits, estimates = sam_stage.decode(sam, image.expand(len(points), -1, -1, -1), prompted)
    logits, estimates = logits.flatten(0, 1), estimates.flatten()
    sure = (logits > STABILITY_MARGIN).sum((1, 2)) / (logits > -STABILITY_MARGIN).sum((1, 2)).clamp_min(1)
    kept = ((estimates >= LEAST_IOU) & (sure >= LEAST_STABILITY)).nonzero().squeeze(1)
    kept = kept[estimates[kept].argsort(descending=True)]
    masks = full_size(logits[kept])
    return masks[thinned(overlaps(masks, masks), MOST_OVERLAP)]


def thinned(overlap: torch.Tensor, most: float) -> list[int]:
    """Of masks in order of preference with overlaps `(n, n)`, those that overlap none chosen before by more."""
    chosen: list[int] = []
    for number in range(len(overlap)):
        if not chosen or overlap[number, chosen].max() <= most:
            chosen.append(number)
    return chosen


@torch.no_grad()
def measure(sam: SamModel, store: SceneStore, scenes: int) -> dict[str, float]:
    """Mean IoU of each form of prompt, and the share of objects that `everything` finds."""
    torch.manual_seed(0)
    ious: dict[str, list[float]] = {}
    found, proposals = [], []
    for start in range(0, scenes, BATCH):
        batch = store.read(torch.arange(start, min(start + BATCH, scenes)).numpy())
        images = sam.vision_encoder(frame_pixels(batch, FRAME))[0]
        for name, prompted in asked(batch).items():
            ious.setdefault(name, []).extend(followed(sam, images, prompted))
        for number, masks in enumerate(batch.masks()):
            objects = masks[masks.flatten(1).any(1)]
            proposed = everything(sam, images[number : number + 1], tuple(batch.sizes[number].tolist()))
            proposals.append(len(proposed))
            met = overlaps(objects, proposed).amax(1) if len(proposed) else torch.zeros(len(objects))
            found += (met >= FOUND).tolist()
    figures = {name: sum(values) / len(values) for name, values in ious.items()}
    figures |= {"everything": sum(found) / len(found), "masks a scene": sum(proposals) / len(proposals)}
    return {name: round(value, 4) for name, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default=tiny_checkpoint())
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--store", help="folder that keeps the drawn scenes")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = SceneStore(args.store or folder, "test", SEED, args.scenes)
        figures = measure(sam_of(str(args.model)), store, args.scenes)
    print(json.dumps({"benchmark": "sam_prompts", "model": str(args.model), "scenes": args.scenes, **figures}))


if __name__ == "__main__":
    main()
