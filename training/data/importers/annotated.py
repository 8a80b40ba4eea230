"""What an importer makes of annotations: pictures with named things, and an account of what was taken and left out."""

import io
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from uground.training.data.files import TURN, UNTURN, upright_size
from uground.training.data.jsonl import check_phrase
from uground.training.data.masks import (
    LEAST_POLYGON,
    decode_mask,
    encode_mask,
    is_empty,
    is_number,
    read_mask,
    shown,
)

TAKEN, LEFT_OUT, NOTED = "taken", "left out", "note"
# Folders and the first words of files that name a split, as COCO, YOLO, VOC and Roboflow write them.
SPLIT_NAMES = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "minival", "trainval")
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2", ".ppm", ".mpo")
# What tools call that which is no object.
BACKGROUND_NAMES = ("background", "_background_", "__background__")
NO_AREA = "a mask without a pixel"
ONLY_A_BOX = "a box without a mask (--boxes take fills it)"
DRAWN_BOX = "a box, filled as if it were a mask (--boxes leave leaves it out)"
UNCLEAR_TURN = "a picture that EXIF turns, though its size does not tell whether its masks are turned: taken as seen"


class Tally:
    """How often something was taken, left out or noted, and where first."""

    def __init__(self):
        self.counts: dict[str, Counter[str]] = {TAKEN: Counter(), LEFT_OUT: Counter(), NOTED: Counter()}
        self._first: dict[tuple[str, str], str] = {}

    def add(self, kind: str, what: str, place: str, count: int = 1) -> None:
        """Count `count` more of a kind; `place` is remembered if it is the first."""
        self.counts[kind][what] += count
        self._first.setdefault((kind, what), place)

    def take(self, what: str, place: str) -> None:
        """Count something taken."""
        self.add(TAKEN, what, place)

    def leave(self, why: str, place: str) -> None:
        """Count something left out."""
        self.add(LEFT_OUT, why, place)

    def note(self, what: str, place: str) -> None:
        """Count something that was taken in a way one should know of."""
        self.add(NOTED, what, place)

    def mark(self) -> tuple[dict, dict]:
        """The counts so far, for [`return_to`]."""
        return {kind: Counter(counted) for kind, counted in self.counts.items()}, dict(self._first)

    def return_to(self, mark: tuple[dict, dict]) -> None:
        """Forget what was counted since [`mark`]."""
        self.counts, self._first = mark

    def table(self) -> list[str]:
        """A line for each thing counted: the kind, how often, what, and where first."""
        rows = [
            (kind, str(count), what, self._first[kind, what])
            for kind, counted in self.counts.items()
            for what, count in counted.items()
        ]
        if not any(kind == LEFT_OUT for kind, *_ in rows):
            rows.append((LEFT_OUT, "0", "", ""))
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return [
            f"{kind:{widths[0]}}  {count:>{widths[1]}}  {what}{f' (first: {first})' if first else ''}".rstrip()
            for kind, count, what, first in rows
        ]


@dataclass(frozen=True)
class Picture:
    """
    A picture that annotations are about.

    Attributes:
        path: of its file; where it only lies inside of the annotations, the name of the file to write.
        size: height and width, turned as its EXIF orientation says.
        orientation: of EXIF, 1 for none.
        content: its bytes, where they lie inside of the annotations.
    """

    path: Path
    size: tuple[int, int]
    orientation: int = 1
    content: bytes | None = None

    @classmethod
    def of(cls, path: Path, place: str) -> "Picture":
        """The picture of a file; raises `OSError` or `ValueError`, beginning with `place`, where it is none."""
        return cls(path, *upright_size(path, f"{place}: the image {path}"))

    @classmethod
    def inside(cls, content: bytes, name: str, place: str) -> "Picture":
        """A picture of which the annotations hold the bytes."""
        return cls(Path(name), *upright_size(io.BytesIO(content), f"{place}: its picture"), content)

    def drawn_on(self, size: tuple[int, int] | None, tally: Tally, place: str) -> "Canvas":
        """
        What masks of this size were drawn on: the picture as one sees it or, if only that fits, as it is stored.

        Raises:
            ValueError: neither has this size.
        """
        stored = self.size[::-1] if self.orientation in UNTURN else self.size
        if size is None or tuple(size) == self.size:
            if self.orientation != 1 and (size is None or stored == self.size):
                tally.note(UNCLEAR_TURN, place)
            return Canvas(self, self.size, False)
        if tuple(size) == stored:
            tally.note("a picture whose masks were drawn as it is stored: turned as EXIF says", place)
            return Canvas(self, stored, True)
        raise ValueError(
            f"{place}: the annotations are of a picture {size[1]} wide and {size[0]} high, but {self.path} is "
            f"{self.size[1]} wide and {self.size[0]} high"
        )


@dataclass(frozen=True)
class Canvas:
    """
    The pixels that masks were drawn on.

    Attributes:
        picture: whose they are.
        size: height and width.
        is_stored: whether EXIF still has to turn them.
    """

    picture: Picture
    size: tuple[int, int]
    is_stored: bool

    def mask(self, segmentation: Any, place: str) -> dict:
        """RLE of the upright picture from what [`read_mask`] takes, drawn on this canvas."""
        return self.upright(read_mask(segmentation, self.size, place))

    def pixels(self, mask: np.ndarray) -> dict:
        """RLE of the upright picture from a boolean mask `(H, W)` of this canvas."""
        return self.upright(encode_mask(mask))

    def upright(self, rle: dict) -> dict:
        """RLE of the upright picture from one of this canvas."""
        if not self.is_stored:
            return rle
        turned = Image.fromarray(decode_mask(rle)).transpose(TURN[self.picture.orientation])
        return encode_mask(np.asarray(turned))


@dataclass(frozen=True)
class Thing:
    """
    An object, or all pixels of a class.

    Attributes:
        name: what it is called.
        mask: RLE of the upright picture.
    """

    name: str
    mask: dict


@dataclass(frozen=True)
class Question:
    """
    A query that the annotations themselves hold.

    Attributes:
        query: what is asked.
        masks: RLE of the upright picture, one per object.
        phrases: a name per mask, None where there are none.
        answer: with a `[SEG]` per mask, None where one is to be made.
    """

    query: str
    masks: tuple[dict, ...]
    phrases: tuple[str, ...] | None = None
    answer: str | None = None


@dataclass
class AnnotatedPicture:
    """
    A picture and what is annotated of it.

    Attributes:
        key: names the picture within its data set.
        picture: the picture.
        split: which it belongs to, None where the annotations do not say.
        things: those that have a mask.
        ignore: RLE of pixels that count neither way, and the name they concern, None for all.
        present: names that the picture holds, also where their mask was left out.
        absent: names known not to be in it, where the annotations list them; None where all others are.
        questions: what is asked in words of its own.
    """

    key: str
    picture: Picture
    split: str | None = None
    things: list[Thing] = field(default_factory=list)
    ignore: list[tuple[str | None, dict]] = field(default_factory=list)
    present: set[str] = field(default_factory=set)
    absent: tuple[str, ...] | None = None
    questions: list[Question] = field(default_factory=list)


@dataclass
class Reading:
    """
    What is read, and how; handed to an importer, which iterates over what makes each annotated picture.

    Attributes:
        source: file or folder of the annotations.
        pictures: finds the pictures.
        tally: counts what was taken and left out.
        names_file: the file of `--names`.
        takes_boxes: whether a box counts as a filled mask; None for the custom of the format.
        split: the split that was named, for all.
        names: those of the data set, whether a picture holds them or not.
        takes_predictions: whether what a model predicted counts where nobody annotated.
        least_score: predictions of a lower score are left out.
        columns: those of image, text and mask, of a dataset in columns.
    """

    source: Path
    pictures: "PictureFinder"
    tally: Tally
    names_file: Path | None = None
    takes_boxes: bool | None = None
    split: str | None = None
    names: dict[str, None] = field(default_factory=dict)
    takes_predictions: bool = False
    least_score: float = 0.0
    columns: tuple[str, str, str] = ("image", "text", "mask")

    def files(self, *endings: str) -> list[Path]:
        """
        The source, or the files below it with one of these endings.

        Raises:
            OSError: there is no such file or folder, or none in it.
        """
        if self.source.is_file():
            return [self.source]
        if not self.source.is_dir():
            raise FileNotFoundError(f"the source {self.source} does not exist")
        found = sorted(path for path in self.source.rglob("*") if path.suffix.lower() in endings and path.is_file())
        if not found:
            raise FileNotFoundError(f"the folder {self.source} holds no {' or '.join(endings)} files")
        return found

    def split_of(self, path: Path, by_file: bool = False) -> str | None:
        """
        The split that was named, or the one that a folder around a file is called after.

        Args:
            path: of the file.
            by_file: whether a word of the file's own name may be that of a split, as in `instances_train2017.json`.
        """
        if self.split is not None:
            return self.split
        is_inner = path != self.source and path.is_relative_to(self.source)
        inner = path.relative_to(self.source.parent) if is_inner else Path(path.parent.name, path.name)
        words = [*(re.split(r"[\W_]+", inner.stem) if by_file else []), *inner.parent.parts[::-1]]
        names = [word.lower().rstrip("0123456789") for word in words]
        return next((name for name in names if name in SPLIT_NAMES), None)

    def add(self, found: AnnotatedPicture, name: str, mask: dict, what: str, place: str) -> None:
        """
        Take a mask of a thing if it has a pixel.

        Raises:
            ValueError: no line can name a thing so.
        """
        check_phrase(name, "its name", place)
        found.present.add(name)
        if is_empty(mask, place):
            self.tally.leave(NO_AREA, place)
        else:
            self.tally.take(what, place)
            found.things.append(Thing(name, mask))

    def takes_box(self, place: str, usually: bool) -> bool:
        """Whether a box becomes a mask; says so either way."""
        if self.takes_boxes if self.takes_boxes is not None else usually:
            self.tally.note(DRAWN_BOX, place)
            return True
        self.tally.leave(ONLY_A_BOX, place)
        return False


# What an importer yields for each picture: a call that reads its annotations, and raises where they make no sense.
Entry = Callable[[], AnnotatedPicture]
Importer = Callable[[Reading], Iterator[Entry]]


class PictureFinder:
    """
    Finds the pictures that annotations name.

    Args:
        folder: below which they lie.
        tally: counts those that lie elsewhere than they are said to.
    """

    def __init__(self, folder: Path, tally: Tally):
        self.folder, self.tally = folder, tally
        self._by_name: dict[str, list[Path]] | None = None

    def find(self, name: str, place: str, beside: Path | None = None) -> Path:
        """
        The file of a picture.

        Args:
            name: a path as the annotations have it, in the style of any system.
            place: what to call the annotation in an error message.
            beside: a folder that the path may be relative to as well.

        Raises:
            OSError: there is no such file. ValueError: several files of this name may be meant.
        """
        found = self.lies_at(name, beside)
        return found or self._only(PurePosixPath(name.replace("\\", "/")).name, f"the image {name!r}", place)

    def lies_at(self, name: str, beside: Path | None = None) -> Path | None:
        """The file at the very path that annotations have, None where there is none."""
        given = PurePosixPath(name.replace("\\", "/"))
        paths = [folder / given for folder in (beside, self.folder) if folder is not None]
        return next((path for path in paths if _is_file(path)), None)

    def of_stem(self, stems: Sequence[str], place: str, other_than: Path | None = None) -> Path:
        """
        The picture of one of these paths without an ending, or of this name anywhere.

        Args:
            stems: the paths, below the folder.
            place: what to call the annotation in an error message.
            other_than: a picture that is not meant, such as the mask itself.

        Raises as [`find`] does.
        """
        for stem in stems:
            at = self.folder / stem
            endings = [form for ending in PICTURE_ENDINGS for form in (ending, ending.upper())]
            found = [path for ending in endings if _is_file(path := at.with_name(at.name + ending))]
            found = [path for path in found if other_than is None or not path.samefile(other_than)]
            # A file system that does not tell capitals apart shows one file twice.
            real = list({path.resolve(): path for path in found}.values())
            if len(real) > 1:
                raise ValueError(f"{place}: several pictures may be meant: {real[0]} and {real[1]}")
            if real:
                return real[0]
        name = PurePosixPath(stems[0]).name
        return self._only(name, f"a picture called {name}.*", place, other_than)

    def _only(self, name: str, what: str, place: str, other_than: Path | None = None) -> Path:
        """The one picture below the folder with this name, with or without its ending."""
        if self._by_name is None:
            self._by_name = {}
            for folder, _, files in os.walk(self.folder):
                for path in (Path(folder, file) for file in sorted(files) if file.lower().endswith(PICTURE_ENDINGS)):
                    for key in {path.name, path.stem}:
                        self._by_name.setdefault(key, []).append(path)
        found = [path for path in self._by_name.get(name, []) if other_than is None or not path.samefile(other_than)]
        if not found:
            raise FileNotFoundError(f"{place}: {what} is not below {self.folder}")
        if len(found) > 1:
            raise ValueError(f"{place}: {what} may be {found[0]} or {found[1]}")
        self.tally.note("a picture found by the name of its file, in another folder", place)
        return found[0]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        # Longer than any name of a file, or with a byte that none has.
        return False


def key_of(path: Path, folder: Path) -> str:
    """What a picture is called within its data set: its path below the folder, or its name."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def with_article(noun: str) -> str:
    """A noun behind "a" or "an"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def number_of(value: object, name: str) -> float:
    """
    A finite number.

    Raises:
        ValueError: it is none; the sentence begins with `name`.
    """
    if isinstance(value, str):
        with suppress(ValueError):
            value = float(value)
    if not is_number(value) or not abs(value) < float("inf"):
        raise ValueError(f"{name} must be a number, got {shown(value)}")
    return float(value)


def check_in_pixels(polygons: list, size: tuple[int, int], place: str) -> None:
    """
    Raises:
        ValueError: all numbers of flat polygons lie within 0..1, so that they are shares and no pixels.
    """
    numbers = [number for ring in polygons if isinstance(ring, (list, tuple)) for number in ring]
    are_shares = all(is_number(number) and 0 <= number <= 1 for number in numbers)
    # Whole ones are the corners of the first pixel.
    if len(numbers) >= LEAST_POLYGON and are_shares and not all(number in (0, 1) for number in numbers):
        raise ValueError(
            f"{place}: all numbers of its polygons lie within 0..1, expected pixels of a picture {size[1]} wide and "
            f"{size[0]} high"
        )
