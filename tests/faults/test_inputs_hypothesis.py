"""Hypothesis over every setting and over rows: one outcome of two, whatever is given. 2,400 cases, no model.

A configuration is taken, or ends with exit code 2 and one short line. A file of rows is taken, or is one report; with
bad_rows: skip a bad row is left out. Nothing else may happen: no other exception, no trace, no control character.
"""

from __future__ import annotations

import json
from unittest import mock

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gem.config.read import build_config, load_config
from gem.config.settings import RowSettings, TrainConfig
from gem.data.pairs import load_pairs
from gem.errors import UserError, short
from gem.terminal.text import visible
from tests.faults.calls import call
from tests.helpers import FORM

# Stored failures would make a run depend on those before it; the seed is fixed so that CI is the same every time.
QUICK = {
    "deadline": None, "database": None, "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
}  # fmt: skip
HOSTILE_WORDS = (
    *("", " ", "\0", "\x1b[31m", "[red]", "[/b]", "\\[/b]", "*a", "&a", "!!python/name:os.system", "!!int", "../.."),
    *("~", "~x", "a,b", "null", "~nobody/x", "yes", "off", "1e400", "-1e400", ".nan", ".inf", "1_000", "0x10", "0o17"),
    *("190:20:30", "2026-01-01", "2026-99-99", "regex:(", "regex:", "regex:(a+)+$", "last_tokens:0"),
    *("marker,marker", "\ud800", "\u202e", "\ufeff", "a" * 5000, "9" * 5000, "-", "--", "%s", "${HOME}", "{{ 1/0 }}"),
    *("<<", "=", "?", "- a", "[", "{", "'", '"'),
)  # fmt: skip
NUMBERS = st.one_of(
    st.integers(),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0, -1, 1, 2, 2**31, 2**32, 2**63, 10**17, 10**18, 10**400, 0.5, -0.0, 5e-324, 1e308, 1e-308]),
    st.booleans(),
)
WORDS = st.one_of(st.sampled_from(HOSTILE_WORDS), st.text(max_size=20))
SCALARS = st.one_of(NUMBERS, st.none(), WORDS, st.binary(max_size=5), st.dates())
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
KEYS = st.sampled_from(list(TrainConfig.model_fields))
NEEDED = {"model": "org/m", "train_file": "org/t", "output_dir": "out"}


def one_short_line(words: str) -> None:
    assert words.strip() and "\n" not in words.strip("\n") and len(words) < 1500, words
    assert visible(words) == words, words


def outcome(make) -> TrainConfig | None:
    """The configuration, or None where it was refused as it should be."""
    try:
        return make()
    except UserError as error:
        words = visible(str(error))  # as the command line prints it
        one_short_line(words)
        return None


@pytest.mark.parametrize("name", TrainConfig.model_fields)
@settings(max_examples=10, **QUICK)
@given(value=VALUES)
def test_any_value_of_each_setting(name, value):
    """Ten values for every one of them: taken, as the command line would take them from its file, or refused."""
    config = outcome(lambda: build_config({**NEEDED, name: value}))
    if config is not None:
        text = yaml.safe_dump(config.model_dump(mode="json"), allow_unicode=True)
        assert build_config(yaml.safe_load(text)) == config  # what is taken is saved and read back


@settings(max_examples=400, **QUICK)
@given(values=st.dictionaries(st.one_of(KEYS, KEYS, KEYS, st.text(max_size=10), NUMBERS), VALUES, max_size=8))
def test_any_settings_together(values):
    outcome(lambda: build_config({**NEEDED, **values}))


@settings(max_examples=300, **QUICK)
@given(values=st.lists(st.tuples(KEYS, st.one_of(WORDS, NUMBERS.map(short))), max_size=4))
def test_any_flags(values):
    outcome(lambda: load_config(None, [part for k, v in values for part in (f"--{k}", v)], **NEEDED))


PIECES = (
    *("seed: ", "1\n", "- ", "[", "]", "{", "}", "&a ", "*a", "!!int ", "!x ", "\n", "\t", "? ", ": ", "'", '"', "|\n"),
    *("#", "---\n", "%YAML 1.1\n", "!!bool ", "!!timestamp ", "!!set ", "!!omap ", "!!binary ", "<<: ", "0x"),
)
FILES = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map(str.encode),
)


@settings(max_examples=400, **QUICK)
@given(data=FILES)
def test_any_file(tmp_path, data):
    (tmp_path / "c.yaml").write_bytes(data)
    outcome(lambda: load_config(tmp_path / "c.yaml"))


@settings(max_examples=15, **QUICK)
@given(data=FILES)
def test_any_file_through_the_command_line(tmp_path, data):
    """`gem train`, which stops before a model is looked for: whatever the file holds, its exit code is 2."""
    (tmp_path / "c.yaml").write_bytes(data)
    code, out, errors = call("train", tmp_path / "c.yaml")
    assert (code, out) == (2, "") and errors.startswith("gem: ")
    one_short_line(errors)


JSON = st.recursive(
    st.one_of(WORDS, st.none(), st.booleans(), st.floats(), st.integers(-(10**20), 10**20)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "x"]), "content": JSON}),
    max_size=3,
)
TEXTS = st.one_of(st.sampled_from(["2 + 2?", "4", "5", "\ud800", "", "Final Answer: 4"]), JSON, MESSAGES)
ROWS = st.one_of(
    st.fixed_dictionaries(
        {}, optional={"prompt": TEXTS, "chosen": TEXTS, "rejected": TEXTS, "answer": JSON, "other": JSON}
    ),
    JSON,
)


@settings(max_examples=350, **QUICK)
@given(rows=st.lists(ROWS, max_size=4), bad=st.sampled_from(["error", "skip"]), broken=st.binary(max_size=12))
def test_any_rows(tmp_path, rows, bad, broken):
    good = {"prompt": "1 + 1?", "chosen": "2", "rejected": "3"}
    lines = [json.dumps(row).encode() for row in (good, *rows)]
    (tmp_path / "p.jsonl").write_bytes(b"\n".join([*lines, broken]))
    policy = RowSettings(bad_rows=bad, overlong_rows=bad)
    try:
        pairs, report = load_pairs(str(tmp_path / "p.jsonl"), FORM, 512, policy)
    except UserError as error:
        assert bad == "error"
        first, *more = visible(str(error)).splitlines()
        one_short_line(first)
        assert all(line.startswith("  ") and len(line) < 700 for line in more)
        return
    assert len(pairs) + len(report.problems) == report.num_rows and pairs[0].chosen_ids
    assert bad == "skip" or not any(problem.kind != "duplicate" for problem in report.problems)


def test_the_cases_are_as_many_as_promised():
    """At least 2,000 in every run: what this file's first line says."""
    assert len(TrainConfig.model_fields) * 10 + 400 + 300 + 400 + 15 + 350 >= 2400
    with mock.patch("gem.config.section.short", lambda *_: "x\ny"), pytest.raises(AssertionError):
        outcome(lambda: build_config({**NEEDED, "seed": "a"}))  # the rule sees a line too many
