"""What the queries of an image have in common, up to its last image token, read once and shared by all of them.

Rows are laid out as they were, padding in front of the rest of a row instead of in front of its beginning, so that
all rows share one cached block of keys and values: `[prefix][padding][rest]`.
"""

import copy
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .library_compat import CACHE_NAME


def features_of_rows(lmm_inputs: dict) -> list[torch.Tensor]:
    """Image features `(n, D)` of each row, from the arguments of the LMM."""
    return lmm_inputs["mm_encoder_outputs"]["image"].pooler_output


@dataclass
class SharedPrefix:
    """
    G prefixes of P tokens each, as the LMM has read them, and which of them each of B rows begins with.

    Attributes:
        keys: image and token ids of each prefix, to tell them apart.
        features (`(G, n, D)`): what the image tokens were before the first layer.
        cache: keys and values `(G, …, P, …)` per layer; never written to, see [`cache_of_rows`].
        states: L+1 tensors `(G, P, D)`.
        image_positions (`(G, n)`): columns of the image tokens in them.
        row_prefix (`(B,)`, int64): prefix of each row.
    """

    keys: list[tuple]
    features: torch.Tensor
    cache: Cache
    states: tuple[torch.Tensor, ...]
    image_positions: torch.Tensor
    row_prefix: torch.Tensor

    @property
    def length(self) -> int:
        """P."""
        return self.states[0].shape[1]

    def of_rows(self, keys: list[tuple], features: list[torch.Tensor]) -> "SharedPrefix | None":
        """
        The same prefixes for rows that begin with other ones of them.

        Args:
            keys: of [`prefix_keys`].
            features: B tensors `(n, D)`, the image features of each row.

        Returns:
            `None` if a row begins with something else, be it another image of the same number.
        """
        known = {key: number for number, key in enumerate(self.keys)}
        first_row = _first_rows(keys)
        if any(
            key not in known or not torch.equal(self.features[known[key]], features[row])
            for key, row in first_row.items()
        ):
            return None
        numbers = [known[key] for key in keys]
        return replace(self, row_prefix=torch.tensor(numbers, device=self.row_prefix.device))


def _first_rows(keys: list[tuple]) -> dict[tuple, int]:
    """Each different key and the first row that has it, in order."""
    first: dict[tuple, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    return first


def prefix_keys(lmm_inputs: dict, image_positions: torch.Tensor, image_index: torch.Tensor) -> list[tuple] | None:
    """
    What tells the prefix of each row from others: its image, and its tokens up to the last image token.

    Args:
        lmm_inputs: of [`prepare_lmm_inputs`], rows padded on the left.
        image_positions (`(B, n)`), image_index (`(B,)`): columns of the image tokens, and the image of each row.

    Returns:
        B keys; `None` if rows cannot share: one ends with its image, or what stands in front of the images is not
        equally long everywhere.
    """
    ids = lmm_inputs["input_ids"]
    # Padding text has position 0 like the first token, so that the last zero is where a row begins.
    starts = (lmm_inputs["position_ids"] == 0).cumsum(-1).argmax(-1).tolist()
    ends = (image_positions[:, -1] + 1).tolist()
    lengths = {end - start for start, end in zip(starts, ends, strict=True)}
    if len(lengths) != 1 or max(ends) == ids.shape[1]:
        return None
    rows = zip(image_index.tolist(), ids.tolist(), starts, ends, strict=True)
    return [(image, *row[start:end]) for image, row, start, end in rows]


def read_prefixes(lmm: nn.Module, lmm_inputs: dict, image_positions: torch.Tensor, keys: list[tuple]) -> SharedPrefix:
    """
    Run the LMM over each different prefix once.

    Args:
        lmm: the trunk.
        lmm_inputs, image_positions: of all rows, as in [`prefix_keys`].
        keys: of [`prefix_keys`].
    """
    first_row = _first_rows(keys)
    device = lmm_inputs["input_ids"].device
    rows = torch.tensor(list(first_row.values()), device=device)
    length = len(keys[0]) - 1
    positions = image_positions.to(device)[rows]
    starts = positions[:, -1:] + 1 - length
    columns = starts + torch.arange(length, device=device)
    features = [features_of_rows(lmm_inputs)[row] for row in rows.tolist()]
    more = {"logits_to_keep": 1} if lmm._supports_logits_to_keep() else {}
    outputs = lmm(
        **{
            name: lmm_inputs[name][rows].gather(1, columns) for name in ("input_ids", "attention_mask", "position_ids")
        },
        mm_encoder_outputs={"image": BaseModelOutputWithPooling(pooler_output=features)},
        use_cache=True,
        output_hidden_states=True,
        **more,
    )
    numbers = {key: number for number, key in enumerate(first_row)}
    return SharedPrefix(
        keys=list(first_row),
        features=torch.stack(features),
        cache=outputs[CACHE_NAME],
        states=outputs.hidden_states,
        image_positions=positions - starts,
        row_prefix=torch.tensor([numbers[key] for key in keys], device=device),
    )


def continue_prefixes(prefix: SharedPrefix, lmm_inputs: dict, image_positions: torch.Tensor) -> dict:
    """
    Arguments for the LMM's `generate` that go on behind the prefixes.

    Args:
        prefix: of the rows.
        lmm_inputs, image_positions: of the rows, as in [`prefix_keys`].
    """
    ids, mask, positions = (lmm_inputs[name] for name in ("input_ids", "attention_mask", "position_ids"))
    length = prefix.length
    ends = image_positions[:, -1:].to(ids.device) + 1
    in_prefix = torch.arange(ids.shape[1], device=ids.device)
    padding = (in_prefix < ends)[:, length:]
    columns = ends - length + in_prefix[:length]
    # A row that is padded at all begins with the padding token.
    rest = torch.where(padding, ids[:, :1], ids[:, length:])
    return {
        "input_ids": torch.cat([ids.gather(1, columns), rest], 1),
        "attention_mask": torch.cat([mask.gather(1, columns), mask[:, length:].masked_fill(padding, 0)], 1),
        "position_ids": torch.cat([positions.gather(1, columns), positions[:, length:].masked_fill(padding, 0)], 1),
        CACHE_NAME: cache_of_rows(prefix.cache, prefix.row_prefix),
    }


def cache_of_rows(cache: Cache, rows: torch.Tensor) -> Cache:
    """Keys and values of some rows of a cache, in a cache of their own: the given one may be used again."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    for layer in chosen.layers:
        layer.batch_select_indices(rows.to(layer.keys.device))
    return chosen
