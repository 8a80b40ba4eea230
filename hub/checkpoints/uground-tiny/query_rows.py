"""Rows: B prompts about I encoded images, prepared for the LMM once per call and handed on."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .lmm_access import LmmAdapter
from .output_uground import UGroundImageEmbeddings


@dataclass
class Rows:
    """
    Attributes:
        adapter: of the LMM.
        images: what the rows ask about.
        input_ids (`(B, T)`): as the processor returns them.
        attention_mask (`(B, T)` or `(B, 1, T, T)`): padded image tokens are masked as keys.
        position_ids (`(B, T)`).
        image_index (`(B,)`): image of each row.
        image_columns (`(B, n)`): columns of the image tokens.
    """

    adapter: LmmAdapter
    images: UGroundImageEmbeddings
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    image_index: torch.Tensor
    image_columns: torch.Tensor

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @cached_property
    def features(self) -> torch.Tensor:
        """`(B, n, D)`: image features of each row."""
        return self.images.lmm_features[self.image_index.to(self.images.lmm_features.device)]

    def lmm_inputs(self) -> dict:
        """Arguments of the LMM's `forward` or `generate`."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
            "mm_encoder_outputs": {"image": self.adapter.image_outputs(self.features)},
        }

    def select(self, rows: torch.Tensor) -> "Rows":
        """Some of the rows, by their numbers."""
        chosen = {
            name: getattr(self, name)[rows.to(getattr(self, name).device)]
            for name in ("input_ids", "attention_mask", "position_ids", "image_index", "image_columns")
        }
        return replace(self, **chosen)

    @cached_property
    def prefix_keys(self) -> list[tuple] | None:
        """
        What tells the prefix of each row from others: its image, and its tokens up to the last image token.

        `None` if rows cannot share one: the LMM is not causal there, a row ends with its image, or what stands in
        front of the images is not equally long everywhere.
        """
        if not (self.adapter.prefix_is_causal and self.adapter.cache_can_be_selected):
            return None
        # Padding text has position 0 like the first token, so that the last zero is where a row begins.
        starts = (self.position_ids == 0).cumsum(-1).argmax(-1).tolist()
        ends = (self.image_columns[:, -1] + 1).tolist()
        lengths = {end - start for start, end in zip(starts, ends, strict=True)}
        if len(lengths) != 1 or max(ends) == self.input_ids.shape[1]:
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
        position_ids (`(B, T)`, *optional*): by default each token counts those before it; packed rows need them.

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
    if position_ids is None:
        if is_packed:
            raise ValueError("position_ids are needed with an attention_mask of shape (B, T, T)")
        position_ids = adapter.position_ids(attention_mask)
    columns = image_token_columns(input_ids, image_token_id, images.lmm_features.shape[1])
    valid = images.token_valid[image_index.to(images.token_valid.device)].to(input_ids.device).flatten(1)
    if is_packed:
        key_valid = torch.ones_like(input_ids, dtype=torch.bool).scatter(1, columns, valid)
        mask = _additive_mask(attention_mask & key_valid[:, None], images.lmm_features.dtype)
    else:
        mask = attention_mask.scatter(1, columns, valid.to(attention_mask.dtype))
    return Rows(adapter, images, input_ids, mask, position_ids, image_index, columns)


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


def image_token_columns(input_ids: torch.Tensor, image_token_id: int, num_image_tokens: int) -> torch.Tensor:
    """
    Columns of the image tokens of each row, `(B, num_image_tokens)` int64.

    Raises:
        ValueError: a row holds another number of image tokens than one image has.
    """
    is_image = input_ids == image_token_id
    counts = is_image.sum(-1)
    if not (counts == num_image_tokens).all():
        raise ValueError(
            f"every row of input_ids must hold the {num_image_tokens} image tokens of one image, got {counts.tolist()}"
        )
    return is_image.nonzero()[:, 1].view(len(input_ids), num_image_tokens)


def _additive_mask(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(B, T, T)` bool to the `(B, 1, T, T)` mask that attention adds; padding, which sees nothing, sees itself."""
    blind = ~allowed.any(-1, keepdim=True)
    allowed = allowed | (blind & torch.eye(allowed.shape[-1], dtype=torch.bool, device=allowed.device))
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill(~allowed, torch.finfo(dtype).min)[:, None]
