"""Many questions about one image, one after the other: encoded once, its prefix read once, freed at the end."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin

# Earlier turns that a session with history repeats to the model; older ones are forgotten.
MAX_TURNS = 8
# Where classes live that came with a checkpoint and not from the installed package.
REMOTE_MODULES = "transformers_modules"


class ImageSession:
    """
    Asks one image; made by [`ImageSessionMixin.image_session`].

    Kept are the image embeddings and the keys, values and layer states of everything up to the last image token, for
    one row: what a call adds is dropped when it returns. `close`, or the end of the `with` block, frees it all.

    Args:
        model: a [`UGroundForReferringSegmentation`].
        image: anything the processor takes as one image.
        processor: the [`UGroundProcessor`] of the model.
        history: whether a query is asked after the turns before it, or by itself.
        max_turns: with history, so many turns are remembered; fewer where the prompt would be too long.

    Attributes:
        turns: with history, the `(query, answer)` pairs remembered, oldest first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        image: Any,
        processor: ProcessorMixin,
        history: bool = False,
        max_turns: int = MAX_TURNS,
    ):
        if isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1:
            raise ValueError(f"max_turns must be a whole number of at least 1, got {max_turns!r}")
        self.turns: list[tuple[str, str]] = []
        self._model, self._processor, self._image = model, processor, image
        self._history, self._max_turns = history, max_turns
        processor.check_token_ids(model.config)
        # The prefix does not depend on the query, but a prompt needs one.
        inputs = processor(images=image, text="?").to(model.device)
        # Only now: an image that cannot be read has been refused by name.
        self._fingerprint = image_fingerprint(image)
        self._images = model.get_image_embeddings(**inputs)
        self._image_tokens = int(self._images.token_counts[0])
        self._prefix = model.read_prefix(inputs["input_ids"], inputs["attention_mask"], None, self._images)

    def __call__(
        self, query: str | list[str], threshold: float = 0.0, mask_threshold: float = 0.0, **settings: Any
    ) -> dict | list[dict]:
        """
        Args:
            query: a query, or, without history, a list of queries, which are answered as a batch. Without history, a
                query may be a whole prompt, as the processor takes it.
            threshold, mask_threshold: as in the processor's `post_process_instance_segmentation`.
            settings: for the model's `segment`: `max_new_tokens`, `layer_selection`, `max_rows` …

        Returns:
            What the processor's `post_process_instance_segmentation` gives for a query: a dictionary with `answer`,
            `masks`, `scores`, `boxes`, `labels`, `layers` and `finished`; a list of them for a list.

        Raises:
            ValueError: the session is closed, the image has changed since it was opened, or an argument does not fit.
        """
        if self._images is None:
            raise ValueError("the image session is closed; open another one with model.image_session(image)")
        if image_fingerprint(self._image) != self._fingerprint:
            raise ValueError("the image has changed since its session was opened; open another one for the new image")
        if not isinstance(query, (str, list, tuple)):
            raise ValueError(f"a session is asked a string or a list of strings, got {type(query).__name__}")
        queries = [query] if isinstance(query, str) else list(query)
        if self._history and len(queries) != 1:
            raise ValueError(f"a session with history takes one query at a time, got {len(queries)}")
        image_token = self._processor.image_token
        if self._history and image_token in str(queries[0]):
            raise ValueError(
                f"a session with history takes plain queries, got a text with {image_token}: {queries[0][:200]!r}"
            )
        inputs = self._encode(queries).to(self._model.device)
        outputs = self._model.segment(**inputs, image_embeddings=self._images, prefix=self._prefix, **settings)
        # Where a text is a whole prompt, its query is read off the prompt.
        plain = [None if image_token in text else text for text in queries]
        results = self._processor.post_process_instance_segmentation(
            outputs, threshold=threshold, mask_threshold=mask_threshold, queries=plain
        )
        if self._history:
            self.turns = [*self.turns, (queries[0], results[0]["answer"])][-self._max_turns :]
        return results[0] if isinstance(query, str) else results

    def _encode(self, queries: list[str]):
        """Prompts of queries; with history behind as many of the last turns as fit."""
        inputs = self._processor.encode_queries(queries, image_tokens=self._image_tokens)
        while self.turns:
            prompt = self._processor.render_prompt(self.turns, queries[0])
            conversation = self._processor.encode_queries(
                [prompt], max_length=sys.maxsize, image_tokens=self._image_tokens
            )
            if conversation["input_ids"].shape[1] <= self._processor.tokenizer.model_max_length:
                return conversation
            # The query by itself fits, so it is the history that is too long.
            self.turns.pop(0)
        return inputs

    def close(self) -> None:
        """Free everything the session holds; closing twice does no harm."""
        for held in ("_model", "_processor", "_image", "_images", "_prefix"):
            setattr(self, held, None)
        self.turns = []

    def __enter__(self) -> "ImageSession":
        return self

    def __exit__(self, *_error) -> None:
        self.close()


class ImageSessionMixin:
    """`image_session` of [`UGroundForReferringSegmentation`]."""

    def image_session(
        self, image: Any, processor: ProcessorMixin | None = None, history: bool = False, max_turns: int = MAX_TURNS
    ) -> ImageSession:
        """
        Ask one image several times, encoding it once.

        ```python
        with model.image_session(image) as session:
            session("the cup")["masks"]
            session(["the tree", "whatever can swim"])
        ```

        Args:
            image: anything the processor takes as one image.
            processor (*optional*): by default that of the checkpoint the model was loaded from.
            history: whether a query is asked after the turns before it.
            max_turns: with history, so many turns are remembered.

        Raises:
            ValueError: no processor is given and the model was not loaded from a checkpoint, or the processor's
                tokens are not the model's.
            OSError: the checkpoint holds no processor, or the image cannot be read.
        """
        return ImageSession(
            cast(PreTrainedModel, self),
            image,
            self._own_processor() if processor is None else processor,
            history,
            max_turns,
        )

    def _own_processor(self):
        origin = self.config.name_or_path
        if not origin:
            raise ValueError("image_session needs processor=…, as the model was not loaded from a checkpoint")
        # Code of the checkpoint may run exactly if the model is of that code.
        trusted = type(self).__module__.startswith(REMOTE_MODULES)
        return AutoProcessor.from_pretrained(origin, trust_remote_code=trusted, revision=self.revision)


def image_fingerprint(image: Any) -> str:
    """What changes when the content of an image changes; a URL is taken to stay what it is."""
    while isinstance(image, Sequence) and not isinstance(image, (str, bytes)) and len(image) == 1:
        image = image[0]
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(image, Image.Image):
        # Mode and size of a file may change when it is loaded.
        image.load()
        transparency = image.info.get("transparency")
        digest.update(repr((image.mode, image.size, image.getpalette(), transparency)).encode())
        digest.update(image.tobytes())
    elif isinstance(image, (np.ndarray, torch.Tensor)):
        array = image.detach().cpu() if isinstance(image, torch.Tensor) else image
        array = array.float() if isinstance(array, torch.Tensor) and array.is_floating_point() else array
        array = np.ascontiguousarray(array)
        digest.update(repr((array.dtype.str, array.shape)).encode())
        digest.update(array.tobytes())
    elif isinstance(image, (str, os.PathLike)) and os.path.isfile(image):
        digest.update(Path(image).read_bytes())
    elif isinstance(image, (str, os.PathLike)):
        digest.update(str(image).encode())
    return digest.hexdigest()


__all__ = ["ImageSession", "ImageSessionMixin"]
