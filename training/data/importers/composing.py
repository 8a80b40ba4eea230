"""From annotated pictures to lines of JSONL: what is asked about each, and what asks for what is not there."""

import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from uground.training.data.importers.annotated import BACKGROUND_NAMES, AnnotatedPicture, Tally
from uground.training.data.masks import decode_mask, encode_mask, is_empty, union_mask

UNION, LIST, EACH = "union", "list", "each"
SEVERAL = (UNION, LIST, EACH)
NAME = "{name}"


def check_templates(templates: Sequence[str]) -> None:
    """
    Raises:
        ValueError: one has no `{name}`, or other words in braces.
    """
    for template in templates:
        if NAME not in template or any(brace in template.replace(NAME, "") for brace in "{}"):
            raise ValueError(f"--query must hold {NAME} and no other braces, got {template!r}")


class Composer:
    """
    Writes lines about pictures.

    Args:
        output: the JSONL file, to which paths of pictures are relative.
        folder: where pictures go that only lie inside of annotations.
        templates: queries with `{name}`; each line draws one of them.
        several: what becomes of several objects of a name: `"union"`, one mask of all; `"list"`, one line with a mask
            for each; `"each"`, a line for each.
        negatives: lines per picture about a name that it lacks, at most.
        seed: of the draws.
        tally: counts what is left out.
    """

    def __init__(
        self,
        output: Path,
        folder: Path,
        templates: Sequence[str],
        several: str,
        negatives: int,
        seed: int,
        tally: Tally,
    ):
        self.output, self.folder, self.templates, self.several = output, folder, templates, several
        self.negatives, self.seed, self.tally = negatives, seed, tally
        self._ids: Counter[str] = Counter()
        # What negatives need of each picture: two annotation files may be about the same one.
        self._seen: dict[str, AnnotatedPicture] = {}

    def lines(self, found: AnnotatedPicture) -> Iterator[dict]:
        """The lines about what a picture holds, and what its annotations ask in words."""
        path = self._path(found)
        self._remember(path, found)
        by_name: dict[str, list[dict]] = {}
        for thing in found.things:
            by_name.setdefault(thing.name, []).append(thing.mask)
        for name, objects in by_name.items():
            for masks in self._grouped(objects, found.picture.size):
                attribute = {"attribute": "gres"} if len(objects) > 1 and self.several == UNION else {}
                phrases = {"phrases": [name] * len(masks)}
                yield self._line(found, path, name, masks, **phrases, **attribute, **self._ignored(found, name, masks))
        for asked in found.questions:
            more = {"phrases": None if asked.phrases is None else list(asked.phrases), "answer": asked.answer}
            more = {key: value for key, value in more.items() if value is not None}
            masks = list(asked.masks)
            yield self._line(
                found, path, asked.query, masks, query=asked.query, **more, **self._ignored(found, None, masks)
            )
        unasked = {name for name, _ in found.ignore if name is not None} - set(by_name)
        for name in sorted(unasked):
            self.tally.leave("a class of which a picture holds nothing but what is ignored", f"{found.key}, {name}")
        if not by_name and not found.questions:
            self.tally.leave("a picture of which no mask was taken", found.key)

    def denials(self, names: Sequence[str]) -> Iterator[dict]:
        """Lines about names of the data set that the pictures lack, once all of them were seen."""
        for path, found in self._seen.items() if self.negatives else ():
            known = names if found.absent is None else found.absent
            # "Cup" and "cup" are one name, and no picture is without its background.
            unasked = {name.casefold() for name in (*found.present, *BACKGROUND_NAMES)}
            lacking = sorted(name for name in set(known) if name.casefold() not in unasked)
            rng = random.Random(f"{self.seed} {path}")
            chosen = rng.sample(lacking, min(self.negatives, len(lacking)))
            if len(chosen) < self.negatives:
                self.tally.leave("a negative: the picture lacks too few names", found.key)
            for name in chosen:
                yield self._line(found, path, name, [])

    def _path(self, found: AnnotatedPicture) -> str:
        picture = found.picture
        file = picture.path if picture.content is None else self.folder / picture.path
        try:
            return Path(os.path.relpath(file, self.output.parent)).as_posix()
        except ValueError:  # another drive
            return file.resolve().as_posix()

    def _remember(self, path: str, found: AnnotatedPicture) -> None:
        first = self._seen.get(path)
        if first is None:
            # Without its masks: all pictures of a data set are remembered.
            self._seen[path] = AnnotatedPicture(
                found.key, found.picture, found.split, present=set(found.present), absent=found.absent
            )
            return
        first.present |= found.present
        if found.absent is not None:
            both = set(found.absent) if first.absent is None else set(found.absent) & set(first.absent)
            first.absent = tuple(sorted(both))

    def _grouped(self, masks: list[dict], size: tuple[int, int]) -> list[list[dict]]:
        """The masks of each line about a name."""
        if self.several == UNION:
            return [[union_mask(masks, size)]]
        return [masks] if self.several == LIST else [[mask] for mask in masks]

    def _ignored(self, found: AnnotatedPicture, name: str | None, masks: list[dict]) -> dict:
        ignored = [mask for about, mask in found.ignore if about in (None, name)]
        if not ignored:
            return {}
        # What is known to be the object counts, also where a crowd is drawn over it.
        size = found.picture.size
        left = decode_mask(union_mask(ignored, size)) & ~decode_mask(union_mask(masks, size))
        rle = encode_mask(np.asarray(left))
        return {} if is_empty(rle) else {"ignore": rle}

    def _line(self, found: AnnotatedPicture, path: str, name: str, masks: list[dict], **more) -> dict:
        identifier = base = " ".join(filter(None, (found.split, found.key, name)))
        while identifier in self._ids:
            # Another class may be called so: "cup 2".
            self._ids[base] += 1
            identifier = f"{base} {self._ids[base]}"
        self._ids[identifier] = 1
        query = random.Random(f"{self.seed} {identifier}").choice(self.templates).replace(NAME, name)
        split = {} if found.split is None else {"split": found.split}
        return {"id": identifier, **split, "image": path, "query": query, "masks": masks, **more}


__all__ = ["EACH", "LIST", "SEVERAL", "UNION", "Composer", "check_templates"]
