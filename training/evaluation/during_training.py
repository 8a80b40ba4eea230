"""Evaluation of a model in training on answers it writes itself, and pictures of them.

A teacher-forced loss does not see that a model has forgotten to write `[SEG]`; this does.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from torch import nn

from uground.processing import UGroundProcessor
from uground.processing.drawing import draw_overlay
from uground.processing.image_reading import read_image
from uground.training.data.masks import decode_mask
from uground.training.evaluation.counts import OVERALL, GroundingCounts
from uground.training.evaluation.predictions import last_turn

FIGURES = ("ciou", "giou", "n_acc", "t_acc")


@dataclass
class WrittenCounts:
    """
    What answers hold, in numbers that add up over processes.

    Attributes:
        wanting: queries whose answer should hold a segment token; `wanting_written` of them got at least one.
        unwanting: queries whose answer should hold none; `unwanting_written` of them got one.
        rejecting: queries whose answer should hold the reject token; `rejecting_written` of them got it.
        exact: answers that are what the example says, of `queries`.
    """

    queries: int = 0
    wanting: int = 0
    wanting_written: int = 0
    unwanting: int = 0
    unwanting_written: int = 0
    rejecting: int = 0
    rejecting_written: int = 0
    exact: int = 0
    counts: GroundingCounts = field(default_factory=GroundingCounts)

    def add(self, processor: UGroundProcessor, example: dict, prediction: dict) -> None:
        """Count one answer; `prediction` is of `post_process_instance_segmentation`."""
        wanted, answer = example["answer"].strip(), prediction["answer"].strip()
        self.queries += 1
        self.exact += answer == wanted
        written = processor.segment_token in answer
        if processor.segment_token in wanted:
            self.wanting += 1
            self.wanting_written += written
        else:
            self.unwanting += 1
            self.unwanting_written += written
        if processor.reject_token in wanted:
            self.rejecting += 1
            self.rejecting_written += processor.reject_token in answer
        size = prediction["masks"].shape[1:]
        # Masks of earlier turns are no part of this answer.
        own = example["masks"][len(example["masks"]) - wanted.count(processor.segment_token) :]
        targets = [decode_mask(rle) for rle in own]
        ignore = example.get("ignore")
        self.counts.process(
            [prediction["masks"].cpu().numpy()],
            [np.stack(targets) if targets else np.zeros((0, *size), bool)],
            [example.get("attribute") or "res"],
            [None if ignore is None else decode_mask(ignore)],
        )

    def merge(self, other: "WrittenCounts") -> None:
        """Add what another process counted."""
        for name, value in vars(other).items():
            if name != "counts":
                setattr(self, name, getattr(self, name) + value)
        self.counts.merge(other.counts)

    def figures(self) -> dict[str, float]:
        """Rates in 0..1; one that is undefined, for want of such queries, is left out."""
        rates = {
            "segment_rate": (self.wanting_written, self.wanting),
            "false_segment_rate": (self.unwanting_written, self.unwanting),
            "reject_rate": (self.rejecting_written, self.rejecting),
            "answers_as_expected": (self.exact, self.queries),
        }
        figures = {name: part / whole for name, (part, whole) in rates.items() if whole}
        overall = self.counts.evaluate()[OVERALL]
        return figures | {name: overall[name] for name in FIGURES if overall[name] is not None}


@dataclass
class AnswerEvaluation:
    """
    Generates answers to evaluation items.

    Args:
        processor: a `UGroundProcessor`.
        collator: the [`GroundingCollator`], which knows how an example becomes a prompt.
        batch_size: items per pass.
        max_new_tokens: most tokens of an answer, `None` for what the model's `generation_config` says.
        overlays: how many answers to draw.
        layer_selection: the layers masks are read at, as for `segment`.
    """

    processor: object
    collator: object
    batch_size: int
    max_new_tokens: int | None
    overlays: int
    layer_selection: str | int | None = None

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, dataset: Dataset, count: int, accelerator: Accelerator, in_step: bool = False
    ) -> Any:
        """
        Args:
            model: the bare model, in evaluation mode.
            dataset: of items the collator takes; `count` of them, spread evenly, are used.
            accelerator: of the trainer; every process must call.
            in_step: make every process do the same, as sharded parameters need, instead of a share each.

        Returns:
            figures of all processes together, and on the main process a list of pictures.
        """
        chosen = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)).tolist()
        if not in_step:
            chosen = chosen[accelerator.process_index :: accelerator.num_processes]
        written, pictures = WrittenCounts(), []
        for start in range(0, len(chosen), self.batch_size):
            items = [dataset[index] for index in chosen[start : start + self.batch_size]]
            for example, image, prediction in self._predict(model, items):
                written.add(self.processor, example, prediction)
                if len(pictures) < self.overlays and accelerator.is_main_process:
                    pictures.append(draw_comparison(image, example, prediction))
        if not in_step:
            shares, written = gather_object([written]), WrittenCounts()
            for share in shares:
                written.merge(share)
        return written.figures(), pictures

    def _predict(self, model, items: list[dict]):
        """Examples of some items, each with its image and what was found."""
        groups = [item["examples"] if item.get("examples") else [item] for item in items]
        images = [read_image(item["image"], "the image") for item in items]
        prompts = [[self.collator.prompt(example) for example in group] for group in groups]
        inputs = self.processor(images, prompts).to(model.device)
        outputs = model.segment(**inputs, max_new_tokens=self.max_new_tokens, layer_selection=self.layer_selection)
        queries = [example["query"] for group in groups for example in group]
        predictions = self.processor.post_process_instance_segmentation(outputs, queries=queries)
        examples = [(example, image) for group, image in zip(groups, images, strict=True) for example in group]
        for (example, image), prediction in zip(examples, predictions, strict=True):
            yield last_turn(example), image, prediction


def draw_comparison(image: Image.Image, example: dict, prediction: dict) -> Image.Image:
    """What was found, beside what was wanted, over one image."""
    found = [
        {"mask": Image.fromarray(mask.cpu().numpy()).convert("L"), "label": label, "score": float(score)}
        for mask, label, score in zip(prediction["masks"], prediction["labels"], prediction["scores"], strict=True)
    ]
    phrases = list(example.get("phrases") or [])
    wanted = [
        {
            "mask": Image.fromarray(decode_mask(rle)).convert("L"),
            "label": phrases[number] if number < len(phrases) else "wanted",
            "score": 1.0,
        }
        for number, rle in enumerate(example["masks"])
    ]
    left, right = draw_overlay(image, found), draw_overlay(image, wanted)
    picture = Image.new("RGB", (left.width + right.width, left.height))
    picture.paste(left, (0, 0))
    picture.paste(right, (left.width, 0))
    return picture
