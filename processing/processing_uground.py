"""The processor of UGround: images and queries to tensors for the model, its outputs to answers and masks."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PreTrainedConfig, ProcessorMixin

from .image_processors import IMAGE_PROCESSORS, cell_side, frame_of, is_native, on_pil, read_frames, read_native
from .image_reading import read_image
from .post_processing import post_process_masks, post_process_segments
from .processor_files import (
    check_fields,
    check_image_settings,
    check_length,
    check_template,
    names_broken_files,
    names_tokenizer_files,
    saved_type,
)
from .processor_options import IMAGE_OPTIONS, CallOptions, read_options, take_image_options, warn_of_unknown
from .prompt_format import PromptFormat, check_token_ids, resolve_token
from .prompt_pieces import (
    ASSISTANT,
    TEMPLATE,
    Piece,
    RenderedPrompt,
    join_pieces,
    query_prompts,
    render_prompt,
    split_prompt,
)
from .query_layout import flatten_texts, match_answers, pair_images_with_queries
from .row_encoding import Row, SpecialTokens, expand_image
from .row_padding import pad_rows

# What SAM sees of an image: the first, and SAM 2 the second.
SAM_FRAMES = ("letterbox", "stretch")
# Side of an LMM image token in pixels where nothing says another: that of CLIP's large tower.
PATCH_SIZE = 14
# The tokens around an image in the default chat template; tokenizers without them get the template without them.
IMAGE_BRACKETS = ("<im_start>", "<im_end>")


class UGroundProcessor(ProcessorMixin):
    r"""
    Prepares images and queries for [`UGroundForReferringSegmentation`] and turns its outputs into answers and masks.

    Args:
        image_processor (`SamImageProcessorPil`, `CLIPImageProcessorPil` or that of an LMM in `NATIVE`): what the LMM
            sees of an image, see [`make_image_processor`].
        sam_image_processor (`SamImageProcessorPil` or `CLIPImageProcessorPil`): what SAM sees of an image: a
            letterbox, or the square of a SAM 2, see [`sam2_image_processor`]. Both always run on PIL, so that results
            do not depend on torchvision being installed; a `Sam2ImageProcessor` is taken for its settings.
        tokenizer: a fast tokenizer that holds `segment_token` and `image_token`, and `reject_token` if the model can
            reject, as one id each.
        patch_size (`int`, *optional*): side of an LMM image token in pixels of the LMM image; by default 14, or what
            the LMM's own image processor says.
        segment_token (`str`, defaults to `"[SEG]"`): the token that asks for a mask.
        reject_token (`str`, defaults to `"[REJ]"`): the token that says "not there"; a tokenizer may lack it.
        image_token (`str`, defaults to `"<image>"`): placeholder of an image in a prompt.
        chat_template (`str`, *optional*): Jinja template of a conversation; with an LMM's own image processor that of
            its tokenizer, by default the LLaVA-v1 one that lies beside this file, without `<im_start>` and `<im_end>`
            if the tokenizer does not know them.

    Attributes:
        segment_token_id, reject_token_id (`None` if absent), image_token_id: ids, resolved by name.
        num_image_tokens: image tokens of one image, (image size // patch size) squared; `None` where each image has
            a number of its own.
        image_frame: what the LMM sees of an image: `"letterbox"`, `"centre_crop"` or `"stretch"`.

    Raises:
        ValueError: a token is not exactly one id, or the sizes do not fit together.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor: Any = None,
        sam_image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        segment_token: str = "[SEG]",
        reject_token: str | None = "[REJ]",
        image_token: str = "<image>",
        chat_template: str | None = None,
    ):
        image_processor = on_pil(image_processor, "image_processor")
        sam_image_processor = on_pil(sam_image_processor, "sam_image_processor")
        sam_frame, side = frame_of(sam_image_processor)
        # A letterbox is a SAM's, whose logits tell its side.
        self.sam_frame_side = None if sam_frame == SAM_FRAMES[0] else side
        if sam_frame not in SAM_FRAMES or side is None:
            expected = " or a ".join(SAM_FRAMES)
            made = f"{sam_frame} of any size" if side is None else sam_frame
            raise ValueError(f"the sam_image_processor of a UGroundProcessor must make a {expected}, got {made}")
        own_side = cell_side(image_processor) if is_native(image_processor) else None
        patch_size = patch_size or own_side or PATCH_SIZE
        self.patch_size = patch_size
        self.segment_token = segment_token
        self.reject_token = reject_token
        self.image_token = image_token
        self.segment_token_id = resolve_token(tokenizer, segment_token)
        self.reject_token_id = resolve_token(tokenizer, reject_token, required=False)
        self.image_token_id = resolve_token(tokenizer, image_token)
        if not tokenizer.is_fast:
            raise ValueError(f"the tokenizer of a UGroundProcessor must be a fast one, got {type(tokenizer).__name__}")
        for role in ("pad_token", "eos_token"):
            if getattr(tokenizer, role) is None:
                raise ValueError(f"the tokenizer of a UGroundProcessor must have a {role}, got one without")
        _, side = frame_of(image_processor)
        if side is None and patch_size != own_side:
            raise ValueError(
                f"patch_size must be the {own_side} pixels of the image processor's tokens, got {patch_size}"
            )
        if side is not None and (patch_size < 1 or side % patch_size):
            raise ValueError(f"patch_size must divide the LMM image size {side}, got {patch_size}")
        self.num_image_tokens = None if side is None else (side // patch_size) ** 2
        if chat_template is None and side is None:
            chat_template = tokenizer.chat_template
            if not chat_template:
                raise ValueError("a chat_template is needed with an LMM's own image processor, got none")
        elif chat_template is None:
            chat_template = _default_chat_template(tokenizer)
        self._reader: tuple[tuple, SpecialTokens] | None = None
        super().__init__(image_processor, sam_image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        """
        Like `ProcessorMixin.from_pretrained`; a warning names keywords that nothing reads.

        Raises:
            OSError, ValueError: there is no processor, or a file of it is cut, of another schema, or a pointer of Git
                LFS; the sentence names the file.
        """
        warn_of_unknown(kwargs, tuple(inspect.signature(cls.__init__).parameters))
        with names_broken_files(pretrained_model_name_or_path, **kwargs):
            # This class asks for no code of the checkpoint; without the word, transformers would ask back.
            trusted = {"trust_remote_code": kwargs.pop("trust_remote_code", False)}
            processor = super().from_pretrained(pretrained_model_name_or_path, **trusted, **kwargs)
            loaded = processor[0] if isinstance(processor, tuple) else processor
            check_template(loaded, pretrained_model_name_or_path, **kwargs)
        return processor

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """
        Build the sub-processors; the image ones straight on PIL, whatever back-end would be picked by default.

        Keywords such as `do_normalize=False` change both image processors; what would change a frame is refused.
        """
        settings = [(processor_dict or {}).get(name) for name in ("image_processor", "sam_image_processor")]
        if not all(isinstance(setting, dict) for setting in settings):
            raise OSError(
                f"{pretrained_model_name_or_path} holds no UGround processor: its processor_config.json must have the "
                f"keys image_processor and sam_image_processor, got {sorted(processor_dict or {})}"
            )
        changed = take_image_options(kwargs)
        kwargs = {name: value for name, value in kwargs.items() if name not in IMAGE_OPTIONS}
        check_fields(processor_dict)
        for name, setting in zip(("image_processor", "sam_image_processor"), settings, strict=True):
            check_image_settings(setting, name)
        with names_tokenizer_files(pretrained_model_name_or_path, **kwargs):
            tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        check_length(tokenizer)
        return [*(IMAGE_PROCESSORS[saved_type(setting)](**{**setting, **changed}) for setting in settings), tokenizer]

    def apply_chat_template(self, conversation: list, *args: Any, **kwargs: Any) -> Any:
        """
        As in transformers; the texts that it hands on to be read count as whole prompts, of whatever template.

        In the users' turns of this processor's own template special tokens are text. Under another `chat_template`
        whose words are whose is not known, so that there every special token counts.

        Raises:
            ValueError: the template refuses the conversation, or cannot be read.
        """
        if kwargs.get("tokenize"):
            kwargs["processor_kwargs"] = {**(kwargs.get("processor_kwargs") or {}), "is_prompt": True}
        try:
            return super().apply_chat_template(conversation, *args, **kwargs)
        except Exception as error:
            # Of a library that transformers needs for this only.
            if not type(error).__module__.startswith("jinja2."):
                raise
            raise ValueError(f"the chat template does not take the conversation: {error}") from error

    def __call__(
        self,
        images: Any = None,
        text: str | list | None = None,
        answers: str | list | None = None,
        *,
        is_prompt: bool | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list, of anything [`read_image`] takes. Without images, `text` is read as it is,
                such as the completion of a prompt, and only `input_ids` and `attention_mask` are returned.
            text: a query; or a list of queries, one per image; or a list of lists, several queries per image. With
                one image that is not in a list, a flat list is several queries about it. A text that holds
                `image_token` is taken as a whole prompt, as `apply_chat_template` renders it.
                In a query, and in the users' turns of a whole prompt, special tokens are text: `[SEG]` asks for no
                mask there.
            answers: the answers to learn, nested as `text`. They and the end-of-sequence token are appended, and
                `labels` is returned. In them, only segment and reject token are more than text.
            is_prompt: whether the texts are whole prompts; by default those are that hold `image_token`.
            return_tensors: `"pt"` (the default), `"np"`, or `None` for lists: of numbers, and of one array per image.
            padding: `True` or `"longest"` (the default), `"max_length"`, or `False`.
            padding_side: `"left"` (the default), which generation needs, or `"right"`.
            pad_to_multiple_of: pads to a multiple of so many tokens.
            max_length: most tokens of a row, image tokens included; by default `tokenizer.model_max_length`.
            truncation: whether a longer row loses its end; by default it is refused.
            add_special_tokens: whether the tokenizer adds its own, such as a beginning-of-sequence token; by default
                it does unless the prompt begins with one.
            return_offsets_mapping: adds `offset_mapping` `(B, T, 2)`: where in the whole prompt the characters of each
                token begin and end; (0, 0) for padding.
            do_convert_rgb, do_normalize, do_rescale, image_mean, image_std, resample, rescale_factor: for both image
                processors. These and the options of text may stand in `images_kwargs`, `text_kwargs`,
                `common_kwargs`.

        Returns:
            `BatchFeature` for I images and B queries, in reading order, with

            - **input_ids**, **attention_mask** `(B, T)` int64: padded prompts, one id per image token; the mask is 0
              where text was padded.
            - **labels** `(B, T)` int64, with `answers` only: -100 everywhere but at the answer and its end.
            - **image_index** `(B,)` int64: the image a row asks about. Left out where each image has one query, so
              that such outputs can be cut, stacked and joined.
            - **pixel_values** `(I, 3, h, w)`, **sam_pixel_values** `(I, 3, S, S)` float32: what the LMM and SAM see.
              With an LMM's own image processor `pixel_values` and what else it returns are as it returns them.
            - **valid_sizes**, **sam_valid_sizes** `(I, 2)` int64: rows, columns of them that are image.
            - **original_sizes** `(I, 2)` int64: height, width of the image as given, after EXIF rotation.

        Raises:
            OSError: an image file is missing, unreadable or truncated.
            ValueError: an image is too small or too elongated, a query is empty or too long, an option has a value
                that it cannot have, or the numbers of images, queries and answers do not fit together.
            TypeError: an argument is not known.
        """
        options = read_options(kwargs)
        if images is None and text is not None and answers is None:
            return self._finish(self._read_plain(flatten_texts(text), options), options)
        images, queries = pair_images_with_queries(images, text)
        flat_queries = [query for asked in queries for query in asked]
        flat_answers = None if answers is None else match_answers(answers, queries)
        pieces, frames = self._pieces(flat_queries, bool(is_prompt)), self._read_images(images, options)
        counts = self._image_tokens(frames)
        per_row = [count for count, asked in zip(counts, queries, strict=True) for _ in asked]
        rows = self._read(pieces, flat_answers, options, per_row)
        data = pad_rows(rows, self.tokenizer, options, with_labels=answers is not None)
        if any(len(asked) != 1 for asked in queries):
            image_index = [index for index, asked in enumerate(queries) for _ in asked]
            data["image_index"] = np.asarray(image_index, dtype=np.int64)
        return self._finish(data | frames, options)

    def encode_queries(
        self, queries: list[str], max_length: int | None = None, image_tokens: int | None = None
    ) -> BatchFeature:
        """
        Queries about an image that was encoded before: the text part of [`UGroundProcessor.__call__`].

        Args:
            queries: B queries, or whole prompts.
            max_length: as in [`UGroundProcessor.__call__`].
            image_tokens: of that image; needed where each image has a number of its own.

        Returns:
            `BatchFeature` with **input_ids** and **attention_mask** `(B, T)`.

        Raises:
            ValueError: a query is empty, no string, or too long; or `image_tokens` is needed.
        """
        count = self.num_image_tokens if image_tokens is None else image_tokens
        if count is None:
            raise ValueError("encode_queries needs image_tokens, the number of them in the image that was encoded")
        options = CallOptions(max_length=max_length)
        _, (checked,) = pair_images_with_queries([None], [list(queries)])
        rows = self._read(self._pieces(checked, False), None, options, [count] * len(checked))
        return self._finish(pad_rows(rows, self.tokenizer, options, with_labels=False), options)

    def render_prompt(self, turns: list[tuple[str, str]], query: str, learn_answers: bool = False) -> RenderedPrompt:
        """A whole prompt of a conversation that keeps whose words are whose, see [`prompt_pieces.render_prompt`]."""
        return render_prompt(self, turns, query, learn_answers)

    @property
    def image_frame(self) -> str:
        """What the LMM sees of an image, as `config.image_frame` of its model says it."""
        return frame_of(self.image_processor)[0]

    def check_token_ids(self, config: PreTrainedConfig) -> None:
        """Refuse a model with other ids or another frame, see [`prompt_format.check_token_ids`]."""
        check_token_ids(config, self)

    @property
    def model_input_names(self) -> list[str]:
        """Keys that [`UGroundProcessor.__call__`] returns for the model."""
        return [
            "input_ids",
            "attention_mask",
            "image_index",
            "pixel_values",
            "valid_sizes",
            "sam_pixel_values",
            "sam_valid_sizes",
            "original_sizes",
            *(name for name in self.image_processor.model_input_names if name != "pixel_values"),
        ]

    def post_process_masks(
        self,
        mask_logits: torch.Tensor | list[torch.Tensor],
        sam_valid_sizes: torch.Tensor | list[tuple[int, int]],
        original_sizes: torch.Tensor | list[tuple[int, int]],
    ) -> list[torch.Tensor]:
        """Mask logits at image size, see [`post_processing.post_process_masks`]."""
        return post_process_masks(mask_logits, sam_valid_sizes, original_sizes, self.sam_frame_side)

    def post_process_instance_segmentation(
        self,
        outputs: Mapping[str, Any],
        threshold: float = 0.0,
        mask_threshold: float = 0.0,
        target_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        queries: list[str] | None = None,
    ) -> list[dict]:
        """Answers, masks, scores, boxes and labels per query, see [`post_processing.post_process_segments`]."""
        return post_process_segments(self, outputs, threshold, mask_threshold, target_sizes, queries)

    def _pieces(self, texts: list[str], is_prompt: bool) -> list[list[Piece]]:
        """Whole prompts of queries, in pieces; a text that already is a prompt is checked and kept."""
        form = PromptFormat.of(self)
        whole = [is_prompt or self.image_token in text for text in texts]
        asked = iter(query_prompts(self, [text for text, kept in zip(texts, whole, strict=True) if not kept]))
        prompts, marker = [], form.generation.strip()
        for number, (text, kept) in enumerate(zip(texts, whole, strict=True), start=1):
            pieces = split_prompt(form, text, self.image_token) if kept else next(asked)
            images = sum(piece.text.count(self.image_token) for piece in pieces if piece.speaker == TEMPLATE)
            if kept and not is_prompt and (images != 1 or marker not in text):
                raise ValueError(
                    f"text {number} holds {self.image_token}, so it must be a whole prompt with one "
                    f"{self.image_token} and {marker!r}, as apply_chat_template(..., add_generation_prompt=True) "
                    f"writes it; got {text[:200]!r}"
                )
            if images != 1:
                raise ValueError(
                    f"prompt {number} must hold {self.image_token} once, for its image, got it {images} times"
                )
            prompts.append(pieces)
        return prompts

    def _image_tokens(self, frames: dict[str, np.ndarray]) -> list[int]:
        """Image tokens of each image that was read."""
        if self.num_image_tokens is not None:
            return [self.num_image_tokens] * len(frames["original_sizes"])
        return (frames["valid_sizes"] // self.patch_size).prod(-1).tolist()

    def _read(
        self, prompts: list[list[Piece]], answers: list[str] | None, options: CallOptions, counts: list[int]
    ) -> list[Row]:
        """Rows of prompts and their answers, images expanded to `counts` tokens, none longer than it may be."""
        if answers is not None:
            form = PromptFormat.of(self)
            for number, (pieces, answer) in enumerate(zip(prompts, answers, strict=True)):
                prompt = join_pieces(pieces)
                if not prompt.endswith(form.generation):
                    raise ValueError(
                        f"prompt {number + 1} is to be answered, so it must end with {form.generation!r}, "
                        f"got {prompt[-40:]!r}"
                    )
                written = ((form.before_answer, TEMPLATE), (answer.strip(), ASSISTANT), (form.after_answer, TEMPLATE))
                prompts[number] = pieces + [Piece(text, speaker, learnt=True) for text, speaker in written if text]
        rows = [
            expand_image(row, self.image_token_id, count)
            for row, count in zip(
                self._special_tokens().encode(self.tokenizer, prompts, options.add_special_tokens), counts, strict=True
            )
        ]
        return self._limit(rows, options)

    def _read_plain(self, texts: list[str], options: CallOptions) -> dict[str, np.ndarray]:
        """Texts by themselves, every special token in them one."""
        for number, text in enumerate(texts, start=1):
            if self.image_token in text:
                raise ValueError(f"text {number} holds {self.image_token}, so it needs an image, got images=None")
        rows = self._special_tokens().encode(
            self.tokenizer, [[Piece(text)] for text in texts], options.add_special_tokens
        )
        return pad_rows(self._limit(rows, options), self.tokenizer, options, with_labels=False)

    def _special_tokens(self) -> SpecialTokens:
        """What reads texts; made anew where tokenizer or template have changed."""
        key = (id(self.tokenizer), len(self.tokenizer), self.chat_template)
        reader = self._reader
        if reader is None or reader[0] != key:
            reader = self._reader = (key, SpecialTokens(self))
        return reader[1]

    def _limit(self, rows: list[Row], options: CallOptions) -> list[Row]:
        """The rows, cut where the call says so; without that one that is too long is refused."""
        limit = self.tokenizer.model_max_length if options.max_length is None else options.max_length
        kept = []
        for number, row in enumerate(rows, start=1):
            if len(row.ids) > limit and not options.truncation:
                raise ValueError(
                    f"query {number} is too long: with its prompt and image it may have {limit} tokens, "
                    f"got {len(row.ids)}"
                )
            if self.image_token_id in row.ids[limit:]:
                raise ValueError(f"query {number} must keep its whole image when it is cut to {limit} tokens")
            kept.append(Row(row.ids[:limit], row.learnt[:limit], row.offsets[:limit]))
        return kept

    def _read_images(self, images: list, options: CallOptions) -> dict[str, np.ndarray]:
        """Both frames of every image, and the sizes of image and frames."""
        names = ["the image"] if len(images) == 1 else [f"image {i + 1} of {len(images)}" for i in range(len(images))]
        pictures = [read_image(image, name) for image, name in zip(images, names, strict=True)]
        if is_native(self.image_processor):
            seen = read_native(self.image_processor, pictures, options.images)
        else:
            pixels, valid = read_frames(self.image_processor, pictures, options.images)
            seen = {"pixel_values": pixels, "valid_sizes": valid}
        sam_pixels, sam_valid = read_frames(self.sam_image_processor, pictures, options.images)
        return {
            **seen,
            "sam_pixel_values": sam_pixels,
            "sam_valid_sizes": sam_valid,
            "original_sizes": np.asarray([(picture.height, picture.width) for picture in pictures], dtype=np.int64),
        }

    @staticmethod
    def _finish(data: dict, options: CallOptions) -> BatchFeature:
        """The batch in the type that was asked for."""
        if options.return_tensors is None:
            arrays = {name: value for name, value in data.items() if not isinstance(value, list)}
            lists = {name: list(value) if value.ndim > 2 else value.tolist() for name, value in arrays.items()}
            return BatchFeature(data=data | lists)
        arrays = {
            name: np.asarray(value, dtype=np.int64) if isinstance(value, list) else value
            for name, value in data.items()
        }
        return BatchFeature(data=arrays, tensor_type=options.return_tensors)


def _default_chat_template(tokenizer) -> str:
    """The template beside this file, without the image brackets if the tokenizer would tear them apart."""
    path = Path(__file__).with_name("chat_template.jinja")
    if not path.is_file():
        raise ValueError("a chat_template is needed where the default one, chat_template.jinja, was not copied along")
    template = path.read_text(encoding="utf-8")
    if any(resolve_token(tokenizer, bracket, required=False) is None for bracket in IMAGE_BRACKETS):
        for bracket in IMAGE_BRACKETS:
            template = template.replace(bracket, "")
    return template


__all__ = ["UGroundProcessor"]
