"""TRL's own tests of its helpers, with TRL's functions and with this package's.

    python -m tests.integrations.trl_own_tests

Fetches the files from TRL's repository at the tag of the installed version into a folder that is removed afterwards; or
takes them from a clone: `--tests path/of/trl/tests`. Those that need models of the Hugging Face hub fail without it in
both runs. Further arguments are pytest's: `-k "Entropy or Selective"`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import pytest

SOURCE = "https://raw.githubusercontent.com/huggingface/trl/v{version}/tests/{name}"
FILES = ("__init__.py", "testing_utils.py", "test_utils.py")


class Outcomes:
    """Counts what the tests came to, with or without the swap."""

    def __init__(self, swapped: bool):
        self.swapped = swapped
        self.found: dict[str, str] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        from trl.trainer import utils

        from gem_kernels.integrations.trl import PARAMETERS, use_gem_kernels

        if not self.swapped:
            return (yield)
        swap, module = use_gem_kernels(), vars(item.module)
        # The test's own module has the names of TRL's helpers too.
        before = {name: module[name] for name in PARAMETERS if name in module}
        module.update({name: getattr(utils, name) for name in before})
        try:
            return (yield)
        finally:
            module.update(before)
            swap.undo()

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.found[report.nodeid] = report.outcome


def fetch(folder: Path, version: str) -> None:
    for name in FILES:
        with urllib.request.urlopen(SOURCE.format(version=version, name=name), timeout=30) as answer:
            (folder / name).write_bytes(answer.read())


def run(folder: Path, swapped: bool, arguments: list[str]) -> dict[str, str]:
    """Test -> passed, failed or skipped."""
    outcomes = Outcomes(swapped)
    options = ["-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist", "-c", "/dev/null"]
    pytest.main([str(folder / FILES[-1]), f"--rootdir={folder}", *options, *arguments], plugins=[outcomes])
    return outcomes.found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tests", type=Path, help="the tests folder of a clone of TRL at the installed version's tag")
    given, more = parser.parse_known_args(arguments)
    version = importlib.metadata.version("trl")
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "trl_tests"
        folder.mkdir()
        try:
            if given.tests is None:
                fetch(folder, version)
            else:
                for name in FILES:
                    shutil.copy(given.tests / name, folder / name)
        except OSError as error:
            print(f"TRL {version}'s tests: {error}; give them with --tests", file=sys.stderr)
            return 2
        own, ours = (run(folder, swapped, more) for swapped in (False, True))
    print(f"TRL {version}, its own functions: {dict(Counter(own.values()))}; ours: {dict(Counter(ours.values()))}")
    worse = [name for name, outcome in ours.items() if outcome != "passed" and own.get(name) == "passed"]
    for name in worse:
        print(f"passes with TRL's alone: {name}")
    return 1 if worse or not ours else 0


if __name__ == "__main__":
    sys.exit(main())
