"""`gem generate`: one prompt, answered; of several candidates the best by its score."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from gem.calibration.score_file import Score
from gem.config.use import GenerateSettings
from gem.data.prompts import Prompt
from gem.errors import UserError
from gem.model.opened import ModelLike, open_model
from gem.model.run_text import as_in_run
from gem.progress import Bar
from gem.terminal.console import print_warning
from gem.terminal.text import visible
from gem.use.score import ScoreRow, overlong, score_rows
from gem.use.scorer import make_scorer


def generate(
    model: ModelLike,
    prompt: Prompt,
    settings: GenerateSettings,
    score: Score | str | Path | None,
    console: Console,
) -> list[dict[str, Any]]:
    """A row for each candidate as `gem score` has them, the highest score first; with `best` that one alone."""
    settings = as_in_run(model, settings, console)
    opened = open_model(model, settings)
    scorer = make_scorer(score, settings, opened.name, lambda words: print_warning(console, words))
    row = ScoreRow("prompt", prompt, (), None)
    if problem := overlong(row, opened.form, opened.context, settings.max_completion_length):
        raise UserError(f"prompt: {problem}, or lower max_completion_length")
    console.print(f"Loading {opened.name}", highlight=False, markup=False)
    policy, form = opened.policy(settings.device, settings.dtype)
    rows = list(score_rows(policy, form, [row], scorer, settings, Bar(Console(quiet=True), "", 1, None)))
    return sorted(rows, key=lambda row: -float("inf") if row["score"] is None else row["score"], reverse=True)


def read_prompt(given: str | None) -> str:
    """The argument, or standard input where there is none or it is "-"."""
    if given is None or given == "-":
        try:
            given = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError("prompt: standard input is not UTF-8 text; convert it first") from error
        given = given.removesuffix("\n")
    if not given.strip():
        raise UserError("prompt: expected a text, got nothing; give it as the argument or on standard input")
    if any("\ud800" <= character <= "\udfff" for character in given):
        raise UserError("prompt: not UTF-8 text; convert it first")
    return given


def print_answers(rows: Sequence[dict[str, Any]], tokens: bool) -> None:
    """Answers to standard output, what is known of each to standard error.

    On a terminal control characters and marks that turn text are written out (`<U+001B>`): a model's text must not
    drive the terminal. A pipe gets the text as it is.
    """
    shown = visible if sys.stdout.isatty() else str
    for i, row in enumerate(rows):
        if i:
            print()
        if len(rows) > 1 or "num_candidates" in row or row.get("probability") is not None:
            sys.stdout.flush()
            print(summary(row), file=sys.stderr, flush=True)
        print(shown(row["completion"]))
        if tokens:
            print("\n".join(["", *token_lines(row)]))


def summary(row: dict[str, Any]) -> str:
    """What is known of an answer, in one line."""
    score = "none" if row["score"] is None else f"{row['score']:.3f}"
    parts = [f"candidate {row['candidate'] + 1}", f"score {score}"]
    if "probability" in row:
        parts.append(f"probability of being right {row['probability']:.2f}")
    if "preference_probability" in row:
        parts.append(f"preferred among the candidates with {row['preference_probability']:.2f}")
    if row.get("agreement") is not None:
        parts.append(f"{round(row['agreement'] * row['num_candidates'])} of {row['num_candidates']} agree")
    if row["final_answer"] is not None:
        parts.append(f"answer {visible(row['final_answer'])}")
    return ", ".join(parts)


def token_lines(row: dict[str, Any]) -> list[str]:
    """entropy, log-prob (nats), fork or answer, the token as JSON writes it: one line a token."""
    lines = [f"{'entropy':>8} {'logprob':>9} {'':6} token"]
    columns = zip(row["tokens"], row["entropy"], row["logprob"], row["fork"])
    for i, (token, entropy, logprob, fork) in enumerate(columns):
        mark = "answer" if i >= row["answer_start"] else "fork" if fork else ""
        numbers = [float("nan") if value is None else value for value in (entropy, logprob)]
        lines.append(f"{numbers[0]:8.4f} {numbers[1]:9.4f} {mark:6} {visible(json.dumps(token, ensure_ascii=False))}")
    return lines
