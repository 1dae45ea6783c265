"""Versions and commands that stand in more than one file are the same in each."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from tests.conftest import WITHOUT_NUMBERS

ROOT = Path(__file__).parents[2]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE)[1]


def test_one_version_of_ruff():
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)[1]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [repo["rev"] for repo in hooks if "ruff" in repo["repo"]] == [f"v{pinned}"]


def test_one_version_of_the_project():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == VERSION
    assert VERSION in (ROOT / "CHANGELOG.md").read_text()


def test_ci_is_the_command_people_run():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"]]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]


def test_only_files_without_numbers_are_run_once():
    """What `make test-numerics` leaves out is there, and has no tolerance in it."""
    assert WITHOUT_NUMBERS
    for name in WITHOUT_NUMBERS:
        source = (ROOT / "tests" / f"{name}.py").read_text()
        assert name == "docs/test_house" or not re.search(r"assert_close|allclose|approx\(|[ar]tol", source), name


def test_issue_forms_ask_for_something():
    forms = [path for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml"]
    assert {path.stem for path in forms} == {"bug", "feature", "wrong_number"}
    for path in forms:
        form = yaml.safe_load(path.read_text())
        assert form["name"] and form["description"], path
        ids = [field["id"] for field in form["body"]]
        assert len(ids) == len(set(ids)), path
        assert any(field.get("validations", {}).get("required") for field in form["body"]), path
