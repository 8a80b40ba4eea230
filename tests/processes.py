"""Run a function in several processes that form one distributed job on the CPU (gloo)."""

import contextlib
import itertools
import multiprocessing
import os
import socket
import sys
import traceback
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState

TIMEOUT = 240
# Children are forked off a process that has imported everything and done nothing: quick, and free of the threads that
# a process in the middle of its tests has.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distributed_jobs", "resume_jobs"])


# Below the ports that the system hands out by itself, and others in each process that runs tests: hardly anybody takes
# one between its being found free and its use.
_first = 10000 + os.getpid() * 37 % 20000
_ports = itertools.cycle(range(_first, _first + 37))


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on, another one each time."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def launched(count: int, *command) -> list[str]:
    """The command line that starts `python -m command` in `count` processes of one job."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", *map(str, command)]


def forget_process_group() -> None:
    """Let a new trainer find out anew how it is distributed."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


def _run(function, rank: int, count: int, port: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        ACCELERATE_USE_CPU="true",
    )
    forget_process_group()
    try:
        torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def run_in_processes(function, count: int, folder: Path, *arguments) -> list:
    """What `function(rank, *arguments)`, of a module that can be imported, returns in each of `count` processes."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    workers = [
        CONTEXT.Process(target=_run, args=(function, rank, count, port, folder, arguments)) for rank in range(count)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(TIMEOUT)
    codes = [worker.exitcode for worker in workers]
    for worker in workers:
        worker.kill()
    assert codes == [0] * count, f"the processes ended with {codes}; None is one that hung"
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]
