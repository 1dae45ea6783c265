"""`write_report`: one page in one file that loads nothing; style, script, drawings and data are in it."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from gem.errors import UserError
from gem.report import views
from gem.report.charts import Lines, key
from gem.report.records import Completion, Source, Tokens, read_source
from gem.terminal.text import visible

# A token with its numbers and five alternatives takes about 130 bytes; a browser opens 50 MB in about a second.
MAX_TOKENS = 400_000
# Entropy and -log-prob (nats) from which a token has the next colour.
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)


def write_report(source: Path, out: Path, *, max_tokens: int = MAX_TOKENS) -> Path:
    """Writes the page of a run's directory, a JSONL file of completions or a calibrated score; returns `out`.

    source: what `gem.report.records` reads. out: replaced in one go, or left as it was. max_tokens: with more tokens
    than this, every k-th prompt keeps its tokens and the rest is shown as text, which the page says.

    Raises `UserError`, with file, line and field, for what cannot be read, and where `out` cannot be written.

        write_report(Path("runs/first"), Path("page.html"))
    """
    source, out = Path(source), Path(out)
    if not source.exists():
        raise UserError(f"{source}: no such file or directory; expected a run, a file of completions or a score.json")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UserError(f"--out: expected a file in a directory that exists, got {out}")
    html = render(read_source(source), max_tokens).encode()
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    try:
        part.write_bytes(html)
        os.replace(part, out)
    except OSError as error:
        raise UserError(f"--out: cannot write {out}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return out


def render(source: Source, max_tokens: int = MAX_TOKENS) -> str:
    """The page as HTML."""
    axis = views.run_axis(source.rows)
    main, rest = views.run_charts(source.rows, axis)
    calibrations = [views.calibration(name, score) for name, score in source.scores.items()]
    groups, tokens = completion_data(source.completions, max_tokens)
    style, script = _part("page.css"), _part("page.js")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.lstrip_blocks = True
    environment.filters["visible"] = visible
    return environment.from_string(_part("template.html.j2")).render(
        name=source.name,
        model=views.model_name(source),
        policy=f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; img-src data:; "
        "base-uri 'none'; form-action 'none'",
        style=Markup(style),
        script=Markup(script),
        tiles=views.headlines(source, calibrations, axis),
        calibrations=calibrations,
        charts=[(i, chart) for i, chart in enumerate(main)],
        more_charts=[(i, chart) for i, chart in enumerate(rest, len(main))],
        key=key,
        evaluations=views.evaluation_table(source.rows, axis),
        guards=views.guard_table(source.rows, axis),
        config=source.config,
        groups=groups["groups"],
        levels=[0.0, *LEVELS],
        data=as_script_json({**groups, "charts": [_chart_data(c) for c in [*main, *rest]], "levels": LEVELS}),
        tokens=[(i, as_script_json(one)) for i, one in tokens],
    )


def completion_data(completions: Sequence[Completion], max_tokens: int) -> tuple[dict[str, Any], list[tuple[int, Any]]]:
    """(what the page lists, searches and sorts; the tokens of each completion, which it reads when it shows them)."""
    members: dict[Any, list[int]] = {}
    for i, one in enumerate(completions):
        members.setdefault(one.group, []).append(i)
    total = sum(len(one.tokens.text) for one in completions if one.tokens)
    every = -(-total // max_tokens) if total > max_tokens else 1
    kept = {i for number, group in enumerate(members.values()) if number % every == 0 for i in group}
    start, end = shared_ends(list(dict.fromkeys(one.prompt for one in completions)))
    groups, listed, tokens = [], [], []
    for group in members.values():
        first = completions[group[0]]
        prompt = first.prompt[start : len(first.prompt) - end]
        made = {"prompt": visible(prompt.strip("\n")), "stage": first.stage, "step": first.step, "candidates": group}
        groups.append({**made, "whole": visible(first.prompt)} if start or end else made)
    for i, one in enumerate(completions):
        row, its_tokens = _completion(one)
        if its_tokens is not None and i in kept:
            row["tokens"] = True
            tokens.append((i, its_tokens))
        listed.append(row)
    left_out = sum(one.tokens is not None and i not in kept for i, one in enumerate(completions))
    return {"groups": groups, "completions": listed, "leftOut": left_out}, tokens


def shared_ends(prompts: Sequence[str]) -> tuple[int, int]:
    """Characters that all prompts begin and end with, whole lines or from a special token on: a chat template's."""
    if len(prompts) < 2:
        return 0, 0
    first, last = min(prompts), max(prompts)  # what these two share at the start, all share
    start = first[: _agreement(first, last)].rfind("\n") + 1
    tails = [prompt[start:][::-1] for prompt in prompts]
    first, last = min(tails), max(tails)
    shared = first[: _agreement(first, last)][::-1]
    end = re.search(r"\n|<\||</|\[/", shared)
    return start, len(shared) - end.start() if end else 0


def _agreement(first: str, second: str) -> int:
    """Characters that both begin with."""
    pairs = enumerate(zip(first, second))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def as_script_json(value: Any) -> Markup:
    """JSON that may stand in a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _completion(one: Completion) -> tuple[dict[str, Any], dict[str, Any] | None]:
    text, tokens = visible(one.text), None
    row: dict[str, Any] = {"label": visible(one.label)}
    if one.tokens is not None:
        pieces = [visible(token) for token in one.tokens.text]
        text = "".join(pieces)
        tokens = _token_data(one.tokens, pieces)
        known = [value for value in one.tokens.entropy if value is not None]
        row["meanEntropy"] = _digits(sum(known) / len(known)) if known else None
    numbers = {"score": one.score, "probability": one.probability, "advantage": one.advantage}
    row |= {
        **{name: _digits(value) for name, value in numbers.items()},
        "text": text,
        "length": one.num_tokens,
        "answer": None if one.answer is None else visible(" ".join(one.answer.split())[:200]),
        "correct": one.correct,
        "valid": one.valid,
        "truncated": one.truncated,
        "features": [[visible(name), _digits(value)] for name, value in one.features.items()],
    }
    return {name: value for name, value in row.items() if value is not None}, tokens


def _token_data(tokens: Tokens, pieces: Sequence[str]) -> dict[str, Any]:
    """lengths: of the pieces in UTF-16, as JavaScript counts, for the text stands in the list of completions."""
    made: dict[str, Any] = {
        "lengths": [len(piece.encode("utf-16-le")) // 2 for piece in pieces],
        "entropy": [_digits(value) for value in tokens.entropy],
        "logprob": [_digits(value) for value in tokens.logprob],
        "answer": tokens.answer_start,
        "fork": tokens.fork,
    }
    if tokens.top is not None:
        made["top"] = [[[visible(token), _digits(value)] for token, value in pairs] for pairs in tokens.top]
    return made


def _digits(value: float | None) -> float | int | None:
    """Four significant digits: what the page shows."""
    if value is None:
        return None
    short = float(f"{value:.4g}")
    return int(short) if short == int(short) and abs(short) < 1e6 else short


def _chart_data(chart: Lines) -> dict[str, Any]:
    return {"names": chart.names, "points": chart.points}


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _part(name: str) -> str:
    return (resources.files("gem.report") / name).read_text(encoding="utf-8")
