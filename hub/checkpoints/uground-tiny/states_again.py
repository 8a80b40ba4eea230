"""Image states that are not kept while an answer is written, but read again of what the policy then picks.

A policy may pick any layer, and does so after the answer is written. Of few prefixes the image tokens are kept at all
layers. Of many they would take half as much memory as the cached keys and values; of those, the prefixes of rows that
wrote a segment are read once more, up to the deepest layer that was picked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .layer_states import ImageStates, LayerHooks
from .query_rows import Rows

# At 7B with 576 image tokens in half precision, those of one prefix take 156 MB at all layers, of 64 prefixes 10 GB.
# One query, several about one image, and small batches do not pay for a second reading.
MAX_KEPT_PREFIXES = 16


@dataclass
class KeptLayers:
    """
    Of which layers a call keeps the states of image tokens; the same for the same arguments, whatever memory is free.

    Attributes:
        layers (*optional*): those that will be read; `None` where only the segments will tell.
        max_prefixes (*optional*): of more prefixes than that, layers that are not known yet are not kept, but read
            again; `None` keeps all layers of any number of prefixes.
    """

    layers: Sequence[int] | None = None
    max_prefixes: int | None = None

    def of(self, num_prefixes: int) -> Sequence[int] | None:
        """Layers to keep of so many prefixes, `None` for all; none of them are [`StatesAgain`]."""
        is_many = self.max_prefixes is not None and num_prefixes > self.max_prefixes
        return [] if self.layers is None and is_many else self.layers


class StatesAgain(ImageStates):
    """
    As [`ImageStates`] of G rows, but read when [`picked`] is asked for them.

    Args:
        lmm: the trunk.
        rows: the G rows; of each, what comes up to its last image token is read.
        num_layers: L+1.
        row_of (`(B,)`, *optional*): as in [`ImageStates`].
    """

    def __init__(self, lmm: nn.Module, rows: Rows, num_layers: int, row_of: torch.Tensor | None = None):
        super().__init__([None] * num_layers, None, row_of)
        # A copy of its own, which holds no features per row until they are read.
        self._lmm, self._rows = lmm, replace(rows)

    @property
    def num_tokens(self) -> int:
        return self._rows.image_columns.shape[1]

    def of_rows(self, row_of: torch.Tensor) -> "StatesAgain":
        return StatesAgain(self._lmm, self._rows, len(self.layers), row_of)

    def at(self, layer: int, row: int) -> torch.Tensor:
        return self.picked(torch.tensor([row]), torch.tensor([layer])).at(layer, row)

    @torch.no_grad()
    def picked(self, rows: torch.Tensor, layers: torch.Tensor) -> "PickedStates":
        places = sorted(set(zip(layers.tolist(), rows.tolist(), strict=True)))
        numbers = sorted({row for _, row in places})
        found: dict[tuple[int, int], torch.Tensor] = {}
        if places:
            self._read(numbers, places, found)
        return PickedStates(found, self.num_tokens, self.row_of)

    def _read(self, numbers: list[int], places: list[tuple[int, int]], found: dict) -> None:
        """Run the LMM over some of the rows, into `found`."""
        rows = self._rows.select(torch.tensor(numbers, device=self._rows.input_ids.device))
        adapter, inputs = rows.adapter, rows.lmm_inputs()
        if adapter.prefix_is_causal:
            end = int(rows.image_columns[:, -1].max()) + 1
            for name in ("input_ids", "attention_mask", "position_ids"):
                inputs[name] = inputs[name][..., :end]
        hooks = _PickingHooks(adapter.decoder_layers(self._lmm), adapter.final_norm(self._lmm), rows, numbers, places)
        with hooks:
            try:
                self._lmm(**inputs, use_cache=False)
            except _DeepestRead:
                found.update(hooks.found)


class PickedStates(ImageStates):
    """
    As [`ImageStates`], of some layers of some rows.

    Args:
        states: `(n, D)` by layer and row.
        num_tokens: n.
        row_of (`(B,)`, *optional*): as in [`ImageStates`].
    """

    def __init__(self, states: dict[tuple[int, int], torch.Tensor], num_tokens: int, row_of: torch.Tensor | None):
        super().__init__([], None, row_of)
        self._states, self._num_tokens = states, num_tokens

    def at(self, layer: int, row: int) -> torch.Tensor:
        return self._states[layer, row]

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    @property
    def nbytes(self) -> int:
        return sum(states.nbytes for states in self._states.values())


class _DeepestRead(Exception):
    """Ends a pass at the deepest layer that is read."""


class _PickingHooks(LayerHooks):
    """Takes the image columns of some rows at some layers, and ends the pass behind the last of them."""

    def __init__(self, layers, norm, rows: Rows, numbers: list[int], places: list[tuple[int, int]]):
        super().__init__(layers, norm)
        self._columns = rows.image_columns
        self._line = {number: line for line, number in enumerate(numbers)}
        self._places, self._deepest = places, max(layer for layer, _ in places)
        self.found: dict[tuple[int, int], torch.Tensor] = {}

    def take(self, layer: int, states: torch.Tensor) -> None:
        for place in self._places:
            if place[0] == layer:
                line = self._line[place[1]]
                self.found[place] = states[line][self._columns[line].to(states.device)]
        if layer == self._deepest:
            raise _DeepestRead
