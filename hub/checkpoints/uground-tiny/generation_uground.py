"""Writing the answer and reading the segment states while it is written: one pass, no second forward."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from .call_arguments import check_supported, merge_settings, refuse_unknown, rows_finished
from .layer_states import WrittenStates
from .mask_head import HEAD_FIELDS, maps_of
from .output_uground import UGroundImageEmbeddings, UGroundSegmentation, join_segmentations
from .query_rows import Rows
from .segment_tokens import LayerRequest, Segments
from .shared_prefix import SharedPrefix, continue_prefixes, find_prefix
from .states_again import MAX_KEPT_PREFIXES, KeptLayers, StatesAgain

# Rows written and decoded at a time where a call does not say: at 7B, keys and values of 64 rows take about 20 GB.
MAX_ROWS = 64


@dataclass
class WrittenAnswers:
    """
    What [`SegmentGenerationMixin.write_answers`] keeps of B rows with N segments.

    Attributes:
        sequences, prompt_length, token_scores, image_index: as in [`UGroundSegmentation`].
        segments: with their states, and those of the image tokens.
        finished (*optional*): as in [`UGroundSegmentation`]; `None` for answers that were not written here.
    """

    sequences: torch.Tensor
    prompt_length: int
    token_scores: torch.Tensor
    image_index: torch.Tensor
    segments: Segments
    finished: torch.Tensor | None = None

    @property
    def state_bytes(self) -> int:
        """Bytes of all layer states that are kept."""
        return self.segments.states.nbytes + self.segments.image_states.nbytes


class SegmentGenerationMixin(GenerationMixin):
    """`segment` and `generate` of [`UGroundForReferringSegmentation`]."""

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict:
        """Generation runs in the LMM, which prepares its own inputs."""
        return self.lmm.prepare_inputs_for_generation(*args, **kwargs)

    @torch.no_grad()
    def generate(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        valid_sizes: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        sam_valid_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        image_embeddings: UGroundImageEmbeddings | None = None,
        inputs: torch.Tensor | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """
        Write the answers only, as the LMM's own `generate` does; see [`segment`] for masks.

        Args:
            input_ids, …, image_embeddings: as in [`segment`].
            inputs (*optional*): what transformers' `generate` calls `input_ids`.
            generate_kwargs: whatever else `generate` takes.

        Returns:
            `(B, T)` sequences, or a `GenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            ValueError: padding on the right, prompts given twice or not at all, or weights that give NaN.
            UnknownKeywordError: a keyword is not known, a `TypeError` and `ValueError`.
        """
        if (input_ids is None) == (inputs is None):
            raise ValueError(f"generate takes either input_ids or inputs, got {'none' if inputs is None else 'both'}")
        input_ids = inputs if input_ids is None else input_ids
        more = self.take_image_inputs(generate_kwargs)
        refuse_unknown(self.generate, generate_kwargs, generates=True)
        _check_left_padding(attention_mask)
        settings, others = self._generation_settings(generate_kwargs)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes, more)
        rows = self.prepare_rows(input_ids, attention_mask, image_index, image_embeddings, frames)
        return self.lmm.generate(**rows.lmm_inputs(), generation_config=settings, **others)

    @torch.no_grad()
    def segment(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_index: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        valid_sizes: torch.Tensor | None = None,
        sam_pixel_values: torch.Tensor | None = None,
        sam_valid_sizes: torch.Tensor | None = None,
        original_sizes: torch.Tensor | None = None,
        image_embeddings: UGroundImageEmbeddings | None = None,
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
        max_rows: int | None = None,
        max_kept_prefixes: int | None = None,
        prefix: SharedPrefix | None = None,
        **generate_kwargs: Any,
    ) -> UGroundSegmentation:
        """
        Write an answer to every query and decode a mask for each segment token written.

        Each image is encoded once, and what its rows have in common up to the last image token is read by the LMM
        once.

        Args:
            input_ids, attention_mask (`(B, T)`): prompts, padded on the left.
            image_index, pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes: as the
            processor returns them; or `image_embeddings` of `get_image_embeddings` instead of the image inputs.
            layer_selection, num_layer_samples: replace those of the config for this call.
            max_rows (`int`, *optional*): so many rows are written and decoded at a time, 64 by default. Fewer take
            less memory.
            max_kept_prefixes (`int`, *optional*): where a policy picks the layers, the states of image tokens are kept
            at all of them if the rows written at a time begin in at most so many ways, 16 by default. Of more, what
            was picked is read again, which takes up to one more reading of the prompts and far less memory.
            prefix (*optional*): of [`read_prefix`], for rows that begin with what was read there.
            generate_kwargs: `generation_config`, `max_new_tokens`, `do_sample` and whatever else `generate` takes, but
            for beams, several sequences per query, assisted generation and a switched-off cache. Where neither these
            nor the model's `generation_config` say how long an answer may become, it is `MAX_NEW_TOKENS`.

        Raises:
            ValueError: padding on the right, an unsupported argument, or weights that give NaN.
            UnknownKeywordError: a keyword is not known, a `TypeError` and `ValueError`.
        """
        more = self.take_image_inputs(generate_kwargs)
        refuse_unknown(self.segment, generate_kwargs, generates=True)
        self._resolve_selection(layer_selection, num_layer_samples)
        _check_left_padding(attention_mask)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes, more)
        rows = self.prepare_rows(input_ids, attention_mask, image_index, image_embeddings, frames)
        max_rows = MAX_ROWS if max_rows is None else max_rows
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        max_kept_prefixes = MAX_KEPT_PREFIXES if max_kept_prefixes is None else max_kept_prefixes
        if max_kept_prefixes < 0:
            raise ValueError(f"max_kept_prefixes must be at least 0, got {max_kept_prefixes}")
        kept = KeptLayers(self.known_layers(layer_selection), max_kept_prefixes)
        request = LayerRequest(selection=layer_selection, num_samples=num_layer_samples)
        parts, is_split = [], len(rows) > max_rows
        for numbers in torch.arange(len(rows)).split(max_rows):
            some = rows.select(numbers) if is_split else rows
            if is_split:
                # Even for one row here: the next ones may begin alike.
                prefix = find_prefix(self.lmm, some, self.config.num_layers, prefix, kept)
            parts.append(self._read_masks(self._write_answers(some, prefix, kept, generate_kwargs), request))
        return join_segmentations(parts, self._padding_token_id()) if is_split else parts[0]

    @torch.no_grad()
    def read_prefix(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor,
        image_embeddings: UGroundImageEmbeddings,
        known: SharedPrefix | None = None,
    ) -> SharedPrefix | None:
        """
        Let the LMM read what rows begin with, up to the last image token, for [`segment`] to go on from.

        Args:
            input_ids, attention_mask, image_index, image_embeddings: as in [`segment`]; what stands behind the image
                tokens does not count.
            known (*optional*): read before; returned, for these rows, if it holds all they begin with.

        Returns:
            `None` if it cannot be shared, see [`Rows.prefix_keys`].
        """
        rows = self.prepare_rows(input_ids, attention_mask, image_index, image_embeddings)
        return find_prefix(self.lmm, rows, self.config.num_layers, known)

    @torch.no_grad()
    def write_answers(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        image_index: torch.Tensor,
        image_embeddings: UGroundImageEmbeddings,
        prefix: SharedPrefix | None = None,
        layers: list[int] | None = None,
        max_kept_prefixes: int | None = None,
        **generate_kwargs: Any,
    ) -> WrittenAnswers:
        """
        The first half of [`segment`]: write, and keep the layer states that masks are read from.

        Masks may be read from the result several times, with different layers, by [`read_masks`]. It holds the states
        of all image tokens at `layers` (all by default), so drop it when done; or, for all layers of more than
        `max_kept_prefixes` prefixes, what it takes to read them again each time. Other arguments and errors are those
        of [`segment`].
        """
        refuse_unknown(self.write_answers, generate_kwargs, generates=True)
        _check_left_padding(attention_mask)
        rows = self.prepare_rows(input_ids, attention_mask, image_index, image_embeddings)
        return self._write_answers(rows, prefix, KeptLayers(layers, max_kept_prefixes), generate_kwargs)

    def _write_answers(self, rows: Rows, prefix, keep: KeptLayers, generate_kwargs: dict) -> WrittenAnswers:
        """Write, following the states that predict segment tokens; of image tokens what `keep` says is held."""
        settings, others = self._generation_settings(generate_kwargs)
        check_supported(settings, others)
        settings.update(return_dict_in_generate=True, output_hidden_states=False, output_logits=False)
        images, adapter, lmm = rows.images, rows.adapter, self.lmm
        self._check_finite(
            images.lmm_features, *([] if self.mask_decoder is None else maps_of(images.sam_embeddings).values())
        )
        prefix = self._shared_prefix(rows, prefix, keep)
        kept = keep.of(len(rows))
        columns = rows.image_columns if prefix is None else None
        states = WrittenStates(
            lmm,
            adapter.decoder_layers(lmm),
            adapter.final_norm(lmm),
            columns,
            kept,
            self._segment_token_id(),
            self.config.image_token_id,
        )
        others["stopping_criteria"] = StoppingCriteriaList([states, *(others.get("stopping_criteria") or [])])
        lmm_inputs = rows.lmm_inputs() if prefix is None else continue_prefixes(prefix, rows)
        prompt_length, laid_out = rows.input_ids.shape[1], lmm_inputs["input_ids"].shape[1]
        if settings.max_length is not None:
            # Prefixes of several lengths are laid out in more columns than their rows.
            settings.max_length += laid_out - prompt_length
        with states:
            generated = lmm.generate(**lmm_inputs, generation_config=settings, **others)
        row, segment_states, scores = states.segments(self.config.num_segment_tokens)
        if prefix is not None:
            image_states = prefix.image_states
        elif kept == []:
            image_states = StatesAgain(lmm, rows, self.config.num_layers)
        else:
            image_states = states.image_states(self.config.num_layers)
        image_index = rows.image_index.to(row.device)
        token_row = row if image_states.row_of is None else image_states.row_of.to(row.device)[row]
        return WrittenAnswers(
            # As they were given: with a shared prefix, padding stood elsewhere.
            sequences=torch.cat([rows.input_ids, generated.sequences[:, laid_out:]], 1),
            prompt_length=prompt_length,
            finished=self._finished(generated.sequences, laid_out, settings, generate_kwargs),
            token_scores=scores,
            image_index=rows.image_index,
            segments=Segments(row, segment_states, image_index[row], token_row, image_states, images),
        )

    def _shared_prefix(self, rows: Rows, known: SharedPrefix | None, kept: KeptLayers) -> SharedPrefix | None:
        """The prefixes of all rows, read now unless they are `known`; `None` where nothing is gained by sharing."""
        keys = rows.prefix_keys
        if keys is None:
            return None
        if known is not None and (prefix := known.of_rows(rows)) is not None:
            return prefix
        return find_prefix(self.lmm, rows, self.config.num_layers, None, kept) if len(set(keys)) < len(keys) else None

    @torch.no_grad()
    def read_masks(
        self,
        answers: WrittenAnswers,
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
    ) -> UGroundSegmentation:
        """The second half of [`segment`]: decode a mask for each segment token of written answers."""
        return self._read_masks(answers, LayerRequest(selection=layer_selection, num_samples=num_layer_samples))

    def _read_masks(self, answers: WrittenAnswers, request: LayerRequest) -> UGroundSegmentation:
        segments = answers.segments
        # Before a layer is drawn: drawing from NaN fails with a sentence about something else.
        self._check_finite(segments.states if self.layer_policy is None else self.layer_policy(segments.states))
        found = self.decode_segments(segments, request)
        if self.mask_decoder is not None:
            self._check_finite(*(found[name] for name in HEAD_FIELDS if name in found))
        images = segments.images
        return UGroundSegmentation(
            sequences=answers.sequences,
            prompt_length=answers.prompt_length,
            finished=answers.finished,
            image_index=answers.image_index,
            token_scores=answers.token_scores,
            valid_sizes=images.valid_sizes,
            sam_valid_sizes=images.sam_valid_sizes,
            original_sizes=images.original_sizes,
            **found,
        )

    def _generation_settings(self, generate_kwargs: dict) -> tuple[GenerationConfig, dict]:
        """One config of all settings of a call, and the arguments that are none (streamers, logits processors …)."""
        settings, others = merge_settings(self.generation_config, generate_kwargs)
        # The placeholder of images has an id that no answer holds; its row of the vocabulary is never trained.
        settings.suppress_tokens = [*(settings.suppress_tokens or []), self.config.image_token_id]
        processors = others.get("logits_processor") or []
        others["logits_processor"] = LogitsProcessorList([_FiniteLogits(self._check_finite), *processors])
        return settings, others

    def _finished(self, sequences, prompt_length: int, settings: GenerationConfig, others: dict) -> torch.Tensor:
        """Which answers came to their end: `(B,)` bool."""
        end_tokens = settings.eos_token_id
        if end_tokens is None:
            end_tokens = self.lmm.generation_config.eos_token_id
        return rows_finished(sequences, prompt_length, settings, others, end_tokens)

    def _padding_token_id(self) -> int:
        """What stands behind the end of an answer that is shorter than others."""
        settings = self.generation_config
        given = settings.eos_token_id if settings.pad_token_id is None else settings.pad_token_id
        return given[0] if isinstance(given, (list, tuple)) else given or 0

    def _check_finite(self, *values: torch.Tensor) -> None:
        """NaN weights would otherwise read as "nothing found": arg-max over NaN is a valid token."""
        if all(torch.isfinite(value).all() for value in values):
            return
        weights = ((name, value) for name, value in self.named_parameters() if not value.is_meta)
        broken = [name for name, value in weights if not torch.isfinite(value).all()]
        if broken:
            raise ValueError(f"the model's weights hold NaN or infinity in {', '.join(broken[:5])}")
        raise ValueError(f"the model computed NaN or infinity in {self.dtype}; try dtype=torch.float32 or bfloat16")


class _FiniteLogits(LogitsProcessor):
    """Looks at the logits of every step before a token is picked: sampling from NaN ends a CUDA process."""

    def __init__(self, check):
        self.check = check

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The largest of each row: tokens ruled out have minus infinity, and NaN wins over any number.
        self.check(scores.amax(-1))
        return scores


def _check_left_padding(attention_mask: torch.Tensor | None) -> None:
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ValueError("prompts must be padded on the left; got rows whose last token is padding")
