"""What a real UGround takes from others, made small: a SAM that follows prompts, and a vision tower that sees.

Purpose: give the tiny checkpoint its frozen parts. `sam` learns to draw the masks of Scenes' objects from points and
from coarse masks; `vision` is a CLIP tower that learns to tell kind, colour, texture and size of what a patch shows.
Non-goal: training SAM or CLIP in earnest.

    python -m uground.training.scenes.pretrain sam --output runs/tiny/sam --steps 3000
    python -m uground.training.scenes.pretrain vision --output runs/tiny/vision --steps 3000
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, get_worker_info
from transformers import CLIPVisionModel, LlavaConfig, SamModel, get_cosine_schedule_with_warmup
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from uground.command_line import run_command, seed_number
from uground.modeling_uground.hub_files import give_usual_mode
from uground.modeling_uground.image_frames import letterbox_mask
from uground.modeling_uground.lmm_llava import LlavaAdapter, vision_key_mask
from uground.training.scenes import scene
from uground.training.scenes.drawing import COLOURS, KINDS, SIZES, TEXTURES, Scene
from uground.training.scenes.tiny_model import FRAME_SIZE, LMM_PATCH, LMM_SIZE, sam_config, vision_config

TRAIN_SEED = 7  # its scenes are other ones than those of the fine-tuning (recipes/tiny.yaml)
PROPERTIES = {"kind": tuple(KINDS), "colour": tuple(COLOURS), "texture": tuple(TEXTURES), "size": tuple(SIZES)}
TARGETS_PER_SCENE = 3
MAX_POINTS = 3
TARGET_SIDE = FRAME_SIZE // 2
LOG_EVERY = 50
SAVE_EVERY = 500


def letterbox(size: int) -> SamImageProcessorPil:
    """The image processor of both frames: longest side to `size`, padded below and to the right."""
    return SamImageProcessorPil(
        size={"longest_edge": size},
        pad_size={"height": size, "width": size},
        mask_size={"longest_edge": size // 4},
        mask_pad_size={"height": size // 4, "width": size // 4},
    )


def letterbox_masks(masks: np.ndarray, side: int) -> torch.Tensor:
    """Masks `(n, H, W)` in a letterbox of `side` pixels: coverage in 0..1, `(n, side, side)`."""
    return torch.stack([letterbox_mask(mask, side) for mask in masks])


class SamScenes(Dataset):
    """Scenes as SAM training data: a frame, target masks (objects, and unions of some) and prompts for them."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.processor = letterbox(FRAME_SIZE)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = scene("train", self.seed, index)
        rng = np.random.default_rng((self.seed, index, 1))
        objects = np.stack([thing.mask for thing in drawn.objects])
        targets, points, labels = [], [], []
        for _ in range(TARGETS_PER_SCENE):
            count = 1 if rng.random() < 0.75 else int(rng.integers(1, len(objects) + 1))
            chosen = objects[rng.choice(len(objects), count, replace=False)].any(0)
            targets.append(chosen)
            point, label = self._points(chosen, count, rng)
            points.append(point)
            labels.append(label)
        masks = np.stack(targets)
        return {
            "pixel_values": torch.as_tensor(self.processor(drawn.image, return_tensors="np")["pixel_values"][0]),
            "targets": letterbox_masks(masks, TARGET_SIDE),
            "coarse": self._coarse(masks, rng),
            "points": torch.tensor(np.stack(points), dtype=torch.float32),
            "labels": torch.tensor(np.stack(labels)),
        }

    @staticmethod
    def _points(mask: np.ndarray, count: int, rng) -> tuple[np.ndarray, np.ndarray]:
        """A few points (x, y) of the frame; unions, and every second object, are asked for by mask alone."""
        points, labels = np.zeros((MAX_POINTS, 2)), -np.ones(MAX_POINTS, dtype=np.int64)
        if count == 1 and rng.random() < 0.5:
            ys, xs = np.nonzero(mask)
            picked = rng.integers(0, len(ys), int(rng.integers(1, MAX_POINTS + 1)))
            scale = FRAME_SIZE / max(mask.shape)
            points[: len(picked)] = np.stack([xs[picked], ys[picked]], 1) * scale
            labels[: len(picked)] = 1
        return points, labels

    @staticmethod
    def _coarse(masks: np.ndarray, rng) -> torch.Tensor:
        """Mask prompts such as a similarity map gives: masks on the token grid as noisy logits, `(n, S/4, S/4)`."""
        grid = LMM_SIZE // LMM_PATCH
        coverage = letterbox_masks(masks, grid)
        gain = rng.uniform(2.0, 8.0, (len(masks), 1, 1))
        noise = rng.normal(0.0, 1.0, coverage.shape) * rng.uniform(0.2, 1.5, (len(masks), 1, 1))
        logits = torch.as_tensor(gain) * (2 * coverage - 1) + torch.as_tensor(noise)
        side = FRAME_SIZE // 4
        return F.interpolate(logits.float()[:, None], size=(side, side), mode="bilinear", align_corners=False)[:, 0]


class VisionScenes(Dataset):
    """Scenes as patch classification: per token of the grid the object that covers most of it, by its properties."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed
        self.processor = letterbox(LMM_SIZE)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = scene("train", self.seed, index)
        item = {name: self._labels(drawn, name) for name in PROPERTIES}
        encoded = self.processor(drawn.image, return_tensors="np")
        item["pixel_values"] = torch.as_tensor(encoded["pixel_values"][0])
        item["valid_sizes"] = torch.tensor(encoded["reshaped_input_sizes"][0])
        return item

    @staticmethod
    def _labels(drawn: Scene, name: str) -> torch.Tensor:
        """`(h*w,)` class numbers; 0 is background, -100 a patch of which an object covers a small part."""
        masks = np.stack([thing.mask for thing in drawn.objects])
        coverage = letterbox_masks(masks, LMM_SIZE // LMM_PATCH)
        most, thing = coverage.max(0)
        classes = torch.tensor([PROPERTIES[name].index(getattr(thing, name)) + 1 for thing in drawn.objects])[thing]
        classes = torch.where(most > 0.25, classes, torch.where(most > 0.02, -100, 0))
        return classes.flatten()


class SamStage(nn.Module):
    """SAM from nothing, trained on one mask per prompt: BCE, dice, and the squared error of its own IoU estimate."""

    dataset = SamScenes

    def __init__(self):
        super().__init__()
        self.model = SamModel(sam_config())
        # transformers draws the Fourier features with a deviation of hidden_size / 2, far too fine for a small frame;
        # the original SAM draws them with 1.
        nn.init.normal_(self.model.shared_image_embedding.positional_embedding, std=1.0)
        nn.init.normal_(self.model.vision_encoder.pos_embed, std=0.02)

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        sam, per_image = self.model, batch["targets"].shape[1]
        embeddings = sam.vision_encoder(batch["pixel_values"])[0].repeat_interleave(per_image, 0)
        points, labels = batch["points"].flatten(0, 1)[:, None], batch["labels"].flatten(0, 1)[:, None]
        coarse = batch["coarse"].flatten(0, 1)[:, None]
        # Where points are given, every second time they must do without a mask.
        silent = (labels[:, 0] == 1).any(-1) & (torch.rand(len(labels)) < 0.5)
        sparse, dense = sam.prompt_encoder(points, labels, None, coarse)
        no_mask = sam.prompt_encoder.no_mask_embed.weight[..., None, None].expand_as(dense)
        dense = torch.where(silent[:, None, None, None], no_mask, dense)
        logits, iou_scores = sam.mask_decoder(
            image_embeddings=embeddings,
            image_positional_embeddings=sam.get_image_wide_positional_embeddings().expand(len(dense), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )
        targets = batch["targets"].flatten(0, 1)
        logits = F.interpolate(logits[:, 0], size=targets.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        probabilities = logits.sigmoid()
        dice = 1 - (2 * (probabilities * targets).sum((1, 2)) + 1) / ((probabilities + targets).sum((1, 2)) + 1)
        found, wanted = logits > 0, targets > 0.5
        iou = (found & wanted).sum((1, 2)) / (found | wanted).sum((1, 2)).clamp_min(1)
        loss = 5 * F.binary_cross_entropy_with_logits(logits, targets) + dice.mean()
        loss = loss + F.mse_loss(iou_scores[:, 0, 0], iou.float())
        return loss, {"iou": iou.mean().item(), "iou_from_points": iou[silent].mean().item()}


class VisionStage(nn.Module):
    """The CLIP tower with one linear head per property on the layer that LLaVA reads; the heads are thrown away."""

    dataset = VisionScenes

    def __init__(self):
        super().__init__()
        config = vision_config()
        self.adapter = LlavaAdapter(LlavaConfig(vision_config=config), "letterbox")
        self.model = CLIPVisionModel(config)
        self.heads = nn.ModuleDict(
            {name: nn.Linear(config.hidden_size, len(values) + 1) for name, values in PROPERTIES.items()}
        )

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        mask = vision_key_mask(self.adapter.token_validity(batch["valid_sizes"]), torch.float32)
        states = self.model(batch["pixel_values"], attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        loss, figures = 0.0, {}
        for name, head in self.heads.items():
            logits, labels = head(states[:, 1:]).flatten(0, 1), batch[name].flatten()
            loss = loss + F.cross_entropy(logits, labels)
            things = labels > 0
            figures[name] = (logits[things].argmax(-1) == labels[things]).float().mean().item()
        return loss, figures


STAGES = {"sam": SamStage, "vision": VisionStage}


def _one_thread(_worker: int) -> None:
    torch.set_num_threads(1)
    assert get_worker_info() is not None


def pretrain(stage_name: str, output: Path, steps: int, batch_size: int, learning_rate: float, seed: int) -> dict:
    """Train a stage, saving its model to `output` every few hundred steps; returns the last figures."""
    torch.manual_seed(seed)
    stage = STAGES[stage_name]()
    data = stage.dataset(steps * batch_size, TRAIN_SEED)
    loader = DataLoader(data, batch_size, num_workers=1, worker_init_fn=_one_thread, prefetch_factor=4)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(200, steps // 10), steps)
    start, sums, figures = time.time(), {}, {}
    for step, batch in enumerate(loader, 1):
        loss, terms = stage(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        for name, value in {"loss": loss.item(), **terms}.items():
            sums[name] = sums.get(name, 0.0) + value
        if step % LOG_EVERY == 0 or step == steps:
            count = LOG_EVERY if step % LOG_EVERY == 0 else step % LOG_EVERY
            figures = {name: round(value / count, 4) for name, value in sums.items()}
            print(json.dumps({"step": step, "seconds": round(time.time() - start), **figures}), flush=True)
            sums = {}
        if step % SAVE_EVERY == 0 or step == steps:
            stage.model.save_pretrained(output)
            for weights in Path(output).glob("*.safetensors"):
                give_usual_mode(weights)
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m uground.training.scenes.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(argv)
    return run_command("pretrain", lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    pretrain(options.stage, options.output, options.steps, options.batch_size, options.learning_rate, options.seed)


if __name__ == "__main__":
    sys.exit(main())
