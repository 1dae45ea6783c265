"""The harness of bench/: a wrong implementation is called wrong, a missing peer says why, a result becomes a page."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from bench import peers, report
from bench.contest import run_contest
from bench.errors import judge, plain
from bench.measure import ReplayClock, interleave
from bench.peers import Adapter, Missing
from bench.shapes import CPU, CUDA, HEADS, Head, Shape
from bench.works import WORKS, Entry, fused_sega, policy, whole_sega

TINY = Shape(Head("tiny", 300, 16), 64, torch.float32)
CPU_DEVICE = torch.device("cpu")


def contest(work: str, *adapters: Adapter, loss=policy) -> dict:
    return run_contest(WORKS[work], TINY, [Entry(adapter, loss) for adapter in adapters], CPU_DEVICE, timed=False)


def entropy_off(logits, targets, temperature):
    logprobs, entropy = peers.eager(logits, targets, temperature)
    return logprobs, entropy * 1.001


def gradient_off(logits, targets, temperature):
    """Right values, half a gradient through the entropy."""
    logprobs, entropy = peers.eager(logits, targets, temperature)
    return logprobs, 0.5 * entropy + 0.5 * entropy.detach()


def nan_in_one_row(logits, targets, temperature):
    logprobs, entropy = peers.eager(logits, targets, temperature)
    return logprobs, torch.where(torch.arange(len(entropy)) == 3, torch.nan, entropy)


@pytest.mark.parametrize(
    ("function", "work", "wrong"),
    [
        (peers.eager, "stats", []),
        (peers.eager, "stats_backward", []),
        (entropy_off, "stats", ["entropy"]),
        (nan_in_one_row, "stats", ["entropy"]),
        (gradient_off, "stats", []),
        (gradient_off, "stats_backward", ["dLogits"]),
    ],
)
def test_wrong_is_called_wrong(function, work, wrong):
    row = contest(work, Adapter("rival", lambda _: function))["rival"]
    assert row.facts["wrong"] == wrong
    assert bool(report.unranked({**row.facts, "times": [1.0]})) == bool(wrong)


def test_without_entropy_is_judged_on_the_rest_and_unranked():
    adapter = Adapter("rival", lambda _: lambda *args: (peers.eager(*args)[0], None), entropy=False)
    row = contest("stats_backward", adapter)["rival"]
    assert row.facts["wrong"] == [] and set(row.facts["errors"]) == {"logprobs", "dLogits"}
    assert report.unranked({**row.facts, "times": [1.0]}) == "no entropy"


@pytest.mark.parametrize("path", ["one_shot", "two_phase"])
def test_our_sega_agrees_with_the_composed_one(path):
    """Against float64: statistics, scores and advantages by the reference, autograd."""
    adapter = Adapter("gem_kernels", fused_sega(path))
    row = contest("sega", adapter, loss=whole_sega)["gem_kernels"]
    assert row.facts["wrong"] == [] and set(row.facts["errors"]) == {"logprobs", "entropy", "dHidden", "dWeight"}


@pytest.mark.parametrize("work", ["sega_padded", "sega_frozen"])
def test_padding_and_a_frozen_head_agree_with_the_composed_way(work):
    """One call, and statistics with autograd, by ours and by eager torch; a gradient of padding would be seen."""
    found = {}
    for entry in WORKS[work].entries:
        if entry.adapter.name in ("eager", "gem_kernels", "gem_kernels one call"):
            found |= contest(work, entry.adapter, loss=entry.loss)
    assert len(found) == 3
    expected = {"logprobs", "entropy", "dHidden", "dWeight"} - ({"dWeight"} if work == "sega_frozen" else set())
    for row in found.values():
        assert row.facts["wrong"] == [] and set(row.facts["errors"]) == expected


def test_missing_peer_says_why(monkeypatch):
    def load(device):
        return peers.package("no_such_module", "no-such-package", device)

    result = contest("stats", Adapter("absent", load))["absent"]
    assert isinstance(result, Missing) and str(result) == "no-such-package is not installed"
    with pytest.raises(Missing, match=r"needs a CUDA device \(Triton\)"):
        peers.package("json", "pytest", CPU_DEVICE, "Triton")
    monkeypatch.setattr(peers, "version", lambda _: "1.0")
    with pytest.raises(Missing, match="pytest 1\\.0 does not import: No module"):
        peers.package("no_such_module", "pytest", CPU_DEVICE)


def test_a_peer_that_raises_is_missing_with_its_error():
    def fails(*_):
        raise ValueError("hidden size must be\na multiple of 128")

    result = contest("stats", Adapter("rival", lambda _: fails))["rival"]
    assert str(result) == "raises ValueError: hidden size must be a multiple of 128"


def test_minus_infinity_is_no_error_in_the_truth():
    logits = torch.tensor([[0.0, -torch.inf, 1.0]], dtype=torch.float64)
    logprobs, entropy = plain(logits, torch.tensor([1]), 1.0)
    p = 1 / (1 + torch.e)
    assert logprobs.item() == -torch.inf
    assert entropy.item() == pytest.approx(
        -p * torch.tensor(p).log().item() - (1 - p) * torch.tensor(1 - p).log().item()
    )
    same = judge({"logprobs": logprobs.float()}, {"logprobs": logprobs}, {"logprobs": logprobs.float()})
    assert same.errors == {"logprobs": 0.0} and same.wrong == []


def test_rivals_take_turns():
    order = []
    prepares = {n: lambda n=n: lambda: order.append(n) for n in "ab"}
    times, failed = interleave({**prepares, "fails": lambda: lambda: 1 / 0}, 3, CPU_DEVICE)
    assert order == list("ababab") and {n: len(t) for n, t in times.items()} == {"a": 3, "b": 3}
    assert isinstance(failed["fails"], ZeroDivisionError)


def test_replayed_times_are_the_measured_ones():
    clock = ReplayClock()
    clock.load([0.25, 0.5])
    first = -clock() + clock()
    second = -clock() + clock()
    assert (first, second) == (0.25, 0.5)


def test_every_work_has_shapes_and_every_head_is_met():
    assert set(CPU) == set(CUDA) == set(WORKS)
    assert {shape.head for shapes in CUDA.values() for shape in shapes} == set(HEADS)


def fact(rival, seconds, rows, **more):
    return {
        "work": "sega", "head": "SmolLM2", "rows": rows, "vocab": 49152, "hidden": 576, "dtype": "fp32", "rival": rival,
        "ours": rival.startswith("gem"), "entropy": True, "approximate": False, "label": "", "data": "random",
        "errors": {"entropy": 1e-7, "dHidden": 2e-7}, "budgets": {"entropy": 1e-6, "dHidden": 1e-6}, "wrong": [],
        "check_rows": 64, "peak_extra_mib": 100.0 * rows / 256, "rate": 0.1, "rate_unit": "TFLOP/s", "ceiling": 0.2,
        "share": 0.5, "group": f"sega SmolLM2-{rows}-fp32", "times": [seconds, seconds * 1.1, seconds * 1.2], **more,
    }  # fmt: skip


@pytest.fixture
def result(tmp_path):
    """A result file of two shapes, as pytest-benchmark writes it."""
    rows = []
    for n in (256, 1024):
        bad = {"wrong": ["entropy"], "errors": {"entropy": 3e-2, "dHidden": 1e-7}}
        rows += [fact("eager", 0.5, n), fact("gem_kernels", 0.2, n), fact("fast and wrong", 0.1, n, **bad)]
        rows.append(fact("CCE", 0.15, n, entropy=False))
    benchmarks = []
    for row in copy.deepcopy(rows):
        group, times = row.pop("group"), row.pop("times")
        benchmarks.append({"group": group, "extra_info": row, "stats": {"median": times[1], "data": times}})
    machine = {"device": "a CPU", "kind": "cpu", "cores": 2, "threads": 2, "load": 0.1, "python": "3.11.0"}
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({
        "machine_info": {"bench": {**machine, "versions": {"torch": "2.13.0"}}},
        "commit_info": {"id": "0123456789abcdef", "dirty": False},
        "datetime": "2026-01-02T03:04:05",
        "command": "pytest bench/",
        "benchmarks": benchmarks,
        "skipped": [{"group": "x", "rival": "quack", "reason": "quack-kernels is not installed"}],
    }))  # fmt: skip
    return path


def test_report_of_a_stored_result(result, tmp_path):
    pytest.importorskip("matplotlib")
    report.main([str(result), "--docs", str(tmp_path)])
    page = (tmp_path / "benchmarks.md").read_text()
    assert "## GPU\n\nnot measured" in page
    assert "a CPU, 2 cores" in page and "Commit 0123456789ab, 2026-01-02" in page and "    pytest bench/\n" in page
    lines = [line.split(" | ") for line in page.splitlines() if "| eager |" in line or "gem_kernels |" in line]
    assert [(x[0].strip("| "), x[1]) for x in lines[:2]] == [("1", "gem_kernels"), ("2", "eager")]
    assert "| - | fast and wrong |" in page and "WRONG: entropy 3.0e-02 > 1.0e-06" in page
    assert "| - | CCE |" in page and "no entropy" in page
    assert "| quack | quack-kernels is not installed | 1 |" in page
    for what in ("time", "memory", "share"):
        drawn = (tmp_path / "benchmarks" / f"cpu-sega-{what}.svg").read_text()
        assert drawn.startswith("<?xml") and f"benchmarks/cpu-sega-{what}.svg" in page


def test_report_refuses_what_is_no_result(tmp_path):
    other = tmp_path / "other.json"
    other.write_text("{}")
    with pytest.raises(SystemExit, match="not a result of"):
        report.main([str(other), "--docs", str(tmp_path)])
    assert not (tmp_path / "benchmarks.md").exists()


def test_whole_step_agrees_with_the_authors_way(monkeypatch):
    """Scores and gradients of both against float64, on the small model with random weights."""
    step = pytest.importorskip("bench.step", exc_type=ImportError)
    monkeypatch.setattr(step.importlib.util, "find_spec", lambda name: None)
    step.step_inputs.cache_clear()
    try:
        inputs = step.first_prompt(step.step_inputs(CPU_DEVICE))
    finally:
        step.step_inputs.cache_clear()
    exact = step.step_outcome(step.authors_step, inputs, double=True)
    yardstick = step.step_outcome(step.authors_step, inputs)
    assert judge(step.step_outcome(step.gem_step, inputs), exact, yardstick).wrong == []
    assert set(exact) == {"score", "dHead", "dBody"} and all(value.abs().max() > 0 for value in exact.values())
