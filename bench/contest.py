"""All rivals of one work at one shape: checked against float64, then measured in turn in this process."""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from . import measure
from .errors import judge
from .measure import MIB, Ceiling
from .peers import Adapter, Missing
from .shapes import Shape, dtype_name
from .works import Entry, Problem, Work, make_problem

CHECK_ROWS = {"cpu": 32, "cuda": 256}
LONG_ROWS = 8192  # on a CPU, from here on each is measured once
FULL_LOGITS = 6 * 4  # bytes a logit, held at a time by what materialises them


@dataclass
class Row:
    """What was measured of one rival: the times, and the facts that go beside them into the result file."""

    times: list[float]
    facts: dict = field(default_factory=dict)


Result = Row | Missing


def run_contest(
    work: Work,
    shape: Shape,
    entries: Sequence[Entry],
    device: torch.device,
    timed: bool = True,
    make: Callable = make_problem,
) -> dict[str, Result]:
    """-> for each entry, by its adapter's name, what was measured or why it is missing.

    `timed` False: checked only. make(work's name, shape, device, rows) gives the problem, or for the check its first
    `rows` rows.
    """
    warnings.filterwarnings("ignore", category=UserWarning)
    ready, results = {}, {}
    check = make(work.name, shape, device, min(shape.rows, CHECK_ROWS[device.type]))
    expected: dict[bool, tuple] = {}
    for entry in entries:
        name = entry.adapter.name
        try:
            refuse(entry.adapter, shape, check, device)
            function = entry.adapter.load(device)
            facts = checked(work, entry, function, check, expected)
        except Exception as error:
            results[name] = as_missing(error)
            continue
        ready[name] = (entry, function)
        results[name] = Row([], {**facts, **describe_row(work, entry.adapter, shape, check)})
    del check, expected
    if not timed:
        return results
    problem = make(work.name, shape, device, None)
    prepares = {}
    for name, (entry, function) in ready.items():

        def prepare(whole=False, entry=entry, function=function):
            return work.closure(entry, function, problem, whole)

        prepares[name] = prepare
    rounds = 1 if device.type == "cpu" and shape.rows >= LONG_ROWS else work.rounds
    measure_rows(results, prepares, ceiling_of(work, problem, device), work.floor(problem), rounds, device)
    for leaf in problem.leaves():
        leaf.grad = None
    return results


def measure_rows(
    results: dict[str, Result],
    prepares: dict[str, Callable],
    ceiling: Ceiling,
    floor: float,
    rounds: int,
    device: torch.device,
) -> None:
    """Memory of each, then all and the ceiling in turn; fills `results` in. prepare(whole) gives what is measured.

    What takes over measure.SLOW seconds when it is warm is timed once.
    """
    gc.collect()
    gc.freeze()  # libraries hold a million objects; without them each later collection takes no time
    for name in list(prepares):
        try:
            prepares[name]()()  # warm
            peak = measure.peak_extra(lambda name=name: prepares[name](True), device)
            results[name].facts["peak_extra_mib"] = None if peak is None else round(peak / MIB, 1)
        except Exception as error:
            results[name] = as_missing(error)
            del prepares[name]
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if not prepares:
        return
    times, failed = measure.interleave({**prepares, "ceiling": ceiling.prepare}, rounds, device)
    results.update((name, as_missing(error)) for name, error in failed.items())
    unit, scale = ("GB/s", 1e9) if ceiling.kind == "copy" else ("TFLOP/s", 1e12)
    best = ceiling.rate(times.pop("ceiling"))
    for name, found in times.items():
        rate = floor / statistics.median(found)
        results[name].times = found
        results[name].facts |= {
            "rate": rate / scale,
            "rate_unit": unit,
            "ceiling": best / scale,
            "share": rate / best,
        }


def ceiling_of(work: Work, problem: Problem, device: torch.device) -> Ceiling:
    if work.rate == "copy":
        return measure.copy_ceiling(device)
    return measure.gemm_ceiling(problem.hidden, problem.weight)


def checked(work: Work, entry: Entry, function: Callable, check: Problem, expected: dict[bool, tuple]) -> dict:
    """Errors, budgets and the verdict on the check problem. `expected` keeps truth and yardstick for the next."""
    entropy = entry.adapter.entropy
    dtype = check.leaves()[0].dtype
    got = work.outcome(entry.loss, function, check.cast(dtype), entropy)
    if entropy not in expected:
        expected[entropy] = tuple(work.expected(check, d, entropy) for d in (torch.float64, dtype))
    terms = {} if check.weight is None else {"dHidden": check.weight.shape[0], "dWeight": check.rows}
    (exact, scale), (yardstick, _) = expected[entropy]
    verdict = judge(got, exact, yardstick, terms, scale)
    return {"errors": verdict.errors, "budgets": verdict.budgets, "wrong": verdict.wrong, "check_rows": check.rows}


def describe_row(work: Work, adapter: Adapter, shape: Shape, problem: Problem) -> dict:
    return {
        "work": work.name,
        "head": shape.head.name,
        "rows": shape.rows,
        "vocab": shape.head.vocab,
        "hidden": shape.head.hidden,
        "dtype": dtype_name(shape.dtype),
        "rival": adapter.name,
        "ours": adapter.ours,
        "entropy": adapter.entropy,
        "approximate": adapter.approximate,
        "label": adapter.label,
        "data": problem.data,
    }


def refuse(adapter: Adapter, shape: Shape, check: Problem, device: torch.device) -> None:
    """What cannot be asked of an implementation. A CPU kills the process that takes too much; a GPU raises."""
    if isinstance(check.temperature, torch.Tensor) and not adapter.row_temperature:
        raise Missing("takes one temperature for all rows")
    need = FULL_LOGITS * shape.rows * shape.head.vocab
    have = measure.available_memory(device)
    if device.type == "cpu" and adapter.full_logits and need > have:
        raise Missing(f"full logits: about {need / 2**30:.0f} GiB needed, {have / 2**30:.0f} GiB free")


def as_missing(error: Exception) -> Missing:
    if isinstance(error, Missing):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return Missing("out of memory")
    return Missing(f"raises {type(error).__name__}: {' '.join(str(error).split())[:200]}")
