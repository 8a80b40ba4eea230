"""Writing the answer and reading the segment states while it is written: one pass, no second forward."""

from dataclasses import dataclass

import torch
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList

from .call_arguments import check_supported, merge_settings, refuse_unknown, rows_finished
from .lmm_access import gather_layer_states
from .output_uground import UGroundImageEmbeddings, UGroundSegmentation, join_segmentations
from .shared_prefix import SharedPrefix, continue_prefixes, features_of_rows, prefix_keys, read_prefixes

# Rows written and decoded at a time where a call does not say: at 7B, keys and values of 64 rows take about 20 GB.
MAX_ROWS = 64


@dataclass
class WrittenAnswers:
    """
    What [`SegmentGenerationMixin.write_answers`] keeps of B rows with N segment tokens.

    Attributes:
        sequences, prompt_length, token_scores, image_index: as in [`UGroundSegmentation`].
        rows (`(N,)`): row of each segment token.
        segment_states (`(N, L+1, D)`): layer states that predicted the segment tokens.
        prompt_states: L+1 tensors `(G, …, D)` that hold the image tokens of every row.
        image_positions (`(G, n)`): columns of the image tokens in them.
        images: the encoded images.
        state_rows (`(B,)`, *optional*): where rows share a prefix, the row of `prompt_states` that holds the image
            tokens of each; otherwise G = B, and each row holds its own.
        finished (*optional*): as in [`UGroundSegmentation`]; `None` for answers that were not written here.
    """

    sequences: torch.Tensor
    prompt_length: int
    rows: torch.Tensor
    token_scores: torch.Tensor
    segment_states: torch.Tensor
    prompt_states: tuple[torch.Tensor, ...]
    image_positions: torch.Tensor
    images: UGroundImageEmbeddings
    image_index: torch.Tensor
    state_rows: torch.Tensor | None = None
    finished: torch.Tensor | None = None


class SegmentGenerationMixin(GenerationMixin):
    """`segment` and `generate` of [`UGroundForReferringSegmentation`]."""

    def prepare_inputs_for_generation(self, *args, **kwargs):
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
        image_embeddings=None,
        inputs: torch.Tensor | None = None,
        **generate_kwargs,
    ):
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
        refuse_unknown(self.generate, generate_kwargs, generates=True)
        _check_left_padding(attention_mask)
        settings, others = self._generation_settings(generate_kwargs)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes)
        images, image_index = self._resolve_images((input_ids, image_index), image_embeddings, frames)
        lmm_inputs, _ = self._prepare_lmm(input_ids, attention_mask, images, image_index)
        return self.lmm.generate(**lmm_inputs, generation_config=settings, **others)

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
        image_embeddings=None,
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
        max_rows: int | None = None,
        prefix: SharedPrefix | None = None,
        **generate_kwargs,
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
            prefix (*optional*): of [`read_prefix`], for rows that begin with what was read there.
            generate_kwargs: `generation_config`, `max_new_tokens`, `do_sample` and whatever else `generate` takes, but
            for beams, several sequences per query, assisted generation and a switched-off cache. Where neither these
            nor the model's `generation_config` say how long an answer may become, it is `MAX_NEW_TOKENS`.

        Raises:
            ValueError: padding on the right, an unsupported argument, or weights that give NaN.
            UnknownKeywordError: a keyword is not known, a `TypeError` and `ValueError`.
        """
        refuse_unknown(self.segment, generate_kwargs, generates=True)
        self._resolve_selection(layer_selection, num_layer_samples)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes)
        images, image_index = self._resolve_images((input_ids, image_index), image_embeddings, frames)
        max_rows = MAX_ROWS if max_rows is None else max_rows
        if max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, got {max_rows}")
        parts, is_split = [], len(input_ids) > max_rows
        for rows in torch.arange(len(input_ids)).split(max_rows):
            text = (input_ids[rows], None if attention_mask is None else attention_mask[rows], image_index[rows])
            if is_split:
                prefix = self.read_prefix(*text, images, known=prefix)
            answers = self.write_answers(*text, images, prefix=prefix, **generate_kwargs)
            parts.append(self.read_masks(answers, layer_selection, num_layer_samples))
        return join_segmentations(parts, self._padding_token_id()) if is_split else parts[0]

    @torch.no_grad()
    def read_prefix(
        self, input_ids, attention_mask, image_index, image_embeddings, known: SharedPrefix | None = None
    ) -> SharedPrefix | None:
        """
        Let the LMM read what rows begin with, up to the last image token, for [`segment`] to go on from.

        Args:
            input_ids, attention_mask, image_index, image_embeddings: as in [`segment`]; what stands behind the image
                tokens does not count.
            known (*optional*): read before; returned, for these rows, if it holds all they begin with.

        Returns:
            `None` if it cannot be shared: a row ends with its image, or the rows' prefixes differ in length.
        """
        image_index = self._resolve_image_index(image_index, len(input_ids), len(image_embeddings.lmm_features))
        lmm_inputs, positions = self._prepare_lmm(input_ids, attention_mask, image_embeddings, image_index)
        keys = prefix_keys(lmm_inputs, positions, image_index)
        if keys is None:
            return None
        prefix = None if known is None else known.of_rows(keys, features_of_rows(lmm_inputs))
        return prefix or read_prefixes(self.lmm, lmm_inputs, positions, keys)

    @torch.no_grad()
    def write_answers(
        self,
        input_ids,
        attention_mask,
        image_index,
        image_embeddings,
        prefix: SharedPrefix | None = None,
        **generate_kwargs,
    ) -> "WrittenAnswers":
        """
        The first half of [`segment`]: write, and keep the layer states that masks are read from.

        Masks may be read from the result several times, with different layers, by [`read_masks`]. It holds the layer
        states of the whole prompts, so drop it when done. Arguments and errors are those of [`segment`].
        """
        refuse_unknown(self.write_answers, generate_kwargs, generates=True)
        _check_left_padding(attention_mask)
        settings, others = self._generation_settings(generate_kwargs)
        check_supported(settings, others)
        settings.update(return_dict_in_generate=True, output_hidden_states=True, output_logits=True)
        images = image_embeddings
        image_index = self._resolve_image_index(image_index, len(input_ids), len(images.lmm_features))
        lmm_inputs, image_positions = self._prepare_lmm(input_ids, attention_mask, images, image_index)
        self._check_finite(images.lmm_features, images.sam_embeddings)
        prefix = self._shared_prefix(lmm_inputs, image_positions, image_index, prefix)
        if prefix is not None:
            lmm_inputs = continue_prefixes(prefix, lmm_inputs, image_positions)
        generated = self.lmm.generate(**lmm_inputs, generation_config=settings, **others)
        prompt_length = input_ids.shape[1]
        token_id = self._segment_token_id()
        rows, steps = (generated.sequences[:, prompt_length:] == token_id).nonzero(as_tuple=True)
        return WrittenAnswers(
            # As they were given: with a shared prefix, padding stood elsewhere.
            sequences=torch.cat([input_ids, generated.sequences[:, prompt_length:]], 1),
            prompt_length=prompt_length,
            finished=self._finished(generated.sequences, prompt_length, settings, others),
            rows=rows,
            token_scores=self._token_probabilities(generated.logits, rows, steps),
            segment_states=_states_at_steps(generated.hidden_states, rows, steps),
            prompt_states=generated.hidden_states[0] if prefix is None else prefix.states,
            image_positions=image_positions if prefix is None else prefix.image_positions,
            images=images,
            image_index=image_index,
            state_rows=None if prefix is None else prefix.row_prefix,
        )

    def _shared_prefix(self, lmm_inputs, image_positions, image_index, known: SharedPrefix | None):
        """The prefixes of all rows, read now unless they are `known`; `None` where nothing is gained by sharing."""
        keys = prefix_keys(lmm_inputs, image_positions, image_index)
        if keys is None:
            return None
        prefix = None if known is None else known.of_rows(keys, features_of_rows(lmm_inputs))
        if prefix is None and len(set(keys)) < len(keys):
            prefix = read_prefixes(self.lmm, lmm_inputs, image_positions, keys)
        return prefix

    @torch.no_grad()
    def read_masks(
        self,
        answers: "WrittenAnswers",
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
    ) -> UGroundSegmentation:
        """The second half of [`segment`]: decode a mask for each segment token of written answers."""
        # Before a layer is drawn: drawing from NaN fails with a sentence about something else.
        self._check_finite(self.layer_policy(answers.segment_states))
        segments = self.decode_segments(
            answers.segment_states,
            answers.prompt_states,
            answers.rows,
            answers.image_positions,
            answers.images,
            answers.image_index,
            layer_selection=layer_selection,
            num_layer_samples=num_layer_samples,
            state_rows=answers.state_rows,
        )
        self._check_finite(segments["mask_logits"], segments["iou_scores"])
        return UGroundSegmentation(
            sequences=answers.sequences,
            prompt_length=answers.prompt_length,
            finished=answers.finished,
            image_index=answers.image_index,
            segment_row=answers.rows,
            token_scores=answers.token_scores,
            valid_sizes=answers.images.valid_sizes,
            sam_valid_sizes=answers.images.sam_valid_sizes,
            original_sizes=answers.images.original_sizes,
            **segments,
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

    def _token_probabilities(self, logits, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """Probability of the segment token at given rows and steps, from per-step logits `(B, V)`: `(N,)` float32."""
        if not len(rows):
            return logits[0].new_zeros((0,)).float()
        places = zip(rows.tolist(), steps.tolist(), strict=True)
        chosen = torch.stack([logits[step][row] for row, step in places]).float()
        chosen[:, self.config.image_token_id] = -torch.inf
        return chosen.softmax(-1)[:, self._segment_token_id()]

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


def _states_at_steps(hidden_states, rows: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """
    States that predicted the tokens written at given steps.

    Args:
        hidden_states: per step, L+1 tensors `(B, t, D)`; t is the prompt's length at step 0 and 1 after it.
        rows, steps (`(N,)`): row and step of each segment token.

    Returns:
        `(N, L+1, D)`.
    """
    last = hidden_states[0][-1]
    states = last.new_empty(len(rows), len(hidden_states[0]), last.shape[-1])
    for step in steps.unique().tolist():
        chosen = (steps == step).nonzero().squeeze(-1)
        columns = torch.full_like(chosen, hidden_states[step][-1].shape[1] - 1)
        states[chosen.to(states.device)] = gather_layer_states(hidden_states[step], rows[chosen], columns)
    return states
