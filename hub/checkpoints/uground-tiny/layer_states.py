"""Layer states: which hidden states are kept, and how they are read.

A segment needs its own states at all layers, which are few, and those of the image tokens at the layer it leaves
through. So nothing else is kept: while an answer is written, hooks take the image columns of each layer as it passes,
and of each step the states of rows that wrote a segment token.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StoppingCriteria


@dataclass
class ImageStates:
    """
    States of the image tokens of G rows at L+1 layers, as far as they are kept.

    Attributes:
        layers: L+1 tensors `(G, T, D)`, `None` for layers that are not kept.
        columns (`(G, n)`, int64): where the image tokens stand in them; `None` if they hold nothing else.
        row_of (`(B,)`, int64, *optional*): where rows share a prefix, the one of each row; otherwise each has its own.
    """

    layers: Sequence[torch.Tensor | None]
    columns: torch.Tensor | None = None
    row_of: torch.Tensor | None = None

    def at(self, layer: int, row: int) -> torch.Tensor:
        """
        `(n, D)` states of one of the G rows.

        Raises:
            ValueError: the layer was not kept.
        """
        states = self.layers[layer]
        if states is None:
            kept = [number for number, held in enumerate(self.layers) if held is not None]
            raise ValueError(f"image states of layer {layer} were not kept; expected one of {kept}")
        return states[row] if self.columns is None else states[row][self.columns[row].to(states.device)]

    @property
    def num_tokens(self) -> int:
        """n."""
        kept = next(states for states in self.layers if states is not None)
        return kept.shape[1] if self.columns is None else self.columns.shape[1]

    def picked(self, rows: torch.Tensor, layers: torch.Tensor) -> "ImageStates":
        """
        States that hold what is read at these places.

        Args:
            rows, layers (`(M,)`, int64): one of the G rows and a layer, for each place; places may repeat.
        """
        return self

    def of_rows(self, row_of: torch.Tensor) -> "ImageStates":
        """The same states for rows that begin with other ones of the G prefixes."""
        return ImageStates(self.layers, self.columns, row_of)

    @property
    def nbytes(self) -> int:
        """Bytes that are kept."""
        return sum(states.nbytes for states in self.layers if states is not None)


def states_at(hidden_states: Sequence[torch.Tensor], rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """States of N segments of K positions at all layers: L+1 tensors `(B, T, D)` to `(N, K, L+1, D)`."""
    device = hidden_states[-1].device
    return torch.stack(
        [state[rows.to(state.device)[:, None], columns.to(state.device)].to(device) for state in hidden_states], 2
    )


class LayerHooks:
    """
    Sees every layer state as it passes, within a `with` block.

    Args:
        layers: the L decoder layers.
        norm: the norm behind them.

    `take(layer, states)` is called with layer 0…L and states `(B, T, D)`: 0 what enters the first decoder layer, L
    what leaves the norm.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module):
        self._layers, self._norm, self._handles = layers, norm, []

    def take(self, layer: int, states: torch.Tensor) -> None:
        raise NotImplementedError

    def __enter__(self):
        def entering(_module, args, kwargs):
            self.take(0, args[0] if args else kwargs["hidden_states"])

        self._handles.append(self._layers[0].register_forward_pre_hook(entering, with_kwargs=True))
        for number, module in enumerate([*self._layers[:-1], self._norm], start=1):
            self._handles.append(module.register_forward_hook(self._leaving(number)))
        return self

    def _leaving(self, number: int):
        def leaving(_module, _args, output):
            self.take(number, output[0] if isinstance(output, tuple) else output)

        return leaving

    def __exit__(self, *_error) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class PrefixStates(LayerHooks):
    """
    Takes the image columns of one pass.

    Args:
        layers, norm: as in [`LayerHooks`].
        columns (`(B, n)`): of the image tokens.
        kept: layers to keep; all by default.
    """

    def __init__(
        self, layers: list[nn.Module], norm: nn.Module, columns: torch.Tensor, kept: Sequence[int] | None = None
    ):
        super().__init__(layers, norm)
        self._columns, self._kept = columns, None if kept is None else set(kept)
        self._taken: dict[int, torch.Tensor] = {}

    def take(self, layer: int, states: torch.Tensor) -> None:
        # Later passes of the same call read tokens behind the image.
        if layer in self._taken or not (self._kept is None or layer in self._kept):
            return
        columns = self._columns.to(states.device)[..., None].expand(-1, -1, states.shape[-1])
        self._taken[layer] = states.gather(1, columns)

    def image_states(self, num_layers: int) -> ImageStates:
        """What was taken, of `num_layers` layers in all."""
        return ImageStates([self._taken.get(layer) for layer in range(num_layers)])


class WrittenStates(PrefixStates, StoppingCriteria):
    """
    Follows `generate`: keeps the states that predicted segment tokens, and with which probability these were written.

    Handed to `generate` as a stopping criterion it is told of every token; it never stops anything.

    Args:
        lmm: the trunk, whose logits are read as they are, before anything is ruled out.
        layers, norm, columns, kept: as in [`PrefixStates`]; `columns=None` where the image was read before.
        segment_token_id, image_token_id: the id that is looked for, and the one that is never written.
    """

    def __init__(
        self,
        lmm: nn.Module,
        layers: list[nn.Module],
        norm: nn.Module,
        columns: torch.Tensor,
        kept: Any,
        segment_token_id: int,
        image_token_id: int,
    ):
        super().__init__(layers, norm, columns, [] if columns is None else kept)
        self._lmm = lmm
        self._segment, self._image = segment_token_id, image_token_id
        self._last: list[torch.Tensor] = []
        self._logits: torch.Tensor | None = None
        self._steps = 0
        self._rows, self._at, self._states, self._scores = [], [], [], []

    def __enter__(self):
        super().__enter__()
        self._handles.append(self._lmm.register_forward_hook(self._read_logits))
        return self

    def _read_logits(self, _module, _args, output) -> None:
        self._logits = output.logits[:, -1]

    def take(self, layer: int, states: torch.Tensor) -> None:
        super().take(layer, states)
        if layer == 0:
            self._last = []
        self._last.append(states[:, -1])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_kwargs: Any) -> torch.Tensor:
        rows = (input_ids[:, -1] == self._segment).nonzero().squeeze(-1)
        if len(rows):
            device = self._last[-1].device
            self._states.append(torch.stack([state[rows.to(state.device)].to(device) for state in self._last], 1))
            logits = self._logits[rows.to(self._logits.device)].float()
            logits[:, self._image] = -torch.inf
            self._scores.append(logits.softmax(-1)[:, self._segment].to(device))
            self._rows.append(rows)
            self._at.append(torch.full_like(rows, self._steps))
        self._steps += 1
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def segments(self, num_ids: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        What was written, in reading order of rows and steps.

        Args:
            num_ids: K; a run of fewer ids is no segment.

        Returns:
            rows `(N,)`, states `(N, K, L+1, D)` and, as the geometric mean over the ids, probabilities `(N,)`.
        """
        last = self._last[-1]
        if not self._rows:
            empty = torch.zeros(0, dtype=torch.long, device=last.device)
            shape = (0, num_ids, len(self._last), last.shape[-1])
            return empty, last.new_zeros(shape), torch.zeros(0, device=last.device)
        rows, steps = torch.cat(self._rows), torch.cat(self._at)
        place = rows * self._steps + steps
        order = place.argsort()
        if num_ids > 1:
            written = torch.zeros(int(rows.max()) + 1, self._steps, dtype=torch.bool, device=rows.device)
            written[rows, steps] = True
            first = run_starts(written, num_ids)[rows[order], steps[order]].nonzero()
            order = order[first + torch.arange(num_ids, device=rows.device)]
        else:
            order = order[:, None]
        scores = torch.cat(self._scores)[order].log().mean(1).exp()
        return rows[order[:, 0]], torch.cat(self._states)[order], scores


def run_starts(is_segment: torch.Tensor, num_ids: int) -> torch.Tensor:
    """Where a whole run of K ids begins: `(B, T)` bool to `(B, T)` bool; longer runs fall into several."""
    columns = torch.arange(is_segment.shape[1], device=is_segment.device)
    # The last column before each that holds another token; a run begins right behind it.
    before = torch.where(is_segment, -1, columns).cummax(1).values
    is_start = is_segment & ((columns - before - 1) % num_ids == 0)
    ends = columns + num_ids - 1
    last = ends.clamp(max=is_segment.shape[1] - 1)
    return is_start & (ends < is_segment.shape[1]) & (before[:, last] == before)
