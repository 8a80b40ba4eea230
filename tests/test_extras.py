"""What works with the few packages that inference needs, and what is said where an extra is missing."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import uground
from uground.extras import missing_packages

ROOT = Path(uground.__file__).parent
# Found by Python at its start: hides distributions as if they were not installed.
HIDE = """
import importlib.machinery, importlib.metadata, os
hidden = dict(pair.split("=") for pair in os.environ["HIDDEN"].split())
found = importlib.metadata.version
def version(name):
    if name in hidden:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.version = version
path_finder = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name in hidden.values() else path_finder(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""
TRAIN = {name: name for name in ("trl", "peft", "datasets", "scipy", "tensorboard")}
METRICS = {"evaluate": "evaluate"}
INSTALL = 'pip install -e ".[train]"'


@pytest.fixture
def run_without(tmp_path):
    """Runs Python with arguments where distributions (name to module) seem not to be installed."""
    (tmp_path / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]

    def run(hidden, *arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            env={
                **os.environ,
                "HIDDEN": " ".join(f"{name}={module}" for name, module in hidden.items()),
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

    return run


def test_inference_needs_no_extra(run_without, tmp_path):
    picture = tmp_path / "overlay.png"
    ran = run_without(
        TRAIN | METRICS, "-m", "uground", "examples/scene.png", "the small red boat", "--output", str(picture)
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "It is [SEG]." in ran.stdout and picture.exists()


@pytest.mark.parametrize("command", ["training.finetune", "hub.assemble", "apps.annotate", "training.scenes"])
def test_commands_name_their_extra(run_without, command):
    ran = run_without({"trl": "trl", "peft": "peft"}, "-m", f"uground.{command}", "--help")
    part = command.split(".")[0]
    said = f"uground: error: uground.{part} needs packages that are not installed (trl, peft): {INSTALL}"
    assert (ran.returncode, ran.stdout, ran.stderr) == (2, "", said + "\n")


def test_imports_name_their_extra(run_without):
    code = "import uground\ntry:\n    import uground.{}\nexcept ImportError as error:\n    print(error)"
    said = 'uground.{} needs packages that are not installed ({}): pip install -e ".[{}]"\n'
    ran = run_without({"datasets": "datasets"}, "-c", code.format("training"))
    assert ran.stdout == said.format("training", "datasets", "train")
    ran = run_without(METRICS, "-c", code.format("training.metric_modules"))
    assert ran.stdout == said.format("training.metric_modules", "evaluate", "metrics")


def test_metrics_alone_are_missing(run_without):
    ran = run_without(METRICS, "-m", "uground.training.evaluate", "--help")
    assert ran.returncode == 0 and ran.stderr == ""


def test_an_extra_is_what_setup_says():
    assert missing_packages("train") == missing_packages("test") == []
    train = re.search(r"TRAINING = \[(.*?)\n\]", (ROOT / "setup.py").read_text(encoding="utf-8"), re.DOTALL)[1]
    assert set(TRAIN) <= set(re.findall(r'"([\w-]+)>=', train))
