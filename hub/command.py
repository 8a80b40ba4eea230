"""What the commands of this folder share: one line for an error, and a non-zero exit status."""

import sys
from collections.abc import Callable

FAILED, INTERRUPTED = 2, 130
# Choices of --dtype.
DTYPES = ("float32", "bfloat16", "float16")


def run_command(name: str, action: Callable[[], None]) -> int:
    """
    Run the action of a command.

    Args:
        name: of the command, in front of an error.
        action: raises `OSError` or `ValueError` for what a user can mend.

    Returns:
        0, or another exit status after an error, of which one line was written to stderr.
    """
    try:
        action()
    except (OSError, ValueError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{name}: interrupted, nothing was kept", file=sys.stderr)
        return INTERRUPTED
    return 0
