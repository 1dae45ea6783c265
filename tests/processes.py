"""Processes that cost no imports: forks of one process that has imported everything, started once a pytest worker.

A fork has an environment, standard streams, an exit code and process groups of its own, and can be killed. Only what
libraries read while they are imported is shared: Triton is its interpreter in every fork, so they compute on the CPU.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
# Nothing that runs on import: no accelerator of `accelerate`'s, which the forks make from their own environment.
# deepspeed, where it is installed: accelerate imports it in every process that saves a whole model.
PRELOADED = [
    "pytest", "gem.cli", "gem.loop", "gem.rollout.vllm", "peft", "deepspeed",
    "transformers.models.llama.modeling_llama",
]  # fmt: skip


@functools.cache
def start_server() -> None:
    """With one thread: threads do not survive a fork. Modules are found as pytest finds them."""
    CONTEXT.set_forkserver_preload(PRELOADED)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu"}
    with mock.patch.dict(os.environ, own):
        forkserver.ensure_running()


class Fork:
    """A function in a process of its own; output in files."""

    def __init__(self, function: Callable, *arguments: Any, environment: dict | None = None, threads: int = 1) -> None:
        start_server()
        self.folder = tempfile.TemporaryDirectory()
        self.streams = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})}
        arguments = (self.streams, environment, threads, function, arguments)
        self.process = CONTEXT.Process(target=_run, args=arguments)
        self.process.start()

    def wait(self, timeout: float = 400) -> Fork:
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"not done after {timeout} s: {self.output}")
        return self

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    @property
    def returncode(self) -> int | None:
        """None while it runs; of one that was killed, the negative number of the signal."""
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self.streams[0].read_text() if self.streams[0].exists() else ""

    @property
    def output(self) -> str:
        return "".join(path.read_text() for path in self.streams if path.exists())


def _run(streams: list[Path], environment: dict, threads: int, function: Callable, arguments: Sequence) -> None:
    import torch

    gc.freeze()
    for path, number in zip(streams, (1, 2)):
        file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)
    try:
        function(*arguments)
    finally:
        atexit._run_exitfuncs()  # as at the end of any process; multiprocessing leaves it out


def gem(*arguments: object) -> None:
    """`gem` with these arguments, in a fork."""
    from gem import cli

    sys.argv = ["gem", *map(str, arguments)]
    cli.main()


def run_script(path: Path, *arguments: object) -> None:
    """A file as `python` runs it, in a fork."""
    sys.argv = [str(path), *map(str, arguments)]
    runpy.run_path(str(path), run_name="__main__")


def run_ranks(world_size: int, function: Callable, *arguments: Any, environment: dict | None = None) -> str:
    """What torchrun does on one machine: `function` in every process, all of which must end well. Their stdout."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size),
        **(environment or {}),
    }  # fmt: skip
    forks = [
        Fork(function, *arguments, environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    try:
        deadline = time.monotonic() + 400
        while any(fork.returncode is None for fork in forks) and time.monotonic() < deadline:
            if any(fork.returncode for fork in forks):
                time.sleep(1)  # the others may have more to say
                break
            time.sleep(0.02)
        assert all(fork.returncode == 0 for fork in forks), "\n".join(fork.output for fork in forks)
        return "".join(fork.stdout for fork in forks)
    finally:
        for fork in forks:
            with contextlib.suppress(ValueError):
                fork.kill()


def torchrun(world_size: int, path: Path, *arguments: object, environment: dict | None = None) -> str:
    """The real one, told by its own options to fork its processes. Their stdout."""
    fork = Fork(_torchrun, world_size, path, *arguments, environment=environment).wait()
    assert fork.returncode == 0, fork.output
    return fork.stdout


def _torchrun(world_size: int, *arguments: object) -> None:
    from torch.distributed import run

    options = ["--standalone", f"--nproc_per_node={world_size}", "--run-path", "--start-method=fork"]
    run.main([*options, *map(str, arguments)])
