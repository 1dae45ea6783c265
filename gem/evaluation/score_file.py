"""`gem score`: entropy scores of answers given in a file or dataset, or sampled for its prompts, as JSON rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gem.config.settings import RowSettings, Sampling, Scoring
from gem.data.answers import answers_match
from gem.data.pairs import answers_from_row
from gem.data.prompts import Prompt, TextFormat
from gem.data.sources import Row, RowProblem, RowReport, read_rows, report
from gem.errors import UserError
from gem.model.forward import Policy
from gem.progress import Bar
from gem.rollout.sample import given_completions, roll_out
from gem.scoring.score import ScoredRollout, score_rollout


@dataclass(frozen=True)
class ScoreRow:
    """One row of the input: its prompt, and its answers by the name of their column."""

    where: str
    prompt: Prompt
    given: tuple[tuple[str, str], ...]
    answer: str | None


def load_score_rows(
    source: str | Path,
    form: TextFormat,
    context: int | None,
    settings: RowSettings,
    *,
    completion_column: str,
    split: str = "train",
    room: int | None = None,
) -> tuple[list[ScoreRow], RowReport]:
    """Every row as a prompt with its answers, and the report of rows left out.

    With `room` answers are not read but will be sampled, and so many tokens must fit. Raises one `UserError` for all
    rows that the settings do not let pass.
    """
    rows = read_rows(source, split)
    names = () if room else (completion_column, settings.chosen_column, settings.rejected_column)
    found: list[ScoreRow] = []
    problems: list[RowProblem] = []
    for row in rows:
        parsed = row.values if isinstance(row.values, str) else _score_row(row, names, settings)
        kind = "bad"
        if not isinstance(parsed, str) and (what := _overlong(parsed, form, context, room or 0)):
            kind, parsed = "overlong", what
        if isinstance(parsed, str):
            problems.append(RowProblem(row.where, kind, parsed))
        else:
            found.append(parsed)
    made = report(source, rows, problems, settings)
    if not found:
        raise UserError(f"{source}: no prompts in it; write one JSON object per line with at least a prompt")
    return found, made


def score_given(
    policy: Policy, form: TextFormat, rows: Sequence[ScoreRow], scoring: Scoring, *, batch_size: int, bar: Bar
) -> Iterator[dict[str, Any]]:
    """One result for each answer of each row, in the order of the file."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        flat = [(row, key, text) for row in part for key, text in row.given]
        prompts = [form.prompt_ids(row.prompt) for row, _, _ in flat]
        rollout = given_completions(form, prompts, [form.answer_ids(text) for _, _, text in flat])
        scored = score_rollout(policy, rollout, scoring, batch_size=batch_size)
        for i, (row, key, _) in enumerate(flat):
            yield _result(scored, i, row, key)
        bar.advance(len(part))


def score_sampled(
    policy: Policy,
    form: TextFormat,
    rows: Sequence[ScoreRow],
    scoring: Scoring,
    sampling: Sampling,
    *,
    batch_size: int,
    seed: int,
    bar: Bar,
) -> Iterator[dict[str, Any]]:
    """G sampled candidates for each row, with their group advantages and Bradley-Terry log-strengths."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        rollout = roll_out(
            policy, form, [form.prompt_ids(row.prompt) for row in part], sampling, seed=seed, step=start,
            batch_size=batch_size, stats_temperature=scoring.score_temperature,
        )  # fmt: skip
        scored = score_rollout(policy, rollout, scoring, batch_size=batch_size)
        for i in range(len(part) * sampling.num_generations):
            result = _result(scored, i, part[i // sampling.num_generations], "sampled")
            yield {**result, "advantage": float(scored.advantages[i]), "strength": float(scored.strengths[i])}
        bar.advance(len(part))


def _score_row(row: Row, names: Sequence[str], settings: RowSettings) -> ScoreRow | str:
    present = [name for name in names if name in row.values]
    if names and not present:
        wanted = f'"{names[0]}", or "{names[1]}" and "{names[2]}"'
        return f"no answer to score: add {wanted}, or sample answers with --sample"
    parsed = answers_from_row(row, present, settings)
    if isinstance(parsed, str):
        return parsed
    prompt, given, answer = parsed
    return ScoreRow(row.where, prompt, tuple(zip(present, given)), answer)


def _overlong(row: ScoreRow, form: TextFormat, context: int | None, room: int) -> str | None:
    needed = max([room, *(len(form.answer_ids(text)) for _, text in row.given)])
    num_tokens = len(form.prompt_ids(row.prompt)) + needed
    if context is None or num_tokens <= context:
        return None
    return f"prompt and answer need {num_tokens} tokens, more than the model's context of {context}: shorten it"


def _result(scored: ScoredRollout, i: int, row: ScoreRow, key: str) -> dict[str, Any]:
    rollout, scores = scored.rollout, scored.scores
    answer = rollout.spans.answers[i]
    finder = int(rollout.spans.found_by[i])
    result = {
        "row": row.where,
        "source": key,
        "prompt": row.prompt,
        "completion": rollout.texts[i],
        "score": float(scores.score[i]),
        "score_standard_error": float(scored.standard_errors[i]),
        "h_final": float(scores.final_entropy[i]),
        "h_fork": float(scores.fork_entropy[i]),
        "valid": bool(scores.valid[i]),
        "logprob": float(scored.logprobs[i].double().sum()),
        "num_tokens": int(rollout.batch.lengths[i]),
        "truncated": bool(rollout.truncated[i]),
        "final_answer": answer,
        "found_by": None if finder < 0 else rollout.spans.finders[finder],
    }
    return result if row.answer is None else {**result, "correct": answers_match(answer, row.answer)}
