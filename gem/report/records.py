"""What the page shows, read from files and checked: completions with their tokens, metrics, calibrated scores.

A completion is one JSON object on a line of a JSONL file (a run's completions.jsonl, what `gem score` writes):

    prompt          str, or a list of {"role", "content"}
    completion      str
    tokens          list of str: the completion cut into its tokens; joined they give its text, an end token may follow
    entropy         list of float, one a token: of the distribution that the token was drawn from, nats
    logprob         list of float, one a token: of the token itself, nats
    top             list, one a token, of its likeliest alternatives [[token, log-prob], ...], likeliest first
    answer_start    int: index of the answer's first token; the number of tokens or more: no answer was found
    fork            list of bool, one a token: counted in H_fork
    prompt_index, candidate    int, from 0; rows of one stage, step and prompt stand side by side
    score, probability (of being right), advantage    float
    features        {name: float}
    correct         bool or null (not known)
    valid           bool, default true
    step, stage     int, str: where in the run it was sampled

All but prompt and completion may be missing. A row with tokens has entropy and logprob as well. A number that is not
finite counts as missing. Any other number of a row (h_final, h_fork, ...) is shown as one of its features.

A calibrated score is a JSON object of "kind": "gem-score"; each of its parts may be missing and is then not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gem.errors import UserError

METRICS, COMPLETIONS, CONFIG = "metrics.jsonl", "completions.jsonl", "config.yaml"
SCORE_KIND = "gem-score"

# Keys of a row that are shown in a place of their own, or not at all.
_PLACED = {"prompt_index", "candidate", "answer_start", "step", "score", "probability", "advantage", "num_tokens"}


@dataclass(frozen=True)
class Tokens:
    """A completion by tokens: lists of one length; entropy and logprob in nats, None where not finite."""

    text: list[str]
    entropy: list[float | None]
    logprob: list[float | None]
    top: list[list[tuple[str, float | None]]] | None
    fork: list[int]  # indices
    answer_start: int  # the number of tokens: no answer


@dataclass(frozen=True)
class Completion:
    """A row of a completions file."""

    prompt: str
    text: str
    group: tuple[str | int | None, ...]  # equal for the candidates of one prompt
    label: str  # "chosen", "sampled 3", or the candidate's number, from 1
    tokens: Tokens | None
    num_tokens: int | None
    answer: str | None
    score: float | None
    probability: float | None
    advantage: float | None
    correct: bool | None
    valid: bool
    truncated: bool
    step: int | None
    stage: str | None
    features: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """All that was found: `rows` of metrics.jsonl, completions, calibrated scores by file name, config.yaml's text."""

    name: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    completions: list[Completion] = field(default_factory=list)
    scores: dict[str, dict[str, Any]] = field(default_factory=dict)
    config: str | None = None


def read_source(source: Path) -> Source:
    """A run's directory, a JSONL file of completions, or a calibrated score's file."""
    if source.is_dir():
        return _read_run(source)
    text = _read_text(source)
    if not text.strip():
        raise UserError(f"{source}: the file is empty")
    try:
        score = json.loads(text)
    except (ValueError, RecursionError):
        score = None
    if isinstance(score, dict) and score.get("kind") == SCORE_KIND:
        return Source(source.name, scores={source.name: check_score(source, score)})
    return Source(source.name, completions=read_completions(source))


def read_completions(path: Path, growing: bool = False) -> list[Completion]:
    """Every row of the file; `UserError` with file, line and field for the first that is not as this file's head says.

    growing: a last line that has no end yet is being written, and is left out.
    """
    found: list[Completion] = []
    members: dict[tuple[str | int | None, ...], int] = {}
    for where, row in _json_lines(path, growing):
        made = _completion(where, row, members)
        found.append(made)
    if not found and not growing:
        raise UserError(f"{path}: no completions in it")
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, each with "total_steps": the optimizer steps of the run up to it."""
    rows, steps = [], 0
    for where, row in _json_lines(path, growing=True):
        stage = row.get("stage")
        if not isinstance(stage, str):
            raise UserError(f'{where}: expected "stage", a text, got {_short(stage)}; is it a run\'s metrics.jsonl?')
        steps += stage not in ("eval", "guard", "calibration")
        rows.append({**row, "total_steps": steps})
    return rows


def check_score(path: Path, score: dict[str, Any]) -> dict[str, Any]:
    """The calibrated score, if its parts are of the types that this version writes."""
    version = score.get("version", 1)
    if version != 1:
        raise UserError(
            f"{path}: a {SCORE_KIND} of version {_short(version)}; this gem reads version 1, use a newer one"
        )
    kinds = {"weights": dict, "weight_intervals": dict, "scales": dict, "verdict": dict, "pair_accuracy": dict}
    for name, kind in {**kinds, "features": list, "samples": dict}.items():
        if score.get(name) is not None and not isinstance(score[name], kind):
            raise UserError(f"{path}: {name}: expected a {kind.__name__}, got {_short(score[name])}")
    return score


def _read_run(run: Path) -> Source:
    scores = {}
    for path in sorted(run.glob("score*.json")):
        try:
            score = json.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON: {error}") from error
        if isinstance(score, dict) and score.get("kind") == SCORE_KIND:
            scores[path.name] = check_score(path, score)
    if any(name != "score.json" and score == scores.get("score.json") for name, score in scores.items()):
        del scores["score.json"]  # the newest, which stands there under the step it was made at
    rows = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    completions = read_completions(run / COMPLETIONS, growing=True) if (run / COMPLETIONS).is_file() else []
    if not (rows or completions or scores):
        inner = [path.parent.name for path in sorted(run.glob(f"*/{METRICS}"))]
        hint = f"name the run within it, {run / inner[0]}" if inner else "name the output_dir of gem train"
        raise UserError(f"{run}: no {METRICS}, {COMPLETIONS} or score.json with anything in it; {hint}")
    config = _read_text(run / CONFIG) if (run / CONFIG).is_file() else None
    return Source(run.resolve().name, rows, completions, scores, config)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#04x}") from error


def _json_lines(path: Path, growing: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of every line that is not blank."""
    lines = _read_text(path).split("\n")  # not splitlines: U+2028 may stand within a JSON string
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if growing and number == len(lines):
                return
            raise UserError(f"{where}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected a JSON object, got {_short(row)}")
        yield where, row


def _completion(where: str, row: dict[str, Any], members: dict[tuple[str | int | None, ...], int]) -> Completion:
    prompt = _prompt(where, row)
    text = _text(where, row, "completion", needed=True)
    stage, step = _text(where, row, "stage"), _integer(where, row, "step")
    index = _integer(where, row, "prompt_index")
    place = index if index is not None else _text(where, row, "row")
    group = (stage, step, place, None if index is not None else prompt)
    count = members[group] = members.get(group, 0) + 1
    candidate = _integer(where, row, "candidate")
    label = str(count if candidate is None else candidate + 1)
    source = _text(where, row, "source")
    if source is not None:
        label = f"{source} {label}" if source == "sampled" else source
    tokens = _tokens(where, row)
    features = {k: float(v) for k, v in row.items() if k not in _PLACED and finite(v) is not None}
    given = row.get("features") or {}
    if not isinstance(given, dict):
        raise UserError(f"{where}: features: expected names with numbers, got {_short(given)}")
    features |= {name: float(v) for name, v in given.items() if finite(v) is not None}
    answer = row.get("answer", row.get("final_answer"))
    return Completion(
        prompt=prompt,
        text=text,
        group=group,
        label=label,
        tokens=tokens,
        num_tokens=len(tokens.text) if tokens else _integer(where, row, "num_tokens"),
        answer=answer if isinstance(answer, str) else None,
        score=_number(where, row, "score"),
        probability=_number(where, row, "probability"),
        advantage=_number(where, row, "advantage"),
        correct=_flag(where, row, "correct", None),
        valid=bool(_flag(where, row, "valid", True)),
        truncated=bool(_flag(where, row, "truncated", False)),
        step=step,
        stage=stage,
        features=features,
    )


def _tokens(where: str, row: dict[str, Any]) -> Tokens | None:
    text = row.get("tokens")
    if text is None:
        return None
    if not isinstance(text, list) or not all(isinstance(token, str) for token in text):
        raise UserError(f"{where}: tokens: expected a list of texts, got {_short(text)}")
    columns = {name: _column(where, row, name, len(text)) for name in ("entropy", "logprob", "top", "fork")}
    for name in ("entropy", "logprob"):
        if columns[name] is None:
            raise UserError(f"{where}: {name}: expected {len(text)} numbers, one for each of tokens, got none")
    start = _integer(where, row, "answer_start")
    return Tokens(
        text=text,
        entropy=_numbers(where, "entropy", columns["entropy"]),
        logprob=_numbers(where, "logprob", columns["logprob"]),
        top=None if columns["top"] is None else [_alternatives(where, value) for value in columns["top"]],
        fork=[i for i, value in enumerate(columns["fork"] or ()) if value],
        answer_start=len(text) if start is None or not 0 <= start < len(text) else start,
    )


def _column(where: str, row: dict[str, Any], name: str, length: int) -> list[Any] | None:
    values = row.get(name)
    if values is None:
        return None
    if not isinstance(values, list) or len(values) != length:
        got = len(values) if isinstance(values, list) else _short(values)
        raise UserError(f"{where}: {name}: expected one entry for each of the {length} tokens, got {got}")
    return values


def _numbers(where: str, name: str, values: list[Any]) -> list[float | None]:
    for value in values:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise UserError(f"{where}: {name}: expected numbers, got {_short(value)}")
    return [finite(value) for value in values]


def _alternatives(where: str, values: Any) -> list[tuple[str, float | None]]:
    if values is None:
        return []
    fits = isinstance(values, list) and all(
        isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in values
    )
    if not fits:
        raise UserError(f"{where}: top: expected lists of [token, log-prob], got {_short(values)}")
    return list(zip([pair[0] for pair in values], _numbers(where, "top", [pair[1] for pair in values])))


def _prompt(where: str, row: dict[str, Any]) -> str:
    """A chat as its messages one below the other."""
    value = row.get("prompt")
    if not isinstance(value, list):
        return _text(where, row, "prompt", needed=True)
    turns = [(m.get("role"), m.get("content")) if isinstance(m, dict) else m for m in value]
    if not all(isinstance(turn, tuple | list) and len(turn) == 2 for turn in turns):
        raise UserError(f"{where}: prompt: expected a text or a list of messages, got {_short(value)}")
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def _text(where: str, row: dict[str, Any], name: str, needed: bool = False) -> Any:
    value = row.get(name)
    if value is None and not needed:
        return None
    if not isinstance(value, str):
        raise UserError(f'{where}: expected "{name}", a text, got {_short(value)}')
    return value


def _integer(where: str, row: dict[str, Any], name: str) -> int | None:
    value = row.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise UserError(f"{where}: {name}: expected a whole number, got {_short(value)}")
    return value


def _number(where: str, row: dict[str, Any], name: str) -> float | None:
    return _numbers(where, name, [row.get(name)])[0]


def _flag(where: str, row: dict[str, Any], name: str, default: bool | None) -> bool | None:
    value = row.get(name, default)
    if value is not None and not isinstance(value, bool):
        raise UserError(f"{where}: {name}: expected true, false or null, got {_short(value)}")
    return value


def finite(value: Any) -> float | None:
    """The number, None for all that is not a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else text[:57] + "..."
