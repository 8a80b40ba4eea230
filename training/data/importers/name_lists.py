"""Lists of class names: text files with one a line, JSON, YOLO's data.yaml, and names of colours."""

import re
from pathlib import Path
from typing import Any

import yaml

from uground.processing.text_lines import read_lines
from uground.training.data.files import read_json
from uground.training.data.masks import is_whole, shown
from uground.training.data.records import Record, checked_text

COLOUR = re.compile(r"#[0-9a-fA-F]{6}|\d{1,3}[ ,]\s*\d{1,3}[ ,]\s*\d{1,3}")
NUMBERED = re.compile(r"(\d+)\s*[:=\t ]\s*(.+)")


def read_yaml(path: Path) -> Record:
    """
    A YAML file of named fields.

    Raises:
        OSError: it is missing. ValueError: it is none.
    """
    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must be a whole YAML file, but {reason}") from error
    return Record(content, str(path))


def read_names(path: Path) -> dict[int | tuple[int, int, int], str]:
    """
    Names by number or by colour.

    Args:
        path: of a text file with a name a line, counted from 0, or a line `NUMBER: NAME`, `R G B: NAME` or
            `#RRGGBB: NAME` each; of JSON or YAML, a list or an object of these; or of YOLO's data.yaml.

    Raises:
        OSError: the file is missing. ValueError: it holds none of these.
    """
    if path.suffix.lower() in (".yaml", ".yml"):
        content = read_yaml(path)
        return names_of(content.value.get("names", content.value), f"{path}: names")
    if path.suffix.lower() == ".json":
        return names_of(read_json(path), f"{path}: names")
    lines = [line.strip() for line in read_lines(path)]
    lines = [line for line in lines if line]
    if not any(line for line in lines if line != "__ignore__"):
        raise ValueError(f"{path} holds no names")
    # labelme counts from its name for what is ignored, as -1.
    if lines[0] == "__ignore__":
        lines = lines[1:]
    # CVAT's label map: `name:r,g,b:parts:actions`, under a line that begins with #.
    if lines[0].startswith("#") and not COLOUR.match(lines[0]):
        lines = lines[1:]
    if all(line.count(":") == 3 for line in lines):
        return names_of({line.split(":")[1]: line.split(":")[0] for line in lines}, str(path))
    pairs = [_pair(line) for line in lines]
    if all(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{path} names a number or colour twice")
        return names_of(dict(pairs), str(path))
    if any(pairs):
        odd = next(line for line, pair in zip(lines, pairs, strict=True) if pair is None)
        raise ValueError(f"{path}: some lines begin with a number or colour, and {shown(odd)} does not")
    return names_of(lines, str(path))


def _pair(line: str) -> tuple[str, str] | None:
    colour = COLOUR.match(line)
    if colour and line[colour.end() :].lstrip(" :=\t"):
        return colour.group(), line[colour.end() :].lstrip(" :=\t")
    numbered = NUMBERED.fullmatch(line)
    return (numbered.group(1), numbered.group(2)) if numbered else None


def names_of(given: Any, place: str) -> dict[int | tuple[int, int, int], str]:
    """Names by number or colour out of a list of names, or of an object whose keys are numbers or colours."""
    if isinstance(given, list):
        given = dict(enumerate(given))
    if not isinstance(given, dict) or not given:
        raise ValueError(f"{place} must be a list, or an object of a number or colour each, got {shown(given)}")
    names = {}
    for key, name in given.items():
        # YAML reads digits as numbers.
        text = checked_text(str(name) if is_whole(name) else name, f"{place}: the name of {shown(key)}")
        if not text:
            raise ValueError(f"{place}: the name of {shown(key)} must not be empty")
        names[_key(key, place)] = text
    return names


def _key(key, place: str) -> int | tuple[int, int, int]:
    if is_whole(key) and key >= 0:
        return int(key)
    if isinstance(key, str) and key.strip().isdecimal():
        return int(key)
    if isinstance(key, str) and COLOUR.fullmatch(key.strip()):
        text = key.strip()
        parts = [int(text[i : i + 2], 16) for i in (1, 3, 5)] if text[0] == "#" else map(int, re.findall(r"\d+", text))
        colour = tuple(parts)
        if max(colour) <= 255:
            return colour
    raise ValueError(f"{place} must be named by whole numbers, by R G B of 0..255 or by #RRGGBB, got {shown(key)}")


__all__ = ["names_of", "read_names", "read_yaml"]
