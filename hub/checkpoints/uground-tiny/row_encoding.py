"""From the pieces of prompts and answers to token ids: whose words they are decides what a special token is.

The text of a row is read as a whole, so that the ids are those of its plain text, unless a token would join a prompt
with its answer. Where an answer begins and ends is how many ids the pieces before have; nothing is searched for.
"""

import json
import re
from dataclasses import dataclass
from itertools import pairwise

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .prompt_format import PromptFormat
from .prompt_pieces import ASSISTANT, TEMPLATE, USER, Piece, join_pieces

# Around the stand-in of a special token; both are no characters, so no text holds them.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
LINE_BREAK = "\n"


@dataclass
class Row:
    """
    One row before padding.

    Attributes:
        ids: token ids, one per image token too.
        learnt: of each, whether the model is to learn to write it.
        offsets: of each, where in the text its characters begin and end; of an image token those of its placeholder.
    """

    ids: list[int]
    learnt: list[bool]
    offsets: list[tuple[int, int]]


class SpecialTokens:
    """
    Reads texts in which a special token counts only where it is meant.

    Args:
        processor: the `UGroundProcessor` whose tokenizer and template are read.

    Attributes:
        names: every token that means more than its letters: the tokenizer's special tokens, those of the processor,
            and the added ones that the chat template writes. Each with its id.
    """

    def __init__(self, processor: ProcessorMixin):
        self._in_answers = {processor.segment_token, processor.reject_token}
        added = processor.tokenizer.added_tokens_decoder
        form = PromptFormat.of(processor)
        written = "\0".join((form.first, form.generation, form.next_turn, form.after_answer))
        own = (*processor.tokenizer.all_special_tokens, processor.image_token, *self._in_answers)
        self.names = {
            token.content: number
            for number, token in added.items()
            if token.special or token.content in own or token.content in written
        }
        self._unknown = processor.tokenizer.unk_token
        self._backend = None

    def encode(
        self, tokenizer: PreTrainedTokenizerBase, rows: list[list[Piece]], add_special_tokens: bool | None
    ) -> list[Row]:
        """
        Rows whose image is one placeholder.

        Args:
            tokenizer: that of the processor.
            rows: pieces of each.
            add_special_tokens: as in the processor's call.
        """
        if add_special_tokens is None:
            bos_token = tokenizer.bos_token
            add_special_tokens = not (bos_token and join_pieces(rows[0]).startswith(bos_token))
        edges = [_edges(pieces) for pieces in rows]
        begun = [pieces[:edge] for pieces, places in zip(rows, edges, strict=True) for edge in places]
        read = self._read(tokenizer, [*rows, *begun], add_special_tokens)
        prefixes, encoded = iter(ids for ids, _ in read[len(rows) :]), []
        for pieces, places, (ids, offsets) in zip(rows, edges, read[: len(rows)], strict=True):
            begins = [next(prefixes) for _ in places]
            if all(ids[: len(begin)] == begin for begin in begins):
                bounds = pairwise((0, *map(len, begins), len(ids)))
                counts = [
                    (pieces[place].learnt, high - low) for place, (low, high) in zip((0, *places), bounds, strict=True)
                ]
                row = Row(ids, [is_learnt for is_learnt, count in counts for _ in range(count)], offsets)
            else:
                row = self._read_in_parts(tokenizer, pieces, places, add_special_tokens)
            encoded.append(row)
        return encoded

    def _read(self, tokenizer, rows: list[list[Piece]], add_special_tokens: bool) -> list[tuple[list, list]]:
        """Ids and offsets of each row, its text read as a whole."""
        texts = [join_pieces(pieces) for pieces in rows]
        encoded = tokenizer(
            texts,
            add_special_tokens=add_special_tokens,
            padding=False,
            truncation=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        read = []
        for pieces, text, ids, offsets in zip(
            rows, texts, encoded["input_ids"], encoded["offset_mapping"], strict=True
        ):
            if self._is_misread(pieces, text, ids, offsets):
                ids, offsets = self._read_literally(tokenizer, pieces, add_special_tokens)
            read.append((ids, [tuple(offset) for offset in offsets]))
        return read

    def _read_in_parts(self, tokenizer, pieces: list[Piece], places: list[int], add_special_tokens: bool) -> Row:
        """
        A row whose tokenizer would join what is learnt with what stands around it.

        A prompt is read without its answer when an answer is to be written, so it must be the same ids here.
        """
        # Behind a line break, as tokenizers may put a space in front of a text.
        [(break_ids, _)] = self._read(tokenizer, [[Piece(LINE_BREAK)]], False)
        row, start = Row([], [], []), 0
        for low, high in pairwise((0, *places, len(pieces))):
            part = pieces[low:high]
            [(ids, offsets)] = self._read(tokenizer, [part], add_special_tokens and not start)
            if start:
                [(behind, shifted)] = self._read(tokenizer, [[Piece(LINE_BREAK), *part]], False)
                if behind[: len(break_ids)] == break_ids:
                    ids = behind[len(break_ids) :]
                    back = len(LINE_BREAK)
                    offsets = [(begin - back, end - back) for begin, end in shifted[len(break_ids) :]]
            row.ids += ids
            row.learnt += [part[0].learnt] * len(ids)
            row.offsets += [(begin + start, end + start) for begin, end in offsets]
            start += len(join_pieces(part))
        return row

    def _is_misread(self, pieces: list[Piece], text: str, ids: list[int], offsets) -> bool:
        """Whether a special token was read where somebody only spells it."""
        names = {number: name for name, number in self.names.items()}
        spans = [(start, end, piece.speaker) for start, end, piece in _spans(pieces) if piece.speaker != TEMPLATE]
        for number, (begin, end) in zip(ids, offsets, strict=True):
            name = names.get(number)
            spelt = text[begin:end]
            # What is not in the vocabulary is read as the unknown token.
            if name is None or (name == self._unknown and spelt.strip() != name):
                continue
            begin, end = begin + len(spelt) - len(spelt.lstrip()), end - len(spelt) + len(spelt.rstrip())
            for start, stop, speaker in spans:
                is_meant = speaker == ASSISTANT and name in self._in_answers
                if begin < stop and end > start and not is_meant:
                    return True
        return False

    def _read_literally(self, tokenizer, pieces: list[Piece], add_special_tokens: bool):
        """Ids and offsets of a row by a tokenizer whose special tokens are spelt as no text spells them."""
        if self._backend is None:
            self._backend = self._make_backend(tokenizer.backend_tokenizer)
        backend, stand_ins, numbers = self._backend
        everywhere = _pattern(self.names)
        in_answers = _pattern(self._in_answers & self.names.keys())
        text, places = "", []
        for start, _, piece in _spans(pieces):
            if piece.speaker != TEMPLATE and (OPEN in piece.text or CLOSE in piece.text):
                raise ValueError(f"a text must not hold the noncharacters U+FDD0 and U+FDD1, got {piece.text[:200]!r}")
            pattern = {TEMPLATE: everywhere, ASSISTANT: in_answers, USER: None}[piece.speaker]
            done = 0
            for found in pattern.finditer(piece.text) if pattern is not None else ():
                plain, name = piece.text[done : found.start()], stand_ins[found.group()]
                text += plain + name
                places += range(start + done, start + found.start())
                # All of a stand-in stands for all of its token.
                places += [start + found.start()] * len(name)
                done = found.end()
            text += piece.text[done:]
            places += range(start + done, start + len(piece.text))
        encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        places.append(len(join_pieces(pieces)))
        ids, offsets = [], []
        for number, offset, is_inserted in zip(
            encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True
        ):
            # What the tokenizer puts around a text of itself has the ids it always had.
            ids.append(number if is_inserted else numbers.get(number, number))
            offsets.append((0, 0) if is_inserted else (places[offset[0]], places[offset[1]]))
        return ids, offsets

    def _make_backend(self, backend):
        """That tokenizer, the stand-in of each special token, and what the ids of its added tokens are in truth."""
        settings = json.loads(backend.to_str())
        settings["truncation"] = settings["padding"] = None
        stand_ins, truth = {}, {}
        for place, token in enumerate(settings["added_tokens"]):
            if token["content"] in self.names:
                stand_ins[token["content"]] = f"{OPEN}{place}{CLOSE}"
                token["content"], token["normalized"] = stand_ins[token["content"]], False
            truth[token["content"]] = token["id"]
        backend = type(backend).from_str(json.dumps(settings))
        return backend, stand_ins, {backend.token_to_id(content): number for content, number in truth.items()}


def _pattern(names) -> re.Pattern | None:
    """What finds any of some tokens, of two that begin alike the longer."""
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _spans(pieces: list[Piece]):
    """Where each piece begins and ends in the text of all."""
    start = 0
    for piece in pieces:
        yield start, start + len(piece.text), piece
        start += len(piece.text)


def _edges(pieces: list[Piece]) -> list[int]:
    """Numbers of the pieces at which what is learnt begins or ends."""
    return [place for place in range(1, len(pieces)) if pieces[place].learnt != pieces[place - 1].learnt]


def expand_image(row: Row, image_token_id: int | None, count: int) -> Row:
    """
    The row with `count` image tokens for its placeholder.

    Raises:
        ValueError: it does not hold exactly one.
    """
    if row.ids.count(image_token_id) != 1:
        raise ValueError(f"a prompt must hold the image token once, got it {row.ids.count(image_token_id)} times")
    place = row.ids.index(image_token_id)

    def repeat(values: list) -> list:
        return values[:place] + [values[place]] * count + values[place + 1 :]

    return Row(repeat(row.ids), repeat(row.learnt), repeat(row.offsets))


__all__ = ["Row", "SpecialTokens", "expand_image"]
