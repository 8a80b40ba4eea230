"""What a real UGround takes from others, made small: a SAM that follows prompts, and a vision tower that sees.

Purpose: give the tiny checkpoints their frozen parts. `sam` learns to draw the masks of Scenes' objects from points,
boxes, coarse masks and embeddings; `vision` is a CLIP tower that learns to tell kind, colour, texture and size.
Non-goal: training SAM or CLIP in earnest.

    python -m uground.training.scenes.pretrain sam --output runs/tiny/sam --scenes runs/tiny/scenes --steps 6000
    python -m uground.training.scenes.pretrain vision --output runs/tiny/vision --scenes runs/tiny/scenes --steps 8000

The same command goes on where it was broken off, to the same weights; a finished stage stays as it is.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

from uground.command_line import RESUMABLE, CommandParser, run_command, seed_number
from uground.matrix_optimizer import MuonWithAdamW, hidden_matrices
from uground.modeling_uground.hub_files import give_usual_mode
from uground.training.scenes.sam_stage import SamStage
from uground.training.scenes.scene_store import DrawnBatch, SceneStore
from uground.training.scenes.vision_stage import VisionStage

STAGES = {"sam": SamStage, "vision": VisionStage}
TRAIN_SEED = 7  # its scenes are other ones than those of the fine-tuning (recipes/tiny.yaml)
VALIDATION_SCENES = 500
WARMUP_STEPS = 100
LOG_EVERY = 100
SAVE_EVERY = 200
STATE_FILE, RECORD_FILE = "pretraining.pt", "pretraining.json"
# Of a step number and a seed, for what a step draws from PyTorch's generator.
SEED_STRIDE = 2**24


class StepBatches(Dataset):
    """The batches of a run by the number of their step, counted from 0."""

    def __init__(self, store: SceneStore, first: int, steps: int, batch_size: int, seed: int):
        self.store, self.first, self.steps, self.batch_size, self.seed = store, first, steps, batch_size, seed

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, index: int) -> DrawnBatch:
        return self.store.sample(self.first + index, self.batch_size, self.seed)


class Pretraining:
    """
    A run of one stage.

    Args:
        options: of the command.
    """

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.output: Path = options.output
        named = ("stage", "steps", "batch_size", "learning_rate", "scene_count", "seed")
        self.record = {name: getattr(options, name) for name in named}
        torch.manual_seed(options.seed)
        self.stage = STAGES[options.stage]()
        matrices = hidden_matrices(self.stage.model, head="")
        held = {id(matrix) for matrix in matrices.values()}
        rest = [parameter for parameter in self.stage.parameters() if id(parameter) not in held]
        self.optimizer = MuonWithAdamW(
            list(matrices.values()),
            [{"params": rest, "weight_decay": 0.01}],
            lr=options.learning_rate,
            weight_decay=0.05,
            betas=(0.9, 0.98),
            eps=1e-8,
        )
        warmup = min(WARMUP_STEPS, options.steps // 10)
        self.schedule = get_cosine_schedule_with_warmup(self.optimizer, warmup, options.steps)
        self.step = 0
        self.sums: dict[str, float] = {}

    def is_finished(self) -> bool:
        """
        Whether the output holds what this run would end with.

        Raises:
            ValueError: it is, or was to become, that of another run.
        """
        path = self.output / RECORD_FILE
        if not path.exists():
            return False
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [name for name, value in self.record.items() if found.get(name) != value]
        if differing:
            told = ", ".join(f"{name} {found.get(name)} there and {self.record[name]} here" for name in differing)
            raise ValueError(f"the folder {str(self.output)!r} holds another run ({told}), name another --output")
        return found["finished"]

    def run(self) -> dict[str, float]:
        """Train to the end, from where an earlier run of the same command was; returns figures of new scenes."""
        options = self.options
        self.output.mkdir(parents=True, exist_ok=True)
        if (self.output / STATE_FILE).exists():
            self._load()
            print(f"going on from step {self.step}", flush=True)
        self._write_record(finished=False)
        store = SceneStore(options.scenes, "train", TRAIN_SEED, options.scene_count)
        unseen = SceneStore(options.scenes, "validation", TRAIN_SEED, VALIDATION_SCENES)
        data = StepBatches(store, self.step, options.steps, options.batch_size, options.seed)
        loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4)
        start, begun = time.time(), self.step
        for batch in tqdm(loader, options.stage, options.steps, initial=begun, mininterval=10):
            self._train_step(batch)
            if self.step % LOG_EVERY == 0 or self.step == options.steps:
                seconds = (time.time() - start) / (self.step - begun)
                self._log(seconds, unseen)
            if self.step % SAVE_EVERY == 0:
                self._save()
        figures = self._figures(unseen)
        self.stage.model.save_pretrained(self.output)
        for weights in self.output.glob("*.safetensors"):
            give_usual_mode(weights)
        self._write_record(finished=True, **figures)
        (self.output / STATE_FILE).unlink(missing_ok=True)
        return figures

    def _train_step(self, batch: DrawnBatch) -> None:
        # What a step draws hangs on its number alone, and not on where the run began.
        torch.manual_seed(self.options.seed * SEED_STRIDE + self.step)
        loss, figures = self.stage(batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.stage.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.step += 1
        for name, value in {"loss": loss.item(), **figures}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _log(self, seconds: float, unseen: SceneStore) -> None:
        """A line of figures: means of the steps since the last one, and those of scenes never trained on."""
        count = self.step % LOG_EVERY or LOG_EVERY
        means = {name: round(value / count, 4) for name, value in self.sums.items()}
        self.sums = {}
        unseen_figures = {f"unseen_{name}": value for name, value in self._figures(unseen).items()}
        print(
            json.dumps({"step": self.step, "seconds_a_step": round(seconds, 3), **means, **unseen_figures}), flush=True
        )

    @torch.no_grad()
    def _figures(self, unseen: SceneStore) -> dict[str, float]:
        """Mean figures of whole scenes of the validation split, held-out combinations among them."""
        self.stage.eval()
        torch.manual_seed(self.options.seed)
        sums: dict[str, float] = {}
        size = 50
        for first in range(0, len(unseen), size):
            numbers = np.arange(first, min(first + size, len(unseen)))
            _, figures = self.stage(unseen.read(numbers))
            for name, value in figures.items():
                sums[name] = sums.get(name, 0.0) + value * len(numbers) / len(unseen)
        self.stage.train()
        return {name: round(value, 4) for name, value in sums.items()}

    def _save(self) -> None:
        """Keep all that the next step depends on, whole or not at all."""
        state = {
            "step": self.step,
            "sums": self.sums,
            "stage": self.stage.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }
        part = self.output / f"{STATE_FILE}.part"
        torch.save(state, part)
        part.replace(self.output / STATE_FILE)

    def _load(self) -> None:
        state = torch.load(self.output / STATE_FILE, weights_only=True)
        self.step, self.sums = state["step"], state["sums"]
        self.stage.load_state_dict(state["stage"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])

    def _write_record(self, finished: bool, **figures: float) -> None:
        text = json.dumps({**self.record, "finished": finished, **figures}, indent=2) + "\n"
        (self.output / RECORD_FILE).write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command; 0, or 2 after an error, of which one line was written to stderr."""
    parser = CommandParser("python -m uground.training.scenes.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=sorted(STAGES))
    parser.add_argument("--output", type=Path, required=True, help="folder for the trained model")
    parser.add_argument("--scenes", type=Path, required=True, help="folder that keeps drawn scenes, 0.26 MB each")
    parser.add_argument("--scene-count", type=int, default=24000, help="scenes to draw and to use again and again")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=32, help="scenes per step")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=seed_number, default=0)
    options = parser.parse_args(argv)
    return run_command("pretrain", lambda: _run(options), RESUMABLE)


def _run(options: argparse.Namespace) -> None:
    run = Pretraining(options)
    if run.is_finished():
        print(f"the folder {str(options.output)!r} holds the finished model")
        return
    print(json.dumps(run.run()))


if __name__ == "__main__":
    sys.exit(main())
