"""What all commands share: one line for a user's mistake, their exit statuses, and checks of common arguments."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from safetensors import SafetensorError

FAILED, INTERRUPTED = 2, 130
# Choices of --dtype, and those where it may stay that of the checkpoint.
DTYPES = ("float32", "bfloat16", "float16")
LOADING_DTYPES = ("auto", *DTYPES)
# NumPy and scikit take no other.
SEEDS = range(2**32)
RESUMABLE = "the same command goes on"
MISTAKES = (OSError, ValueError, MemoryError, SafetensorError)


def run_command(name: str, action: Callable[[], int | None], left: str = "nothing was kept") -> int:
    """
    Run the action of a command.

    Args:
        name: of the command, in front of an error.
        action: raises `OSError` or `ValueError` for what a user can mend; other exceptions are ours, and stay.
        left: what an interruption leaves.

    Returns:
        What the action returns, 0 for nothing; 2 after an error, of which one line was written to stderr.
    """
    try:
        return action() or 0
    except MISTAKES as error:
        print(f"{name}: error: {one_line(error)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted, {left}", file=sys.stderr)
        return INTERRUPTED


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; of one that a worker process passed on with its traceback, the last."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if any(line.startswith("Traceback ") for line in lines):
        lines = [lines[-1].partition("Error: ")[2] or lines[-1]]
    return " ".join(" ".join(lines).split())


class CommandParser(argparse.ArgumentParser):
    """Reports a mistake in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(FAILED, f"{self.prog.rpartition('.')[2]}: error: {message}\n")


def seed_number(text: str) -> int:
    """The value of `--seed`, for argparse."""
    try:
        return checked_seed(int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"a seed must be a whole number in 0..{SEEDS[-1]}, got {text!r}") from None


def checked_seed(seed: int, name: str = "seed", seeds: range = SEEDS) -> int:
    """
    A seed as it is.

    Raises:
        ValueError: it lies outside of what the random streams take.
    """
    if seed not in seeds:
        raise ValueError(f"{name} must lie in 0..{seeds[-1]}, got {seed}")
    return seed


__all__ = [
    "DTYPES",
    "FAILED",
    "INTERRUPTED",
    "LOADING_DTYPES",
    "RESUMABLE",
    "SEEDS",
    "CommandParser",
    "checked_seed",
    "one_line",
    "run_command",
    "seed_number",
]
