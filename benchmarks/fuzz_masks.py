"""Masks and lines of data for `fuzz.py`, with a rasteriser and a decoder that share nothing with the package."""

import json
from pathlib import Path
from random import Random

import numpy as np
from fuzz_inputs import ODD_VALUES, Refused, Wrong, broken_bytes, broken_json, odd_text
from PIL import Image

from uground.training.check_data import check_data
from uground.training.data.jsonl import JsonlSource
from uground.training.data.masks import decode_mask, read_mask

# Rasterisers differ about pixels that an outline passes: those this near to it, in pixels, are not compared.
NEAR = 1.5
NAME = "annotation 7"
ODD_NUMBERS = [float("nan"), float("inf"), -float("inf"), 1e30, -1e9, 2**70, "3", None, True, [1]]


def mask_input(rng: Random, folder: Path, checkpoint) -> None:
    """Polygons or an RLE of the forms that annotations have: refused, or the pixels that they mean."""
    size = (rng.randrange(2, 40), rng.randrange(2, 40))
    given, wanted, near = _polygons(rng, size) if rng.random() < 0.5 else _rle(rng, size)
    try:
        rle = read_mask(given, size, NAME)
        found = decode_mask(rle)
    except (ValueError, OSError, TypeError) as error:
        if wanted is not None and near is None and _is_plain(given):
            raise Wrong(f"an RLE that is right is refused: {error}") from None
        raise Refused((NAME,)) from error
    if wanted is None:
        raise Wrong(f"{str(given)[:200]} of {size} is taken, {int(found.sum())} pixels come out")
    differ = found != wanted if near is None else (found != wanted) & ~near
    if found.shape != size or differ.any():
        raise Wrong(f"{str(given)[:300]} of {size}: {int(differ.sum())} pixels are others")


def _is_plain(given) -> bool:
    return isinstance(given, dict) and set(given) == {"size", "counts"}


def _polygons(rng: Random, size: tuple[int, int]):
    """Polygons in one of their nestings, their pixels, and which of these are too near to an outline to tell."""
    rings = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        count = rng.choice([2, 3, 4, 5, 9])  # rings of one point each would read as one ring of points
        spread = rng.choice([0.0, 0.0, 0.5])
        rings.append([[rng.uniform(-spread, 1 + spread) * side for side in size[::-1]] for _ in range(count)])
    if rng.random() < 0.2:
        rings = [[[round(x), round(y)] for x, y in ring] for ring in rings]
    wanted, near = np.zeros(size, bool), np.zeros(size, bool)
    for ring in rings:
        inside, outline = _raster(ring, size)
        wanted, near = wanted | inside, near | outline
    flat = [[number for point in ring for number in point] for ring in rings]
    nested = rng.choice([flat, rings, flat[0] if len(flat) == 1 else flat])
    if rng.random() < 0.35:
        ring = rng.choice(flat)
        ring[rng.randrange(len(ring))] = rng.choice(ODD_NUMBERS)
        return flat, None, None
    return nested, wanted, near


def _raster(ring: list, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels whose centre is inside by the even-odd rule, and those near the outline or hidden behind the border."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    inside, near = np.zeros(size, bool), np.zeros(size, bool)
    for (x0, y0), (x1, y1) in zip(ring, ring[1:] + ring[:1], strict=True):
        crosses = (y0 > rows) != (y1 > rows)
        with np.errstate(all="ignore"):
            inside ^= crosses & (columns < x0 + (rows - y0) * (x1 - x0) / (y1 - y0))
        length = (x1 - x0) ** 2 + (y1 - y0) ** 2
        along = np.clip(((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / max(length, 1e-12), 0, 1)
        near |= np.hypot(columns - x0 - along * (x1 - x0), rows - y0 - along * (y1 - y0)) < NEAR
    return inside, near


def _rle(rng: Random, size: tuple[int, int]):
    """An RLE, compressed or not, perhaps broken; its pixels, None where it is none."""
    mask = np.random.default_rng(rng.getrandbits(64)).random(size) < rng.choice([0.0, 0.1, 0.5, 1.0])
    runs = _runs(mask)
    if rng.random() < 0.5:
        broken = list(runs)
        if rng.random() < 0.6:
            way = rng.randrange(5)
            if way == 0:
                broken[rng.randrange(len(broken))] += rng.choice([1, -1, 0.5, 2**32, -(2**40)])
            elif way == 1:
                broken[rng.randrange(len(broken))] = rng.choice([*ODD_NUMBERS, -1, 2**32])
            elif way == 2:
                broken = broken[:-1]
            elif way == 3:
                broken += [0, 0]
            else:
                broken = [*broken, 1, -1]
        return _with_size(rng, broken, size)
    text = _compress(runs)
    if rng.random() < 0.6:
        way = rng.randrange(4)
        place = rng.randrange(len(text))
        if way == 0:
            text = text[:place]
        elif way == 1:
            text = text[:place] + chr(rng.randrange(30, 130)) + text[place + 1 :]
        elif way == 2:
            text = text[:place] + rng.choice(["0", "o", "é", "\x00", " "]) + text[place:]
        else:
            text = "".join(chr(rng.randrange(48, 112)) for _ in range(rng.randrange(1, 40)))
    return _with_size(rng, text if rng.random() < 0.7 else text.encode(), size)


def _with_size(rng: Random, counts, size: tuple[int, int]):
    given = {"size": list(size), "counts": counts}
    if rng.random() < 0.1:
        given["size"] = rng.choice(
            [None, [size[0]], list(size)[::-1] + [1], [size[0] + 0.5, size[1]], "x", [0, 5], [2**31, 2]]
        )
        return given, None, None
    runs = counts if isinstance(counts, list) else _decompress(counts)
    if runs is None or any(type(run) is not int or run < 0 for run in runs) or sum(runs) != size[0] * size[1]:
        return given, None, None
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return given, values.reshape(size, order="F"), None


def _runs(mask: np.ndarray) -> list[int]:
    """Lengths of runs, column by column, the first of what is off."""
    values = np.concatenate([[False], mask.flatten(order="F")])
    places = np.flatnonzero(values[1:] != values[:-1])
    return np.diff(np.concatenate([[0], places, [mask.size]])).tolist()


def _compress(runs: list[int]) -> str:
    """As the format of COCO says: from the fourth on differences, five bits a character, the sixth for more."""
    text = []
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text.append(chr(48 + bits + 32 * more))
            if not more:
                break
    return "".join(text)


def _decompress(counts: str | bytes) -> list[int] | None:
    text = counts.decode("latin-1") if isinstance(counts, bytes) else counts
    runs, value, shift = [], 0, 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (1 << shift) if code & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value, shift = 0, 0
    return None if shift or not runs else runs


def line_input(rng: Random, folder: Path, checkpoint) -> None:
    """A file of a few lines, some of them broken: every bad one named, the others as they are written."""
    size = (rng.randrange(4, 30), rng.randrange(4, 30))
    Image.new("RGB", size[::-1], "white").save(folder / "a.png")
    lines, wanted = [], []
    for number in range(rng.randrange(1, 4)):
        record, pixels = _record(rng, size, folder, number)
        is_broken = rng.random() < 0.6
        line = json.dumps(record).encode()
        if is_broken:
            line = (broken_json(rng, record) if rng.random() < 0.8 else broken_bytes(rng, line)).replace(b"\n", b" ")
        lines.append(line)
        wanted.append(None if is_broken else pixels)
    path = folder / "data.jsonl"
    path.write_bytes(b"\n".join(lines) + b"\n")
    try:
        source, report = JsonlSource(path), check_data(path, 0, True, checkpoint.processor)
    except (ValueError, OSError, TypeError) as error:
        raise Refused((str(path),)) from error
    refused = None
    for index in range(len(source)):
        name, pixels = source.name_of(index), wanted[int(source.name_of(index).rpartition(":")[2]) - 1]
        named = [problem for problem in report.problems if problem.startswith(f"{name}:")]
        try:
            (example,) = source[index]["examples"]
        except (ValueError, OSError, TypeError) as error:
            if len(named) != 1:
                raise Wrong(f"{name} cannot be read, but check_data says {named}: {error}") from None
            refused = refused or (name, error)
            continue
        found = [decode_mask(rle) for rle in example["masks"]]
        if pixels is not None and not (len(found) == len(pixels) and all(map(np.array_equal, found, pixels))):
            raise Wrong(f"{name}: other masks than written")
    if len(report.problems) > len(source) or any("\n" in problem for problem in report.problems):
        raise Wrong(f"check_data says {report.problems}")
    if refused is not None:
        raise Refused((refused[0],)) from refused[1]


def _record(rng: Random, size: tuple[int, int], folder: Path, number: int) -> tuple[dict, list[np.ndarray]]:
    """A good line, and the masks that it means."""
    pixels, masks = [], []
    for place in range(rng.randrange(3)):
        mask = np.zeros(size, bool)
        top, left = rng.randrange(size[0] - 1), rng.randrange(size[1] - 1)
        bottom, right = rng.randrange(top + 1, size[0]), rng.randrange(left + 1, size[1])
        mask[top:bottom, left:right] = True
        way = rng.randrange(4)
        if way == 0:
            masks.append({"size": list(size), "counts": _runs(mask)})
        elif way == 1:
            masks.append({"size": list(size), "counts": _compress(_runs(mask))})
        elif way == 2:
            masks.append([[left, top, right, top, right, bottom, left, bottom]])
        else:
            masks.append(f"mask-{number}-{place}.png")
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / masks[-1])
        pixels.append(mask)
    record = {"image": "a.png", "query": "the red cup", "masks": masks}
    if rng.random() < 0.3:
        record["phrases"] = [f"thing {place}" for place in range(len(masks))]
    if rng.random() < 0.3:
        record["id"] = f"line-{number}"
    if rng.random() < 0.2:
        record["ignore"] = {"size": list(size), "counts": [size[0] * size[1]]}
    if rng.random() < 0.1:
        record[rng.choice(["note", "attribute", "boxes"])] = rng.choice([*ODD_VALUES, odd_text(rng)])
        return record, None
    return record, pixels
