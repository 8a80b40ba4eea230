"""Check a JSONL file before training on it: every bad line with its reason, and a contact sheet of the good ones.

    python -m uground.training.check_data mine.jsonl --sheet sheet.png

The format is described in `uground.training.data.jsonl`. The command ends with status 1 if a line is bad.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from pycocotools import mask as coco_mask
from tqdm import tqdm

from uground.command_line import run_command
from uground.processing.drawing import draw_overlay
from uground.training.data.jsonl import JsonlSource

CELL, TEXT_HEIGHT, COLUMNS, FONT_SIZE = 320, 40, 4, 13
BAD_LINES_SHOWN = 50


@dataclass
class DataReport:
    """
    What was found in a file.

    Attributes:
        lines, masks: how many there are, masks of good lines only.
        attributes: how many good lines there are of each.
        problems: one sentence per bad line, which begins with file and line number.
        shown: examples for the contact sheet, spread over the file.
    """

    lines: int = 0
    masks: int = 0
    attributes: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    shown: list[dict] = field(default_factory=list)


def check_data(path: str | Path, sheet_size: int = 12, quiet: bool = False) -> DataReport:
    """
    Read every line of a JSONL file as training would.

    Args:
        path: of the file.
        sheet_size: examples to keep for a contact sheet.
        quiet: show no progress bar.

    Raises:
        OSError, ValueError: the file is missing or empty; a bad line is no error but a part of the report.
    """
    source, report = JsonlSource(path), DataReport()
    every, seen = max(1, len(source) // max(1, sheet_size)), set()
    for index in tqdm(range(len(source)), unit="line", disable=quiet):
        report.lines += 1
        try:
            example = source[index]["examples"][0]
            if example["id"] in seen:
                raise ValueError(f"{source.name_of(index)}: the id {example['id']!r} stands in an earlier line too")
        except (OSError, ValueError) as error:
            report.problems.append(str(error))
            continue
        seen.add(example["id"])
        report.masks += len(example["masks"])
        report.attributes[example["attribute"]] += 1
        if index % every == 0 and len(report.shown) < sheet_size:
            report.shown.append(example)
    return report


def contact_sheet(examples: list[dict]) -> Image.Image:
    """Examples in a grid: the image with its masks, query and answer below."""
    columns = min(COLUMNS, max(1, len(examples)))
    rows = max(1, -(-len(examples) // columns))
    sheet = Image.new("RGB", (columns * CELL, rows * (CELL + TEXT_HEIGHT)), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, example in enumerate(examples):
        left, top = number % columns * CELL, number // columns * (CELL + TEXT_HEIGHT)
        segments = [
            {"mask": Image.fromarray(coco_mask.decode(rle) * 255), "label": str(place + 1), "score": 1.0}
            for place, rle in enumerate(example["masks"])
        ]
        picture = draw_overlay(example["image"], segments)
        picture.thumbnail((CELL - 8, CELL - 8))
        sheet.paste(picture, (left + 4, top + 4))
        for line, text in enumerate((example["query"], "> " + example["answer"])):
            while text and font.getlength(text) > CELL - 8:
                text = text[:-2]
            pen.text((left + 4, top + CELL + line * (FONT_SIZE + 4)), text, fill="black", font=font)
    return sheet


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m uground.training.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the JSONL file")
    parser.add_argument("--sheet", help="where to write the contact sheet, such as sheet.png")
    parser.add_argument("--count", type=int, default=12, help="examples on the contact sheet")
    options = parser.parse_args(argv)
    if options.count < 1:
        parser.error(f"--count must be at least 1, got {options.count}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0 where every line is good, 1 where one is bad, or 2 after an error."""
    options = _parse(argv)
    return run_command("check_data", lambda: _run(options))


def _run(options: argparse.Namespace) -> int:
    report = check_data(options.file, options.count)
    if options.sheet and report.shown:
        contact_sheet(report.shown).save(options.sheet)
    for problem in report.problems[:BAD_LINES_SHOWN]:
        print(problem)
    if len(report.problems) > BAD_LINES_SHOWN:
        print(f"… and {len(report.problems) - BAD_LINES_SHOWN} more")
    kinds = ", ".join(f"{count} {name}" for name, count in sorted(report.attributes.items()))
    good = report.lines - len(report.problems)
    print(f"{good} of {report.lines} lines are good ({kinds or 'none'}), with {report.masks} masks")
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
