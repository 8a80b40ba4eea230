"""What tests of converters share: converting and reading back, and shapes drawn without the code under test."""

import base64
import io

import numpy as np
from miniatures import SIZE, decoded
from PIL import Image, ImageDraw

from uground.training.data.jsonl import JsonlSource
from uground.training.data.to_jsonl import main, to_jsonl


def convert(kind, source, output, **settings):
    """The lines by id, with examples read back by what trains on them; and the closing table."""
    tally, counts = to_jsonl(kind, source, output, quiet=True, **settings)
    source = JsonlSource(output)
    lines = [source.line(index) for index in range(len(source))]
    for index, line in enumerate(lines):
        (line["example"],) = source[index]["examples"]
        line["decoded"] = [decoded(mask) for mask in line["example"]["masks"]]
    assert counts.total() == len(lines)
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}, "\n".join(tally.table())


def refused(capsys, *arguments) -> str:
    """The one line of an error of the command."""
    assert main([*map(str, arguments)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("to_jsonl: error: ")
    return line


def png_text(mask: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(mask).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def drawn(shape: str, *arguments, size=SIZE) -> np.ndarray:
    """A shape as Pillow draws it at eight times the size: what is covered by half is in."""
    scale = 8
    canvas = Image.new("L", (size[1] * scale, size[0] * scale))
    getattr(ImageDraw.Draw(canvas), shape)([scale * number for number in arguments], fill=255)
    return np.asarray(canvas.resize((size[1], size[0]), Image.Resampling.BOX)) >= 128


def overlap(first: np.ndarray, second: np.ndarray) -> float:
    return float((first & second).sum() / (first | second).sum())
