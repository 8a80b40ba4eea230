"""Check a JSONL file before training on it: every bad line with its reason, and a contact sheet of the good ones.

    python -m uground.training.check_data mine.jsonl --model PATH --sheet sheet.png

The format is described in `uground.training.data.jsonl`. A line is read by what reads it in training and put into a
batch with the processor of the model that is to be trained (by default the bundled one), so training takes what passes
here, and stops at what does not, or skips it. The command ends with status 1 if a line is bad.
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from uground import UGroundProcessor, tiny_checkpoint
from uground.checkpoint_loading import load_processor
from uground.command_line import run_command
from uground.processing.drawing import draw_overlay
from uground.training.collator import GroundingCollator
from uground.training.data.jsonl import JsonlSource
from uground.training.data.masks import decode_mask

CELL, TEXT_HEIGHT, COLUMNS, FONT_SIZE = 320, 40, 4, 13
BAD_LINES_SHOWN = 50
# Masks are compared with no target here; a small frame is quick to fill.
LOSS_SIZE = 16


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


def check_data(
    path: str | Path,
    sheet_size: int = 12,
    quiet: bool = False,
    processor: UGroundProcessor | None = None,
    max_length: int | None = None,
) -> DataReport:
    """
    Read every line of a JSONL file and make a batch of it, as training would.

    Args:
        path: of the file.
        sheet_size: examples to keep for a contact sheet.
        quiet: show no progress bar.
        processor: of the model that is to be trained; by default of the bundled one.
        max_length: as in training, where it cuts what is too long; by default that is refused.

    Raises:
        OSError, ValueError: the file is missing, empty or no JSON lines; a bad line is no error but a part of the
            report.
    """
    source, report = JsonlSource(path), DataReport()
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
            {"mask": Image.fromarray(decode_mask(rle)), "label": str(place + 1), "score": 1.0}
            for place, rle in enumerate(example["masks"])
        ]
        picture = draw_overlay(example["image"], segments)
        picture.thumbnail((CELL - 8, CELL - 8))
        sheet.paste(picture, (left + 4, top + 4))
        for line, text in enumerate((example["query"], "> " + example["answer"])):
            text = " ".join(text.split())
            while text and font.getlength(text) > CELL - 8:
                text = text[:-2]
            pen.text((left + 4, top + CELL + line * (FONT_SIZE + 4)), text, fill="black", font=font)
    return sheet


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m uground.training.check_data", description=__doc__.splitlines()[0])
    parser.add_argument("file", help="the JSONL file")
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
    processor = load_processor(options.model or tiny_checkpoint())
    report = check_data(options.file, options.count, False, processor, options.max_length)
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
