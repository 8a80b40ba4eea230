"""UGround: an LMM writes `[SEG]`, a policy picks the layer to leave through, and the similarity map there prompts SAM.

The parts lie in their own files; this one says how they follow one another.
"""

import torch
from transformers import AutoModelForImageTextToText

from .attention_parts import is_flash
from .call_arguments import refuse_unknown, with_answer_length
from .checkpoint_files import refuses_bad_config
from .configuration_uground import UGroundConfig, check_layer_selection
from .generation_uground import SegmentGenerationMixin
from .image_rows import check_images, check_queries, resolve_image_index
from .layer_policy import LayerChoice, LayerPolicy, log_probs_of, select_layers
from .library_compat import CACHE_NAME
from .lmm_access import (
    encode_lmm_images,
    find_segments,
    gather_layer_states,
    image_similarity,
    image_token_positions,
    prepare_lmm_inputs,
    token_validity,
)
from .mask_decoder import MaskDecoder, mask_overlap
from .output_uground import UGroundImageEmbeddings, UGroundOutput, UGroundSegmentation, asked_outputs, further_outputs
from .pretrained_uground import UGroundPreTrainedModel
from .prompts import PADDING_VALUE, SegmentProjection, SimilarityScaling, build_mask_prompts
from .session_uground import ImageSessionMixin

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
    `segment_projection` and `similarity_scaling` (prompts), `mask_decoder` (SAM).
    """

    @refuses_bad_config
    def __init__(self, config: UGroundConfig):
        super().__init__(config)
        # Settings may have been changed since the config was made.
        config.check_token_ids()
        hidden_size = config.get_text_config().hidden_size
        prompt_size = config.sam_config.prompt_encoder_config.hidden_size
        # First in line: `device_map="auto"` takes off the accelerator what is last, and the LMM's layers can bear it.
        self.mask_decoder = MaskDecoder(config.sam_config)
        self.lmm = AutoModelForImageTextToText.from_config(config.lmm_config)
        self.layer_policy = LayerPolicy(
            config.num_layers,
            hidden_size,
            config.policy_baseline,
            config.policy_ema_decay,
            config.critic_hidden_size,
        )
        self.segment_projection = SegmentProjection(hidden_size, prompt_size) if self._uses("embedding") else None
        self.similarity_scaling = SimilarityScaling(config.similarity_scaling, config.num_layers, hidden_size)
        self.post_init()
        with_answer_length(self.generation_config)

    def _uses(self, prompt: str) -> bool:
        return prompt in self.config.prompts

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the LMM knows, also after [`resize_token_embeddings`]."""
        return self.config.get_text_config().vocab_size

    def get_input_embeddings(self):
        return self.lmm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.lmm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lmm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self.lmm.set_output_embeddings(new_embeddings)

    def get_decoder(self):
        """The language model of the LMM."""
        return self.lmm.get_decoder()

    def set_decoder(self, decoder):
        self.lmm.set_decoder(decoder)

    def enable_input_require_grads(self):
        """Of words only: encoders of images that are frozen would build a graph for nothing."""
        decoder = self.lmm.get_decoder()
        # Once, however often it is asked for: only the hooks of the last time are known to be taken back.
        decoder.disable_input_require_grads()
        decoder.enable_input_require_grads()

    def disable_input_require_grads(self):
        """Take back [`enable_input_require_grads`]."""
        self.lmm.get_decoder().disable_input_require_grads()

    def resize_token_embeddings(self, *args, **kwargs):
        """Resize the LMM's vocabulary; see `PreTrainedModel.resize_token_embeddings`."""
        return self.lmm.resize_token_embeddings(*args, **kwargs)

    def compile_mask_path(self, **options) -> "UGroundForReferringSegmentation":
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
        **queries,
    ) -> UGroundImageEmbeddings:
        """
        Encode images once; hand the result to `forward` or `segment` as `image_embeddings=` for any number of queries.

        Args:
            pixel_values (`(I, 3, h, w)`), valid_sizes (`(I, 2)`), sam_pixel_values (`(I, 3, S, S)`),
            sam_valid_sizes (`(I, 2)`), original_sizes (`(I, 2)`): as the processor returns them.
            input_ids, image_index (*optional*): if given, it is checked that they belong to these images. What else
            the processor returned may be passed along and is not read.

        Raises:
            ValueError: the sizes do not fit together, or no query asks about one of the images.
            UnknownKeywordError: a keyword is none of these, a `TypeError` and `ValueError`.
        """
        refuse_unknown(self.get_image_embeddings, queries, QUERY_INPUTS)
        check_images(pixel_values, sam_pixel_values, valid_sizes, sam_valid_sizes, original_sizes)
        if input_ids is not None:
            check_queries(input_ids, image_index, len(pixel_values))
        lmm_vision = self.config.lmm_config.vision_config
        token_valid = token_validity(valid_sizes, self.config.token_grid_hw, lmm_vision.patch_size)
        return UGroundImageEmbeddings(
            lmm_features=encode_lmm_images(self.lmm, pixel_values, token_valid),
            sam_embeddings=self.mask_decoder.encode(sam_pixel_values),
            token_valid=token_valid,
            valid_sizes=valid_sizes,
            sam_valid_sizes=sam_valid_sizes,
            original_sizes=original_sizes,
        )

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
        image_embeddings: UGroundImageEmbeddings | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        **kwargs,
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
            image_embeddings (*optional*): of [`get_image_embeddings`], instead of the image inputs.
            position_ids (`(B, T)`, *optional*): by default each token counts the tokens before it. Rows that pack
            several queries behind one image need them, and an `attention_mask` `(B, T, T)` that says which keys each
            token may see.
            inputs_embeds (*optional*): only `None`, which wrappers such as PEFT pass along.
            use_cache, output_hidden_states, output_attentions (`bool`, *optional*): whether to return keys and values,
            layer states (or those of a list of layers) and attentions, which need `attn_implementation="eager"`.
            return_dict (`bool`, *optional*): `False` gives a tuple of what is there.
            kwargs: `num_items_in_batch`, which the text loss is divided by instead of the number of labels.

        Raises:
            ValueError: an argument does not fit; see the sentence.
            UnknownKeywordError: a keyword is not known, a `TypeError` and `ValueError`.
        """
        refuse_unknown(self.forward, kwargs, LOSS_ARGUMENTS)
        if inputs_embeds is not None:
            raise ValueError("forward looks for segment tokens in input_ids and takes no inputs_embeds, got some")
        asked = asked_outputs(self.config, use_cache, output_hidden_states, output_attentions)
        frames = (pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes)
        images, image_index = self._resolve_images((input_ids, image_index), image_embeddings, frames)
        lmm_inputs, image_positions = self._prepare_lmm(input_ids, attention_mask, images, image_index, position_ids)
        outputs = self.lmm(
            **lmm_inputs,
            use_cache=bool(asked["cache"]),
            output_hidden_states=True,
            output_attentions=asked["attentions"],
            return_dict=True,
        )
        rows, columns = find_segments(input_ids, self._segment_token_id())
        states = gather_layer_states(outputs.hidden_states, rows, columns)
        segments = self.decode_segments(
            states,
            outputs.hidden_states,
            rows,
            image_positions,
            images,
            image_index,
            layer_index=layer_index,
            layer_selection=layer_selection,
            num_layer_samples=num_layer_samples,
        )
        loss = None if labels is None else self._text_loss(outputs.logits, labels, **kwargs)
        segments |= further_outputs(outputs, CACHE_NAME, asked)
        output = UGroundOutput(loss=loss, logits=outputs.logits, segment_row=rows, **segments)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _text_loss(self, logits: torch.Tensor, labels: torch.Tensor, **kwargs) -> torch.Tensor:
        """
        Cross-entropy over the words: the image placeholder has an id, but it is never written and takes no part.

        Without this a converted checkpoint would share its probability with a row that the official code lacks.
        """
        image_token = self.config.image_token_id
        words = logits.index_fill(-1, torch.tensor([image_token], device=logits.device), -torch.inf)
        labels = labels.masked_fill(labels == image_token, IGNORED_LABEL)
        return self.lmm.loss_function(logits=words, labels=labels, vocab_size=logits.shape[-1], **kwargs)

    def decode_segments(
        self,
        segment_states: torch.Tensor,
        hidden_states: tuple[torch.Tensor, ...],
        rows: torch.Tensor,
        image_positions: torch.Tensor,
        images: UGroundImageEmbeddings,
        image_index: torch.Tensor,
        layer_index: torch.Tensor | None = None,
        layer_selection: str | int | None = None,
        num_layer_samples: int | None = None,
        state_rows: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor | None]:
        """
        From layer states to masks: policy, similarity map, prompts, SAM.

        Args:
            segment_states (`(N, L+1, D)`): of the N segments, in reading order.
            hidden_states: L+1 tensors `(G, T, D)` that hold the image tokens of every row.
            rows (`(N,)`): row of each segment.
            image_positions (`(G, n)`): columns of the image tokens in `hidden_states`.
            images, image_index: the images, and which one each of B rows asks about.
            layer_index, layer_selection, num_layer_samples: as in [`forward`].
            state_rows (`(B,)`, *optional*): row of `hidden_states` that holds the image tokens of each row; by
                default each row holds its own.

        Returns:
            The fields of [`UGroundOutput`] from `layer_logits` on.
        """
        # Parts may lie on several devices; everything comes back to that of the states.
        device = segment_states.device
        layer_logits = self.layer_policy(segment_states).to(device)
        choice = self._choose_layers(layer_logits, layer_index, layer_selection, num_layer_samples)
        rows = rows.to(device)
        segment_image = image_index.to(device)[rows]
        token_rows = rows if state_rows is None else state_rows.to(device)[rows]
        sources = (segment_states, hidden_states, token_rows, image_positions, images, segment_image)
        decoded = (
            self._decode_chosen(choice.index, *sources)
            if choice.draws is None
            else self._decode_drawn(choice.draws, *sources)
        )
        return {
            "layer_logits": layer_logits,
            "layer_index": choice.index,
            "log_probs": choice.log_probs,
            **decoded,
        }

    def _decode_chosen(self, layer_index, states, hidden_states, token_rows, image_positions, images, segment_image):
        """One layer per segment: similarity, similarity map, mask logits and IoU estimates."""
        segments = torch.arange(len(token_rows), device=states.device)
        chosen_states = states[segments, layer_index]
        similarity = image_similarity(chosen_states, hidden_states, token_rows, layer_index, image_positions)
        similarity = similarity.view(-1, *self.config.token_grid_hw)
        similarity_map = self.similarity_scaling(similarity, layer_index).to(states.device)
        embedding_prompts = mask_prompts = None
        if self._uses("embedding"):
            embedded = chosen_states if self.config.embedding_layer == "selected" else states[:, -1]
            embedding_prompts = self.segment_projection(embedded)
        if self._uses("mask"):
            mask_prompts = build_mask_prompts(
                similarity_map,
                segment_image,
                images.valid_sizes,
                images.original_sizes,
                self.config.lmm_config.vision_config.image_size,
                self.mask_decoder.low_resolution,
                PADDING_VALUE[self.config.similarity_scaling],
            )
        mask_logits, iou_scores = self.mask_decoder(
            images.sam_embeddings, segment_image, embedding_prompts, mask_prompts
        )
        return {
            "similarity": similarity,
            "similarity_map": similarity_map,
            "mask_logits": mask_logits.to(states.device),
            "iou_scores": iou_scores.to(states.device),
        }

    def _decode_drawn(self, draws, states, hidden_states, token_rows, image_positions, images, segment_image):
        """Average over the layers drawn of each segment; a layer drawn twice is decoded once and weighs double."""
        segment, layer = draws.nonzero(as_tuple=True)
        weight = draws[segment, layer]
        decoded = self._decode_chosen(
            layer, states[segment], hidden_states, token_rows[segment], image_positions, images, segment_image[segment]
        )

        def average(values: torch.Tensor) -> torch.Tensor:
            weighted = values * weight.view(-1, *[1] * (values.dim() - 1))
            return values.new_zeros(len(token_rows), *values.shape[1:]).index_add(0, segment, weighted)

        probabilities = decoded.pop("mask_logits").sigmoid()
        mean = average(probabilities)
        # One at a time: each of these is as large as all mask logits.
        uncertainty = average((probabilities - mean[segment]) ** 2)
        overlap = mask_overlap(probabilities > 0.5, (mean > 0.5)[segment])
        return {
            **{name: average(values) for name, values in decoded.items()},
            "mask_logits": mean.clamp(PROBABILITY_MARGIN, 1 - PROBABILITY_MARGIN).logit(),
            "uncertainty": uncertainty,
            "agreement": average(overlap),
        }

    def _choose_layers(self, layer_logits, layer_index, layer_selection, num_layer_samples) -> LayerChoice:
        if layer_index is not None:
            if layer_index.shape != layer_logits.shape[:1]:
                raise ValueError(
                    f"layer_index must name one layer for each of the {len(layer_logits)} segments, "
                    f"got shape {tuple(layer_index.shape)}"
                )
            if len(layer_index) and not 0 <= layer_index.min() <= layer_index.max() < layer_logits.shape[1]:
                raise ValueError(f"layer_index must lie in 0..{layer_logits.shape[1] - 1}, got {layer_index.tolist()}")
            layer_index = layer_index.to(layer_logits.device)
            return LayerChoice(layer_index, log_probs_of(layer_logits, layer_index))
        return select_layers(layer_logits, *self._resolve_selection(layer_selection, num_layer_samples))

    def _resolve_selection(self, layer_selection, num_layer_samples) -> tuple[str | int, int]:
        """How layers are chosen, and how many are drawn under `"mc"`: what the call says, or else the config."""
        selection = self.config.layer_selection if layer_selection is None else layer_selection
        check_layer_selection(selection, self.config.num_layers)
        samples = self.config.num_layer_samples if num_layer_samples is None else num_layer_samples
        if samples < 1:
            raise ValueError(f"num_layer_samples must be at least 1, got {samples}")
        return selection, samples

    def _segment_token_id(self) -> int:
        if self.config.segment_token_id is None:
            raise ValueError("config.segment_token_id is not set: this model does not know its [SEG] token")
        return self.config.segment_token_id

    def _resolve_images(self, rows, image_embeddings, image_inputs) -> tuple[UGroundImageEmbeddings, torch.Tensor]:
        """
        Encode the image inputs, which must be those of the rows, unless they were encoded before; and say which image
        each row asks about.
        """
        input_ids, image_index = rows
        if image_embeddings is None and any(value is None for value in image_inputs):
            raise ValueError(
                "pass image_embeddings, or all of pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes and "
                "original_sizes"
            )
        if image_embeddings is None:
            image_embeddings = self.get_image_embeddings(*image_inputs, input_ids=input_ids, image_index=image_index)
        images = len(image_embeddings.lmm_features)
        return image_embeddings, self._resolve_image_index(image_index, len(input_ids), images)

    _resolve_image_index = staticmethod(resolve_image_index)

    def _prepare_lmm(self, input_ids, attention_mask, images: UGroundImageEmbeddings, image_index, position_ids=None):
        """Arguments of the LMM, and the columns of its image tokens `(B, n)`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        attention = self.lmm.config.get_text_config()._attn_implementation
        if attention_mask.dim() == 3 and is_flash(attention):
            raise ValueError(f"rows that pack several queries need attention that takes masks, got {attention!r}")
        positions = image_token_positions(input_ids, self.config.image_token_id, images.lmm_features.shape[1])
        inputs = prepare_lmm_inputs(
            input_ids,
            attention_mask,
            positions,
            images.lmm_features[image_index.to(images.lmm_features.device)],
            images.token_valid[image_index.to(images.token_valid.device)].to(input_ids.device),
            position_ids,
        )
        return inputs, positions


UGroundForReferringSegmentation.register_for_auto_class("AutoModel")

__all__ = [
    "UGroundForReferringSegmentation",
    "UGroundImageEmbeddings",
    "UGroundOutput",
    "UGroundPreTrainedModel",
    "UGroundSegmentation",
]
