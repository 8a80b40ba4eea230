"""What the package knows of a family of LMMs: one adapter per family, and nothing else reads the LMM's insides.

An adapter is made of a configuration and holds no weights; where it needs the trunk, it is handed it. `lmm_families`
finds the adapter of a `model_type`.

Images may be of different grids in one batch: what is said of tokens or cells is then padded to the largest image, and
[`TokenLayout`] tells which of it is real.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .image_frames import ImageFrame, ImageFrames

# In place of a cell: an image placeholder that shows no cell of its own, such as a thumbnail's or the end of a row.
NO_CELL = -1


@dataclass
class TokenLayout:
    """
    Where the image tokens of I images lie, padded to the largest image.

    Attributes:
        counts (`(I,)`, int64): image placeholders of each.
        cells (`(I, n)`, int64): of each placeholder, row * w + column on the padded grid `(h, w)`; `NO_CELL` where it
            shows none, and behind the last placeholder of an image.
        grid_sizes (`(I, 2)`, int64): rows and columns of each image's own grid, at the top left of the padded one.
        valid (`(I, h, w)`, bool): cells that see image and not padding only; `False` outside of the own grid.
    """

    counts: torch.Tensor
    cells: torch.Tensor
    grid_sizes: torch.Tensor
    valid: torch.Tensor

    @classmethod
    def full(cls, valid: torch.Tensor) -> "TokenLayout":
        """Images of one grid `(I, h, w)`, one placeholder per cell in reading order."""
        images, rows, columns = valid.shape
        cells = torch.arange(rows * columns, device=valid.device).expand(images, -1)
        counts = torch.full((images,), rows * columns, device=valid.device)
        grid_sizes = torch.tensor([rows, columns], device=valid.device).expand(images, 2)
        return cls(counts, cells, grid_sizes, valid)

    @classmethod
    def of_cells(cls, cells: list[list[tuple[int, int] | None]], device: torch.device | str) -> "TokenLayout":
        """
        From the cells that the placeholders of each image show.

        Args:
            cells: of each image and placeholder in order, row and column, or `None`. Every cell of an image's grid
                must be shown by one of them.
            device: of the result.
        """
        grids = [tuple(1 + max(place[axis] for place in image if place) for axis in (0, 1)) for image in cells]
        width, length = max(columns for _, columns in grids), max(map(len, cells))
        numbers = [
            [NO_CELL if place is None else place[0] * width + place[1] for place in image]
            + [NO_CELL] * (length - len(image))
            for image in cells
        ]
        valid = torch.zeros(len(grids), max(rows for rows, _ in grids), width, dtype=torch.bool, device=device)
        for image, (rows, columns) in enumerate(grids):
            valid[image, :rows, :columns] = True
        return cls(
            torch.tensor([len(image) for image in cells], device=device),
            torch.tensor(numbers, device=device),
            torch.tensor(grids, device=device),
            valid,
        )

    def token_valid(self) -> torch.Tensor:
        """`(I, n)` bool: placeholders that may be seen; those without a cell may."""
        cells = self.valid.flatten(1)
        return torch.where(self.cells == NO_CELL, True, cells.gather(1, self.cells.clamp_min(0)))


def on_grid(values: torch.Tensor, cells: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
    """
    Values of image placeholders at their cells.

    Args:
        values (`(N, n)`): one per placeholder.
        cells (`(N, n)`): of [`TokenLayout`].
        grid_hw: of the padded grid.

    Returns:
        `(N, h, w)`; 0 in cells that nobody shows.
    """
    size = grid_hw[0] * grid_hw[1]
    places = torch.where(cells == NO_CELL, size, cells)
    return values.new_zeros(len(values), size + 1).scatter(1, places, values)[:, :size].view(-1, *grid_hw)


@dataclass(frozen=True)
class ModuleNames:
    """
    Names of an LMM's modules, from the LMM's root on.

    Attributes:
        language_model: what adapters of LoRA sit in.
        encoders: see images only; they stay frozen unless a run asks for them.
        never_quantized: small, or what becomes of their rounding shows in every mask.
        embeddings, head: the two sides of the vocabulary, by the last part of their names.
    """

    language_model: str
    encoders: tuple[str, ...]
    never_quantized: tuple[str, ...]
    embeddings: str = "embed_tokens"
    head: str = "lm_head"


class LmmAdapter:
    """
    One family of LMMs.

    Args:
        config: of the LMM, as `config.lmm_config` holds it.
        image_frame: what the LMM sees of an image, one of the adapter's `frames`.

    Attributes:
        frames: kinds of frames that the family's weights may have been trained with, the usual one first.
        names: of the family's modules.
        image_keys: what the family's image processor returns beside pixels, and its encoder needs.
        pixels_per_image: whether the first axis of `pixel_values` is that of images.
        prefix_is_causal: whether nothing before the last image token sees what comes behind it, so that queries about
            an image can share it.
        cache_can_be_selected: whether rows of the cached keys and values can be picked.
        takes_4d_masks: whether a mask `(B, 1, T, T)` says which keys each token sees, as packed rows need.

    Raises:
        ValueError: the family has no such frame.
    """

    frames: tuple[str, ...] = ()
    names: ModuleNames
    image_keys: tuple[str, ...] = ()
    pixels_per_image = True
    prefix_is_causal = True
    cache_can_be_selected = True
    takes_4d_masks = True

    def __init__(self, config: PreTrainedConfig, image_frame: str):
        if image_frame not in self.frames:
            raise ValueError(f"image_frame of a {config.model_type} must be one of {self.frames}, got {image_frame!r}")
        self.config = config
        self.image_frame = image_frame

    @property
    def frame(self) -> ImageFrame | None:
        """What the vision tower sees of every image, in pixels; `None` where each image has a frame of its own."""
        return None

    def frame_of(self, grid_hw: tuple[int, int]) -> ImageFrame:
        """What the vision tower sees of an image of this token grid, in pixels."""
        raise NotImplementedError

    def frames_of(self, grid_sizes: torch.Tensor) -> ImageFrame | ImageFrames:
        """Frames of images with token grids of these sizes `(I, 2)`."""
        if self.frame is not None:
            return self.frame
        grids = tuple((rows, columns) for rows, columns in grid_sizes.tolist())
        return ImageFrames(tuple(map(self.frame_of, grids)), grids)

    @property
    def token_grid_hw(self) -> tuple[int, int] | None:
        """Rows and columns of the image tokens of every image; `None` where each image has its own."""
        return None

    @property
    def cell_side(self) -> int:
        """Side of an image token in pixels of the frame."""
        return self.frame.side // self.token_grid_hw[0]

    def layout(self, valid_sizes: torch.Tensor, image_inputs: Mapping[str, torch.Tensor]) -> TokenLayout:
        """
        Where the image tokens lie.

        Args:
            valid_sizes (`(I, 2)`): rows and columns of the frame that are image.
            image_inputs: what the processor returned of `image_keys`.
        """
        raise NotImplementedError

    def encode(
        self, lmm: nn.Module, pixel_values: torch.Tensor, layout: TokenLayout, image_inputs: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Vision tower and projector.

        Returns:
            features `(I, n, D)` in the LMM's embedding space; and, where later layers are fed too, `(I, k, n, D)` of
            k layers. Zeros behind the last placeholder of an image.
        """
        raise NotImplementedError

    def image_outputs(self, features: torch.Tensor, further: torch.Tensor | None, counts: torch.Tensor) -> Any:
        """
        The object that the family's `get_image_features` returns, of the image of each row.

        Args:
            features (`(B, n, D)`), further (`(B, k, n, D)`, *optional*): of [`encode`].
            counts (`(B,)`): placeholders of each row.
        """
        raise NotImplementedError

    def decoder_layers(self, lmm: nn.Module) -> list[nn.Module]:
        """The L decoder layers, whose outputs are layer states 1…L-1 (and L before its norm)."""
        return list(lmm.model.language_model.layers)

    def final_norm(self, lmm: nn.Module) -> nn.Module:
        """The norm behind the last decoder layer; its output is layer state L."""
        return lmm.model.language_model.norm

    def unused(self) -> tuple[str, ...]:
        """Names, from the LMM's root on, of what the forward pass never runs through."""
        return ()

    def position_ids(
        self, attention_mask: torch.Tensor, image_columns: torch.Tensor, grid_sizes: torch.Tensor
    ) -> torch.Tensor:
        """
        Positions `(…, B, T)` of rows that are not packed. What is written behind a row counts on from its last one,
        in every axis in front, so that a row needs no offset beside them.

        Args:
            attention_mask (`(B, T)`): of what is not text padding.
            image_columns (`(B, n)`): of the image tokens, the last one repeated where an image has fewer.
            grid_sizes (`(B, 2)`): of the image of each row.
        """
        return counted_positions(attention_mask)

    def packed_position_ids(
        self, position_ids: torch.Tensor, image_columns: torch.Tensor, grid_sizes: torch.Tensor
    ) -> torch.Tensor:
        """Positions `(…, B, T)` of packed rows, of the number `(B, T)` of tokens that each token comes behind."""
        return position_ids


def counted_positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: each token counts those before it, from the end of the padding in front of its row on."""
    # Padding behind a row counts on, as in the official code; only padding in front of it does not.
    in_front = (attention_mask.cumsum(-1) == 0).sum(-1, keepdim=True)
    return (torch.arange(attention_mask.shape[1], device=attention_mask.device) - in_front).clamp_min(0)
