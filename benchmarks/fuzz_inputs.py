"""Broken bytes, JSON and text for `fuzz.py`, and how an input's outcome is told."""

import copy
import json
from random import Random

ODD_VALUES = [None, True, False, 0, 1, -1, 5, 1.5, 2**31, 2**63, -(2**70), 1e308, float("nan"), float("inf"), "", " ",
              "x", "\ud83d", "\x00", "9" * 50, [], {}, [[]], [None], {"a": 1}, [1, 2], "../x", "float99"]  # fmt: skip
ODD_PIECES = ["the red cup", " ", "\n", "\t", "\x00", "\u2028", "\u202e", "é", "e\u0301", "🐟", "\ud83d", "\ude00",
              "杯子", "[SEG]", "[REJ]", "<image>", "<s>", "</s>", "<unk>", "<pad>", "USER:", "ASSISTANT:", "ASSISTANT",
              "{}", "{{ x }}", "{% for %}", "<im_start>", "[SEG", "]", "<ima", "ge>", "a" * 300, "word " * 80, "\x7f",
              "\ufffe"]  # fmt: skip


class Refused(Exception):
    """An entry point raised; its error is the cause, which must hold one of `names`."""

    def __init__(self, names: tuple[str, ...] = ()):
        super().__init__("refused")
        self.names = names


class Wrong(Exception):
    """An entry point took an input and made something else of it."""


def broken_bytes(rng: Random, content: bytes) -> bytes:
    """Bytes cut, changed, repeated or replaced."""
    data = bytearray(content)
    way = rng.randrange(8)
    place = rng.randrange(len(data) + 1)
    if way == 0:
        return bytes(data[:place])
    if way == 1:
        for _ in range(rng.choice([1, 1, 3, 20])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        return bytes(data)
    if way == 2:
        return bytes(data[:place]) + rng.randbytes(rng.choice([1, 4, 64])) + bytes(data[place:])
    if way == 3:
        return bytes(data[:place]) + bytes(data[place + rng.choice([1, 2, 16, 200]) :])
    if way == 4:
        return bytes(data[:place]) + bytes(len(data) - place)
    if way == 5:
        return rng.choice([b"", b"\n", b"\x00" * 40, b"\xff\xfe" + "{}".encode("utf-16-le"), rng.randbytes(200)])
    if way == 6:
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    return bytes(data) + bytes(data[:place])


def broken_json(rng: Random, content) -> bytes:
    """JSON of a structure in which one to three values are gone, replaced or moved."""
    content = copy.deepcopy(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        content = _broken_value(rng, content)
    if rng.random() < 0.02:
        return b"[" * 100_000
    return json.dumps(content).encode()


def _broken_value(rng: Random, content):
    parent, key = None, None
    value = content
    # A walk from the root that may stop anywhere, so that outer values are hit as often as inner ones.
    while isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        parent, key = value, rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value = parent[key]
    if parent is None:
        return _odd_value(rng)
    if rng.random() < 0.25:
        del parent[key]
    elif rng.random() < 0.2 and isinstance(parent, dict):
        parent[str(key) + rng.choice(["s", "_", "x"])] = parent.pop(key)
    elif rng.random() < 0.3 and isinstance(value, (int, float)) and not isinstance(value, bool):
        parent[key] = rng.choice([value + 1, value - 1, -value, value * 2, value + 0.5])
    else:
        parent[key] = _odd_value(rng)
    return content


def _odd_value(rng: Random):
    # A copy: what is put in twice may be changed within itself.
    return copy.deepcopy(rng.choice(ODD_VALUES))


def odd_text(rng: Random) -> str:
    """A text of odd pieces, or of any characters."""
    if rng.random() < 0.3:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(12)))
    return "".join(rng.choice(ODD_PIECES) for _ in range(rng.randrange(6)))
