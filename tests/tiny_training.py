"""A few examples in the common schema, and trainers of tiny models on them."""

import numpy as np
from datasets import Dataset
from PIL import Image
from pycocotools import mask as coco_mask
from tiny import tiny_model
from tiny_processor import gradient_image, tiny_processor

from uground.training.trainer import UGroundTrainer, UGroundTrainingConfig

SIZES = [(40, 40), (24, 48), (48, 30), (36, 40)]
# Query, answer, attribute; an answer holds one segment token per mask.
SAYINGS = [
    ("what is the red cup", "it is [SEG] .", "res"),
    ("what can swim", "a fish is [SEG] and a boat is [SEG] .", "multi_rs"),
    ("what is the blue tree", "it is [REJ] .", "fp_res"),
    ("what is red", "the cup .", "vqa"),
]


def rle(mask: np.ndarray) -> dict:
    """COCO RLE of an `(H, W)` bool mask."""
    encoded = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}


def example(number: int, saying: int | None = None) -> dict:
    """Example number `number`; images of four sizes, one to four sayings apart."""
    query, answer, attribute = SAYINGS[(number if saying is None else saying) % len(SAYINGS)]
    height, width = SIZES[(number + number // 4) % len(SIZES)]
    pixels = np.roll(gradient_image(height, width), number * 3, axis=1)
    masks = []
    for segment in range(answer.count("[SEG]")):
        mask = np.zeros((height, width), bool)
        mask[segment * 8 : height // 2 + segment * 4, number % 7 : width // 2 + number % 7] = True
        masks.append(rle(mask))
    return {
        "id": f"example-{number}",
        "image": Image.fromarray(pixels),
        "query": query,
        "answer": answer,
        "phrases": ["the cup", "the boat"][: len(masks)],
        "masks": masks,
        "ignore": None,
        "attribute": attribute,
    }


class Items:
    """Reads items of a list by index, as a transform of a `datasets.Dataset`."""

    def __init__(self, items: list[dict]):
        self.items = items

    def __call__(self, rows: dict) -> dict:
        chosen = [self.items[index] for index in rows["index"]]
        groups = [item.get("examples", [item]) for item in chosen]
        return {"image": [item["image"] for item in chosen], "examples": groups}


def dataset(items: list[dict]) -> Dataset:
    """Items as the trainer takes them."""
    return Dataset.from_dict({"index": list(range(len(items)))}).with_transform(Items(items))


def training_config(folder, **settings) -> UGroundTrainingConfig:
    """Short, quiet, on the CPU, and the same on every machine."""
    defaults = {
        "output_dir": str(folder),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "loss_size": 16,
        "gaussian_kernel_size": 3,
        "gaussian_sigma": 1.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 3,
        "dataloader_pin_memory": False,
    }
    return UGroundTrainingConfig(**{**defaults, **settings})


def tiny_trainer(folder, items=None, model=None, trainer=None, **settings) -> UGroundTrainer:
    """A trainer of `model` (by default a tiny one) on `items` (by default eight examples); `trainer`: its keywords."""
    items = [example(number) for number in range(8)] if items is None else items
    return UGroundTrainer(
        model=tiny_model().train() if model is None else model,
        args=training_config(folder, **settings),
        train_dataset=dataset(items),
        **{"processing_class": tiny_processor(), **(trainer or {})},
    )


def losses_of(trainer: UGroundTrainer) -> list[float]:
    """The logged loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
