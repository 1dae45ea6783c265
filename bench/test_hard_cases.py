"""Small problems that implementations get wrong: what counts here is the error, not the time."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from .contest import run_contest
from .measure import replay_clock
from .shapes import Head, Shape
from .works import WORKS, Problem

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
ROWS = 32
SMALL = Head("V 50304", 50304, 128)
ODD = Head("V 50257", 50257, 128)  # GPT-2's: no multiple of 1024, nor of 8


def hard_problem(case: str, work: str, shape: Shape, device: torch.device, rows: int | None) -> Problem:
    """Normal logits of deviation 3 (from logits: exactly; from hidden states: about), made hard."""
    generator = torch.Generator(device).manual_seed(0)
    V, D = shape.head.vocab, shape.head.hidden
    targets = torch.randint(0, V, (ROWS,), generator=generator, device=device)
    kind = {"device": device, "dtype": torch.float32}
    hidden = torch.empty(ROWS, D, **kind).normal_(generator=generator)
    weight = torch.empty(V, D, **kind).normal_(0, 3 / D**0.5, generator=generator)
    temperature = 1.0
    if case == "all logits negative":
        hidden[:, 0], weight[:, 0] = 8.0, -8.0
    elif case == "one temperature a row":
        temperature = torch.linspace(0.5, 2.0, ROWS, device=device)
    elif case == "confident rows":
        hidden *= torch.linspace(1, 2, ROWS, device=device)[:, None]
        weight[targets] += hidden * (2.0 / D**0.5)
    if work != "stats_backward":
        leaves = {"hidden": hidden.to(shape.dtype), "weight": weight.to(shape.dtype)}
    else:
        logits = hidden @ weight.t()
        if case == "-inf logits":
            logits[:, 1::2] = -torch.inf
            targets = targets - targets % 2
        leaves = {"logits": logits.to(shape.dtype)}
    problem = Problem(targets, temperature=temperature, **{k: v.requires_grad_() for k, v in leaves.items()})
    return replace(problem, data=case)


CASES = ("V % 1024 != 0", "all logits negative", "-inf logits", "one temperature a row", "confident rows")


def pytest_generate_tests(metafunc):
    cases = []
    for name in ("stats_backward", "linear_policy"):
        for case in CASES:
            if case == "-inf logits" and name == "linear_policy":
                continue  # no finite hidden state makes one
            for entry in WORKS[name].entries:
                if entry.adapter.name == "torch.compile":
                    continue  # eager's formula, at ten seconds of compiling a case
                if entry.adapter.name.endswith("one shot") and case == "one temperature a row":
                    continue  # the adapter passes none
                slug = case.replace(" ", "_").replace("%", "mod")
                label = f"{name}-{slug}-{entry.adapter.name.replace(' ', '_')}"
                cases.append(pytest.param(name, case, entry, id=label))
    metafunc.parametrize(("work", "case", "entry"), cases)


@pytest.mark.benchmark(timer=replay_clock)
def test_hard_case(benchmark, contests, work, case, entry):
    shape = Shape(ODD if case == CASES[0] else SMALL, ROWS, DTYPE)

    def run(entries, timed):
        make = functools.partial(hard_problem, case)
        results = run_contest(replace(WORKS[work], rounds=1), shape, entries, DEVICE, timed, make)
        for row in results.values():
            getattr(row, "facts", {})["case"] = case
        return results

    contests(benchmark, f"{work} hard: {case}", run, entry.adapter.name)
