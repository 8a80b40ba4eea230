"""The processor of UGround: images and queries to tensors for the model, its outputs to answers and masks."""

from pathlib import Path

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from .image_reading import read_image
from .post_processing import post_process_masks, post_process_segments
from .prompt_format import PromptFormat, resolve_token
from .query_layout import match_answers, pair_images_with_queries

# Of pixels in 0..255: rescaling to 0..1 first would round differently from the official code.
SAM_MEAN = [123.675, 116.28, 103.53]
SAM_STD = [58.395, 57.12, 57.375]
# Label value that the cross-entropy of PyTorch ignores.
IGNORED_LABEL = -100
# The tokens around an image in the default chat template; tokenizers without them get the template without them.
IMAGE_BRACKETS = ("<im_start>", "<im_end>")


def letterbox_image_processor(size: int) -> SamImageProcessorPil:
    """
    An image processor that scales the longest side to `size` pixels (bilinear, PIL), normalises with SAM's mean and
    standard deviation, and pads with zeros at the bottom and the right to `size` x `size`.

    UGround feeds its LMM and its SAM this way, at two sizes.
    """
    return SamImageProcessorPil(
        size={"longest_edge": size},
        pad_size={"height": size, "width": size},
        do_rescale=False,
        image_mean=SAM_MEAN,
        image_std=SAM_STD,
    )


class UGroundProcessor(ProcessorMixin):
    r"""
    Prepares images and queries for [`UGroundForReferringSegmentation`] and turns its outputs into answers and masks.

    Args:
        image_processor (`SamImageProcessorPil`): letterbox for the LMM, see [`letterbox_image_processor`].
        sam_image_processor (`SamImageProcessorPil`): letterbox for the SAM frame. Both always run on PIL, so that
            results do not depend on torchvision being installed.
        tokenizer: a fast tokenizer that holds `segment_token` and `image_token`, and `reject_token` if the model can
            reject, as one id each.
        patch_size (`int`, defaults to 14): side of an LMM image token in pixels of the LMM image.
        segment_token (`str`, defaults to `"[SEG]"`): the token that asks for a mask.
        reject_token (`str`, defaults to `"[REJ]"`): the token that says "not there"; a tokenizer may lack it.
        image_token (`str`, defaults to `"<image>"`): placeholder of an image in a prompt.
        chat_template (`str`, *optional*): Jinja template of a conversation; by default the LLaVA-v1 one that lies
            beside this file, without `<im_start>` and `<im_end>` if the tokenizer does not know them.

    Attributes:
        segment_token_id, reject_token_id (`None` if absent), image_token_id: ids, resolved by name.
        num_image_tokens: image tokens of one image, (image size // patch size) squared.

    Raises:
        ValueError: a token is not exactly one id, or the sizes do not fit together.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        image_processor=None,
        sam_image_processor=None,
        tokenizer=None,
        patch_size=14,
        segment_token="[SEG]",
        reject_token="[REJ]",
        image_token="<image>",
        chat_template=None,
    ):
        image_processor = _on_pil(image_processor, "image_processor")
        sam_image_processor = _on_pil(sam_image_processor, "sam_image_processor")
        self.patch_size = patch_size
        self.segment_token = segment_token
        self.reject_token = reject_token
        self.image_token = image_token
        self.segment_token_id = resolve_token(tokenizer, segment_token)
        self.reject_token_id = resolve_token(tokenizer, reject_token, required=False)
        self.image_token_id = resolve_token(tokenizer, image_token)
        for role in ("pad_token", "eos_token"):
            if getattr(tokenizer, role) is None:
                raise ValueError(f"the tokenizer of a UGroundProcessor must have a {role}, got one without")
        side = image_processor.pad_size["height"]
        if patch_size < 1 or side % patch_size:
            raise ValueError(f"patch_size must divide the LMM image size {side}, got {patch_size}")
        self.num_image_tokens = (side // patch_size) ** 2
        if chat_template is None:
            chat_template = _default_chat_template(tokenizer)
        super().__init__(image_processor, sam_image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        """Build the sub-processors; the image ones straight on PIL, whatever back-end would be picked by default."""
        settings = [(processor_dict or {}).get(name) for name in ("image_processor", "sam_image_processor")]
        if not all(isinstance(setting, dict) for setting in settings):
            raise OSError(
                f"{pretrained_model_name_or_path} holds no UGround processor: its processor_config.json must have the "
                f"keys image_processor and sam_image_processor, got {sorted(processor_dict or {})}"
            )
        tokenizer = cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs)
        return [*(SamImageProcessorPil(**setting) for setting in settings), tokenizer]

    def __call__(
        self,
        images=None,
        text=None,
        answers=None,
        return_tensors="pt",
        max_length=None,
        padding=True,
        add_special_tokens=None,
        videos=None,
        audio=None,
    ) -> BatchFeature:
        """
        Args:
            images: one image or a list, of anything [`read_image`] takes.
            text: a query; or a list of queries, one per image; or a list of lists, several queries per image. With
                one image that is not in a list, a flat list is several queries about it. A text that holds
                `image_token` is taken as a whole prompt, as `apply_chat_template` renders it.
            answers: the answers to learn, nested as `text`. They and the end-of-sequence token are appended, and
                `labels` is returned.
            return_tensors: `"pt"`, `"np"`, or `None` for lists.
            max_length: most tokens of a row, image tokens included; by default `tokenizer.model_max_length`.
                Nothing is ever truncated.
            padding: must stay on: rows are padded on the left to the longest.
            add_special_tokens: whether the tokenizer adds its own, such as a beginning-of-sequence token; by default
                it does unless the prompt begins with one.
            videos, audio: must be `None`; `apply_chat_template` of transformers hands them on.

        Returns:
            `BatchFeature` for I images and B queries, in reading order, with

            - **input_ids**, **attention_mask** `(B, T)` int64: left-padded prompts, one id per image token; the mask
              is 0 where text was padded.
            - **labels** `(B, T)` int64, with `answers` only: -100 everywhere but at the answer and its end.
            - **image_index** `(B,)` int64: the image a row asks about.
            - **pixel_values** `(I, 3, h, w)`, **sam_pixel_values** `(I, 3, S, S)` float32: letterboxed images.
            - **valid_sizes**, **sam_valid_sizes** `(I, 2)` int64: rows, columns of them that are image.
            - **original_sizes** `(I, 2)` int64: height, width of the image as given, after EXIF rotation.

        Raises:
            OSError: an image file is missing, unreadable or truncated.
            ValueError: an image is too small or too elongated, a query is empty or too long, or the numbers of
                images, queries and answers do not fit together.
        """
        if padding not in (True, "longest"):
            raise ValueError(f"UGroundProcessor pads to the longest row, so padding must be True, got {padding!r}")
        if videos is not None or audio is not None:
            raise ValueError("UGroundProcessor takes images and text only, got videos or audio")
        images, queries = pair_images_with_queries(images, text)
        image_index = [index for index, asked in enumerate(queries) for _ in asked]
        flat_queries = [query for asked in queries for query in asked]
        flat_answers = None if answers is None else match_answers(answers, queries)
        rows = self._encode(self._prompts(flat_queries), flat_answers, add_special_tokens)
        self._check_length(rows, self.tokenizer.model_max_length if max_length is None else max_length)
        data = self._pad(rows, with_labels=answers is not None)
        data["image_index"] = np.asarray(image_index, dtype=np.int64)
        names = ["the image"] if len(images) == 1 else [f"image {i + 1} of {len(images)}" for i in range(len(images))]
        pictures = [read_image(image, name) for image, name in zip(images, names, strict=True)]
        data["pixel_values"], data["valid_sizes"] = _letterbox(self.image_processor, pictures)
        data["sam_pixel_values"], data["sam_valid_sizes"] = _letterbox(self.sam_image_processor, pictures)
        data["original_sizes"] = np.asarray([(picture.height, picture.width) for picture in pictures], dtype=np.int64)
        return BatchFeature(data=data, tensor_type=return_tensors)

    def encode_queries(self, queries: list[str], max_length: int | None = None) -> BatchFeature:
        """
        Queries about an image that was encoded before: the text part of [`UGroundProcessor.__call__`].

        Args:
            queries: B queries, or whole prompts.
            max_length: as in [`UGroundProcessor.__call__`].

        Returns:
            `BatchFeature` with **input_ids** and **attention_mask** `(B, T)`.

        Raises:
            ValueError: a query is empty, no string, or too long.
        """
        _, (checked,) = pair_images_with_queries([None], [list(queries)])
        rows = self._encode(self._prompts(checked), None, None)
        self._check_length(rows, self.tokenizer.model_max_length if max_length is None else max_length)
        return BatchFeature(data=self._pad(rows, with_labels=False), tensor_type="pt")

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
        ]

    def post_process_masks(self, mask_logits, sam_valid_sizes, original_sizes) -> list[torch.Tensor]:
        """Mask logits at image size, see [`post_processing.post_process_masks`]."""
        return post_process_masks(mask_logits, sam_valid_sizes, original_sizes)

    def post_process_instance_segmentation(
        self, outputs, threshold=0.0, mask_threshold=0.0, target_sizes=None, queries=None
    ) -> list[dict]:
        """Answers, masks, scores, boxes and labels per query, see [`post_processing.post_process_segments`]."""
        return post_process_segments(self, outputs, threshold, mask_threshold, target_sizes, queries)

    def _prompts(self, queries: list[str]) -> list[str]:
        """Whole prompts of queries; a text that already is a prompt is checked and kept."""
        conversations = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": query.strip()}]}]
            for query in queries
        ]
        prompts = self.apply_chat_template(conversations, add_generation_prompt=True)
        marker = PromptFormat.of(self).generation.strip()
        for number, query in enumerate(queries):
            if self.image_token not in query:
                continue
            if marker not in query or query.count(self.image_token) != 1:
                raise ValueError(
                    f"text {number + 1} holds {self.image_token}, so it must be a whole prompt with one "
                    f"{self.image_token} and {marker!r}, as apply_chat_template(..., add_generation_prompt=True) "
                    f"writes it; got {query[:200]!r}"
                )
            prompts[number] = query
        return prompts

    def _encode(self, prompts, answers, add_special_tokens) -> list[tuple[list[int], int]]:
        """Token ids of every row, its image expanded, and the position where its answer begins."""
        encoded = self._tokenize(prompts, add_special_tokens)
        if answers is None:
            return [(ids, len(ids)) for ids in encoded]
        form = PromptFormat.of(self)
        for number, prompt in enumerate(prompts, start=1):
            if not prompt.endswith(form.generation):
                raise ValueError(
                    f"prompt {number} is to be answered, so it must end with {form.generation!r}, got {prompt[-40:]!r}"
                )
        full = [
            prompt + form.before_answer + answer.strip() + form.after_answer
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        rows = []
        for prompt_ids, ids in zip(encoded, self._tokenize(full, add_special_tokens), strict=True):
            # A tokenizer may merge the end of the prompt with the beginning of the answer: what differs is learnt.
            start = next((i for i, (a, b) in enumerate(zip(prompt_ids, ids, strict=False)) if a != b), len(prompt_ids))
            rows.append((ids, start))
        return rows

    def _tokenize(self, texts: list[str], add_special_tokens: bool | None) -> list[list[int]]:
        if add_special_tokens is None:
            bos_token = self.tokenizer.bos_token
            add_special_tokens = not (bos_token and texts[0].startswith(bos_token))
        encoded = self.tokenizer(texts, add_special_tokens=add_special_tokens, padding=False, verbose=False)
        return [self._expand_image_token(ids) for ids in encoded["input_ids"]]

    def _expand_image_token(self, ids: list[int]) -> list[int]:
        place = ids.index(self.image_token_id)
        return ids[:place] + [self.image_token_id] * self.num_image_tokens + ids[place + 1 :]

    @staticmethod
    def _check_length(rows, limit: int) -> None:
        for number, (ids, _) in enumerate(rows, start=1):
            if len(ids) > limit:
                raise ValueError(
                    f"query {number} is too long: with its prompt and image it may have {limit} tokens, got {len(ids)}"
                )

    def _pad(self, rows, with_labels: bool) -> dict[str, np.ndarray]:
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids = np.full(shape, self.tokenizer.pad_token_id, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        for row, (ids, answer_start) in enumerate(rows):
            left = shape[1] - len(ids)
            input_ids[row, left:] = ids
            attention_mask[row, left:] = 1
            labels[row, left + answer_start :] = ids[answer_start:]
        data = {"input_ids": input_ids, "attention_mask": attention_mask}
        return {**data, "labels": labels} if with_labels else data


def _on_pil(image_processor, name: str) -> SamImageProcessorPil:
    """The same letterbox on the PIL back-end."""
    if isinstance(image_processor, SamImageProcessorPil):
        return image_processor
    if type(image_processor).__name__ != "SamImageProcessor":
        raise ValueError(
            f"the {name} of a UGroundProcessor must be a SamImageProcessor, got {type(image_processor).__name__}"
        )
    return SamImageProcessorPil(**image_processor.to_dict())


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


def _letterbox(image_processor, pictures) -> tuple[np.ndarray, np.ndarray]:
    """`(I, 3, size, size)` float32 pixels and `(I, 2)` valid rows and columns."""
    size = image_processor.size["longest_edge"]
    for picture in pictures:
        if int(min(picture.size) * size / max(picture.size) + 0.5) < 1:
            raise ValueError(
                f"an image may not be so elongated that its short side vanishes at {size} pixels, got "
                f"{picture.width} wide and {picture.height} high"
            )
    features = image_processor(pictures)
    pixels = np.stack(features["pixel_values"]).astype(np.float32, copy=False)
    return pixels, np.asarray(features["reshaped_input_sizes"], dtype=np.int64)


__all__ = ["UGroundProcessor", "letterbox_image_processor"]
