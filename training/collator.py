"""From examples in the common schema to a batch: the processor's tensors, and target masks in reading order.

Purpose: the one place where answers meet masks, and the place that refuses a `[SEG]` without a mask or a mask without
a `[SEG]`. Non-goal: reading files (`training.data`).
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.utils import logging

from uground.modeling_uground.image_frames import letterbox_mask
from uground.modeling_uground.image_rows import resolve_image_index
from uground.processing import UGroundProcessor
from uground.processing.row_padding import IGNORED_LABEL
from uground.training.data.masks import decode_mask

logger = logging.get_logger(__name__)

# Of a batch, what the trainer keeps to itself; the model takes the rest.
TARGET_KEYS = ("target_groups", "segment_keys", "example_ids", "frame_keys")


class GroundingCollator:
    """
    Collates examples for [`UGroundTrainer`].

    An item is one example of the common schema, or `{"image": …, "examples": [example, …]}` with several queries about
    one image, which then is encoded once. An example may have a `"history"`: earlier turns `{"query", "answer"}`,
    whose answers are learnt too and whose masks come first in `"masks"`.

    A batch without any segment token gets one behind the end of its first row, where no other token sees it and no
    loss counts it: so every batch passes through the same modules, which distributed training needs.

    Args:
        processor: a `UGroundProcessor`.
        pack_queries: put all queries about an image into one row behind it, each blind to the others. The image then
            passes through the language model once, not once per query; the outputs are the same.
        loss_size: side of the square, letterboxed frame in which masks and maps are compared; `None` compares them at
            image size, as the official code does.
        max_length: tokens of a query and its answer, image included; what is longer loses its end, and with every
            segment token that goes its mask goes too. `None` refuses what the tokenizer calls too long.
        frame_keys: also return `frame_keys`, for a [`SamEmbeddingCache`].

    Returns (of a call), besides what the processor returns with answers:
        `target_groups`: a list of dicts of tensors, one per size of target. `segments` `(n,)` are the places of these
        targets among the N segment tokens of the batch, in reading order; `masks` `(n, H, W)` float32 in 0..1 (the
        coverage of a pixel of the frame); `valid` `(n, H, W)` bool, pixels that count; `images` `(n,)` the image of
        each. `in_frame` is True for letterboxed targets.
        `segment_keys` `(N,)` int64: a number per segment that depends on its example only.
        `example_ids`: a list of B strings, one per query.
        `frame_keys`: a list of I strings, one per image, that depend on the pixels of the SAM frame only.

    Raises:
        ValueError: an example's segment tokens and masks differ in number, a mask and the image in size, or a prompt
            leaves no room for an answer.
    """

    def __init__(
        self,
        processor: UGroundProcessor,
        loss_size: int | None = None,
        pack_queries: bool = True,
        max_length: int | None = None,
        frame_keys: bool = False,
    ):
        self.processor = processor
        self.pack_queries = pack_queries
        self.loss_size = loss_size
        self.max_length = max_length
        self.frame_keys = frame_keys

    def __call__(self, items: Sequence[dict]) -> dict:
        groups = [item["examples"] if item.get("examples") else [item] for item in items]
        examples = [(image, example) for image, group in enumerate(groups) for example in group]
        for _, example in examples:
            self._check(example)
        batch = self._encode([item["image"] for item in items], groups)
        kept = self._rows(batch, examples)
        images, masks, valid, keys = [], [], [], []
        for count, (image, example) in zip(kept, examples, strict=True):
            size = tuple(batch["original_sizes"][image].tolist())
            for number, rle in enumerate(example["masks"][:count]):
                masks.append(self._decode(rle, size, example))
                valid.append(self._valid(example, size))
                images.append(image)
                keys.append(stable_key(f"{example['id']}/{number}"))
        if self.pack_queries and len(examples) > len(items):
            batch = pack_rows(batch, self.processor.image_token_id, self.processor.tokenizer.pad_token_id)
        if self.frame_keys:
            batch["frame_keys"] = [frame_key(frame) for frame in batch["sam_pixel_values"]]
        return {
            **batch,
            "target_groups": self._group(images, masks, valid),
            "segment_keys": torch.tensor(keys, dtype=torch.long),
            "example_ids": [str(example["id"]) for _, example in examples],
        }

    def check(self, item: dict) -> None:
        """
        Refuse an item that no batch may hold, as training does and with the same sentence.

        Raises:
            OSError, ValueError: see the class.
        """
        self([item])

    def _encode(self, images: list, groups: list[list[dict]]) -> dict:
        """What the processor makes of images and the examples about each; its errors name the example."""
        try:
            return self._processed(images, groups)
        except (OSError, ValueError):
            for image, group in zip(images, groups, strict=True):
                for example in group:
                    try:
                        self._processed([image], [[example]])
                    except (OSError, ValueError) as error:
                        kind = OSError if isinstance(error, OSError) else ValueError
                        raise kind(f"example {example['id']}: {error}") from error
            raise

    def _processed(self, images: list, groups: list[list[dict]]) -> dict:
        return dict(
            self.processor(
                images,
                [[self.prompt(example) for example in group] for group in groups],
                answers=[[example["answer"] for example in group] for group in groups],
                max_length=None if self.max_length is None else np.iinfo(np.int64).max,
            )
        )

    def _check(self, example: dict) -> None:
        answers = [turn["answer"] for turn in example.get("history") or []] + [example["answer"]]
        written = sum(answer.count(self.processor.segment_token) for answer in answers)
        if written != len(example["masks"]):
            shown = answers[0] if len(answers) == 1 else answers
            raise ValueError(
                f"example {example['id']}: the answer {shown!r} holds {written} "
                f"{self.processor.segment_token}, expected one for each of its {len(example['masks'])} masks"
            )
        for answer in answers:
            if self.processor.image_token in answer:
                raise ValueError(
                    f"example {example['id']}: an answer must be text without an image, got {answer[:80]!r}"
                )

    def prompt(self, example: dict) -> str:
        """The query, or with earlier turns the whole conversation up to the answer."""
        if not example.get("history"):
            return example["query"]
        turns = [(turn["query"], turn["answer"]) for turn in example["history"]]
        return self.processor.render_prompt(turns, example["query"], learn_answers=True)

    def _rows(self, batch: dict, examples) -> list[int]:
        """
        Cut what is too long, add the lone segment token, all of it in place.

        Returns:
            How many segment tokens are left of each example.
        """
        limit = None
        if self.max_length is not None:
            limit = min(self.max_length, self.processor.tokenizer.model_max_length)
        rows, kept = [], []
        for row, (_, example) in enumerate(examples):
            real = batch["attention_mask"][row].bool()
            ids, labels = batch["input_ids"][row][real], batch["labels"][row][real]
            count = int((ids == self.processor.segment_token_id).sum())
            if count != len(example["masks"]):
                raise ValueError(
                    f"example {example['id']}: prompt and answer hold {count} {self.processor.segment_token} tokens, "
                    f"expected {len(example['masks'])}"
                )
            ids, labels = ids[:limit], labels[:limit]
            if (labels == IGNORED_LABEL).all():
                raise ValueError(
                    f"example {example['id']}: the prompt is too long, expected it and the beginning of its answer "
                    f"to fit into {limit} tokens"
                )
            rows.append((ids, labels))
            kept.append(int((ids == self.processor.segment_token_id).sum()))
        if not any(kept):
            ids, labels = rows[0]
            lone = torch.tensor([self.processor.segment_token_id])
            rows[0] = (torch.cat([ids, lone]), torch.cat([labels, torch.tensor([IGNORED_LABEL])]))
        longest = max(len(ids) for ids, _ in rows)
        pad = self.processor.tokenizer.pad_token_id
        batch["input_ids"] = torch.stack([_pad_left(ids, longest, pad) for ids, _ in rows])
        batch["labels"] = torch.stack([_pad_left(labels, longest, IGNORED_LABEL) for _, labels in rows])
        batch["attention_mask"] = torch.stack([_pad_left(torch.ones_like(ids), longest, 0) for ids, _ in rows])
        return kept

    @staticmethod
    def _decode(rle: dict, size: tuple[int, int], example: dict) -> np.ndarray:
        mask = decode_mask(rle, f"example {example['id']}: a mask")
        if mask.shape != size:
            raise ValueError(
                f"example {example['id']}: a mask has size {mask.shape}, expected that of the image, {size}"
            )
        return mask

    def _valid(self, example: dict, size: tuple[int, int]) -> np.ndarray:
        """Pixels that count: all but the example's ignore region."""
        if example.get("ignore") is None:
            return np.ones(size, dtype=bool)
        return ~self._decode(example["ignore"], size, example)

    def _group(self, images: list[int], masks: list[np.ndarray], valid: list[np.ndarray]) -> list[dict]:
        """Targets of one size in one group, in the frame or in image pixels."""
        if not masks:
            return []
        if self.loss_size is not None:
            masks = [letterbox_mask(mask, self.loss_size) for mask in masks]
            valid = [letterbox_mask(mask, self.loss_size) > 0.5 for mask in valid]
        else:
            masks = [torch.from_numpy(mask).float() for mask in masks]
            valid = [torch.from_numpy(mask) for mask in valid]
        by_size: dict[tuple, list[int]] = {}
        for segment, mask in enumerate(masks):
            by_size.setdefault(tuple(mask.shape), []).append(segment)
        return [
            {
                "segments": torch.tensor(segments),
                "masks": torch.stack([masks[segment] for segment in segments]),
                "valid": torch.stack([valid[segment] for segment in segments]),
                "images": torch.tensor([images[segment] for segment in segments]),
                "in_frame": self.loss_size is not None,
            }
            for segments in by_size.values()
        ]


def stable_key(text: str) -> int:
    """A number in 0..2^63-1 that depends on the text only, on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def frame_key(frame: torch.Tensor) -> str:
    """A name of a SAM frame `(3, S, S)` that depends on its pixels only."""
    return hashlib.sha256(frame.contiguous().numpy().tobytes()).hexdigest()


def packs_queries(model: PreTrainedModel) -> bool:
    """Whether queries about an image may be packed into one row; where not, the log says so once."""
    adapter = model.adapter
    if not adapter.takes_4d_masks:
        logger.warning_once(
            f"a {adapter.config.model_type} takes no masks per token: training reads one row per query, with the same "
            "results"
        )
    return adapter.takes_4d_masks


def pack_rows(batch: dict, image_token_id: int, pad_token_id: int) -> dict:
    """
    One row per image: what all its rows begin with, up to the last image token, then the rest of each row.

    A token sees the common beginning and, of the rest, its own row so far. Segment tokens keep their reading order.

    Args:
        batch: of the processor, with `labels`; rows of one image lie together.
        image_token_id, pad_token_id: of the processor.

    Returns:
        The batch with `input_ids`, `labels`, `position_ids` `(I, T)` padded on the left, `attention_mask` `(I, T, T)`
        bool, and without `image_index`, as each image has one row.

    Raises:
        ValueError: two prompts about one image differ before the image.
    """
    packed = []
    images = len(batch["original_sizes"])
    image_index = resolve_image_index(batch.get("image_index"), len(batch["input_ids"]), images)
    for image in range(images):
        rows = (image_index == image).nonzero().squeeze(-1)
        ids = [batch["input_ids"][row][batch["attention_mask"][row].bool()] for row in rows]
        labels = [batch["labels"][row][batch["attention_mask"][row].bool()] for row in rows]
        common = int((ids[0] == image_token_id).nonzero().max()) + 1
        if any(not torch.equal(row[:common], ids[0][:common]) for row in ids):
            raise ValueError("prompts about one image must begin alike, up to the image, to be packed into one row")
        lengths = torch.tensor([common] + [len(row) - common for row in ids])
        owner = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        positions = torch.cat([torch.arange(common)] + [torch.arange(common, len(row)) for row in ids])
        packed.append(
            {
                "input_ids": torch.cat([ids[0][:common]] + [row[common:] for row in ids]),
                "labels": torch.cat([labels[0][:common]] + [row[common:] for row in labels]),
                "position_ids": positions,
                "attention_mask": ((owner[:, None] == owner) | (owner == 0)).tril(),
            }
        )
    longest = max(len(row["input_ids"]) for row in packed)
    padding = {"input_ids": pad_token_id, "labels": IGNORED_LABEL, "position_ids": 0, "attention_mask": False}
    padded = {
        name: torch.stack([_pad_left(row[name], longest, value) for row in packed]) for name, value in padding.items()
    }
    return {name: value for name, value in {**batch, **padded}.items() if name != "image_index"}


def _pad_left(values: torch.Tensor, length: int, value) -> torch.Tensor:
    """Pad every axis of `values` at its beginning to `length`."""
    missing = length - len(values)
    return F.pad(values, (missing, 0) * values.dim(), value=value)
