"""Checkpoints of a run: which are whole, and whether a run may go on from them.

A checkpoint counts once `complete.json` lies in it, which is written last and lists every file with its size; one that
a kill left half-written has no such file, or does not fit it. `run.json` beside the weights says what the run was told
that matters to its result. `finished.json` in the folder of the run says that it made all its steps and saved its end.
"""

import json
import os
import re
from pathlib import Path

from transformers.utils import logging

from uground.hub.publish.run_files import BASELINE_SETTINGS, COMPLETE_FILE, LENGTH_SETTINGS, SETTINGS_THAT_MATTER
from uground.training.training_config import UGroundTrainingConfig

logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
FINISHED_FILE = "finished.json"
# Recorded since later than the first release.
LATER = (*BASELINE_SETTINGS, "presence_weight")
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")


def run_record(args: UGroundTrainingConfig, extra: dict | None = None) -> dict:
    """
    What a run was told that matters to its result, as plain JSON.

    Args:
        args: a `UGroundTrainingConfig`.
        extra: more of it, such as what the data are.
    """
    names = SETTINGS_THAT_MATTER
    is_constant = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)).startswith("constant")
    # A warm-up of less than one step is a share of the run.
    if not is_constant or 0 < args.warmup_steps < 1:
        names += LENGTH_SETTINGS
    record = {name: getattr(args, name) for name in names}
    if args.muon:
        record["muon"] = True  # records of runs without it may not know it
    record["batch size of a step"] = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    )
    return json.loads(json.dumps({**record, **(extra or {})}, default=str))


def check_same_run(checkpoint: Path, record: dict) -> None:
    """
    Refuse to go on from a checkpoint of a run that was told something else.

    Raises:
        ValueError: names what was changed, from what, and to what.
    """
    path = Path(checkpoint) / RUN_FILE
    if not path.is_file():
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changes = [
        f"{name} was {before.get(name)!r} and is {record.get(name)!r}" for name in changed_settings(before, record)
    ]
    if changes:
        raise ValueError(
            f"the run in {Path(checkpoint).parent} cannot go on from {Path(checkpoint).name}, because "
            f"{'; '.join(changes)}: set it back, or name another output_dir for a new run"
        )


def changed_settings(before: dict, record: dict) -> list[str]:
    """Names in which two records differ; what an earlier release did not record had no effect then."""
    names = sorted({*before, *record})
    return [name for name in names if before.get(name) != record.get(name) and (name in before or name not in LATER)]


def mark_finished(folder: str | os.PathLike, record: dict, steps: int) -> None:
    """Write that a run, told what `record` says, has made all its `steps` and saved its end in `folder`."""
    text = json.dumps({"steps": steps, "run": record}, indent=1) + "\n"
    (Path(folder) / FINISHED_FILE).write_text(text, encoding="utf-8")


def mark_unfinished(folder: str | os.PathLike) -> None:
    """Take back what [`mark_finished`] wrote, if anything."""
    (Path(folder) / FINISHED_FILE).unlink(missing_ok=True)


def finished_steps(folder: str | os.PathLike, record: dict) -> int:
    """How many steps a finished run in `folder` has made that was told what `record` says; 0 if there is none."""
    path = Path(folder) / FINISHED_FILE
    if not path.is_file():
        return 0
    finished = json.loads(path.read_text(encoding="utf-8"))
    return 0 if changed_settings(finished["run"], record) else finished["steps"]


def mark_complete(checkpoint: Path, record: dict) -> None:
    """Write `run.json` and, last of all, the list of files that makes a checkpoint count."""
    checkpoint = Path(checkpoint)
    (checkpoint / RUN_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sizes = _sizes(checkpoint)
    draft = checkpoint / f".{COMPLETE_FILE}"
    with draft.open("w", encoding="utf-8") as file:
        json.dump(sizes, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, checkpoint / COMPLETE_FILE)


def _sizes(checkpoint: Path) -> dict[str, int]:
    hidden = {COMPLETE_FILE, f".{COMPLETE_FILE}"}
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name not in hidden]
    return {str(path.relative_to(checkpoint)): path.stat().st_size for path in files}


def what_is_missing(checkpoint: Path) -> str | None:
    """Why a checkpoint does not count, or `None` for one that is whole."""
    marker = Path(checkpoint) / COMPLETE_FILE
    if not marker.is_file():
        return f"it has no {COMPLETE_FILE}, so it was not written to its end"
    found = _sizes(Path(checkpoint))
    for name, size in json.loads(marker.read_text(encoding="utf-8")).items():
        if found.get(name) != size:
            return f"{name} has {found.get(name, 'no')} bytes, expected {size}"
    return None


def last_complete_checkpoint(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint of a run, `None` if there is none; those passed over are named in a warning."""
    folder = Path(folder)
    if not folder.is_dir():
        return None
    numbered = [(CHECKPOINT_NAME.fullmatch(path.name), path) for path in folder.iterdir() if path.is_dir()]
    for _, path in sorted(((int(match[1]), path) for match, path in numbered if match), reverse=True):
        reason = what_is_missing(path)
        if reason is None:
            return path
        logger.warning(f"the checkpoint {path} is passed over: {reason}")
    return None
