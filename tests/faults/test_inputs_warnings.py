"""What is no error but seldom meant is said in one line, where it is meant nothing is."""

from __future__ import annotations

import json

import pytest

from gem.config.read import build_config
from gem.data.pairs import load_run_pairs
from tests.faults.calls import call
from tests.helpers import FORM, save_tiny

PAIRS = [
    {"prompt": f"{i} + 2?", "chosen": f"Final Answer: {i + 2}", "rejected": f"Final Answer: {i}", "answer": str(i + 2)}
    for i in range(4)
]


def said(tmp_path, train, held_out=None):
    """The lines beside the reports of rows that are left out."""
    files = {"train_file": train, "eval_file": held_out}
    paths = {key: str(tmp_path / f"{key}.jsonl") for key, rows in files.items() if rows is not None}
    for key, path in paths.items():
        (tmp_path / path).write_text("".join(json.dumps(row) + "\n" for row in files[key]))
    config = build_config({"model": "m", "output_dir": "o", "max_completion_length": 8, **paths})
    return [line for line in load_run_pairs(config, FORM, 512)[2] if isinstance(line, str)]


def turned(pair):
    return {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}


def test_nothing_is_said_of_what_is_as_it_should_be(tmp_path):
    assert said(tmp_path, PAIRS) == said(tmp_path, PAIRS[:2], PAIRS[2:]) == []


def test_held_out_pairs_that_are_trained_on(tmp_path):
    (line,) = said(tmp_path, PAIRS[:3], PAIRS[2:])
    assert line.startswith(f"Warning: {tmp_path}/eval_file.jsonl shares 1 of its 2 prompts with {tmp_path}/train_file")
    (line,) = said(tmp_path, PAIRS, PAIRS[::-1])
    assert "eval_file.jsonl holds the pairs of " in line and "take them out of one" in line


def test_pairs_both_ways_round(tmp_path):
    (line,) = said(tmp_path, [*PAIRS, turned(PAIRS[1])])
    assert "train_file.jsonl: 1 of 5 pairs stand there the other way round too" in line and "\n" not in line


def test_no_known_answer_anywhere(tmp_path):
    without = [{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in PAIRS]
    (line,) = said(tmp_path, without)
    assert (
        'train_file.jsonl: no row has a known answer ("answer")' in line
        and "named by --answer-column (answer_column" in line
    )
    assert said(tmp_path, [*without[:3], PAIRS[3]]) == []


def test_answers_that_sft_adds_a_line_to(tmp_path):
    (line,) = said(tmp_path, [{**PAIRS[0], "chosen": "2"}, *PAIRS[1:]])
    assert "train_file.jsonl: 1 of 4 chosen answers have no 'Final Answer:'" in line and "\n" not in line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("warnings")
    save_tiny(folder / "model")
    for name, rows in (("one", PAIRS), ("two", PAIRS[:2]), ("both", [*PAIRS, turned(PAIRS[0])])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_several_files_each_have_their_table(folder):
    files = [folder / "one.jsonl", folder / "two.jsonl"]
    code, out, errors = call("evaluate", folder / "model", *files, "--json", "--device", "cpu")
    found = json.loads(out)
    assert code == 0 and list(found) == list(map(str, files)), errors
    assert [found[str(file)]["eval/preference_num_pairs"] for file in files] == [4, 2]
    code, alone, _ = call("evaluate", folder / "model", files[1], "--json", "--device", "cpu")
    second = found[str(files[1])]
    assert {**json.loads(alone), "eval/seconds": 0} == {**second, "eval/seconds": 0}
    code, out, _ = call("evaluate", folder / "model", *files, "--device", "cpu")
    assert code == 0 and all(str(file) in out for file in files) and out.count("preference accuracy") == 2
    code, _, errors = call("evaluate", folder / "model", files[0], files[0])
    assert code == 2 and "one.jsonl: named twice; once is enough" in errors


def test_a_warning_is_printed_and_can_be_left_out(folder):
    command = ["evaluate", folder / "model", folder / "both.jsonl", "--json", "--device", "cpu"]
    for level, loading, warned in (("info", True, True), ("warning", False, True), ("error", False, False)):
        code, out, errors = call("--log-level", level, *command)
        assert code == 0 and json.loads(out)
        assert ("Loading" in errors, "Warning: " in errors) == (loading, warned), level
