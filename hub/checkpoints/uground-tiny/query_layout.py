"""Which query is about which image: the accepted nestings of images, texts and answers, brought to one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def pair_images_with_queries(images: Any, text: Any) -> tuple[list, list[list[str]]]:
    """
    Bring images and queries to a flat list of images and one list of queries per image.

    Args:
        images: one image, or a list (or a 4-D array) of I images; `[[image], …]` is taken as `[image, …]`.
        text: a query, for one image; a list of I queries, one per image; a list of I entries that are a query or a
            list of queries; or, when `images` is one image and no list, a list of queries about it.

    Returns:
        `(images, queries)`, both of length I; every entry of `queries` is a non-empty list of non-blank strings.

    Raises:
        ValueError: nothing is given, the numbers do not match, or a query is blank or no string.
    """
    if images is None or text is None:
        missing = "images" if images is None else "text"
        raise ValueError(f"both images and text are needed, got no {missing}")
    is_list = is_list_of_images(images)
    images = [_unwrap(image) for image in images] if is_list else [images]
    if not images:
        raise ValueError("at least one image is needed, got an empty list")
    if isinstance(text, str):
        entries = [text]
    elif _is_list(text):
        entries = list(text) if is_list or any(map(_is_list, text)) else [text]
    else:
        raise ValueError(f"text must be a string or a list of strings, got {type(text).__name__}")
    if len(entries) != len(images):
        raise ValueError(
            f"text must hold one query or one list of queries per image: expected {len(images)}, got {len(entries)}"
        )
    queries = [list(entry) if _is_list(entry) else [entry] for entry in entries]
    for number, asked in enumerate(queries, start=1):
        if not asked:
            raise ValueError(f"every image needs at least one query, got none for image {number}")
        for query in asked:
            if not isinstance(query, str):
                raise ValueError(f"a query must be a string, got {type(query).__name__} for image {number}")
            if not query.strip():
                raise ValueError(f"a query must not be empty, got {query!r} for image {number}")
            check_characters(query, "a query")
    return images, queries


def flatten_texts(text: str | list) -> list[str]:
    """
    Texts without images as a list.

    Raises:
        ValueError: there are none, or one is no string.
    """
    texts = [text] if isinstance(text, str) else list(text) if _is_list(text) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise ValueError(f"without images, text must be a string or a list of strings, got {text!r:.200}")
    for one in texts:
        check_characters(one, "a text")
    return texts


def check_characters(text: str, name: str) -> None:
    """Raise a `ValueError` for half a character, as a cut emoji leaves it: no tokenizer takes one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} must hold whole characters, got the half {text[error.start]!a} in {text[:200]!a}"
        ) from error


def match_answers(answers: str | list, queries: list[list[str]]) -> list[str]:
    """
    Flatten answers that are nested like the text they answer.

    Args:
        answers: a string, a list of strings or lists of strings.
        queries: queries per image, as [`pair_images_with_queries`] returns them.

    Returns:
        One answer per query, in reading order.

    Raises:
        ValueError: the numbers do not match, or an answer is no string.
    """
    flat = [answers] if isinstance(answers, str) else []
    if _is_list(answers):
        flat = [answer for entry in answers for answer in (entry if _is_list(entry) else [entry])]
    expected = sum(map(len, queries))
    if len(flat) != expected:
        raise ValueError(f"answers must hold one answer per query: expected {expected}, got {len(flat)}")
    for answer in flat:
        if not isinstance(answer, str):
            raise ValueError(f"an answer must be a string, got {type(answer).__name__}")
        check_characters(answer, "an answer")
    if _is_list(answers) and len(answers) == len(queries) and any(map(_is_list, answers)):
        for number, (entry, asked) in enumerate(zip(answers, queries, strict=True), start=1):
            given = len(entry) if _is_list(entry) else 1
            if given != len(asked):
                raise ValueError(f"image {number} has {len(asked)} queries, so it needs as many answers, got {given}")
    return flat


def _is_list(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def is_list_of_images(images: Any) -> bool:
    """Whether these are several images: a list, or an array or tensor with an axis more than an image has."""
    return _is_list(images) or (isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4)


def _unwrap(image):
    """`image` itself, or the only entry of a list, as `apply_chat_template` hands images on."""
    if not _is_list(image):
        return image
    if len(image) != 1:
        raise ValueError(f"a query is about one image, got {len(image)} images in one conversation")
    return image[0]


__all__ = ["check_characters", "flatten_texts", "is_list_of_images", "match_answers", "pair_images_with_queries"]
