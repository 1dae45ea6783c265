"""Entropies -> span scores and group advantages, ragged sequences."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

import gem_kernels
from gem_kernels import reference

from .contest import Row, as_missing, measure_rows
from .errors import judge
from .measure import copy_ceiling, replay_clock
from .peers import OURS, Adapter

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUP = 8
SHAPES = [(64, 256), (512, 1024)] if DEVICE.type == "cpu" else [(64, 1024), (1024, 4096)]
Entry = namedtuple("Entry", "adapter")


def sequences(B, T):
    """Entropies [B, T], mask, answer starts; lengths between T / 4 and T."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(T // 4, T + 1, (B,), generator=generator)
    entropy = torch.rand(B, T, generator=generator) * 5
    mask = torch.arange(T) < lengths[:, None]
    return tuple(x.to(DEVICE) for x in (entropy, mask, lengths - lengths // 5))


def loop(entropy, mask, start):
    """The specification: one sequence after the other, each sorted."""
    scores = reference.entropy_scores(entropy, completion_mask=mask, answer_start=start)
    return scores.score, reference.group_advantages(scores.score, GROUP, valid=scores.valid)


def sorted_rows(entropy, mask, start):
    """Plain torch over the whole batch: one sort of all rows, masks for the rest."""
    position = torch.arange(entropy.shape[1], device=entropy.device)
    answer = mask & (position >= start[:, None])
    reasoning = mask & ~answer
    final = (entropy * answer).sum(1) / answer.sum(1)
    count = reasoning.sum(1)
    top = torch.clamp(count // 10, min=1)
    ordered = entropy.masked_fill(~reasoning, -torch.inf).sort(1, descending=True).values
    fork = ordered.masked_fill(position >= top[:, None], 0.0).sum(1) / top
    score = -final + torch.where(count > 0, fork, torch.zeros_like(fork))
    groups = score.view(-1, GROUP)
    return score, (groups - groups.mean(1, keepdim=True)).flatten()


def ours(entropy, mask, start):
    scores = gem_kernels.entropy_scores(entropy, completion_mask=mask, answer_start=start)
    return scores.score, gem_kernels.group_advantages(scores.score, GROUP, valid=scores.valid)


RIVALS = (
    Entry(Adapter("eager loop", lambda _: loop)),
    Entry(Adapter("eager sort", lambda _: sorted_rows)),
    Entry(Adapter("torch.compile", lambda _: torch.compile(sorted_rows, dynamic=True))),
    Entry(Adapter(OURS, lambda _: ours)),
)


def run_scores(entries, timed, B, T) -> dict:
    entropy, mask, start = sequences(B, T)
    names = ("score", "advantages")
    exact = dict(zip(names, loop(entropy.double(), mask, start)))
    yardstick = dict(zip(names, loop(entropy, mask, start)))
    results, prepares = {}, {}
    for entry in entries:
        name = entry.adapter.name
        try:
            function = entry.adapter.load(DEVICE)
            verdict = judge(dict(zip(names, function(entropy, mask, start))), exact, yardstick)
        except Exception as error:
            results[name] = as_missing(error)
            continue
        results[name] = Row([], {
            "work": "scores", "head": "", "rows": B * T, "vocab": 0, "hidden": 0, "dtype": "fp32", "rival": name,
            "ours": entry.adapter.ours, "entropy": True, "approximate": False, "label": f"[{B}, {T}]",
            "data": "random", "errors": verdict.errors, "budgets": verdict.budgets, "wrong": verdict.wrong,
            "check_rows": B * T,
        })  # fmt: skip
        prepares[name] = lambda whole=False, function=function: lambda: function(entropy, mask, start)
    floor = float(entropy.numel() * entropy.itemsize)
    if timed:
        measure_rows(results, prepares, copy_ceiling(DEVICE), floor, 5, DEVICE)
    return results


@pytest.mark.parametrize("entry", RIVALS, ids=lambda e: e.adapter.name.replace(" ", "_"))
@pytest.mark.parametrize(("B", "T"), SHAPES)
@pytest.mark.benchmark(timer=replay_clock)
def test_scores(benchmark, contests, B, T, entry):
    contests(benchmark, f"scores {B}x{T}", lambda *args: run_scores(*args, B, T), entry.adapter.name)
