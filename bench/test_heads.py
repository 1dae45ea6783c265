"""Every work at every shape, one test a rival: works.py has the works, peers.py the rivals, shapes.py the shapes."""

from __future__ import annotations

import pytest
import torch

from .contest import run_contest
from .measure import replay_clock
from .shapes import shapes
from .works import WORKS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc):
    long = metafunc.config.getoption("--long")
    cases = [
        pytest.param(work, shape, entry, id=f"{work.name}-{shape}-{entry.adapter.name.replace(' ', '_')}")
        for work in WORKS.values()
        for shape in shapes(work.name, DEVICE.type, long)
        for entry in work.entries
    ]
    metafunc.parametrize(("work", "shape", "entry"), cases)


@pytest.mark.benchmark(timer=replay_clock)
def test_head(benchmark, contests, work, shape, entry):
    def run(entries, timed):
        return run_contest(work, shape, entries, DEVICE, timed)

    contests(benchmark, f"{work.name} {shape}", run, entry.adapter.name)
