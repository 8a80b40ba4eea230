"""UGround: an LMM writes `[SEG]`, a policy picks the layer to leave through, and the similarity map there prompts SAM.

The parts lie in their own files; this one says how they follow one another.
"""

import copy

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers import initialization as init

from .configuration_uground import UGroundConfig, check_layer_selection
from .generation_uground import SegmentGenerationMixin
from .hub_files import HubFilesMixin, check_shard_names
from .layer_policy import LayerChoice, LayerPolicy, log_probs_of, select_layers
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
from .output_uground import UGroundImageEmbeddings, UGroundOutput, UGroundSegmentation
from .prompts import PADDING_VALUE, SegmentProjection, SimilarityScaling, build_mask_prompts
from .session_uground import ImageSessionMixin

# Keeps the logit of an average probability finite where every draw is certain.
PROBABILITY_MARGIN = 1e-6
# Label value that the cross-entropy of PyTorch ignores.
IGNORED_LABEL = -100
# Small, and what becomes of their rounding shows in every mask: quantisation leaves them as they are.
UNQUANTIZED = ("mask_decoder", "layer_policy", "segment_projection", "similarity_scaling", "lm_head")


class UGroundPreTrainedModel(HubFilesMixin, PreTrainedModel):
    config: UGroundConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]
    # SAM reads weights of its parts directly, where hooks that fetch them from another device do not see it.
    _no_split_modules = ["MaskDecoder"]

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, LayerPolicy):
            init.zeros_(module.gates)
            init.zeros_(module.reward_ema)
            init.zeros_(module.reward_updates)
        elif isinstance(module, SimilarityScaling) and module.bias is not None:
            init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, output_loading_info=False, **kwargs):
        """
        Like `PreTrainedModel.from_pretrained`, but a checkpoint that does not fit the model exactly is refused.

        A `quantization_config` is for the LMM: what turns its states into masks stays in the `dtype` of the rest.

        Raises:
            ValueError: tensors are missing, unexpected or of the wrong shape; the sentence names them. Or the index
                names files outside of the folder.
            OSError: there are no weights, or they are truncated or damaged.
        """
        check_shard_names(pretrained_model_name_or_path)
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = keep_mask_path(kwargs["quantization_config"])
        # Wrong shapes are let through to be reported here with the other two kinds, in one sentence.
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except SafetensorError as error:
            raise OSError(f"the weights in {pretrained_model_name_or_path} cannot be read: {error}") from error
        problems = [
            f"{kind}: {_name_some(names)}"
            for kind, names in (
                ("missing", info["missing_keys"]),
                ("unexpected", info["unexpected_keys"]),
                ("of the wrong shape", [] if allow_mismatch else info["mismatched_keys"]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} do not fit the model; tensors {'; '.join(problems)}"
            )
        # Under ZeRO-3 transformers also keeps renamings that met no weight, and would apply their inverse at saving.
        if conversions := getattr(model, "_weight_conversions", None):
            model._weight_conversions = [conversion for conversion in conversions if conversion.was_used()]
        return (model, info) if output_loading_info else model


def keep_mask_path(quantization_config):
    """A copy of a quantisation config (object or `dict`) that leaves out what turns layer states into masks."""
    chosen = copy.deepcopy(quantization_config)
    if isinstance(chosen, dict):
        is_bits = chosen.get("quant_method") == "bitsandbytes" or {"load_in_4bit", "load_in_8bit"} & chosen.keys()
        name = "llm_int8_skip_modules" if is_bits else "modules_to_not_convert"
        chosen[name] = [*dict.fromkeys([*(chosen.get(name) or []), *UNQUANTIZED])]
        return chosen
    for name in ("llm_int8_skip_modules", "modules_to_not_convert"):
        if hasattr(chosen, name):
            setattr(chosen, name, [*dict.fromkeys([*(getattr(chosen, name) or []), *UNQUANTIZED])])
            return chosen
    raise ValueError(f"quantization_config must be able to leave modules out, got a {type(chosen).__name__}")


def _name_some(names, at_most: int = 8) -> str:
    """Names of a few tensors, and how many more there are; wrong shapes come as (name, got, expected)."""
    texts = [
        name if isinstance(name, str) else f"{name[0]} (got {tuple(name[1])}, expected {tuple(name[2])})"
        for name in names
    ]
    texts = sorted(texts)
    more = f" and {len(texts) - at_most} more" if len(texts) > at_most else ""
    return ", ".join(texts[:at_most]) + more


class UGroundForReferringSegmentation(SegmentGenerationMixin, ImageSessionMixin, UGroundPreTrainedModel):
    """
    An image and a sentence in, words and masks out.

    Parts: `lmm` (the vision-language trunk), `layer_policy` (which layer a segment leaves through),
    `segment_projection` and `similarity_scaling` (prompts), `mask_decoder` (SAM).
    """

    def __init__(self, config: UGroundConfig):
        super().__init__(config)
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

    def _uses(self, prompt: str) -> bool:
        return prompt in self.config.prompts

    def get_input_embeddings(self):
        return self.lmm.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.lmm.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.lmm.get_output_embeddings()

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
        **_queries,
    ) -> UGroundImageEmbeddings:
        """
        Encode images once; hand the result to `forward` or `segment` as `image_embeddings=` for any number of queries.

        Args:
            pixel_values (`(I, 3, h, w)`), valid_sizes (`(I, 2)`), sam_pixel_values (`(I, 3, S, S)`),
            sam_valid_sizes (`(I, 2)`), original_sizes (`(I, 2)`): as the processor returns them. What else the
            processor returned may be passed along and is not read.
        """
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
        **kwargs,
    ) -> UGroundOutput:
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
            kwargs: for the LMM's forward (`num_items_in_batch`, for one).

        Raises:
            ValueError: an argument does not fit; see the sentence.
        """
        images = self._resolve_images(
            image_embeddings, pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes, original_sizes
        )
        image_index = self._resolve_image_index(image_index, len(input_ids), len(images.lmm_features))
        lmm_inputs, image_positions = self._prepare_lmm(input_ids, attention_mask, images, image_index, position_ids)
        outputs = self.lmm(**lmm_inputs, output_hidden_states=True, use_cache=False, **kwargs)
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
        return UGroundOutput(loss=loss, logits=outputs.logits, segment_row=rows, **segments)

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

    def _resolve_images(self, image_embeddings, *image_inputs) -> UGroundImageEmbeddings:
        """Encode the image inputs, unless they were encoded before."""
        if image_embeddings is not None:
            return image_embeddings
        if any(value is None for value in image_inputs):
            raise ValueError(
                "pass image_embeddings, or all of pixel_values, valid_sizes, sam_pixel_values, sam_valid_sizes and "
                "original_sizes"
            )
        return self.get_image_embeddings(*image_inputs)

    @staticmethod
    def _resolve_image_index(image_index, num_rows: int, num_images: int) -> torch.Tensor:
        """One image per row in order, or one image for all rows, unless the caller says which."""
        if image_index is None:
            if num_images not in (1, num_rows):
                raise ValueError(f"image_index is needed: {num_rows} rows ask about {num_images} images")
            return torch.arange(num_rows) if num_images == num_rows else torch.zeros(num_rows, dtype=torch.long)
        if len(image_index) != num_rows or (num_rows and not 0 <= image_index.min() <= image_index.max() < num_images):
            raise ValueError(
                f"image_index must name one of {num_images} images for each of {num_rows} rows, "
                f"got {image_index.tolist()}"
            )
        return image_index

    def _prepare_lmm(self, input_ids, attention_mask, images: UGroundImageEmbeddings, image_index, position_ids=None):
        """Arguments of the LMM, and the columns of its image tokens `(B, n)`."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
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
