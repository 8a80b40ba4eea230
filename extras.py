"""Which dependencies are installed: the package itself needs few, training and the rest bring theirs as extras."""

import re
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from uground.command_line import FAILED

REQUIREMENT = re.compile(r"^(?P<name>[\w.-]+).*extra == ['\"](?P<extra>[\w-]+)['\"]")


def missing_packages(extra: str) -> list[str]:
    """Names of the distributions of an extra, as `setup.py` lists them, that are not installed."""
    found = [REQUIREMENT.match(line) for line in requires("uground") or ()]
    return [line["name"] for line in found if line and line["extra"] == extra and not is_installed(line["name"])]


def is_installed(name: str) -> bool:
    """Whether a distribution is installed, in whatever version."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def require_extra(extra: str, module: str) -> None:
    """
    Stop the import of a module, in one sentence, unless the packages of its extra are installed.

    Args:
        extra: as in `pip install "uground[extra]"`.
        module: what is being imported.

    Raises:
        ImportError: a package is missing. While `python -m` looks for a command in the module, the process ends with
            status 2 and that sentence instead.
    """
    missing = missing_packages(extra)
    if not missing:
        return
    sentence = f'{module} needs packages that are not installed ({", ".join(missing)}): pip install -e ".[{extra}]"'
    # Python sets the first argument so until it has found the module.
    if sys.argv[:1] == ["-m"]:
        print(f"uground: error: {sentence}", file=sys.stderr)
        sys.exit(FAILED)
    raise ImportError(sentence)


__all__ = ["is_installed", "missing_packages", "require_extra"]
