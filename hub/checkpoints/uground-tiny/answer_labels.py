"""The words of an answer: its text, the query it answers, and what each of its segments is called."""

import re

from transformers import ProcessorMixin

from .prompt_format import PLACEHOLDER, PromptFormat

# Words in front of a phrase that name nothing: "Sure, the tree is [SEG]", "… and whatever can swim is [SEG]".
LEAD_INS = re.compile(
    r"^(?:[\s,;:.!?]+"
    r"|(?:and|so|then|but|while|also|sure|yes|okay|ok|certainly|of course|(?:here|there) (?:is|are))\b)+",
    re.IGNORECASE,
)
# What links a phrase to its segment token: "the tree is", "the boat:", "the cup at".
LINKS = re.compile(r"(?:\s+(?:is|are|was|were|at|here))*[\s,:;=-]*$", re.IGNORECASE)
# What an answer says of a thing that is not there, around its name: "no boat", "the tree is not in the image".
ABSENCE = re.compile(r"^no\s+|\s+(?:is|are|was|were)(?:\s+not|n't)\b.*$", re.IGNORECASE)
# Phrases that only point back to the query: "it is", "the segmentation result is", "they are".
POINTERS = re.compile(
    r"^(?:it|they|this|that|these|those|one|none|nothing|there|here"
    r"|(?:the\s+)?(?:segmentation\s+|segmented\s+|predicted\s+)?(?:result|mask|answer|output|object|target|region)s?)?$",
    re.IGNORECASE,
)


def decode_answer(processor: ProcessorMixin, written_ids: list[int]) -> str:
    """
    The text of what was written, up to the end of the sequence: without end, beginning and padding tokens, with
    segment and reject tokens.
    """
    tokenizer = processor.tokenizer
    if tokenizer.eos_token_id in written_ids:
        written_ids = written_ids[: written_ids.index(tokenizer.eos_token_id)]
    dropped = {tokenizer.pad_token_id, tokenizer.bos_token_id}
    text = tokenizer.decode([token for token in written_ids if token not in dropped], skip_special_tokens=False)
    # Tokenizers differ in the white space they leave around added tokens: "is[SEG]and", "[SEG] .".
    marks = "|".join(map(re.escape, (processor.segment_token, processor.reject_token)))
    text = re.sub(rf"\s*({marks})\s*", r" \1 ", text)
    return re.sub(rf"({marks})\s+(?=[.,;:!?)]|$)", r"\1", text).strip()


def recover_query(processor: ProcessorMixin, prompt_ids: list[int]) -> str:
    """
    The last query of a prompt, found as what the chat template does not write itself; `""` if the prompt is not of
    the template's form.

    Args:
        processor: the processor that made the prompt.
        prompt_ids: one row of `input_ids`, padding and image tokens included.
    """
    tokenizer = processor.tokenizer
    if not tokenizer.is_fast:
        return ""
    first, next_turn, generation = _frame_ids(processor)
    ids = prompt_ids
    while ids and ids[0] == tokenizer.pad_token_id:
        ids = ids[1:]
    image = processor.image_token_id
    ids = [token for i, token in enumerate(ids) if token != image or ids[i - 1 : i] != [image]]
    end = len(ids) - len(generation)
    if end < 0 or ids[end:] != generation:
        return ""
    turns = [i for i in range(end) if next_turn and ids[i : i + len(next_turn)] == next_turn]
    if turns:
        start = turns[-1] + len(next_turn)
    else:
        # What stands before the image may be another system message than the template's own.
        behind = first[first.index(image) + 1 :]
        start = ids.index(image) + 1 + len(behind) if image in ids else end + 1
        if start > end or ids[start - len(behind) : start] != behind:
            return ""
    return tokenizer.decode(ids[start:end], skip_special_tokens=False).strip()


def _frame_ids(processor) -> tuple[list[int], list[int], list[int]]:
    """Ids of what the template writes before a first query, between an answer and the next query, and after that."""
    form = PromptFormat.of(processor)
    pieces = (form.first, form.generation + form.before_answer, form.next_turn, form.generation)
    text = PLACEHOLDER.join(pieces)
    add_special_tokens = not (processor.tokenizer.bos_token and text.startswith(processor.tokenizer.bos_token))
    encoded = processor.tokenizer(
        text, add_special_tokens=add_special_tokens, return_offsets_mapping=True, verbose=False
    )
    tokens = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    first_end = len(pieces[0])
    turn_start = first_end + len(pieces[1]) + 2 * len(PLACEHOLDER)
    turn_end = turn_start + len(pieces[2])
    return (
        [token for token, (_, end) in tokens if end <= first_end],
        [token for token, (start, end) in tokens if turn_start <= start and end <= turn_end],
        [token for token, (start, _) in tokens if start >= turn_end + len(PLACEHOLDER)],
    )


def label_segments(answer: str, query: str, segment_token: str, reject_token: str) -> list[str]:
    """
    What each segment of an answer is called.

    A segment is called by the phrase in front of its segment token; several tokens after one phrase share it, or
    share it out if it enumerates as many things ("a, b and c are [SEG], [SEG] and [SEG]"). Where the phrase only
    points back ("It is [SEG]"), the segment is called by the query.

    Returns:
        One label per segment token of `answer`, in reading order.
    """
    return [label for label, token in _labels(answer, query, segment_token, reject_token) if token == segment_token]


def label_absent(answer: str, query: str, segment_token: str, reject_token: str) -> list[str]:
    """What each reject token of an answer says is not there, named as by [`label_segments`]."""
    labels = [label for label, token in _labels(answer, query, segment_token, reject_token) if token == reject_token]
    return [ABSENCE.sub("", label) or query for label in labels]


def _labels(answer: str, query: str, segment_token: str, reject_token: str) -> list[tuple[str, str]]:
    """Name and token of each segment or reject token of an answer."""
    marks = "|".join(map(re.escape, (segment_token, reject_token)))
    pieces = re.split(f"({marks})", answer)
    groups: list[tuple[str, list[str]]] = []
    for text, mark in zip(pieces[0::2], pieces[1::2], strict=False):
        if groups and not LEAD_INS.sub("", text):
            groups[-1][1].append(mark)
        else:
            groups.append((_phrase(text), [mark]))
    labels = []
    for phrase, tokens in groups:
        names = re.split(r"\s*,\s*(?:and\s+)?|\s+and\s+", phrase)
        names = names if len(names) == len(tokens) else [phrase] * len(tokens)
        labels += [(name or query, token) for name, token in zip(names, tokens, strict=True)]
    return labels


def _phrase(text: str) -> str:
    """The name in the words in front of a segment token; `""` if they hold none."""
    sentence = re.split(r"[.!?]\s+", text.strip())[-1]
    phrase = LINKS.sub("", LEAD_INS.sub("", sentence))
    last_clause = LEAD_INS.sub("", phrase.rsplit(",", 1)[-1])
    return "" if POINTERS.match(last_clause) else phrase


__all__ = ["decode_answer", "label_absent", "label_segments", "recover_query"]
