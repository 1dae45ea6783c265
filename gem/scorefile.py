"""`gem score`: entropy scores of the answers in a JSONL file, or of answers sampled for its prompts, as JSONL rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gem.data import PromptFormat, raise_problems, read_rows, text_problem
from gem.errors import UserError
from gem.filtering import ScoredRollout, Scoring, score_rollout
from gem.progress import Progress
from gem.rollout import Rollout, Sampling, given_completions, roll_out
from gem.spans import answers_match

GIVEN_KEYS = ("completion", "chosen", "rejected")


@dataclass(frozen=True)
class ScoreRow:
    """One line of the input: its prompt, and its answers by key (`GIVEN_KEYS`)."""

    line: int
    prompt: str
    given: tuple[tuple[str, str], ...]
    answer: str | None


def read_score_rows(path: str | Path, need_answers: bool) -> list[ScoreRow]:
    """Every line as a prompt with its answers; raises one `UserError` that names each bad line."""
    rows: list[ScoreRow] = []
    problems: list[tuple[int, str]] = []
    for line, row in read_rows(path):
        parsed = row if isinstance(row, str) else _row_or_problem(row, line, need_answers)
        if isinstance(parsed, str):
            problems.append((line, parsed))
        else:
            rows.append(parsed)
    raise_problems(path, problems)
    if not rows:
        raise UserError(f"{path}: no prompts in it; write one JSON object per line with at least a prompt")
    return rows


def score_given(
    model: PreTrainedModel,
    form: PromptFormat,
    rows: Sequence[ScoreRow],
    scoring: Scoring,
    *,
    end_token_ids: Sequence[int],
    marker: str,
    batch_size: int,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """One result for each answer of each row, in the order of the file."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        flat = [(row, key, text) for row in part for key, text in row.given]
        rollout = given_completions(
            form.tokenizer,
            [form.prompt_ids(row.prompt) for row, _, _ in flat],
            [form.answer_ids(text) for _, _, text in flat],
            end_token_ids=end_token_ids,
            marker=marker,
        )
        scored = score_rollout(model, rollout, scoring, batch_size=batch_size)
        for i, (row, key, _) in enumerate(flat):
            yield _result(scored, i, row, key)
        if progress is not None:
            progress.advance(len(part))


def score_sampled(
    model: PreTrainedModel,
    form: PromptFormat,
    rows: Sequence[ScoreRow],
    scoring: Scoring,
    sampling: Sampling,
    *,
    end_token_ids: Sequence[int],
    marker: str,
    batch_size: int,
    seed: int,
    progress: Progress | None = None,
) -> Iterator[dict[str, Any]]:
    """G sampled candidates for each row, with their group advantages."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        rollout: Rollout = roll_out(
            model,
            form.tokenizer,
            [form.prompt_ids(row.prompt) for row in part],
            sampling,
            end_token_ids=end_token_ids,
            marker=marker,
            seed=seed + start,
            batch_size=batch_size,
        )
        scored = score_rollout(model, rollout, scoring, batch_size=batch_size)
        for i in range(len(part) * sampling.num_generations):
            result = _result(scored, i, part[i // sampling.num_generations], "sampled")
            yield {**result, "advantage": float(scored.advantages[i])}
        if progress is not None:
            progress.advance(len(part))


def check_score_lengths(
    path: str | Path, rows: Sequence[ScoreRow], form: PromptFormat, context: int | None, room: int
) -> None:
    """Raises one `UserError` where a prompt with its answer (or `room` sampled tokens) exceeds the context."""
    problems = []
    for row in rows:
        needed = max([room, *(len(form.answer_ids(text)) for _, text in row.given)])
        num_tokens = len(form.prompt_ids(row.prompt)) + needed
        if context is not None and num_tokens > context:
            problems.append((row.line, (
                f"prompt and answer need {num_tokens} tokens, more than the model's context of {context}: "
                "shorten or delete this line"
            )))  # fmt: skip
    raise_problems(path, problems)


def _row_or_problem(row: dict[str, Any], line: int, need_answers: bool) -> ScoreRow | str:
    if "prompt" not in row:
        return 'the key "prompt" is missing: each line needs it'
    if problem := text_problem(row, "prompt"):
        return problem
    given = []
    for key in GIVEN_KEYS if need_answers else ():
        if key in row:
            if problem := text_problem(row, key):
                return problem
            given.append((key, row[key]))
    if need_answers and not given:
        return 'no answer to score: add "completion", or "chosen" and "rejected", or sample answers with --sample'
    answer = row.get("answer")
    return ScoreRow(line, row["prompt"], tuple(given), None if answer is None else str(answer))


def _result(scored: ScoredRollout, i: int, row: ScoreRow, key: str) -> dict[str, Any]:
    rollout, scores = scored.rollout, scored.scores
    answer = rollout.spans.answers[i]
    result = {
        "line": row.line,
        "source": key,
        "prompt": row.prompt,
        "completion": rollout.texts[i],
        "score": float(scores.score[i]),
        "h_final": float(scores.final_entropy[i]),
        "h_fork": float(scores.fork_entropy[i]),
        "valid": bool(scores.valid[i]),
        "logprob": float(scored.logprobs[i].double().sum()),
        "num_tokens": int(rollout.batch.lengths[i]),
        "truncated": bool(rollout.truncated[i]),
        "final_answer": answer,
    }
    return result if row.answer is None else {**result, "correct": answers_match(answer, row.answer)}
