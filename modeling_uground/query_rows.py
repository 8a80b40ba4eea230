"""Rows: B prompts about I encoded images, prepared for the LMM once per call and handed on."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers.utils import logging

from .lmm_access import LmmAdapter
from .output_uground import UGroundImageEmbeddings

logger = logging.get_logger(__name__)


@dataclass
class Rows:
    """
    Attributes:
        adapter: of the LMM.
        images: what the rows ask about.
        input_ids (`(B, T)`): as the processor returns them.
        attention_mask (`(B, T)` or `(B, 1, T, T)`): padded image tokens are masked as keys.
        position_ids (`(…, B, T)`): of as many axes as the LMM knows.
        image_index (`(B,)`): image of each row.
        image_columns (`(B, n)`): columns of the image tokens, the last one repeated where an image has fewer.
        starts (`(B,)`): columns of padding in front of each row.
    """

    adapter: LmmAdapter
    images: UGroundImageEmbeddings
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    image_index: torch.Tensor
    image_columns: torch.Tensor
    starts: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def features(self) -> torch.Tensor:
        """`(B, n, D)`: image features of each row."""
        return self._of_rows(self.images.lmm_features)

    def _of_rows(self, values: torch.Tensor | None) -> torch.Tensor | None:
        """What is held per image, per row."""
        return None if values is None else values[self.image_index.to(values.device)]

    def lmm_inputs(self) -> dict:
        """Arguments of the LMM's `forward` or `generate`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "mm_encoder_outputs": {
                "image": self.adapter.image_outputs(
                    self.features,
                    self._of_rows(self.images.further_features),
                    self._of_rows(self.images.token_counts),
                )
            },
        }

    def select(self, rows: torch.Tensor) -> "Rows":
        """Some of the rows, by their numbers."""
        chosen = {
            name: getattr(self, name)[rows.to(getattr(self, name).device)]
            for name in ("input_ids", "attention_mask", "image_index", "image_columns", "starts")
        }
        positions = self.position_ids.index_select(-2, rows.to(self.position_ids.device))
        return replace(self, position_ids=positions, **chosen)

    @cached_property
    def prefix_keys(self) -> list[tuple] | None:
        """
        What tells the prefix of each row from others: its image, and its tokens up to the last image token.

        `None` if rows cannot share one: the LMM is not causal there, or a row ends with its image.
        """
        if not (self.adapter.prefix_is_causal and self.adapter.cache_can_be_selected):
            logger.info_once(
                f"queries about an image share no prefix with a {self.adapter.config.model_type}: each is read by "
                "itself, with the same results"
            )
            return None
        starts, ends = self.starts.tolist(), (self.image_columns[:, -1] + 1).tolist()
        if max(ends) == self.input_ids.shape[1]:
            return None
        rows = zip(self.image_index.tolist(), self.input_ids.tolist(), starts, ends, strict=True)
        return [(image, *row[start:end]) for image, row, start, end in rows]


def prepare_rows(
    adapter: LmmAdapter,
    images: UGroundImageEmbeddings,
    image_token_id: int,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    image_index: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> Rows:
    """
    Rows as the LMM takes them.

    Padded image tokens are masked as keys but keep their place: position ids count every token after the padding in
    front of a row, as the official weights were trained with.

    Args:
        adapter: of the LMM.
        images: the encoded images.
        image_token_id: id of the placeholder of image tokens.
        input_ids (`(B, T)`): as the processor returns them.
        attention_mask (`(B, T)`, or `(B, T, T)` bool, *optional*): tokens that are not text padding; or which keys
            each token may see, for rows that pack several queries behind one image.
        image_index (`(B,)`): image of each row.
        position_ids (`(B, T)`, *optional*): how many tokens each one comes behind; by default those before it in the
            row, packed rows need them. The adapter makes the LMM's own positions of these.

    Raises:
        ValueError: shapes do not fit together; packed rows without `position_ids`, or for an LMM that does not take
            their masks; or a row holds another number of image tokens than one image has.
    """
    _check_rows(input_ids, attention_mask, position_ids)
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    is_packed = attention_mask.dim() == 3
    if is_packed and not adapter.takes_4d_masks:
        raise ValueError(f"a {adapter.config.model_type} takes one query per row, got an attention_mask (B, T, T)")
    if is_packed and position_ids is None:
        raise ValueError("position_ids are needed with an attention_mask of shape (B, T, T)")
    padding = torch.zeros_like(input_ids) if is_packed else attention_mask.cumsum(-1) == 0
    starts = padding.sum(-1)
    chosen = image_index.to(images.token_valid.device)
    layout, device = images.layout, input_ids.device
    columns = image_token_columns(input_ids, image_token_id, layout.counts[chosen].to(device))
    grid_sizes = layout.grid_sizes[chosen].to(device)
    if position_ids is None:
        position_ids = adapter.position_ids(attention_mask, columns, grid_sizes)
    else:
        position_ids = adapter.packed_position_ids(position_ids, columns, grid_sizes)
    valid = layout.token_valid()[chosen].to(device)[:, : columns.shape[1]]
    if is_packed:
        key_valid = torch.ones_like(input_ids, dtype=torch.bool).scatter(1, columns, valid)
        mask = _additive_mask(attention_mask & key_valid[:, None], images.lmm_features.dtype)
    else:
        mask = attention_mask.scatter(1, columns, valid.to(attention_mask.dtype))
    return Rows(adapter, images, input_ids, mask, position_ids, image_index, columns, starts)


def _check_rows(input_ids, attention_mask, position_ids) -> None:
    """Raise a `ValueError` unless ids are whole numbers `(B, T)`, and mask and positions belong to them."""
    shape = tuple(input_ids.shape)
    if len(shape) != 2 or input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be whole numbers (B, T), got {input_ids.dtype} of shape {shape}")
    for name, value, allowed in (
        ("attention_mask", attention_mask, (shape, (*shape, shape[1]))),
        ("position_ids", position_ids, (shape,)),
    ):
        if value is not None and tuple(value.shape) not in allowed:
            raise ValueError(f"{name} must have the shape {allowed[0]} of input_ids, got {tuple(value.shape)}")


def image_token_columns(input_ids: torch.Tensor, image_token_id: int, counts: torch.Tensor) -> torch.Tensor:
    """
    Columns of the image tokens of each row, `(B, n)` int64; the last one is repeated where others have more.

    Args:
        input_ids (`(B, T)`).
        image_token_id: id of the placeholder.
        counts (`(B,)`): image tokens of the image of each row.

    Raises:
        ValueError: a row holds another number of image tokens than its image has.
    """
    is_image = input_ids == image_token_id
    found = is_image.sum(-1)
    if not (found == counts).all():
        raise ValueError(
            f"every row of input_ids must hold the {_numbers(counts)} image tokens of one image, got {found.tolist()}"
        )
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    last = torch.where(is_image, columns, -1).amax(-1, keepdim=True)
    # In order: the image's columns first, then all others.
    order = torch.where(is_image, columns, columns + input_ids.shape[1]).sort(-1).values
    return torch.minimum(order[:, : int(counts.max())], last)


def _numbers(counts: torch.Tensor) -> str:
    """One number where all are alike, or else all."""
    return str(counts.tolist() if counts.unique().numel() > 1 else int(counts[0]))


def _additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, T, T)` bool to the `(B, 1, T, T)` mask that attention adds; padding, which sees nothing, sees itself."""
    blind = ~allowed.any(-1, keepdim=True)
    allowed = allowed | (blind & torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
