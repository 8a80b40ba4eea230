"""A prompt as pieces that know who speaks: what the template writes, what the user says, what is to be answered."""

from dataclasses import dataclass

from transformers import ProcessorMixin

from .prompt_format import PLACEHOLDER, PromptFormat

# Who a piece is from. In the template's words every special token counts, in an answer the segment and the reject
# token, in a user's words none.
TEMPLATE, USER, ASSISTANT = "template", "user", "assistant"


@dataclass(frozen=True)
class Piece:
    """
    A part of a prompt.

    Attributes:
        text: its characters.
        speaker: `TEMPLATE`, `USER` or `ASSISTANT`.
        learnt: whether the model is to learn to write it.
    """

    text: str
    speaker: str = TEMPLATE
    learnt: bool = False


class RenderedPrompt(str):
    """
    A whole prompt that knows its pieces; made by [`render_prompt`], and taken wherever a whole prompt is.

    Attributes:
        pieces: list of [`Piece`] that make up the text.
    """

    def __new__(cls, pieces: list[Piece]):
        prompt = super().__new__(cls, join_pieces(pieces))
        prompt.pieces = pieces
        return prompt

    def __getnewargs__(self):
        return (self.pieces,)


def join_pieces(pieces: list[Piece]) -> str:
    """The text of pieces."""
    return "".join(piece.text for piece in pieces)


def render_prompt(
    processor: ProcessorMixin, turns: list[tuple[str, str]], query: str, learn_answers: bool = False
) -> RenderedPrompt:
    """
    A whole prompt of a conversation about one image, which stands in front of the first query.

    Args:
        processor: whose chat template to use.
        turns: earlier queries, each with its answer.
        query: what is asked now.
        learn_answers: whether the earlier answers are to be learnt when the prompt is answered.

    Raises:
        ValueError: the chat template does not write the texts as they are.
    """
    form, said = PromptFormat.of(processor), [text.strip() for turn in turns for text in turn] + [query.strip()]
    frame = processor.apply_chat_template(_messages([PLACEHOLDER] * len(said)), add_generation_prompt=True)
    written = frame.split(PLACEHOLDER)
    if len(written) != len(said) + 1:
        raise ValueError(f"the chat template must write every text of a conversation once, got {frame!r}")
    pieces = [Piece(written[0])]
    for number, text in enumerate(said):
        is_answer, after = number % 2 == 1, written[number + 1]
        pieces.append(Piece(text, ASSISTANT if is_answer else USER, learnt=is_answer and learn_answers))
        if is_answer and after.startswith(form.after_answer):
            pieces.append(Piece(form.after_answer, learnt=learn_answers))
            after = after[len(form.after_answer) :]
        lead = form.before_answer if number + 1 < len(said) and not is_answer else ""
        pieces += [Piece(after[: len(after) - len(lead)]), Piece(lead, learnt=learn_answers)]
    prompt = RenderedPrompt([piece for piece in pieces if piece.text])
    check_rendering(processor, [_messages(said)], [prompt])
    return prompt


def _messages(said: list[str]) -> list[dict]:
    """Queries and answers by turns as messages, with the image in front."""
    messages = [
        {"role": "assistant" if number % 2 else "user", "content": [{"type": "text", "text": text}]}
        for number, text in enumerate(said)
    ]
    messages[0]["content"].insert(0, {"type": "image"})
    return messages


def query_prompts(processor: ProcessorMixin, queries: list[str]) -> list[list[Piece]]:
    """
    Pieces of the prompts that ask one query each.

    Raises:
        ValueError: the chat template does not write the texts as they are.
    """
    form, queries = PromptFormat.of(processor), [query.strip() for query in queries]
    prompts = [[Piece(form.first), Piece(query, USER), Piece(form.generation)] for query in queries]
    check_rendering(processor, [_messages([query]) for query in queries], [join_pieces(prompt) for prompt in prompts])
    return prompts


def check_rendering(processor: ProcessorMixin, conversations: list[list[dict]], prompts: list[str]) -> None:
    """Raise a `ValueError` where the chat template writes a conversation otherwise than it was put together."""
    rendered = processor.apply_chat_template(conversations, add_generation_prompt=True) if conversations else []
    for prompt, expected in zip(rendered, prompts, strict=True):
        if prompt != expected:
            raise ValueError(f"the chat template must write texts as they are, expected {expected!r}, got {prompt!r}")


def split_prompt(form: PromptFormat, prompt: str, image_token: str) -> list[Piece]:
    """
    Tell whose words a whole prompt holds, by what the chat template writes around them.

    Where a user spells what the template writes in front of an answer, the rest of that turn counts as the template's.

    Args:
        form: of the processor.
        prompt: as `apply_chat_template` renders it.
        image_token: the first one in a user's turn stands for the image; further ones there are text.

    Returns:
        Pieces of the template's and the users' words; answers of earlier turns count as the template's. One piece if
        the prompt is not of the template's form.
    """
    if isinstance(prompt, RenderedPrompt):
        return prompt.pieces
    lead = form.next_turn.removeprefix(form.after_answer)
    image_mark = form.first.rpartition(lead)[2] if lead in form.first else image_token
    image_mark = image_mark if image_token in image_mark else image_token
    pieces, start, has_image = [], 0, False
    opening = lead
    while lead and (at := prompt.find(opening, start)) >= 0:
        begin = at + len(opening)
        end = prompt.find(form.generation, begin)
        end = len(prompt) if end < 0 else end
        said = prompt[begin:end]
        mark = next((mark for mark in (image_mark, image_token) if not has_image and mark in said), "")
        has_image = has_image or bool(mark)
        before, after = said.split(mark, 1) if mark else ("", said)
        pieces += [Piece(prompt[start:begin]), Piece(before, USER), Piece(mark), Piece(after, USER)]
        start, opening = end, form.next_turn
    return [piece for piece in (*pieces, Piece(prompt[start:])) if piece.text]


__all__ = [
    "ASSISTANT",
    "TEMPLATE",
    "USER",
    "Piece",
    "RenderedPrompt",
    "join_pieces",
    "query_prompts",
    "render_prompt",
    "split_prompt",
]
