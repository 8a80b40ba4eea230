"""The processes of one job, as `accelerate launch` or `torchrun` starts them."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def job_state() -> PartialState:
    """
    This process's place and device in the job that it was started for.

    `PartialState()` alone passes over a launcher's `--cpu`, and over machines that have nothing but a CPU: every
    process would take itself for the only one, and do the whole work.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1)) > 1
    return PartialState(
        cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or (launched and not torch.accelerator.is_available())
    )
