"""A model used: `gem score` with a calibrated score, its probabilities and tokens, and `gem generate`."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
import torch

from gem.calibration.fit import calibrate
from gem.calibration.probability import preference_probabilities, right_probabilities
from gem.calibration.score_file import Platt, write_score
from gem.config.settings import Sampling
from gem.data.answers import decode
from gem.demo.arithmetic import arithmetic_pairs
from gem.files import write_jsonl
from gem.model.forward import Policy, measured_stats, top_tokens
from gem.report.records import read_completions
from gem.rollout.sample import roll_out
from gem.scoring.records import token_texts
from gem.use import generate as generating
from gem.use.score import agreement
from tests.gem.test_cli import call
from tests.helpers import FORM, encode, rollout_of, save_tiny, tiny_model, tiny_tokenizer

NAMES = ("final_entropy", "mean_logprob")


def fitted(seed=0, **changed):
    """A calibrated score of made-up features; `changed` stands over what was found."""
    rng = np.random.default_rng(seed)
    rejected = rng.normal(size=(24, 9))
    chosen = rejected + rng.normal(size=(24, 9)) + 2.0 * (np.arange(9) < 8)  # no difference in length
    score = calibrate(chosen, rejected, list(range(24)), features=NAMES).score(model="m", pairs_hash="sha256:0")
    return score.model_copy(update=changed)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("use")
    save_tiny(folder / "model", context=1024)
    write_jsonl(folder / "pairs.jsonl", arithmetic_pairs(5, seed=3))
    write_score(
        fitted(model=str(folder / "model"), platt=Platt(slope=0.7, intercept=-0.3, count=40)), folder / "s.json"
    )
    return folder


def scored(folder, monkeypatch, capsys, *arguments):
    """(rows, standard error) of `gem score`."""
    command = ["score", folder / "model", folder / "pairs.jsonl", "--max-completion-length", 12, *arguments]
    code, out, err = call(command, monkeypatch, capsys)
    assert code == 0, err
    return [json.loads(line) for line in out.splitlines()], err


def test_a_calibrated_score_is_that_of_its_file(folder, monkeypatch, capsys):
    rows, err = scored(folder, monkeypatch, capsys, "--score", folder / "s.json")
    score = fitted()
    assert len(rows) == 10 and [row["source"] for row in rows[:2]] == ["chosen", "rejected"]
    for row in rows:
        truth = sum(score.weights[name] / score.scales[name] * row["features"][name] for name in NAMES)
        assert row["score"] == pytest.approx(truth, rel=1e-5)
        # Of being right there is nothing to say of an answer that the model did not sample.
        assert "probability" not in row and len(row["features"]) == 9
    for one, other in zip(rows[::2], rows[1::2]):
        truth = 1 / (1 + math.exp(other["score"] - one["score"]))
        assert one["preference_probability"] == pytest.approx(truth, rel=1e-6)
        assert one["prompt_index"] == other["prompt_index"] and (one["candidate"], other["candidate"]) == (0, 1)
    assert "was fitted for" not in err
    plain, _ = scored(folder, monkeypatch, capsys)
    for row in plain:
        features = row["features"]
        assert row["score"] == pytest.approx(features["fork_entropy"] - features["final_entropy"], abs=1e-5)
        assert "preference_probability" not in row


def test_sampled_candidates_have_probabilities_and_the_best_is_one_row(folder, monkeypatch, capsys):
    options = ["--score", folder / "s.json", "--sample", 3, "--seed", 1]
    rows, _ = scored(folder, monkeypatch, capsys, *options)
    assert len(rows) == 15
    values = np.array([row["score"] for row in rows]).reshape(5, 3)
    right = right_probabilities(Platt(slope=0.7, intercept=-0.3, count=40), values)
    preferred = preference_probabilities(values, np.ones_like(values, dtype=bool))
    np.testing.assert_allclose(np.array([row["probability"] for row in rows]).reshape(5, 3), right, rtol=1e-6)
    found = np.array([row["preference_probability"] for row in rows]).reshape(5, 3)
    np.testing.assert_allclose(found, preferred, rtol=1e-6)
    best, _ = scored(folder, monkeypatch, capsys, *options, "--best")
    assert [row["candidate"] for row in best] == values.argmax(1).tolist()
    for i, row in enumerate(best):
        same = rows[3 * i + row["candidate"]]
        for key in ("completion", "score", "probability", "preference_probability", "correct", "final_answer"):
            assert row[key] == same[key], key
        assert row["num_candidates"] == 3
        assert row["agreement"] is None if row["final_answer"] is None else row["agreement"] >= 1 / 3


def test_agreement_by_hand():
    assert agreement(["7", " 7", None, "8"], "7") == 0.5
    assert agreement([None, "8"], None) is None


def test_a_score_of_another_model_or_not_informative_is_a_warning(folder, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    rejected, chosen = rng.normal(size=(2, 12, 9))
    score = calibrate(chosen, rejected, list(range(12)), features=NAMES).score(model="other", pairs_hash="sha256:0")
    assert score.verdict.kind == "not_informative"
    write_score(score, tmp_path / "weak.json")
    rows, err = scored(folder, monkeypatch, capsys, "--score", tmp_path / "weak.json", "--sample", 2)
    lines = [line for line in err.splitlines() if "weak.json" in line]
    assert len(lines) == 2 and "was fitted for other" in lines[0] and score.verdict.words in lines[1]
    assert "probability" not in rows[0] and "preference_probability" in rows[0]  # no Platt numbers in it


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--score", "no.json"], "no.json: cannot read it"),
        (["--score", "s.json", "--fork-weight", "2"], "fork_weight: expected none beside score"),
        (["--best"], "--sample 8"),
        (["--top", "3"], "top: expected tokens with it"),
        (["--tokens", "--top", "101"], "top: expected at most 100"),
    ],
)
def test_what_does_not_fit_together_is_one_line(folder, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(folder)
    code, out, err = call(["score", "model", "pairs.jsonl", *flags], monkeypatch, capsys)
    assert code == 2 and out == "" and words in err.splitlines()[-1], err


def test_tokens_are_in_the_format_of_the_page(folder, tmp_path, monkeypatch, capsys):
    rows, _ = scored(folder, monkeypatch, capsys, "--sample", 2, "--tokens", "--top", 3)
    given, _ = scored(folder, monkeypatch, capsys, "--tokens")
    tokenizer = tiny_tokenizer()
    assert all("top" in row for row in rows) and not any("top" in row for row in given)
    for row in (*rows, *given):
        number = row["num_tokens"]
        assert all(len(row[name]) == number for name in ("tokens", "entropy", "logprob", "fork"))
        text = "".join(row["tokens"])
        assert text == row["completion"] if row["truncated"] else text == row["completion"] + tokenizer.eos_token
        assert sum(row["logprob"]) == pytest.approx(row["features"]["sum_logprob"], abs=1e-4 * number + 1e-5)
        assert max(row["entropy"]) == pytest.approx(row["features"]["max_entropy"], abs=1e-4)
        forks = [value for value, fork in zip(row["entropy"], row["fork"]) if fork]
        if forks:
            assert sum(forks) / len(forks) == pytest.approx(row["h_fork"], abs=1e-4)
        assert (row["answer_start"] < number) == (row["final_answer"] is not None)
        assert row["entropy"] == [round(value, 4) for value in row["entropy"]]
    for row in rows:
        for token, logprob, top in zip(row["tokens"], row["logprob"], row["top"]):
            assert len(top) == 3 and top == sorted(top, key=lambda pair: -pair[1])
            if token.isascii() and token in [text for text, _ in top]:  # half characters look alike
                assert dict(map(tuple, top))[token] == pytest.approx(logprob, abs=2e-4)
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = read_completions(tmp_path / "rows.jsonl")
    assert [one.label for one in found[:2]] == ["sampled 1", "sampled 2"] and found[0].group == found[1].group
    assert found[0].tokens.text == rows[0]["tokens"] and found[0].tokens.top is not None
    assert found[0].features["mean_logprob"] == rows[0]["features"]["mean_logprob"]


@pytest.mark.parametrize("chunk", [1, 3 * 272, 1 << 24])
def test_top_tokens_are_those_of_the_whole_logits(chunk, monkeypatch):
    monkeypatch.setattr("gem.model.forward._TOP_LOGITS", chunk)
    model, rollout = tiny_model(), rollout_of(num_prompts=3, size=2)
    ids, logprobs = top_tokens(Policy(model), rollout.batch, 4, temperature=0.7, batch_size=2)
    batch = rollout.batch
    for i, length in enumerate(batch.lengths.tolist()):
        prompt = batch.prompt_ids[i // 2][batch.prompt_mask[i // 2]]
        row = torch.cat([prompt, batch.completion_ids[i, :length]])[None]
        with torch.no_grad():
            logits = model(row).logits[0, len(prompt) - 1 : -1] / 0.7
        truth = logits.log_softmax(-1).topk(4)
        assert torch.equal(ids[i, :length], truth.indices)
        torch.testing.assert_close(logprobs[i, :length], truth.values, rtol=1e-5, atol=1e-5)
        assert not ids[i, length:].any() and not logprobs[i, length:].any()
    stats = measured_stats(Policy(model), batch, temperature=0.7, batch_size=2)
    hits = ids == batch.completion_ids[..., None]
    found = logprobs[hits & batch.completion_mask[..., None]]
    known = stats.logprobs[hits.any(-1) & batch.completion_mask]
    assert len(found) and torch.allclose(found, known, atol=1e-5)


@pytest.mark.parametrize("text", ["plain words", "naïve – 北京 🙂!", ""])
def test_the_tokens_joined_are_the_text(text):
    ids = encode(text)
    pieces = token_texts(tiny_tokenizer(), ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text


def test_a_character_cut_off_at_the_end_is_shown_too():
    tokenizer = tiny_tokenizer()
    ids = encode("ab🙂")[:-1]
    pieces = token_texts(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == decode(tokenizer, [ids])[0]


def generated(folder, monkeypatch, capsys, *arguments, stdin=None):
    if stdin is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    return call(["generate", folder / "model", "--max-completion-length", 12, *arguments], monkeypatch, capsys)


def test_generate_prints_the_most_likely_answer(folder, monkeypatch, capsys):
    code, out, err = generated(folder, monkeypatch, capsys, "2 + 2?", "--system-prompt", "Think.")
    form = dataclasses.replace(FORM, system_prompt="Think.")
    greedy = Sampling(num_generations=1, max_completion_length=12, temperature=0.0)
    prompt = form.prompt_ids("2 + 2?")
    truth = roll_out(Policy(tiny_model(context=1024)), form, [prompt], greedy, seed=0, batch_size=1).texts[0]
    assert code == 0 and out == truth + "\n" and "score" not in err
    for stdin in ("2 + 2?", "2 + 2?\n"):
        arguments = ["-", "--system-prompt", "Think."] if stdin.endswith("\n") else ["--system-prompt", "Think."]
        assert generated(folder, monkeypatch, capsys, *arguments, stdin=stdin)[1] == out


def test_generate_takes_the_best_by_the_score(folder, tmp_path, monkeypatch, capsys):
    options = ["2 + 2?", "--sample", 4, "--score", folder / "s.json", "--out", tmp_path / "all.jsonl"]
    code, out, _ = generated(folder, monkeypatch, capsys, *options)
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert code == 0 and [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert out == "\n\n".join(row["completion"] for row in rows) + "\n" and len({row["score"] for row in rows}) > 1
    options[-1] = tmp_path / "best.jsonl"
    code, out, err = generated(folder, monkeypatch, capsys, *options, "--best", "--tokens")
    (row,) = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert code == 0 and row["score"] == rows[0]["score"] and row["probability"] == rows[0]["probability"]
    assert out.startswith(row["completion"] + "\n") and len(out[len(row["completion"]) :].splitlines()) >= 2
    assert f"score {row['score']:.3f}, probability of being right {row['probability']:.2f}" in err
    assert len(read_completions(tmp_path / "best.jsonl")[0].tokens.text) == row["num_tokens"]


@pytest.mark.parametrize(
    ("prompt", "words"), [("", "got nothing"), ("x" * 2000, "model's context of 1024"), ("a\udc80", "not UTF-8")]
)
def test_a_prompt_that_cannot_be_used_is_one_line(folder, monkeypatch, capsys, prompt, words):
    code, out, err = generated(folder, monkeypatch, capsys, prompt)
    assert code == 2 and out == "" and words in err.splitlines()[-1]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_no_escape_sequence_and_no_markup_reaches_a_terminal(folder, tmp_path, monkeypatch, capsys):
    row = {
        "completion": "\x1b[2Jgone [/b] [red]", "score": 1.0, "candidate": 0, "final_answer": "\x1b]0;x\x07[/b]",
        "probability": 0.5, "tokens": ["\x1b", "\x9b"], "entropy": [0.1, None], "logprob": [-0.1, -2.0],
        "fork": [True, False], "answer_start": 1,
    }  # fmt: skip
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    generating.print_answers([row], tokens=True)
    shown = terminal.getvalue() + capsys.readouterr().err
    assert not any(code in shown for code in "\x1b\x07\x9b") and "gone [/b] [red]" in shown and "U+001B" in shown
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    generating.print_answers([row], tokens=False)
    assert pipe.getvalue() == row["completion"] + "\n"
    write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "[/b]"}, {"prompt": "fine [/b]", "completion": "x"}])
    code, _, err = call(["score", folder / "model", tmp_path / "bad.jsonl", "--skip-bad"], monkeypatch, capsys)
    assert code == 0, err
