"""UGround: an LMM writes `[SEG]`, a policy picks the layer to leave through, and the similarity map there prompts SAM.

The parts lie in their own files; this one says how they follow one another.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from .attention_parts import is_flash
from .call_arguments import refuse_unknown, with_answer_length
from .checkpoint_files import refuses_bad_config
from .configuration_uground import MASK_HEADS, UGroundConfig, check_layer_selection
from .generation_uground import SegmentGenerationMixin
from .image_rows import check_images, check_labels, check_queries, resolve_image_index
from .layer_policy import LayerChoice, LayerPolicy, draw_layers, log_probs_of, select_layers
from .layer_states import ImageStates, states_at
from .library_compat import CACHE_NAME
from .lmm_access import on_grid
from .mask_head import HEAD_FIELDS, ImageMaps, mask_overlap
from .output_uground import UGroundImageEmbeddings, UGroundOutput, UGroundSegmentation, asked_outputs, further_outputs
from .pretrained_uground import UGroundPreTrainedModel
from .prompts import PROMPTS, PromptSource, SegmentProjection
from .query_rows import Rows, prepare_rows
from .segment_tokens import LayerRequest, Segments, find_segments
from .session_uground import ImageSessionMixin
from .similarity import PADDING_VALUE, SimilarityScaling, image_similarity

# Keeps the logit of an average probability finite where every draw is certain.
PROBABILITY_MARGIN = 1e-6
# Label value that the cross-entropy of PyTorch ignores.
IGNORED_LABEL = -100
# Keywords of the forward for the text loss; a `Trainer` that finds `**kwargs` passes them.
LOSS_ARGUMENTS = ("num_items_in_batch",)
# What the processor and a collator return of the queries, which encoding images does not read.
QUERY_INPUTS = ("input_ids", "attention_mask", "image_index", "labels", "position_ids")


class UGroundForReferringSegmentation(SegmentGenerationMixin, ImageSessionMixin, UGroundPreTrainedModel):
    """
    An image and a sentence in, words and masks out.

    Parts: `lmm` (the vision-language trunk), `layer_policy` (which layer a segment leaves through),
    `segment_projection` and `similarity_scaling` (prompts), `mask_decoder` (the mask head). A part that the config
    does not ask for is `None`.
    """

    @refuses_bad_config
    def __init__(self, config: UGroundConfig):
        super().__init__(config)
        # Settings may have been changed since the config was made.
        config.check_token_ids()
        hidden_size = config.get_text_config().hidden_size
        self.adapter = config.adapter
        # First in line: `device_map="auto"` takes off the accelerator what is last, and the LMM's layers can bear it.
        self.mask_decoder = MASK_HEADS[config.mask_head](config.sam_config) if config.mask_head else None
        self.lmm = AutoModelForImageTextToText.from_config(config.lmm_config)
        self.layer_policy = LayerPolicy(config.num_layers, hidden_size) if config.layer_policy else None
        self.segment_projection = None
        if "embedding" in config.prompts:
            prompt_size = config.sam_config.prompt_encoder_config.hidden_size
            self.segment_projection = SegmentProjection(hidden_size, prompt_size)
        self.similarity_scaling = SimilarityScaling(config.similarity_scaling, config.num_layers, hidden_size)
        self.post_init()
        with_answer_length(self.generation_config)

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the LMM knows, also after [`resize_token_embeddings`]."""
        return self.config.get_text_config().vocab_size

    def get_input_embeddings(self) -> nn.Module:
        return self.lmm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lmm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lmm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lmm.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        """The language model of the LMM."""
        return self.lmm.get_decoder()

    def set_decoder(self, decoder: nn.Module) -> None:
        self.lmm.set_decoder(decoder)

    def enable_input_require_grads(self) -> None:
        """Of words only: encoders of images that are frozen would build a graph for nothing."""
        decoder = self.lmm.get_decoder()
        # Once, however often it is asked for: only the hooks of the last time are known to be taken back.
        decoder.disable_input_require_grads()
        decoder.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        """Take back [`enable_input_require_grads`]."""
        self.lmm.get_decoder().disable_input_require_grads()

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Resize the LMM's vocabulary; see `PreTrainedModel.resize_token_embeddings`."""
        return self.lmm.resize_token_embeddings(*args, **kwargs)

    def compile_mask_path(self, **options: Any) -> "UGroundForReferringSegmentation":
        """
        Compile SAM's image encoder and mask decoder in place with `torch.compile`; the first calls then take longer.

        Args:
            options: of `torch.compile`. By default sizes that change, such as the number of segments, do not lead to
                compiling anew.
        """
        sam = self.mask_decoder.sam
        for part in (sam.vision_encoder, sam.mask_decoder):
            part.compile(**{"dynamic": True, **options})
        return self

    def get_image_embeddings(
        self,
        pixel_values: torch.Tensor,
        valid_sizes: torch.Tensor,
        sam_pixel_values: torch.Tensor,
        sam_valid_sizes: torch.Tensor,
        original_sizes: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        sam_embeddings: ImageMaps | None = None,
        **others: Any,
    ) -> UGroundImageEmbeddings:
        """
        Encode images once; hand the result to `forward` or `segment` as `image_embeddings=` for any number of queries.

        Args:
            pixel_values (`(I, 3, h, w)`), valid_sizes (`(I, 2)`), sam_pixel_values (`(I, 3, S, S)`),
            sam_valid_sizes (`(I, 2)`), original_sizes (`(I, 2)`): as the processor returns them.
            input_ids, image_index (*optional*): if given, it is checked that they belong to these images. What else
            the processor returned may be passed along and is not read.
            sam_embeddings (*optional*): of these images, made before, as the mask head makes them.
            others: what else the LMM's encoder needs, see `LmmAdapter.image_keys`.

        Raises:
            ValueError: the sizes do not fit together, or no query asks about one of the images.
            UnknownKeywordError: a keyword is none of these, a `TypeError` and `ValueError`.
        """
        image_inputs = self.take_image_inputs(others)
        refuse_unknown(self.get_image_embeddings, others, (*QUERY_INPUTS, *self.adapter.image_keys))
        missing = [key for key in self.adapter.image_keys if image_inputs.get(key) is None]
        if missing:
            raise ValueError(f"a {self.adapter.config.model_type} needs {', '.join(missing)} beside pixel_values")
        sizes = (valid_sizes, sam_valid_sizes, original_sizes, *image_inputs.values())
        check_images(pixel_values if self.adapter.pixels_per_image else None, sam_pixel_values, *sizes)
        if input_ids is not None:
            check_queries(input_ids, image_index, len(original_sizes))
        if self.mask_decoder is not None and sam_embeddings is None:
            sam_embeddings = self.mask_decoder.encode(sam_pixel_values)
        layout = self.adapter.layout(valid_sizes, image_inputs)
        features, further = self.adapter.encode(self.lmm, pixel_values, layout, image_inputs)
        return UGroundImageEmbeddings(
            lmm_features=features,
            further_features=further,
            token_counts=layout.counts,
            token_cells=layout.cells,
            grid_sizes=layout.grid_sizes,
            sam_embeddings=sam_embeddings,
            token_valid=layout.valid,
            valid_sizes=valid_sizes,
            sam_valid_sizes=sam_valid_sizes,
            original_sizes=original_sizes,
        )

    def take_image_inputs(self, others: dict) -> dict[str, torch.Tensor]:
        """Out of further arguments of a call: what the LMM's encoder needs beside pixels."""
        return {key: others.pop(key) for key in self.adapter.image_keys if others.get(key) is not None}

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        valid_sizes: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        sam_valid_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        layer_index: torch.Tensor | None = None,
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
        layer_uniforms: torch.Tensor | np.ndarray | None = None,
        image_embeddings: UGroundImageEmbeddings | None = None,
        sam_embeddings: ImageMaps | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> UGroundOutput | tuple:
        """
        Teacher-forced pass: a mask for every segment token in `input_ids`.

        Args:
            input_ids, attention_mask (`(B, T)`), image_index (`(B,)`), pixel_values, valid_sizes, sam_pixel_values,
            sam_valid_sizes, original_sizes: as the processor returns them.
            labels (`(B, T)`, *optional*): token ids to score, -100 where none; gives `loss`.
            layer_index (`(N,)`, *optional*): forces the layer of each segment.
            layer_selection (`str` or `int`, *optional*): replaces `config.layer_selection` for this call.
            num_layer_samples (`int`, *optional*): replaces `config.num_layer_samples` for this call.
            layer_uniforms (`(k, M)`, tensor or array in [0, 1), *optional*): draws k layers for each of the first M
            segments with these numbers, and decodes the first draw; gives `layer_draws`, `draw_log_probs` and
            `other_maps`.
            image_embeddings (*optional*): of [`get_image_embeddings`], instead of the image inputs.
            sam_embeddings (*optional*): of an earlier pass over these images, which then are not encoded by SAM.
            position_ids (`(B, T)`, *optional*): by default each token counts the tokens before it. Rows that pack
            several queries behind one image need them, and an `attention_mask` `(B, T, T)` that says which keys each
            token may see.
            inputs_embeds (*optional*): only `None`, which wrappers such as PEFT pass along.
            use_cache, output_hidden_states, output_attentions (`bool`, *optional*): whether to return keys and values,
            layer states (or those of a list of layers) and attentions, which need `attn_implementation="eager"`.
            return_dict (`bool`, *optional*): `False` gives a tuple of what is there.
            kwargs: `num_items_in_batch`, which divides the text loss instead of the number of labels; what
            [`take_image_inputs`] takes.

        Raises:
            ValueError: an argument does not fit; see the sentence.
            UnknownKeywordError: a keyword is not known, a `TypeError` and `ValueError`.
        """
        more = self.take_image_inputs(kwargs)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes, more)
        refuse_unknown(self.forward, kwargs, (*LOSS_ARGUMENTS, *self.adapter.image_keys))
        if inputs_embeds is not None:
            raise ValueError("forward looks for segment tokens in input_ids and takes no inputs_embeds, got some")
        check_labels(labels, input_ids)
        asked = asked_outputs(self.config, use_cache, output_hidden_states, output_attentions)
        rows = self.prepare_rows(
            input_ids, attention_mask, image_index, image_embeddings, frames, position_ids, sam_embeddings
        )
        outputs = self.lmm(
            **rows.lmm_inputs(),
            use_cache=bool(asked["cache"]),
            output_hidden_states=True,
            output_attentions=asked["attentions"],
            return_dict=True,
        )
        segments = self.segments_of(rows, outputs.hidden_states)
        request = LayerRequest(layer_index, layer_selection, num_layer_samples, layer_uniforms)
        found = self.decode_segments(segments, request)
        found |= further_outputs(outputs, CACHE_NAME, asked)
        loss = None if labels is None else self._text_loss(outputs.logits, labels, **kwargs)
        sam_embeddings = rows.images.sam_embeddings
        output = UGroundOutput(loss=loss, logits=outputs.logits, sam_embeddings=sam_embeddings, **found)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def segments_of(self, rows: Rows, hidden_states: tuple[torch.Tensor, ...]) -> Segments:
        """The segments that stand in rows, with L+1 states `(B, T, D)` of a pass over these."""
        row, columns = find_segments(rows.input_ids, self._segment_token_id(), self.config.num_segment_tokens)
        states = states_at(hidden_states, row, columns)
        # Views, no copies: a graph keeps these states anyway.
        image_states = ImageStates(hidden_states, rows.image_columns)
        device = states.device
        image = rows.image_index.to(device)[row.to(device)]
        row = row.to(device)
        return Segments(row, states, image, row, image_states, rows.images, columns.to(device))

    def _text_loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Cross-entropy over the words: the image placeholder has an id, but it is never written and takes no part.

        Without this a converted checkpoint would share its probability with a row that the official code lacks.
        """
        image_token = self.config.image_token_id
        words = logits.index_fill(-1, torch.tensor([image_token], device=logits.device), -torch.inf)
        labels = labels.masked_fill(labels == image_token, IGNORED_LABEL)
        return self.lmm.loss_function(logits=words, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def decode_segments(self, segments: Segments, request: LayerRequest) -> dict[str, torch.Tensor | None]:
        """
        From layer states to masks: policy, similarity map, prompts, mask head.

        Args:
            segments: N segments with their states.
            request: how their layers are chosen.

        Returns:
            Fields of [`UGroundOutput`].
        """
        # Parts may lie on several devices; everything comes back to that of the states.
        device = segments.states.device
        logits = None if self.layer_policy is None else self.layer_policy(segments.states).to(device)
        drawn = {} if request.uniforms is None else self._draw(segments, logits, request.uniforms)
        if drawn:
            request = LayerRequest(index=drawn["layer_draws"][0])
        choice = self._choose_layers(len(segments), logits, request, device)
        segment, layer = choice.places
        picked = segments.image_states.picked(segments.token_row[segment.to(segments.token_row.device)], layer)
        segments = replace(segments, image_states=picked)
        decode = self._decode_chosen if choice.draws is None else self._decode_drawn
        return {
            "segment_row": segments.row,
            "layer_logits": logits,
            "layer_index": choice.index,
            "log_probs": choice.log_probs,
            **drawn,
            **decode(segments, choice),
        }

    def _draw(self, segments: Segments, logits, uniforms: torch.Tensor) -> dict[str, torch.Tensor]:
        """Layers drawn with given numbers, their log-probabilities, and the maps at all draws but the first."""
        if logits is None:
            raise ValueError("layer_uniforms draw from a layer policy, which this model has not")
        uniforms = torch.as_tensor(uniforms)
        missing = len(segments) - uniforms.shape[1]
        # A segment that stands for none of the batch is drawn too, and judged by nobody.
        uniforms = torch.nn.functional.pad(uniforms, (0, missing)) if missing > 0 else uniforms
        draws = draw_layers(logits, uniforms.to(logits.device))
        with torch.no_grad():
            maps = [self._similarity(segments, layers)[1] for layers in draws[1:]]
        empty = (0, len(segments), *segments.images.token_valid.shape[1:])
        return {
            "layer_draws": draws,
            "draw_log_probs": torch.stack([log_probs_of(logits, layers) for layers in draws]),
            "other_maps": torch.stack(maps) if maps else logits.new_zeros(empty),
        }

    def _similarity(self, segments: Segments, layer_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Raw and scaled similarity `(N, h, w)` at one layer per segment."""
        chosen = segments.states[torch.arange(len(segments), device=layer_index.device), :, layer_index].mean(1)
        similarity = image_similarity(chosen, segments.image_states, segments.token_row, layer_index)
        similarity = on_grid(similarity, segments.cells, tuple(segments.images.token_valid.shape[1:]))
        return similarity, self.similarity_scaling(similarity, layer_index, segments.in_grid).to(similarity.device)

    def _decode_chosen(self, segments: Segments, choice: LayerChoice) -> dict[str, torch.Tensor]:
        """One layer per segment: similarity, similarity map, prompts, mask logits and IoU estimates."""
        similarity, similarity_map = self._similarity(segments, choice.index)
        found = {"similarity": similarity, "similarity_map": similarity_map}
        if self.mask_decoder is None:
            return found
        number = torch.arange(len(segments), device=choice.index.device)
        layer = choice.index if self.config.embedding_layer == "selected" else torch.full_like(choice.index, -1)
        source = PromptSource(
            states=segments.states[number, :, layer].mean(1),
            similarity=similarity,
            similarity_map=similarity_map,
            image=segments.image,
            image_sizes=list(map(tuple, segments.images.original_sizes.tolist())),
            lmm_frame=self.adapter.frames_of(segments.images.grid_sizes),
            head_frame=self.mask_decoder.frame,
            prompt_side=self.mask_decoder.side,
            padding_value=PADDING_VALUE[self.config.similarity_scaling],
            projection=self.segment_projection,
            points=self.config.point_settings,
        )
        prompts = {argument: make(source) for argument, make in map(PROMPTS.get, self.config.prompts)}
        if "point_prompts" in prompts:
            found["points"], found["point_labels"] = prompts["point_prompts"]
        decoded = self.mask_decoder(segments.images.sam_embeddings, segments.image, **prompts)
        device = segments.states.device
        # A head without estimates of presence gives one field less.
        return {**found, **{name: values.to(device) for name, values in zip(HEAD_FIELDS, decoded, strict=False)}}

    def _decode_drawn(self, segments: Segments, choice: LayerChoice) -> dict[str, torch.Tensor]:
        """Average over the layers drawn of each segment; a layer drawn twice is decoded once and weighs double."""
        segment, layer = choice.places
        weight = choice.draws[segment, layer]
        decoded = self._decode_chosen(segments.select(segment), LayerChoice(layer, None))

        def average(values: torch.Tensor) -> torch.Tensor:
            weighted = values * weight.view(-1, *[1] * (values.dim() - 1))
            return values.new_zeros(len(segments), *values.shape[1:]).index_add(0, segment, weighted)

        # Points of several layers are no points of one.
        found = {name: average(decoded[name]) for name in ("similarity", "similarity_map")}
        if "mask_logits" not in decoded:
            return found
        probabilities = decoded.pop("mask_logits").sigmoid()
        mean = average(probabilities)
        # One at a time: each of these is as large as all mask logits.
        uncertainty = average((probabilities - mean[segment]) ** 2)
        overlap = mask_overlap(probabilities > 0.5, (mean > 0.5)[segment])
        if "presence_logits" in decoded:
            found["presence_logits"] = _logit(average(decoded["presence_logits"].sigmoid()))
        return {
            **found,
            "iou_scores": average(decoded["iou_scores"]),
            "mask_logits": _logit(mean),
            "uncertainty": uncertainty,
            "agreement": average(overlap),
        }

    def _choose_layers(self, count: int, layer_logits, request: LayerRequest, device) -> LayerChoice:
        """A layer for each of N segments, by number or by a rule."""
        num_layers, layer_index = self.config.num_layers, request.index
        if layer_index is not None:
            is_tensor = isinstance(layer_index, torch.Tensor) and layer_index.dtype == torch.long
            if not is_tensor or layer_index.shape != (count,):
                got = f"shape {tuple(layer_index.shape)}" if is_tensor else repr(layer_index)
                raise ValueError(f"layer_index must be int64, one layer for each of the {count} segments, got {got}")
            if len(layer_index) and not 0 <= layer_index.min() <= layer_index.max() < num_layers:
                raise ValueError(f"layer_index must lie in 0..{num_layers - 1}, got {layer_index.tolist()}")
            layer_index = layer_index.to(device)
            return LayerChoice(layer_index, None if layer_logits is None else log_probs_of(layer_logits, layer_index))
        selection, samples = self._resolve_selection(request.selection, request.num_samples)
        if layer_logits is None:
            layer = num_layers - 1 if selection == "last" else selection
            return LayerChoice(torch.full((count,), layer, dtype=torch.long, device=device), None)
        return select_layers(layer_logits, selection, samples)

    def _resolve_selection(self, layer_selection, num_layer_samples) -> tuple[str | int, int]:
        """How layers are chosen, and how many are drawn under `"mc"`: what the call says, or else the config."""
        selection = self.config.layer_selection if layer_selection is None else layer_selection
        check_layer_selection(selection, self.config.num_layers, self.config.layer_policy)
        samples = self.config.num_layer_samples if num_layer_samples is None else num_layer_samples
        if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
            raise ValueError(f"num_layer_samples must be at least 1, got {samples!r}")
        return selection, samples

    def _segment_token_id(self) -> int:
        if self.config.segment_token_id is None:
            raise ValueError("config.segment_token_id is not set: this model does not know its [SEG] token")
        return self.config.segment_token_id

    def known_layers(self, layer_selection: str | int | None = None) -> list[int] | None:
        """Layers whose image states a rule will read; `None` where only the segments will tell."""
        selection, _ = self._resolve_selection(layer_selection, None)
        if selection == "last":
            return [self.config.num_layers - 1]
        return None if isinstance(selection, str) else [selection]

    def prepare_rows(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        image_index: torch.Tensor | None,
        image_embeddings: UGroundImageEmbeddings | None,
        frames: tuple[Any, ...] = (),
        position_ids: torch.Tensor | None = None,
        sam_embeddings: ImageMaps | None = None,
    ) -> Rows:
        """
        Rows as the LMM takes them, and the images that they ask about, encoded unless they were before.

        Args:
            input_ids, attention_mask, image_index, image_embeddings, position_ids, sam_embeddings: as in [`forward`].
            frames: pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes and what
                [`take_image_inputs`] gives, needed without `image_embeddings`.

        Raises:
            ValueError: something is missing, or does not fit together.
        """
        if image_embeddings is None:
            if not frames or any(value is None for value in frames):
                raise ValueError(
                    "pass image_embeddings, or all of pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes "
                    "and original_sizes"
                )
            *tensors, more = frames
            image_embeddings = self.get_image_embeddings(
                *tensors,
                input_ids=input_ids,
                image_index=image_index,
                sam_embeddings=sam_embeddings,
                **more,
            )
        image_index = resolve_image_index(image_index, len(input_ids), len(image_embeddings.lmm_features))
        attention = self.lmm.config.get_text_config()._attn_implementation
        if attention_mask is not None and attention_mask.dim() == 3 and is_flash(attention):
            raise ValueError(f"rows that pack several queries need attention that takes masks, got {attention!r}")
        return prepare_rows(
            self.adapter,
            image_embeddings,
            self.config.image_token_id,
            input_ids,
            attention_mask,
            image_index,
            position_ids,
        )


def _logit(probabilities: torch.Tensor) -> torch.Tensor:
    return probabilities.clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN).logit()


UGroundForReferringSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "UGroundForReferringSegmentation",
    "UGroundImageEmbeddings",
    "UGroundOutput",
    "UGroundPreTrainedModel",
    "UGroundSegmentation",
]
