"""Files and folders that appear whole or not at all."""

import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """
    Let a file or folder be written beside its place, and move it there once it is whole.

    Args:
        path: its place; a file there is replaced, a folder only if it is empty.
        write: is given a path with the same ending, which says of what kind a file is. Whatever it raises is passed
            on, and leaves nothing behind.
    """
    partial = path.absolute().with_name(f".{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        write(partial)
        if partial.is_dir() and path.is_dir():
            path.rmdir()
        partial.replace(path)
    finally:
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)


__all__ = ["write_whole"]
