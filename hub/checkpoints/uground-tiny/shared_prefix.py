"""What the queries of an image have in common, up to its last image token, read once and shared by all of them.

Rows are laid out as they were, padding in front of the rest of a row instead of in front of its beginning, so that
all rows share one cached block of keys and values: `[prefix][padding][rest]`. Prefixes of images of several sizes are
padded in front, to the longest.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import Cache

from .layer_states import ImageStates, PrefixStates
from .library_compat import CACHE_NAME
from .query_rows import Rows
from .states_again import KeptLayers, StatesAgain


@dataclass
class SharedPrefix:
    """
    G prefixes of up to P tokens each, as the LMM has read them, and which of them each of B rows begins with.

    Attributes:
        keys: image and token ids of each prefix, to tell them apart.
        features (`(G, n, D)`): what the image tokens were before the first layer.
        length: P, the longest.
        cache: keys and values `(G, …, P, …)` per layer; never written to, see [`cache_of_rows`].
        image_states: of the G prefixes; its `row_of` says which one each of the B rows begins with.
    """

    keys: list[tuple]
    features: torch.Tensor
    length: int
    cache: Cache
    image_states: ImageStates

    def of_rows(self, rows: Rows) -> "SharedPrefix | None":
        """
        The same prefixes for rows that begin with other ones of them.

        Returns:
            `None` if a row begins with something else, be it another image of the same number.
        """
        known = {key: number for number, key in enumerate(self.keys)}
        first_row = _first_rows(rows.prefix_keys)
        if any(
            key not in known or not torch.equal(self.features[known[key]], rows.features[row])
            for key, row in first_row.items()
        ):
            return None
        numbers = torch.tensor([known[key] for key in rows.prefix_keys], device=self.features.device)
        return replace(self, image_states=self.image_states.of_rows(numbers))


def _first_rows(keys: list[tuple]) -> dict[tuple, int]:
    """Each different key and the first row that has it, in order."""
    first: dict[tuple, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return first


def find_prefix(
    lmm: nn.Module, rows: Rows, num_layers: int, known: SharedPrefix | None = None, kept: KeptLayers | None = None
) -> SharedPrefix | None:
    """
    The prefixes of all rows: what is known of them, or read now.

    Args:
        lmm: the trunk.
        rows: padded on the left.
        num_layers: L+1.
        known (*optional*): read before.
        kept: of which layers image states are kept; of all by default.

    Returns:
        `None` if rows cannot share, see [`Rows.prefix_keys`].
    """
    if rows.prefix_keys is None:
        return None
    prefix = None if known is None else known.of_rows(rows)
    return prefix or _read_prefixes(lmm, rows, num_layers, kept or KeptLayers())


def _read_prefixes(lmm: nn.Module, rows: Rows, num_layers: int, keep: KeptLayers) -> SharedPrefix:
    """Run the LMM over each different prefix once."""
    keys, adapter = rows.prefix_keys, rows.adapter
    first_row = _first_rows(keys)
    device = rows.input_ids.device
    firsts = rows.select(torch.tensor(list(first_row.values()), device=device))
    length = max(map(len, keys)) - 1
    image_columns = firsts.image_columns.to(device)
    starts = image_columns[:, -1:] + 1 - length
    inputs = firsts.lmm_inputs() | _prefix_inputs(firsts, length)
    more = {"logits_to_keep": 1} if lmm._supports_logits_to_keep() else {}
    kept = keep.of(len(firsts))
    with PrefixStates(adapter.decoder_layers(lmm), adapter.final_norm(lmm), image_columns - starts, kept) as states:
        outputs = lmm(**inputs, use_cache=True, **more)
    numbers = {key: number for number, key in enumerate(first_row)}
    row_of = torch.tensor([numbers[key] for key in keys], device=device)
    image_states = StatesAgain(lmm, firsts, num_layers) if kept == [] else states.image_states(num_layers)
    return SharedPrefix(
        keys=list(first_row),
        features=firsts.features,
        length=length,
        cache=outputs[CACHE_NAME],
        image_states=image_states.of_rows(row_of),
    )


def _prefix_inputs(rows: Rows, length: int) -> dict[str, torch.Tensor]:
    """The last `length` tokens of each row up to its image; what lies before a shorter prefix is masked."""
    ends = rows.image_columns[:, -1:].to(rows.input_ids.device) + 1
    columns = ends - length + torch.arange(length, device=rows.input_ids.device)
    is_prefix = columns >= rows.starts[:, None]
    columns = columns.clamp_min(0)
    ids = rows.input_ids.gather(1, columns)
    # No image token: their number is that of the features.
    first = rows.input_ids.gather(1, ends.clamp(max=rows.input_ids.shape[1] - 1))
    return {
        "input_ids": torch.where(is_prefix, ids, first),
        "attention_mask": rows.attention_mask.gather(1, columns).masked_fill(~is_prefix, 0),
        "position_ids": _take(rows.position_ids, columns).masked_fill(~is_prefix, 0),
    }


def _take(positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Columns `(B, m)` of positions `(…, B, T)`."""
    return positions.gather(-1, columns.expand(*positions.shape[:-1], -1))


def continue_prefixes(prefix: SharedPrefix, rows: Rows) -> dict:
    """Arguments for the LMM's `generate` that go on behind the prefixes of rows."""
    ids, mask, positions = rows.input_ids, rows.attention_mask, rows.position_ids
    ends = rows.image_columns[:, -1:].to(ids.device) + 1
    # Rests end where their rows do; where all prefixes are equally long, so are rows as they were given.
    count = max(ids.shape[1] - prefix.length, ids.shape[1] - int(ends.min()))
    start = ids.shape[1] - count
    padding = torch.arange(start, ids.shape[1], device=ids.device) < ends
    begun = _prefix_inputs(rows, prefix.length)
    rest = {
        # What is masked need only be no image token.
        "input_ids": torch.where(padding, ids.gather(1, ends), ids[:, start:]),
        "attention_mask": mask[:, start:].masked_fill(padding, 0),
        "position_ids": positions[..., start:].masked_fill(padding, 0),
    }
    return {
        **{name: torch.cat([begun[name], values], -1) for name, values in rest.items()},
        CACHE_NAME: cache_of_rows(prefix.cache, prefix.image_states.row_of),
    }


def cache_of_rows(cache: Cache, rows: torch.Tensor) -> Cache:
    """Keys and values of some rows of a cache, in a cache of their own: the given one may be used again."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))
    return chosen
