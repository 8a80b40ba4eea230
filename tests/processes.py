"""Run functions and commands in other processes, also in several that form one distributed job on the CPU (gloo)."""

import contextlib
import itertools
import multiprocessing
import os
import runpy
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


def _join_job(rank: int, count: int, port: int) -> None:
    """Be process `rank` of a job, as a launcher says it."""
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


def _run(function, rank: int, count: int, port: int, folder: Path, arguments: tuple) -> None:
    _join_job(rank, count, port)
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


def _command(folder: Path, rank: int, count: int, port: int, module: str, *words: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (folder / f"{rank}.{name}").open("w") as file:
            os.dup2(file.fileno(), number)
    torch.set_num_threads(1)
    if count > 1:
        _join_job(rank, count, port)
    sys.argv, code = [module, *words], 0
    # As in an interpreter that was started for it, which has not imported it before.
    sys.modules.pop(module, None)
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Command:
    """
    `python -m module words` in `count` processes of one job, but for the seconds an interpreter takes to import torch.

    For what does not turn on what is imported, or on the environment as it is when that happens.
    """

    def __init__(self, folder: Path, module: str, *words, count: int = 1):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, port = folder, free_port()
        self.workers = [
            CONTEXT.Process(target=_command, args=(folder, rank, count, port, module, *map(str, words)))
            for rank in range(count)
        ]
        for worker in self.workers:
            worker.start()

    def kill(self) -> None:
        """End it as nobody can refuse."""
        for worker in self.workers:
            worker.kill()

    def wait(self) -> list[int]:
        """The exit code of each process; `None` of one that hung."""
        for worker in self.workers:
            worker.join(TIMEOUT)
        codes = [worker.exitcode for worker in self.workers]
        self.kill()
        return codes

    def text(self, name: str) -> str:
        """What all processes wrote to `"stdout"` or `"stderr"`."""
        return "".join((self.folder / f"{rank}.{name}").read_text() for rank in range(len(self.workers)))
