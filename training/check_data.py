"""Check data before training on them: every bad line with its reason, and a contact sheet of the good ones.

    python -m uground.training.check_data mine.jsonl --model PATH --sheet sheet.png
    python -m uground.training.check_data prepared/refcoco:val --sheet sheet.png

The format is described in `uground.training.data.jsonl`. A line is read by what reads it in training and put into a
batch with the processor of the model that is to be trained (by default the bundled one), so training takes what passes
here, and stops at what does not, or skips it. Of a prepared folder the rows are checked alike. Both may name a split
behind a colon. The command ends with status 1 if a line is bad.
"""

import argparse
import sys
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
from datasets import Dataset
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from uground import UGroundProcessor, tiny_checkpoint
from uground.checkpoint_loading import load_processor
from uground.command_line import run_command
from uground.processing.drawing import segment_color
from uground.training.collator import GroundingCollator
from uground.training.data.jsonl import REJECT, JsonlSource, named_file
from uground.training.data.masks import decode_mask
from uground.training.data.prepared import prepared_dataset, prepared_splits

# A cell of the contact sheet: two pictures side by side, and lines of text below.
PANEL, GAP, COLUMNS, FONT_SIZE, LINE_HEIGHT, TEXT_LINES = 240, 8, 3, 13, 17, 4
CELL_WIDTH = 2 * PANEL + 3 * GAP
# What surrounds the objects keeps this share of its brightness; ignored pixels are hatched, a stripe every so many.
DIMMED, RIM, HATCH = 0.35, 2, 6
BAD_LINES_SHOWN = 50
# Masks are compared with no target here; a small frame is quick to fill.
LOSS_SIZE = 16


@dataclass(frozen=True)
class Shown:
    """
    An example for the contact sheet.

    Attributes:
        example: in the common schema, its image opened.
        place: the line or row it stands in.
        absent: what is asked for and not there, by name.
    """

    example: dict
    place: str
    absent: list[str]


@dataclass
class DataReport:
    """
    What was found.

    Attributes:
        lines, masks: how many there are, masks of good lines only.
        attributes: how many good lines there are of each.
        problems: one sentence per bad line, which begins with file and line number.
        shown: examples for the contact sheet, spread over the data.
    """

    lines: int = 0
    masks: int = 0
    attributes: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    shown: list[Shown] = field(default_factory=list)


class _PreparedRows:
    """The rows of all splits of a prepared folder, or of one, with the face of a [`JsonlSource`]."""

    def __init__(self, folder: str, split: str | None):
        splits = list(prepared_splits(folder)) if split is None else [split]
        self._parts = [(name, prepared_dataset(folder, name)) for name in splits]
        self._ends = list(accumulate(len(part) for _, part in self._parts))
        self._folder = folder

    def __len__(self) -> int:
        return self._ends[-1]

    def _at(self, index: int) -> tuple[str, Dataset, int]:
        part = bisect_right(self._ends, index)
        name, data = self._parts[part]
        return name, data, index - (self._ends[part - 1] if part else 0)

    def __getitem__(self, index: int) -> dict:
        _, data, row = self._at(index)
        example = data[row]
        return {"image": example["image"], "examples": [example]}

    def name_of(self, index: int) -> str:
        name, _, row = self._at(index)
        return f"{self._folder}:{name} row {row}"


def open_data(name: str | Path) -> JsonlSource | _PreparedRows:
    """
    What is to be checked: a JSONL file or a prepared folder, or of either the split behind a colon.

    Raises:
        OSError: there is no such thing. ValueError: it is none of these, or has no such split.
    """
    name = str(name)
    folder, colon, split = name.rpartition(":")
    if Path(name).is_dir():
        folder, split = name, None
    elif not (colon and Path(folder).is_dir()):
        return JsonlSource(*(named_file(name) or (name,)))
    if not prepared_splits(folder):
        raise ValueError(f"the folder {folder} holds no prepared dataset (data/SPLIT-*.parquet)")
    return _PreparedRows(folder, split)


def check_data(
    path: str | Path,
    sheet_size: int = 12,
    quiet: bool = False,
    processor: UGroundProcessor | None = None,
    max_length: int | None = None,
) -> DataReport:
    """
    Read every line of a JSONL file, or row of a prepared folder, and make a batch of it, as training would.

    Args:
        path: of the file or folder, with or without `:SPLIT`.
        sheet_size: examples to keep for a contact sheet.
        quiet: show no progress bar.
        processor: of the model that is to be trained; by default of the bundled one.
        max_length: as in training, where it cuts what is too long; by default that is refused.

    Raises:
        OSError, ValueError: the file is missing, empty or no JSON lines; a bad line is no error but a part of the
            report.
    """
    source, report = open_data(path), DataReport()
    processor = UGroundProcessor.from_pretrained(tiny_checkpoint()) if processor is None else processor
    collator = GroundingCollator(processor, LOSS_SIZE, max_length=max_length)
    every = max(1, len(source) // max(1, sheet_size))
    for index in tqdm(range(len(source)), unit="line", disable=quiet):
        report.lines += 1
        name = example_id = source.name_of(index)
        try:
            item = source[index]
            (example,) = item["examples"]
            example_id = example["id"]
            collator.check(item)
        except (OSError, ValueError) as error:
            sentence = " ".join(str(error).splitlines())
            if not sentence.startswith(f"{name}:"):
                # The collator knows an example by its id only.
                sentence = f"{name}: {sentence.removeprefix(f'example {example_id}: ')}"
            report.problems.append(sentence)
            continue
        report.masks += len(example["masks"])
        report.attributes[example["attribute"]] += 1
        if index % every == 0 and len(report.shown) < sheet_size:
            report.shown.append(Shown(example, name, _absent(source, index, example)))
    return report


def _absent(source, index: int, example: dict) -> list[str]:
    """Names of what a line asks for and says is not there."""
    if REJECT not in example["answer"]:
        return []
    line = source.line(index) if isinstance(source, JsonlSource) else {}
    absent = []
    for turn in line.get("turns") or [line]:
        masks, phrases = turn.get("masks") or [], turn.get("phrases")
        absent += [name for name, mask in zip(phrases or (), masks, strict=True) if mask is None] if phrases else []
    return absent or [
        example["query"] if not example["masks"] else f"{example['answer'].count(REJECT)} of what is asked"
    ]


def contact_sheet(shown: list[Shown]) -> Image.Image:
    """
    Examples in a grid: the picture, beside it the same with its objects in their own colours and the rest dimmed, and
    below where it stands, the query, the answer, and the names of masks and of what is absent.
    """
    columns = min(COLUMNS, max(1, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    height = PANEL + 2 * GAP + TEXT_LINES * LINE_HEIGHT
    sheet = Image.new("RGB", (columns * CELL_WIDTH, rows * height), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, one in enumerate(shown):
        left, top = number % columns * CELL_WIDTH + GAP, number // columns * height + GAP
        picture, masks = mask_panels(one.example)
        sheet.paste(picture, (left, top))
        sheet.paste(masks, (left + PANEL + GAP, top))
        top += PANEL + 2
        place = f"{one.place.rsplit('/', 1)[-1]}  {one.example['attribute']}"
        for line, text in enumerate((place, one.example["query"], f"> {one.example['answer']}")):
            _write(pen, (left, top + line * LINE_HEIGHT), text, "black", font, CELL_WIDTH - 2 * GAP)
        _write_names(pen, one, (left, top + 3 * LINE_HEIGHT), font)
    return sheet


def mask_panels(example: dict) -> tuple[Image.Image, Image.Image]:
    """
    Two pictures of an example, `PANEL` pixels on the longer side: as it is, and with all but its objects dimmed, a rim
    of the colour of its number around each object, and stripes over what is ignored.
    """
    picture = example["image"].convert("RGB")
    scale = PANEL / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    picture = picture.resize(size, Image.Resampling.LANCZOS)
    masks = [_panel_mask(rle, size) for rle in example["masks"]]
    objects = np.any(masks, axis=0) if masks else np.zeros(size[::-1], dtype=bool)
    pixels = np.asarray(picture)
    drawn = np.where(objects[..., None], pixels, (pixels * DIMMED).astype(np.uint8))
    for number, mask in enumerate(masks):
        grown = Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(2 * RIM + 1))
        drawn[(np.asarray(grown) > 0) & ~objects] = segment_color(number)
    if example["ignore"] is not None:
        rows, columns = np.indices(objects.shape)
        stripes = (rows + columns) % HATCH == 0
        drawn[_panel_mask(example["ignore"], size) & ~objects & stripes] = 255
    return picture, Image.fromarray(drawn)


def _panel_mask(rle: dict, size: tuple[int, int]) -> np.ndarray:
    mask = Image.fromarray(decode_mask(rle)).convert("L")
    return np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128


def _write(pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour, font, width: float) -> float:
    """Write as much of a text as fits; returns how wide it is."""
    text = " ".join(text.split())
    while text and font.getlength(text) > width:
        text = text[:-2]
    pen.text(place, text, fill=colour, font=font)
    return font.getlength(text)


def _write_names(pen: ImageDraw.ImageDraw, one: Shown, place: tuple[int, int], font) -> None:
    """The masks by number and name, each in the colour of its rim, then what is ignored and what is absent."""
    example, (left, top) = one.example, place
    phrases = example["phrases"] if len(example["phrases"]) == len(example["masks"]) else [""] * len(example["masks"])
    names = [(f"{i + 1} {phrase}".strip(), segment_color(i)) for i, phrase in enumerate(phrases)]
    names += [("/// ignored", "grey")] * (example["ignore"] is not None)
    names += [(f"not there: {name}", "red") for name in one.absent]
    right = left + CELL_WIDTH - 2 * GAP
    for name, colour in names:
        left += _write(pen, (round(left), top), name, colour, font, right - left) + GAP


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m uground.training.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the JSONL file or prepared folder, with or without :SPLIT")
    parser.add_argument("--sheet", help="where to write the contact sheet, such as sheet.png")
    parser.add_argument("--count", type=int, default=12, help="examples on the contact sheet")
    parser.add_argument("--model", help="the checkpoint to be trained; by default the bundled one")
    parser.add_argument("--max_length", type=int, help="as in training: cut what is longer")
    options = parser.parse_args(argv)
    for name in ("count", "max_length"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 where every line is good, 1 where one is bad, or 2 after an error."""
    options = _parse(argv)
    return run_command("check_data", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    if options.sheet:
        check_writable(Path(options.sheet))
    processor = load_processor(options.model or tiny_checkpoint())
    report = check_data(options.file, options.count, False, processor, options.max_length)
    for problem in report.problems[:BAD_LINES_SHOWN]:
        print(problem)
    if len(report.problems) > BAD_LINES_SHOWN:
        print(f"… and {len(report.problems) - BAD_LINES_SHOWN} more")
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(report.attributes.items()))
    good = report.lines - len(report.problems)
    print(f"{good} of {report.lines} lines are good ({kinds or 'none'}), with {report.masks} masks", flush=True)
    if options.sheet and report.shown:
        contact_sheet(report.shown).save(options.sheet)
        print(f"{len(report.shown)} of them are drawn in {options.sheet}")
    return 1 if report.problems else 0


def check_writable(path: Path) -> None:
    """
    Raises:
        OSError: no file can be written there. ValueError: its ending names no picture that can be written.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if path.suffix.lower() not in endings:
        raise ValueError(f"--sheet must end as a picture does, such as .png, got {str(path)!r}")
    existed = path.exists()
    with open(path, "ab"):
        pass
    if not existed:
        path.unlink()


if __name__ == "__main__":
    sys.exit(main())
