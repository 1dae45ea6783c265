"""Time, memory and ceilings, measured the same way for every rival, and what they were measured on."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MIB = 2**20
Closure = Callable[[], object]
VERSIONS = (
    *("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy", "verl", "quack-kernels"),
    *("flash-attn", "pytest-benchmark"),
)


# Seconds of a call on a CPU after which it is not repeated: `pytest bench/` is to end in four minutes.
SLOW = 1.5


def seconds(closure: Closure, device: torch.device) -> float:
    """One call: CUDA events around it on a GPU (its L2 cache emptied first), the wall clock on a CPU."""
    if device.type != "cuda":
        begin = time.perf_counter()
        closure()
        return time.perf_counter() - begin
    _empty_l2(device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    closure()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3


def _empty_l2(device: torch.device) -> None:
    torch.empty(256 * MIB, dtype=torch.int8, device=device).zero_()


def interleave(
    prepares: Mapping[str, Callable[[], Closure]], rounds: int, device: torch.device
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Seconds of each rival, `rounds` times in turn, and who failed on the way.

    `prepare()` is not timed and gives what is; all are warm. What took over SLOW seconds is not run again.
    """
    times: dict[str, list[float]] = {name: [] for name in prepares}
    failed: dict[str, Exception] = {}
    for _ in range(rounds):
        gc.collect()
        for name in list(times):
            if times[name] and times[name][0] > SLOW:
                continue
            try:
                closure = prepares[name]()
                times[name].append(seconds(closure, device))
                del closure
            except Exception as error:
                failed[name] = error.with_traceback(None)  # it holds the tensors
                del times[name]
    return times, failed


def peak_extra(prepare: Callable[[], Closure], device: torch.device) -> int | None:
    """Most bytes that one call held at a time above what stood when it began; None where that cannot be seen.

    CUDA: the allocator's peak. Linux: the resident set's high-water mark, which sees compiled code's memory too.
    """
    closure = prepare()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        closure()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the C library keeps would hide what is taken from it
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark
    except (OSError, AttributeError):
        return None
    closure()
    return max(0, resident("VmHWM") - before)


def resident(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":"))


def available_memory(device: torch.device) -> int:
    """Bytes that can still be taken; 2^62 where that cannot be seen."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except OSError:
        return 2**62


@dataclass(frozen=True)
class Ceiling:
    """The best the device did at the bare operation that bounds a work, measured in turn with the rivals."""

    kind: str  # "copy": bytes read + written a second; "gemm": flop a second
    prepare: Callable[[], Closure]
    amount: float  # bytes or flop of one call

    def rate(self, times: list[float]) -> float:
        return self.amount / statistics.median(times)


def copy_ceiling(device: torch.device) -> Ceiling:
    """dst.copy_(src), 256 MiB on a CPU, 2 GiB on a GPU."""
    count = (2048 if device.type == "cuda" else 256) * MIB
    source = torch.ones(count, dtype=torch.int8, device=device)
    target = torch.zeros_like(source)
    return Ceiling("copy", lambda: lambda: target.copy_(source), 2.0 * count)


def gemm_ceiling(hidden: torch.Tensor, weight: torch.Tensor) -> Ceiling:
    """The head's own product, hidden @ weight.T, for at most 1 GiB of logits on a CPU and 4 GiB on a GPU."""
    most = (4096 if hidden.is_cuda else 1024) * MIB
    rows = max(1, min(len(hidden), most // (hidden.itemsize * weight.shape[0])))
    with torch.no_grad():
        left, out = hidden[:rows].detach(), hidden.new_empty(rows, weight.shape[0])
    right = weight.detach().t()
    return Ceiling("gemm", lambda: lambda: torch.mm(left, right, out=out), 2.0 * rows * weight.numel())


class ReplayClock:
    """The timer given to pytest-benchmark: it tells the times that were measured in turn with the rivals."""

    def __init__(self) -> None:
        self._durations: list[float] = []
        self._now = 0.0
        self._running = False

    def load(self, durations: list[float]) -> None:
        self._durations, self._running = list(durations), False

    def __call__(self) -> float:
        if not self._durations:
            return time.perf_counter()
        if self._running:
            self._now += self._durations.pop(0)
        self._running = not self._running
        return self._now


replay_clock = ReplayClock()


def describe(device: torch.device) -> dict[str, object]:
    """The machine as the report prints it; no host name."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "kind": device.type,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {name: found for name in VERSIONS if (found := version(name))},
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
