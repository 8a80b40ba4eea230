"""Conversations as transformers' chat models take them: which image they are about, and what is asked last."""

from collections.abc import Mapping
from typing import Any

# Where a message holds its image; the names are those of transformers.
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")
DATA_URI = "data:image/png;base64,"


def is_conversation(value: object) -> bool:
    """Whether this is one conversation: a list of messages, dictionaries with a role and content."""
    return isinstance(value, (list, tuple)) and bool(value) and all(map(_is_message, value))


def read_conversation(messages: Any) -> tuple[list[dict], object, str]:
    """
    A conversation about one image, checked.

    Args:
        messages: `[{"role": "user", "content": [{"type": "image", "image": …}, {"type": "text", "text": …}]}, …]`. An
            image stands under `image`, `url`, `path`, `base64` or `image_url`; content may be a text.

    Returns:
        The messages with the image under `"image"`; the image; and the text of the last message.

    Raises:
        ValueError: there are no messages, not exactly one image, content that is neither text nor image, or the last
            message is not the user's or holds no text.
    """
    if not is_conversation(messages):
        raise ValueError(f'a conversation must be a list of {{"role": …, "content": …}}, got {messages!r:.100}')
    images, read = [], []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, (list, tuple)):
            raise ValueError(f"the content of a message must be a text or a list of parts, got {content!r:.100}")
        read.append({"role": message["role"], "content": [_read_part(part, images) for part in parts]})
    if len(images) != 1:
        raise ValueError(f"a conversation must be about one image, got {len(images)}")
    last = read[-1]
    if last["role"] != "user":
        raise ValueError(f"the last message of a conversation must be the user's, got role {last['role']!r}")
    query = " ".join(part["text"].strip() for part in last["content"] if part["type"] == "text").strip()
    if not query:
        raise ValueError("the last message of a conversation must ask something, got no text")
    return read, images[0], query


def _is_message(value) -> bool:
    return isinstance(value, Mapping) and {"role", "content"} <= set(value)


def _read_part(part, images: list) -> dict:
    """A part of a message; its image goes to the list."""
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind not in ("image", "image_url"):
        raise ValueError(f'a part of a message must be {{"type": "text" | "image", …}}, got {part!r:.100}')
    given = [name for name in IMAGE_KEYS if part.get(name) is not None]
    if len(given) != 1:
        raise ValueError(f"the image of a message must stand under one of {', '.join(IMAGE_KEYS)}, got {given}")
    image = part[given[0]]
    if isinstance(image, Mapping):  # as other servers' clients write it
        image = image.get("url")
    if given[0] == "base64" and not str(image).startswith("data:"):
        image = DATA_URI + image
    images.append(image)
    return {"type": "image", "image": image}


__all__ = ["is_conversation", "read_conversation"]
