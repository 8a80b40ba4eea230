"""The bundled tiny checkpoint from nothing, in one command that may be killed and given again.

    python -m uground.training.scenes.make_tiny --runs runs/tiny

Each stage is a command of its own with a folder of its own, which goes on where it was broken off and leaves alone
what is finished; a file `NAME.done` in the folder of the runs says that a stage is. Finished stages are not asked
again. At the end `checkpoint` holds what is bundled.
"""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from uground.command_line import RESUMABLE, CommandParser, run_command

RECIPES = Path(__file__).parents[2] / "recipes"
PRETRAIN = "uground.training.scenes.pretrain"
SCENE_COUNT = 24000  # drawn ahead for both towers


@dataclass(frozen=True)
class Stage:
    """
    A command of `python -m`.

    Attributes:
        name: of the stage.
        module, arguments: of the command.
        whole: a folder that the command writes in one go: it is given another name first, and renamed at the end.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    whole: Path | None = None


def stages(runs: Path) -> list[tuple[Stage, ...]]:
    """What is done, in order; stages in one tuple do not need each other and run at the same time."""
    scenes = ("--scenes", str(runs / "scenes"), "--scene-count", str(SCENE_COUNT))
    sam = ("--steps", "6000", "--batch-size", "16", "--learning-rate", "3e-3")
    vision = ("--steps", "6000", "--batch-size", "32", "--learning-rate", "4e-3")
    start, checkpoint = runs / "start", runs / "checkpoint"
    recipe = str(RECIPES / "tiny-joint.yaml")
    facts = ("--from-nothing", "--dataset", "scenes", "--license", "apache-2.0", "--recipe", recipe)
    return [
        (
            Stage("sam", PRETRAIN, ("sam", "--output", str(runs / "sam"), *scenes, *sam)),
            Stage("vision", PRETRAIN, ("vision", "--output", str(runs / "vision"), *scenes, *vision)),
        ),
        (
            Stage(
                "start",
                "uground.training.scenes.tiny_model",
                ("--sam", str(runs / "sam"), "--vision", str(runs / "vision")),
                whole=start,
            ),
        ),
        (finetuning("frozen", RECIPES / "tiny.yaml", start, runs / "frozen"),),
        (finetuning("joint", RECIPES / "tiny-joint.yaml", runs / "frozen", runs / "joint"),),
        (Stage("threshold", "uground.training.choose_rejection", (str(runs / "joint"),)),),
        (Stage("checkpoint", "uground.hub.closure", (str(checkpoint), *facts, "--replace-card")),),
    ]


def finetuning(name: str, recipe: Path, model: Path, output: Path) -> Stage:
    """Fine-tuning by a recipe."""
    arguments = ("--config", str(recipe), "--model", str(model), "--output_dir", str(output))
    return Stage(name, "uground.training.finetune", arguments)


def make(runs: Path, threads: int) -> None:
    """
    Run what is not yet done.

    Args:
        runs: folder of all stages.
        threads: of all commands that run at the same time, together.

    Raises:
        OSError: a stage failed; it has said why.
    """
    runs.mkdir(parents=True, exist_ok=True)
    for together in stages(runs):
        missing = [stage for stage in together if not done_file(runs, stage).exists()]
        if not missing:
            continue
        if missing[0].name == "checkpoint":
            copy_model(runs / "joint", runs / "checkpoint")
        start = time.time()
        run_together(missing, max(1, threads // len(missing)))
        for stage in missing:
            done_file(runs, stage).write_text(f"{time.time() - start:.0f} seconds in its last run\n", encoding="utf-8")
            print(f"stage {stage.name} is done", flush=True)


def done_file(runs: Path, stage: Stage) -> Path:
    """The file that says that a stage is finished."""
    return runs / f"{stage.name}.done"


def run_together(together: list[Stage], threads: int) -> None:
    """Run stages at the same time, each in a process of its own, to the end of the last one."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = []
    for stage in together:
        arguments = list(stage.arguments)
        if stage.whole is not None:
            arguments += ["--output", str(draft_of(stage.whole))]
            shutil.rmtree(draft_of(stage.whole), ignore_errors=True)
        print(f"stage {stage.name}: python -m {stage.module} {' '.join(arguments)}", flush=True)
        running.append(subprocess.Popen([sys.executable, "-m", stage.module, *arguments], env=environment))
    try:
        codes = [process.wait() for process in running]
    finally:
        for process in running:
            process.terminate()
    for stage, code in zip(together, codes, strict=True):
        if code:
            raise OSError(f"stage {stage.name} ended with exit code {code}")
        if stage.whole is not None:
            shutil.rmtree(stage.whole, ignore_errors=True)
            draft_of(stage.whole).replace(stage.whole)


def draft_of(folder: Path) -> Path:
    """Where a folder grows until it is whole."""
    return folder.with_name(f"{folder.name}.part")


def copy_model(trained: Path, checkpoint: Path) -> None:
    """The model and processor of a run, without what only the run needs."""
    shutil.rmtree(checkpoint, ignore_errors=True)
    checkpoint.mkdir()
    for path in trained.iterdir():
        kept = path.suffix in (".json", ".safetensors", ".jinja") and path.name not in ("run.json", "finished.json")
        if path.is_file() and kept:
            shutil.copyfile(path, checkpoint / path.name)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = CommandParser("python -m uground.training.scenes.make_tiny", description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/tiny"), help="folder of all stages")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="that may compute at the same time")
    options = parser.parse_args(argv)
    return run_command("make_tiny", lambda: make(options.runs, options.threads), RESUMABLE)


if __name__ == "__main__":
    sys.exit(main())
