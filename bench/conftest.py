"""`pytest bench/`: rivals of one contest are measured in turn, then each is handed to pytest-benchmark as its own test.

The first test of a contest runs all those of its rivals that were selected (`-k` leaves the others out), and the tests
replay the recorded times. What was skipped goes into the result file too, with its reason.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch

from . import report
from .contest import Row
from .measure import describe, replay_clock


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="bench: also the long shapes on a CPU, up to 128k rows")
    parser.addoption("--rows-log", metavar="FILE", help="bench: append each row as a line of JSON when it is measured")


def pytest_configure(config):
    config.bench_rows, config.bench_skipped = [], []


class Contests:
    """The contests of this session, by name."""

    def __init__(self, items, config) -> None:
        self.config = config
        self.selected = defaultdict(list)
        self.results: dict[str, dict] = {}
        for item in items:
            params = getattr(getattr(item, "callspec", None), "params", {})
            if "entry" in params:
                self.selected[self.key(item)].append(params["entry"])

    @staticmethod
    def key(item) -> tuple:
        """All that the rivals of a test share: its function and its other parameters."""
        return item.function, *(str(v) for k, v in sorted(item.callspec.params.items()) if k != "entry")

    def replay(self, benchmark, item, group: str, run: Callable, name: str) -> None:
        """Measures the contest where that has not been done, and gives the rival `name`'s times to `benchmark`."""
        key = self.key(item)
        if key not in self.results:
            torch.manual_seed(0)
            self.results[key] = run(self.selected[key], benchmark.enabled)
        result = self.results[key][name]
        if not isinstance(result, Row):
            self.config.bench_skipped.append({"group": group, "rival": name, "reason": str(result)})
            if name.startswith("gem"):
                pytest.fail(f"{name}: {result}")
            pytest.skip(str(result))
        benchmark.group = group
        benchmark.extra_info.update(result.facts)
        replay_clock.load(result.times)
        benchmark.pedantic(lambda: None, rounds=max(1, len(result.times)), iterations=1)
        replay_clock.load([])
        if benchmark.enabled:
            self.keep({**result.facts, "group": group, "times": result.times})
        wrong = result.facts["wrong"]
        if result.facts["ours"] and wrong and not result.facts["approximate"]:
            pytest.fail(f"{name} is wrong: " + ", ".join(f"{k} {result.facts['errors'][k]:.1e}" for k in wrong))

    def keep(self, row: dict) -> None:
        self.config.bench_rows.append(row)
        log = self.config.getoption("--rows-log")
        if log:
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")


@pytest.fixture(scope="session")
def all_contests(request):
    return Contests(request.session.items, request.config)


@pytest.fixture
def contests(all_contests, request):
    """replay(benchmark, group, run, name) of this test."""

    def replay(benchmark, group, run, name):
        all_contests.replay(benchmark, request.node, group, run, name)

    return replay


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine_info.pop("node", None)
    machine_info["bench"] = describe(device)


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["skipped"] = config.bench_skipped
    output_json["command"] = report.command_line(config.invocation_params.args)


def pytest_terminal_summary(terminalreporter, config):
    if config.bench_rows:
        terminalreporter.section("bench: each contest, the wrong and the incomplete unranked")
        terminalreporter.write_line(report.text_tables(config.bench_rows, config.bench_skipped))
