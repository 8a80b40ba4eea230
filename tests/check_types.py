"""The type checker over what users' code meets first, and over code such as theirs: run by `make check`.

The files are checked as parts of `uground`, whatever the folder of the clone is called. Of `typed_use.py` every line
that says `# wrong` must be found wrong, and no other.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PUBLIC = [
    "__init__.py",
    "checkpoint_loading.py",
    "command_line.py",
    "extras.py",
    "hub/publish/publishing.py",
    *(
        f"modeling_uground/{name}.py"
        for name in (
            "__init__",
            "configuration_uground",
            "head_sam",
            "hub_files",
            "image_frames",
            "layer_policy",
            "output_uground",
            "pretrained_uground",
            "prompts",
            "session_uground",
        )
    ),
    *(
        f"processing/{name}.py"
        for name in (
            "__init__",
            "drawing",
            "image_processors",
            "image_reading",
            "pipeline_uground",
            "post_processing",
            "processing_uground",
        )
    ),
    "training/training_config.py",
    *(f"training/data/{name}.py" for name in ("jsonl", "masks", "samples")),
    "training/evaluation/protocols.py",
    "training/objectives/losses.py",
    "training/scenes/__init__.py",
    "training/scenes/world.py",
]
USE = "tests/typed_use.py"


def main() -> int:
    """Run mypy; 0 where all is as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "uground").symlink_to(ROOT)
        command = [sys.executable, "-m", "mypy", "--config-file", "uground/pyproject.toml"]
        ran = subprocess.run(
            [*command, *(f"uground/{name}" for name in (*PUBLIC, USE))],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
    errors = [line for line in ran.stdout.splitlines() if ": error: " in line]
    in_use = {int(found[1]) for line in errors if (found := re.match(rf"uground/{USE}:(\d+):", line))}
    lines = (ROOT / USE).read_text(encoding="utf-8").splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if "# wrong" in line}
    print(ran.stderr, end="")
    for line in errors:
        if USE not in line:
            print(line)
    for number in sorted(in_use ^ wrong):
        print(
            f"{USE}:{number}: {'found wrong' if number in in_use else 'not found wrong'}: {lines[number - 1].strip()}"
        )
    broken = len(errors) > len(in_use) or in_use != wrong or ran.returncode > 1
    print(f"types: {len(PUBLIC)} files, {len(wrong)} wrong uses found" if not broken else "types: see above")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
