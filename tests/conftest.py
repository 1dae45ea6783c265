"""Triton runs under its interpreter where there is no GPU, and memory that torch.empty hands out is NaN."""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

# Imports make a million objects that stay; each search of all of them for cycles takes half a second.
gc.disable()

# Read by every library of threads when it is loaded; the processes of tests inherit it. Workers that share the cores
# would wait for each other's threads: two workers of two threads each took twice the time of one thread each.
if "PYTEST_XDIST_WORKER" in os.environ:
    _shared = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(_shared))

import torch  # noqa: E402
from filelock import FileLock  # noqa: E402

# Read when a kernel is defined, so before anything imports triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    if importlib.util.find_spec("triton"):
        from tests.interpreter import patch_once_a_launch

        patch_once_a_launch()


# Files that compare no floating-point numbers. `make test-numerics` runs all others again: the mark `numerical`.
WITHOUT_NUMBERS = [
    "docs/test_house", "faults/test_inputs_hypothesis", "faults/test_inputs_startup", "faults/test_inputs_table",
    "faults/test_inputs_vllm", "faults/test_inputs_warnings", "faults/test_runs_folder", "faults/test_runs_storm",
    "gem/test_arguments", "gem/test_arithmetic", "gem/test_cli", "gem/test_config", "gem/test_data",
    "gem/test_imports", "gem/test_waits", "kernels/test_imports", "kernels/test_machine_code",
    "report/test_report_browser", "report/test_report_records",
]  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if item.path.relative_to(here).with_suffix("").as_posix() not in WITHOUT_NUMBERS:
            item.add_marker(pytest.mark.numerical)


def pytest_collection_finish():
    import hypothesis  # noqa: F401 (its plugin does, after the last test; trio then looks for objects that are frozen)

    gc.freeze()  # what imports made is looked at by no collection: trainers collect at the end of each run
    gc.set_threshold(20_000, 10, 20)
    gc.enable()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """made_once(name, make): a folder that make(folder) has filled, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def made(name: str, make: Callable[[Path], None]) -> Path:
        with FileLock(base / f"{name}.lock"):
            if not (base / name).exists():
                unfinished = Path(tempfile.mkdtemp(dir=base))
                make(unfinished)
                unfinished.rename(base / name)
        return base / name

    return made


@pytest.fixture(autouse=True)
def signals_as_before():
    """`gem` leaves them to the system when it ends, as its process does too."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="session")
def signals_as_in_a_terminal():
    """A shell starts what runs in the background with SIGINT ignored, nohup with SIGHUP; processes inherit both."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned_empty():
    """torch.empty yields NaN (the largest integer, True), so an output that is not written fails."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
