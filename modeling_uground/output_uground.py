"""What the model returns."""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .lmm_access import TokenLayout
from .mask_head import ImageMaps


@dataclass
class UGroundImageEmbeddings(ModelOutput):
    """
    Everything of I images that does not depend on a query: encode once, ask many times.

    Args:
        lmm_features (`(I, n, D)`): image tokens in the LMM's embedding space, zeros behind those of a smaller image.
        further_features (`(I, k, n, D)`, *optional*): what an LMM adds to the image tokens behind its first k layers.
        token_counts (`(I,)`, int64): image tokens of each.
        token_cells (`(I, n)`, int64): cell of the grid `(h, w)` that each token shows, row * w + column; -1: none.
        grid_sizes (`(I, 2)`, int64): rows and columns of each image's own grid, at the top left of the common one.
        sam_embeddings (*optional*): SAM's image embeddings, as the mask head makes them: `(I, C, S/16, S/16)` of a
            SAM, several maps `(I, C, h, w)` by name of a SAM 2; `None` without a mask head.
        token_valid (`(I, h, w)`, bool): image tokens that see image and not padding only.
        valid_sizes, sam_valid_sizes, original_sizes (`(I, 2)`, int64): as the processor returned them.
    """

    lmm_features: torch.Tensor | None = None
    further_features: torch.Tensor | None = None
    token_counts: torch.Tensor | None = None
    token_cells: torch.Tensor | None = None
    grid_sizes: torch.Tensor | None = None
    sam_embeddings: ImageMaps | None = None
    token_valid: torch.Tensor | None = None
    valid_sizes: torch.Tensor | None = None
    sam_valid_sizes: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None

    @property
    def layout(self) -> TokenLayout:
        """Where the image tokens lie."""
        parts: Any = (self.token_counts, self.token_cells, self.grid_sizes, self.token_valid)
        return TokenLayout(*parts)


@dataclass
class SegmentFields(ModelOutput):
    """
    Of N segments in reading order.

    Args:
        segment_row (`(N,)`, int64): row each segment stands in.
        layer_logits (`(N, L+1)`, float32): of the layer policy; `None` for a model without one.
        layer_index (`(N,)`, int64): layer each segment was read at; under `"mc"` the one drawn most often.
        log_probs (`(N,)`, float32): log-probability of `layer_index` under the policy, `None` without one.
        similarity (`(N, h, w)`, float32): raw dot products with the image tokens; where images have grids of their
            own, each lies at the top left and the rest is 0.
        similarity_map (`(N, h, w)`, float32): the same after `config.similarity_scaling`.
        points (`(N, K, 2)`, float32, *optional*): with the prompt `points`, x and y in pixels of the SAM frame, as
            handed to the prompt encoder.
        point_labels (`(N, K)`, int64, *optional*): 1 inside, 0 outside, -1 neutral, -10 where there is no such point.
        mask_logits (`(N, p, p)`, float32): in the SAM frame; a pixel is mask where the logit is above 0. The side is
            that of SAM's mask prompts, S/4 with patches of 16 pixels.
        iou_scores (`(N,)`, float32): SAM's estimate of the IoU of each mask.
        presence_logits (`(N,)`, float32, *optional*): of a SAM 2, how sure it is that there is anything; a thing is
            there where the logit is above 0.
        uncertainty (`(N, p, p)`, float32, *optional*): under `"mc"`, the variance of the mask probability over
            the drawn layers, in 0..0.25.
        agreement (`(N,)`, float32, *optional*): under `"mc"`, the mean IoU of the masks of the drawn layers with the
            mask of their average, in 0..1; 1 where all are alike.
    """

    segment_row: torch.Tensor | None = None
    layer_logits: torch.Tensor | None = None
    layer_index: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    similarity: torch.Tensor | None = None
    similarity_map: torch.Tensor | None = None
    points: torch.Tensor | None = None
    point_labels: torch.Tensor | None = None
    mask_logits: torch.Tensor | None = None
    iou_scores: torch.Tensor | None = None
    presence_logits: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    agreement: torch.Tensor | None = None


@dataclass
class TextFields(ModelOutput):
    """
    Of a teacher-forced pass over B rows.

    Args:
        loss (scalar, *optional*): text cross-entropy, when `labels` were given.
        logits (`(B, T, V)`): of the LMM.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class UGroundOutput(SegmentFields, TextFields):
    """
    Output of a teacher-forced pass over B rows with N segments: the fields of [`TextFields`] and [`SegmentFields`].

    Args:
        layer_draws (`(k, N)`, int64, *optional*): layers drawn with `layer_uniforms`; masks are read at the first.
        draw_log_probs (`(k, N)`, float32, *optional*): their log-probabilities under the policy.
        other_maps (`(k - 1, N, h, w)`, float32, *optional*): similarity maps at the draws but the first, without a
            graph.
        sam_embeddings (*optional*): SAM's image embeddings, where the pass made them, as in
            [`UGroundImageEmbeddings`].
        hidden_states (L+1 tensors `(B, T, D)`, *optional*): layer states of every token, on request;
            `None` in place of layers that were not asked for.
        attentions (L tensors `(B, heads, T, T)`, *optional*): of the language model, on request.
        cache (`Cache`, *optional*): keys and values of the language model, on request.
    """

    layer_draws: torch.Tensor | None = None
    draw_log_probs: torch.Tensor | None = None
    other_maps: torch.Tensor | None = None
    sam_embeddings: ImageMaps | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    cache: Cache | None = None


@dataclass
class AnswerFields(ModelOutput):
    """
    Of B written answers.

    Args:
        sequences (`(B, T)`, int64): prompts and what was written after them.
        prompt_length (`int`): number of columns of `sequences` that are prompt.
        finished (`(B,)`, bool): answers that came to their end; the others were cut by a limit, such as
            `max_new_tokens`, and may lack segments.
        image_index (`(B,)`, int64): image each row asks about.
    """

    sequences: torch.Tensor | None = None
    prompt_length: int | None = None
    finished: torch.Tensor | None = None
    image_index: torch.Tensor | None = None


@dataclass
class UGroundSegmentation(SegmentFields, AnswerFields):
    """
    Output of [`UGroundForReferringSegmentation.segment`]: the fields of [`AnswerFields`] and [`SegmentFields`].

    Args:
        token_scores (`(N,)`, float32): probability with which each segment token was written.
        valid_sizes, sam_valid_sizes, original_sizes (`(I, 2)`, int64): as the processor returned them.
    """

    token_scores: torch.Tensor | None = None
    valid_sizes: torch.Tensor | None = None
    sam_valid_sizes: torch.Tensor | None = None
    original_sizes: torch.Tensor | None = None


def asked_outputs(
    config: PreTrainedConfig,
    use_cache: bool | None,
    output_hidden_states: bool | int | list[int] | None,
    output_attentions: bool | None,
) -> dict:
    """
    Which further fields a forward shall return: `cache`, `hidden_states`, `attentions`.

    Args:
        config: says of states and attentions what the call does not.
        use_cache, output_attentions: of the call, `None` where it does not say.
        output_hidden_states: the same, or a layer, or a list of layers, from the end if negative.

    Returns:
        `True` or `False` for each; for states, numbers of the layers.

    Raises:
        ValueError: there is no such layer.
    """
    states = config.output_hidden_states if output_hidden_states is None else output_hidden_states
    attentions = config.output_attentions if output_attentions is None else output_attentions
    layers = range(config.num_layers)
    if isinstance(states, bool):
        states = [*layers] if states else []
    asked = [states] if isinstance(states, int) else list(states or ())
    if any(layer not in range(-len(layers), len(layers)) for layer in asked):
        raise ValueError(f"output_hidden_states must name layers in 0..{len(layers) - 1}, got {asked}")
    return {"cache": bool(use_cache), "hidden_states": {layers[n] for n in asked}, "attentions": bool(attentions)}


def further_outputs(outputs: ModelOutput, cache_name: str, asked: dict) -> dict:
    """
    What a forward of the LMM gave, as far as it was asked for.

    Args:
        outputs: of the LMM.
        cache_name: its name for keys and values.
        asked: of [`asked_outputs`].
    """
    states = enumerate(outputs.hidden_states)
    found = {
        "cache": outputs.get(cache_name),
        "hidden_states": tuple(state if layer in asked["hidden_states"] else None for layer, state in states),
        "attentions": outputs.get("attentions"),
    }
    return {name: value for name, value in found.items() if asked[name]}


def join_segmentations(parts: list[UGroundSegmentation], padding_token_id: int) -> UGroundSegmentation:
    """Outputs for consecutive rows of one batch, with prompts of one length and the same images, as one output."""
    length = max(part.sequences.shape[1] for part in parts)
    joined: dict[str, Any] = {}
    for field in fields(UGroundSegmentation):
        values = [part[field.name] for part in parts if part.get(field.name) is not None]
        if not values:
            continue
        if field.name == "sequences":
            values = [
                torch.nn.functional.pad(value, (0, length - value.shape[1]), value=padding_token_id)
                for value in values
            ]
        elif field.name == "segment_row":
            starts = torch.tensor([0] + [part.sequences.shape[0] for part in parts[:-1]]).cumsum(0).tolist()
            values = [value + start for value, start in zip(values, starts, strict=True)]
        shared = field.name == "prompt_length" or field.name.endswith("_sizes")
        joined[field.name] = values[0] if shared else torch.cat(values)
    return UGroundSegmentation(**joined)
