"""Reading of a run's files: what is taken, and the one line said of what is not."""

from __future__ import annotations

import json

import pytest

from gem.errors import UserError
from gem.report.records import read_completions, read_metrics, read_source
from tests.report.report_data import calibrated_score, completion_row, make_run, metric_rows, write_rows


def said(tmp_path, row) -> str:
    """The error that a file of this row (an object, or the line itself) gives, without its directory."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(completion_row()) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(UserError) as error:
        read_source(path)
    message = str(error.value)
    assert "\n" not in message
    return message.removeprefix(f"{tmp_path}/")


def test_a_row_with_tokens(tmp_path):
    row = completion_row(2, 1, step=3, stage="SEGA")
    (one,) = read_completions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert one.tokens.text == row["tokens"]
    assert one.tokens.entropy == row["entropy"] and one.tokens.logprob == row["logprob"]
    assert one.tokens.fork == [i for i, fork in enumerate(row["fork"]) if fork] and one.tokens.fork
    assert one.tokens.answer_start == len(row["tokens"]) - 2
    assert one.tokens.top[0][0] == (row["tokens"][0], row["logprob"][0]) and len(one.tokens.top[0]) == 5
    assert (one.label, one.step, one.stage, one.correct) == ("2", 3, "SEGA", False)
    assert one.features == row["features"] and one.num_tokens == len(row["tokens"])


def test_rows_without_tokens_as_runs_and_gem_score_write_them(tmp_path):
    logged = {"step": 3, "prompt": "p", "completion": "c", "answer": "7", "score": 1.5, "h_final": 0.01, "h_fork": 1.6,
              "advantage": -0.1, "valid": True, "truncated": False}  # fmt: skip
    scored = {"row": "line 1", "source": "chosen", "prompt": [{"role": "user", "content": "q"}], "completion": "c",
              "score": None, "score_standard_error": 0.2, "valid": False, "logprob": -3.5, "num_tokens": 9,
              "truncated": True, "final_answer": "7", "found_by": "marker", "correct": True}  # fmt: skip
    rows = [logged, logged, {**logged, "step": 4}, scored, {**scored, "source": "rejected"}]
    one, again, later, chosen, rejected = read_completions(write_rows(tmp_path / "rows.jsonl", rows))
    assert one.tokens is None and one.answer == "7" and one.features == {"h_final": 0.01, "h_fork": 1.6}
    assert one.group == again.group != later.group and (one.label, again.label) == ("1", "2")
    assert (chosen.label, rejected.label) == ("chosen", "rejected") and chosen.group == rejected.group
    assert chosen.prompt == "user: q" and chosen.answer == "7" and chosen.num_tokens == 9
    assert chosen.score is None and not chosen.valid and chosen.truncated and chosen.features["logprob"] == -3.5


def test_numbers_that_are_not_finite_are_missing(tmp_path):
    row = completion_row(tokens=["a", "b", "c"], score=float("nan"), entropy=[float("inf"), None, 1.0])
    (one,) = read_completions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert one.score is None and one.tokens.entropy == [None, None, 1.0]


@pytest.mark.parametrize("start, expected", [(None, 3), (-1, 3), (2, 2), (3, 3), (99, 3)])
def test_an_answer_outside_the_completion_is_none(tmp_path, start, expected):
    row = completion_row(tokens=["a", "b", "c"], answer_start=start)
    (one,) = read_completions(write_rows(tmp_path / "rows.jsonl", [row]))
    assert one.tokens.answer_start == expected


@pytest.mark.parametrize(
    "change, words",
    [
        ({"prompt": None}, 'expected "prompt", a text, got null'),
        ({"completion": 3}, 'expected "completion", a text, got 3'),
        ({"entropy": [1.0]}, "entropy: expected one entry for each of the 3 tokens, got 1"),
        ({"logprob": None}, "logprob: expected 3 numbers, one for each of tokens, got none"),
        ({"entropy": [0.1, "x", 0.2]}, 'entropy: expected numbers, got "x"'),
        ({"entropy": [0.1, True, 0.2]}, "entropy: expected numbers, got true"),
        ({"tokens": ["a", 1, "c"]}, 'tokens: expected a list of texts, got ["a", 1, "c"]'),
        ({"top": [[["a"]], [], []]}, 'top: expected lists of [token, log-prob], got [["a"]]'),
        ({"step": 1.5}, "step: expected a whole number, got 1.5"),
        ({"score": "high"}, 'score: expected numbers, got "high"'),
        ({"correct": "yes"}, 'correct: expected true, false or null, got "yes"'),
        ({"features": [1]}, "features: expected names with numbers, got [1]"),
        ({"prompt": ["q"]}, 'prompt: expected a text or a list of messages, got ["q"]'),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, change, words):
    assert said(tmp_path, {**completion_row(tokens=["a", "b", "c"]), **change}) == f"rows.jsonl, line 2: {words}"


def test_lines_that_are_not_objects(tmp_path):
    assert said(tmp_path, "{").startswith("rows.jsonl, line 2: not JSON: ")
    assert said(tmp_path, "[1]") == "rows.jsonl, line 2: expected a JSON object, got [1]"


def test_metrics_count_the_optimizer_steps_of_the_run(tmp_path):
    rows = read_metrics(write_rows(tmp_path / "metrics.jsonl", metric_rows(sft_steps=2, sega_steps=3, guards=(2,))))
    assert [(row["stage"], row["total_steps"]) for row in rows] == [
        ("eval", 0), ("SFT", 1), ("SFT", 2), ("eval", 2), ("SEGA", 3), ("eval", 3), ("SEGA", 4), ("guard", 4),
        ("SEGA", 5), ("eval", 5),
    ]  # fmt: skip


def test_a_run_that_is_being_written(tmp_path):
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "SEGA", "st')
    whole = read_source(run)
    assert (
        len(whole.rows) == len(metric_rows()) and len(whole.completions) == 48 and list(whole.scores) == ["score.json"]
    )
    assert whole.config.startswith("model: ") and whole.name == "run"


def test_a_folder_that_is_no_run_names_the_run_in_it(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl, .*; name the output_dir of gem train"):
        read_source(tmp_path)
    make_run(tmp_path / "demo" / "run")
    with pytest.raises(UserError, match=r"name the run within it, .*demo/run"):
        read_source(tmp_path / "demo")


def test_other_files(tmp_path):
    path = tmp_path / "file"
    for content, words in (
        (b"", "the file is empty"),
        (b"\xff\xfe", "expected UTF-8 text, got byte 0xff"),
        (b'{"kind": "gem-score", "version": 2}', "a gem-score of version 2; this gem reads version 1, use a newer one"),
        (b'{"kind": "gem-score", "weights": [1]}', r"weights: expected a dict, got \[1\]"),
        (b'{"kind": "other"}', 'line 1: expected "prompt", a text, got null'),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=words):
            read_source(path)
    path.write_text(json.dumps(calibrated_score(), indent=1))
    assert read_source(path).scores["file"]["num_pairs"] == 48
