"""What tokenizer and chat template must agree on: single-id tokens, and what stands around query and answer."""

from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, ProcessorMixin

from .image_processors import frame_of

# Stands for a query or an answer when a template is rendered to see what surrounds them; no template holds it.
PLACEHOLDER = "zqxjk"
EARLIER_FRAME = "letterbox"


def resolve_token(tokenizer: PreTrainedTokenizerBase, token: str | None, required: bool = True) -> int | None:
    """
    The id of a token, looked up by name.

    Args:
        tokenizer: any `PreTrainedTokenizerBase`.
        token: its text, such as `"[SEG]"`.
        required: whether it must exist; a token that exists must be one id in either case.

    Returns:
        The id, or `None` for a token that is not required and not in the vocabulary.

    Raises:
        ValueError: the token is missing, or is not kept whole inside of a text.
    """
    token_id = tokenizer.convert_tokens_to_ids(token)
    is_known = token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token
    if not is_known and not required:
        return None
    context = f"a{token}."
    if not is_known or tokenizer(context, add_special_tokens=False)["input_ids"].count(token_id) != 1:
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(context, add_special_tokens=False)["input_ids"])
        raise ValueError(f"the tokenizer must read {token} as exactly one id, but it reads {context!r} as {pieces}")
    return token_id


def check_token_ids(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """
    See that a model and a processor mean the same tokens, and see images alike.

    Args:
        config: of the model, with `segment_token_id`, `reject_token_id` (`None` if it cannot reject by a token),
            `image_token_id`, and the size of the vocabulary in its text config.
        processor: with the same three ids, `None` where its tokenizer lacks the token.

    Raises:
        ValueError: they do not, or an id lies outside of the vocabulary.
    """
    check_image_frame(config, processor)
    size = config.get_text_config().vocab_size
    for name in ("segment_token_id", "reject_token_id", "image_token_id"):
        said, read = getattr(config, name), getattr(processor, name)
        if said is None and name == "reject_token_id":
            continue
        if said != read or not 0 <= read < size:
            raise ValueError(
                f"model and processor do not belong together: for {name} the config says {said}, the tokenizer "
                f"{read}, and the vocabulary has {size} tokens"
            )


def check_image_frame(config: PreTrainedConfig, processor: ProcessorMixin) -> None:
    """Raise a `ValueError` unless a processor shows images as the model of a config was trained to see them."""
    # Code of release 0.1.0 knew one frame and did not name it.
    said, made = (getattr(owner, "image_frame", EARLIER_FRAME) for owner in (config, processor))
    frames = [("image_frame", said, made)]
    # There may be no mask head; then nobody sees what the processor makes for it.
    if (head := getattr(config, "head_frame", None)) is not None:
        frames.append(("the mask head", head.kind, frame_of(processor.sam_image_processor)[0]))
    for name, said, made in frames:
        if said != made:
            raise ValueError(
                f"model and processor do not belong together: for {name} the config says {said!r}, and the "
                f"processor makes a {made!r}"
            )


@dataclass(frozen=True)
class PromptFormat:
    """
    What a chat template writes around a query and an answer.

    Attributes:
        first: a conversation up to its first query, image included.
        generation: from a query to the end of a prompt for generation, such as `" ASSISTANT:"`.
        before_answer: from there to the answer.
        after_answer: what closes the last answer.
        next_turn: from an answer to the next query.
    """

    first: str
    generation: str
    before_answer: str
    after_answer: str
    next_turn: str

    @classmethod
    def of(cls, processor: ProcessorMixin) -> "PromptFormat":
        """
        Read the format off the chat template of a processor.

        Raises:
            ValueError: the template drops content, or writes something else in front of an answer than it ends a
                prompt for generation with.
        """
        question = {"role": "user", "content": [{"type": "text", "text": PLACEHOLDER}]}
        opening = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PLACEHOLDER}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": PLACEHOLDER}]}
        prompt = processor.apply_chat_template([opening, answer, question], add_generation_prompt=True)
        closed = processor.apply_chat_template([opening, answer])
        parts = prompt.split(PLACEHOLDER)
        if len(parts) != 4 or not closed.startswith(PLACEHOLDER.join(parts[:2])) or not parts[1].startswith(parts[3]):
            raise ValueError(
                f"the chat template must repeat its generation prompt in front of an answer, got {prompt!r} with "
                f"{PLACEHOLDER!r} for every text"
            )
        first, to_answer, next_turn, generation = parts
        return cls(
            first=first,
            generation=generation,
            before_answer=to_answer[len(generation) :],
            after_answer=closed.rsplit(PLACEHOLDER, 1)[1],
            next_turn=next_turn,
        )


__all__ = ["PLACEHOLDER", "PromptFormat", "check_image_frame", "check_token_ids", "resolve_token"]
