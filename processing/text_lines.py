"""Lines of a text file that others wrote: in UTF-8, cut at `\\n` and `\\r\\n` only."""

import os
from pathlib import Path

UTF8_MARK = b"\xef\xbb\xbf"
# How a text in UTF-16 or UTF-32 begins; without such a mark, one of the two first bytes of an ASCII letter is 0.
WIDE_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")


def raw_lines(path: str | os.PathLike) -> list[bytes]:
    """
    Lines of a file, not decoded: one that is bad leaves the others readable.

    `str.splitlines` also cuts at U+2028, U+2029, U+0085, form feeds and more, which may stand inside of a text. What
    follows the last line end is a line if there is anything; a UTF-8 byte order mark is left out.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is UTF-16 or UTF-32, or its lines end with `\\r` only.
    """
    data = Path(path).read_bytes()
    if looks_wide(data):
        raise ValueError(f"{path}:1: the file looks like UTF-16 or UTF-32, expected UTF-8; save it as UTF-8")
    data = data.removeprefix(UTF8_MARK)
    if b"\n" not in data and b"\r" in data.rstrip(b"\r"):
        raise ValueError(f"{path}:1: the lines of the file end with \\r only, expected \\n or \\r\\n")
    lines = data.split(b"\n")
    if not lines[-1]:
        del lines[-1]
    return [line.removesuffix(b"\r") for line in lines]


def looks_wide(data: bytes) -> bool:
    """Whether a file's bytes begin as text does in UTF-16 or UTF-32."""
    return data.startswith(WIDE_MARKS) or 0 in data[:2]


def decode_line(line: bytes, name: str) -> str:
    """
    The text of a line.

    Args:
        line: without its end.
        name: what to call it in an error message, such as `"queries.txt:3"`.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: the line is not UTF-8, got the byte 0x{line[error.start]:02x} at place {error.start + 1}; save "
            "the file as UTF-8"
        ) from None


def read_lines(path: str | os.PathLike) -> list[str]:
    """
    Lines of a text file, see [`raw_lines`].

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not UTF-8; the sentence begins with file and line number.
    """
    return [decode_line(line, f"{path}:{number}") for number, line in enumerate(raw_lines(path), start=1)]


__all__ = ["decode_line", "looks_wide", "raw_lines", "read_lines"]
