"""What README and docs tell a user to run prints no warning, of ours or of a library that we provoke."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import uground
from uground.hub.weights.code_files import write_code

ROOT = Path(uground.__file__).parent
# What Python shows by default of what libraries warn of; raised, so that the traceback tells where it comes from.
SHOWN = ("FutureWarning", "UserWarning", "RuntimeWarning")
# Progress is no warning, but goes the same way.
NO_BARS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
BAR = re.compile(r"\s*\d+%\|.*|\s*")


def test_launchers_are_told_everything():
    """`accelerate launch` without a configuration lists every value that it has to choose."""
    for page in ("README.md", "Makefile", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))):
        commands = re.findall(r"accelerate launch .*", (ROOT / page).read_text(encoding="utf-8"))
        assert all("--config_file" in command for command in commands), page


def test_commands_and_snippets_say_nothing_unasked(tmp_path):
    checkpoint = shutil.copytree(uground.tiny_checkpoint(), tmp_path / "uground-tiny")
    write_code(checkpoint)
    work = tmp_path / "work"
    work.mkdir()
    script = Path(__file__).with_name("quiet_commands.py")
    flags = [flag for kind in SHOWN for flag in ("-W", f"error::{kind}")]
    ran = subprocess.run(
        [sys.executable, *flags, str(script), str(work), str(checkpoint)],
        env={**os.environ, **NO_BARS},
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in ran.stderr.splitlines() if not BAR.fullmatch(line)]
    assert (ran.returncode, said) == (0, [])
