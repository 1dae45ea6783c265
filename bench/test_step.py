"""The whole SEGA step on a real model against the method as its authors run it: see step.py."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from .contest import Row, as_missing, measure_rows
from .errors import judge
from .measure import Ceiling, replay_clock
from .peers import Adapter

step = pytest.importorskip(
    "bench.step", reason="the loop's packages are missing: pip install -e '.[train]'", exc_type=ImportError
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Entry = namedtuple("Entry", "adapter")
RIVALS = tuple(Entry(Adapter(name, lambda _, way=way: way)) for name, way in step.WAYS.items())


def run_step(entries, timed) -> dict:
    inputs = step.step_inputs(DEVICE)
    # The method's first definition in float64 is the truth, and in the model's dtype the yardstick.
    check = step.first_prompt(inputs)
    exact = step.step_outcome(step.authors_step, check, double=True)
    yardstick = step.step_outcome(step.authors_step, check)
    head = inputs.model.get_input_embeddings().weight
    results, prepares = {}, {}
    trainer = step.new_trainer(inputs.model)  # one for all: its moments stand before anything is measured
    for entry in entries:
        name = entry.adapter.name
        try:
            way = entry.adapter.load(DEVICE)
            got = yardstick if way is step.authors_step else step.step_outcome(way, check)
            verdict = judge(got, exact, yardstick)
        except Exception as error:
            results[name] = as_missing(error)
            continue
        results[name] = Row([], {
            "work": "step", "head": inputs.name, "rows": inputs.tokens, "vocab": head.shape[0],
            "hidden": head.shape[1], "dtype": "bf16" if head.dtype == torch.bfloat16 else "fp32", "rival": name,
            "ours": name == "gem", "entropy": True, "approximate": False,
            "label": f"{step.PROMPTS} prompts x {step.GROUP} candidates", "data": "written answers",
            "errors": verdict.errors, "budgets": verdict.budgets, "wrong": verdict.wrong, "check_rows": check.tokens,
        })  # fmt: skip
        prepares[name] = lambda whole=False, way=way: lambda: way(trainer, inputs)
    weights = sum(p.numel() for p in inputs.model.parameters())
    tokens = int(inputs.batch.prompt_mask.sum() + inputs.batch.completion_mask.sum())
    # The least: each prompt and completion token once forward to score, once forward and backward to train.
    floor = 8.0 * weights * tokens
    if timed:
        measure_rows(results, prepares, block_ceiling(inputs, tokens), floor, 1, DEVICE)
    return results


def block_ceiling(inputs, tokens: int) -> Ceiling:
    """A bare product of as many rows as the step has tokens with one matrix of the model."""
    matrix = max((p for p in inputs.model.parameters() if p.dim() == 2), key=lambda p: p.numel()).detach()
    left = torch.ones(tokens, matrix.shape[1], dtype=matrix.dtype, device=matrix.device)
    out = torch.empty(tokens, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return Ceiling("gemm", lambda: lambda: torch.mm(left, matrix.t(), out=out), 2.0 * tokens * matrix.numel())


@pytest.mark.parametrize("entry", RIVALS, ids=lambda e: e.adapter.name.replace(" ", "_").replace("'", ""))
@pytest.mark.benchmark(timer=replay_clock)
def test_step(benchmark, contests, entry):
    contests(benchmark, "step", run_step, entry.adapter.name)
