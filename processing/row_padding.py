"""Rows of token ids, padded to one length."""

from typing import Any

from transformers import PreTrainedTokenizerBase

from .processor_options import CallOptions
from .row_encoding import Row

# Label value that the cross-entropy of PyTorch ignores.
IGNORED_LABEL = -100
# Tokenizers that know no longest context claim one far above this.
LONGEST_CONTEXT = 2**31


def pad_rows(rows: list[Row], tokenizer: PreTrainedTokenizerBase, options: CallOptions, with_labels: bool) -> dict:
    """
    Rows of one length, or, without padding, as they are.

    Args:
        rows: B rows.
        tokenizer: says what is filled in, and how long rows may become.
        options: of the call.
        with_labels: whether to give the ids that are to be learnt, `IGNORED_LABEL` in place of the others.

    Raises:
        ValueError: the rows differ in length and are to become one tensor, or are to have a length that nothing says.
    """
    data = {
        "input_ids": [row.ids for row in rows],
        "attention_mask": [[1] * len(row.ids) for row in rows],
    }
    fills: dict[str, Any] = {
        "input_ids": tokenizer.pad_token_id,
        "attention_mask": 0,
        "labels": IGNORED_LABEL,
    }
    if with_labels:
        data["labels"] = [
            [token if learnt else IGNORED_LABEL for token, learnt in zip(row.ids, row.learnt, strict=True)]
            for row in rows
        ]
    if options.return_offsets_mapping:
        data["offset_mapping"], fills["offset_mapping"] = [row.offsets for row in rows], (0, 0)
    lengths = {len(row.ids) for row in rows}
    length = max(lengths)
    if options.padding is None:
        if len(lengths) > 1 and options.return_tensors is not None:
            raise ValueError(
                f"rows of several lengths need padding or return_tensors=None, got lengths {sorted(lengths)}"
            )
        return data
    if options.padding == "max_length":
        length = tokenizer.model_max_length if options.max_length is None else options.max_length
        if length > LONGEST_CONTEXT:
            raise ValueError("padding='max_length' needs max_length=…, as the tokenizer knows no length")
    multiple = options.pad_to_multiple_of or 1
    length = -(-length // multiple) * multiple
    on_left = options.padding_side == "left"
    for name, values in data.items():
        filling = [[fills[name]] * (length - len(value)) for value in values]
        data[name] = [fill + value if on_left else value + fill for fill, value in zip(filling, values, strict=True)]
    return data


__all__ = ["IGNORED_LABEL", "pad_rows"]
