"""Answers and masks of a batch of examples, in the two styles that papers use.

- `generate`: the model writes its answer; masks are those of the segment tokens it wrote.
- `teacher-forced`: the answer wanted stands in the prompt with a segment token in every place, absent targets
  included; each place has a mask, and is *rejected* where the reject token was likelier there.

A written answer is rejected too, with all its segments, where the checkpoint's `reject_threshold` finds its maps
weak.

In both the language model runs once, however many choices of layer masks are read at.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from uground.modeling_uground.generation_uground import WrittenAnswers
from uground.processing import UGroundProcessor
from uground.processing.rejection import is_rejected, map_peak, valid_maps
from uground.training.data.masks import decode_mask
from uground.training.data.wording import SEGMENT
from uground.training.evaluation.prompts import with_system_prompt

STYLES = ("generate", "teacher-forced")


@dataclass
class Prediction:
    """
    What a model gave for one example at one choice of layer.

    Attributes:
        answer: what was written, or forced.
        masks (`(n, H, W)`, bool), scores (`(n,)`), boxes (`(n, 4)`), labels, layers (`(n,)`): of its segments.
        rejected: of each segment, whether the reject token was likelier, or its answer is rejected.
        targets (`(m, H, W)`, bool): the masks to compare with, in order; empty ones stand where nothing is.
    """

    answer: str
    masks: np.ndarray
    scores: list[float]
    boxes: list[list[float]]
    labels: list[str]
    layers: list[int]
    rejected: list[bool]
    targets: np.ndarray


def target_masks(example: dict) -> np.ndarray:
    """Masks an example wants, `(m, H, W)` bool; m may be 0."""
    masks = [decode_mask(rle) for rle in example["masks"]]
    size = (example["image"].height, example["image"].width)
    return np.stack(masks) if masks else np.zeros((0, *size), dtype=bool)


def last_turn(example: dict) -> dict:
    """An example with the masks and phrases of its last answer; those of earlier ones stand in its `history`."""
    if not example.get("history"):
        return example
    masks, phrases = example["masks"], example["phrases"]
    first = len(masks) - example["answer"].count(SEGMENT)
    return {**example, "masks": masks[first:], "phrases": phrases[first:] if len(phrases) == len(masks) else []}


def group_by_image(examples: list[dict]) -> tuple[list, list[list[int]]]:
    """Distinct images, and of each the numbers of its examples: an image is encoded once for all its queries."""
    groups: dict[object, list[int]] = {}
    for number, example in enumerate(examples):
        image = example["image"]
        groups.setdefault((image.size, image.tobytes()), []).append(number)
    return [examples[numbers[0]]["image"] for numbers in groups.values()], list(groups.values())


def _asked(processor, example: dict, system_prompt: str | None) -> str:
    """The query, or a whole prompt where earlier turns or other words stand before it."""
    if example.get("history"):
        return processor.render_prompt(
            [(turn["query"], turn["answer"]) for turn in example["history"]], example["query"]
        )
    return (
        example["query"] if system_prompt is None else with_system_prompt(processor, example["query"], system_prompt)
    )


@torch.no_grad()
def predict(
    model: PreTrainedModel,
    processor: UGroundProcessor,
    examples: list[dict],
    layers: list[str | int],
    style: str = "generate",
    max_new_tokens: int | None = None,
    neutral_answer: str = "[SEG].",
    system_prompt: str | None = None,
) -> dict[str | int, list[Prediction]]:
    """
    Answers and masks of a batch.

    Args:
        model, processor: of one checkpoint.
        examples: in the common schema, images opened; several may be about one image. One with a `history` is asked
            its last query behind the earlier ones and the answers wanted there, in the style `generate` only, and
            holds the masks of the last answer alone, see [`last_turn`].
        layers: choices of layer, as `model.read_masks` takes them.
        style: one of `STYLES`.
        max_new_tokens: of a written answer; by default as the model's `generation_config` says.
        neutral_answer: forced where the answer wanted has no segment.
        system_prompt: in place of the chat template's own.

    Returns:
        For each choice of layer, one prediction per example, in order.
    """
    images, groups = group_by_image(examples)
    order = [number for group in groups for number in group]
    queries = [[_asked(processor, examples[number], system_prompt) for number in group] for group in groups]
    answers = forced = None
    if style == "teacher-forced":
        forced = [forced_answer(processor, example, neutral_answer) for example in examples]
        inputs = processor(images, queries, answers=[[forced[number] for number in group] for group in groups])
        inputs = inputs.to(model.device)
        answers, rejected = force_answers(model, processor, inputs)
    else:
        inputs = processor(images, queries).to(model.device)
        answers = model.write_answers(
            inputs["input_ids"],
            inputs["attention_mask"],
            inputs.get("image_index"),
            model.get_image_embeddings(**inputs),
            max_new_tokens=max_new_tokens,
        )
        rejected = torch.zeros(len(answers.segments), dtype=torch.bool)
    flat_queries = [examples[number]["query"] for number in order]
    predictions = {}
    for layer in layers:
        outputs = model.read_masks(answers, layer)
        results = processor.post_process_instance_segmentation(outputs, queries=flat_queries)
        found: list[Prediction | None] = [None] * len(examples)
        maps = valid_maps(outputs, processor.patch_size)
        for row, (number, result) in enumerate(zip(order, results, strict=True)):
            flags = rejected[(answers.segments.row == row).cpu()].tolist()
            if style == "generate" and _is_weak(model, processor, result["answer"], maps[row]):
                flags = [True] * len(flags)
            found[number] = _prediction(processor, examples[number], result, flags, forced and forced[number])
        predictions[layer] = found
    return predictions


def _is_weak(model, processor, answer: str, maps: list[np.ndarray]) -> bool:
    """Whether the checkpoint's own threshold rejects an answer."""
    threshold = model.config.reject_threshold
    return threshold > 0 and is_rejected(answer, list(map(map_peak, maps)), processor.reject_token, threshold)


def _prediction(processor, example: dict, result: dict, rejected: list[bool], forced: str | None) -> Prediction:
    return Prediction(
        answer=result["answer"] if forced is None else forced,
        masks=result["masks"].cpu().numpy(),
        scores=result["scores"].tolist(),
        boxes=result["boxes"].tolist(),
        labels=list(result["labels"]),
        layers=result["layers"].tolist(),
        rejected=rejected,
        targets=target_masks(example) if forced is None else placed_targets(processor, example),
    )


def forced_answer(processor: UGroundProcessor, example: dict, neutral_answer: str) -> str:
    """The answer to put in the prompt: that of the example with a segment token in every place, or the neutral one."""
    answer = example["answer"]
    if processor.segment_token not in answer:
        # Its words would give away that nothing is there.
        return neutral_answer.replace("[SEG]", processor.segment_token)
    return answer.replace(processor.reject_token, processor.segment_token)


def placed_targets(processor: UGroundProcessor, example: dict) -> np.ndarray:
    """`(m, H, W)` bool masks for the places of a forced answer: empty where the answer rejects, or has no segment."""
    masks = target_masks(example)
    nothing = np.zeros(masks.shape[1:], dtype=bool)
    if not len(masks):
        return nothing[None]
    marks = {processor.segment_token: True, processor.reject_token: False}
    answer, places = example["answer"], []
    found = sorted((at, there) for mark, there in marks.items() for at in _places(answer, mark))
    remaining = iter(masks)
    for _, there in found:
        places.append(next(remaining) if there else nothing)
    return np.stack(places)


def _places(text: str, mark: str) -> list[int]:
    places, at = [], text.find(mark)
    while at >= 0:
        places.append(at)
        at = text.find(mark, at + len(mark))
    return places


def force_answers(
    model: PreTrainedModel, processor: UGroundProcessor, inputs: Mapping[str, Any]
) -> tuple[WrittenAnswers, torch.Tensor]:
    """
    One teacher-forced pass.

    Args:
        inputs: of the processor, with answers.

    Returns:
        What `model.read_masks` reads masks from, and which of the N segments are rejected `(N,)` (bool, on the CPU);
        none where the tokenizer has no reject token.
    """
    images = model.get_image_embeddings(**inputs)
    input_ids = inputs["input_ids"]
    rows = model.prepare_rows(input_ids, inputs["attention_mask"], inputs.get("image_index"), images)
    outputs = model.lmm(**rows.lmm_inputs(), output_hidden_states=True, use_cache=False)
    segments = model.segments_of(rows, outputs.hidden_states)
    logits = outputs.logits[segments.row, segments.columns[:, 0]].float()
    # The placeholder of images has an id but is never written.
    logits[:, model.config.image_token_id] = -torch.inf
    rejected = torch.zeros(len(segments), dtype=torch.bool)
    if processor.reject_token_id is not None:
        rejected = (logits[:, processor.reject_token_id] > logits[:, processor.segment_token_id]).cpu()
    answers = WrittenAnswers(
        sequences=input_ids,
        prompt_length=input_ids.shape[1],
        token_scores=logits.softmax(-1)[:, processor.segment_token_id],
        image_index=rows.image_index,
        segments=segments,
    )
    return answers, rejected
