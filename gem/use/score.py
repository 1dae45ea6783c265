"""`gem score`: scores of answers given in a file or dataset, or sampled for its prompts, as rows of JSON.

`gem.report.records` says what is in a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from gem.calibration.score_file import Score
from gem.config.settings import RowSettings
from gem.config.use import ScoreSettings, UseSettings
from gem.data.answers import answers_match, normalize_answer
from gem.data.pairs import answers_from_row
from gem.data.prompts import Prompt, PromptError, TextFormat
from gem.data.sources import Row, RowProblem, RowReport, Source, read_rows, report
from gem.errors import UserError
from gem.model.forward import Policy, top_tokens
from gem.model.opened import ModelLike, open_model
from gem.model.run_text import as_in_run
from gem.progress import Bar, progress
from gem.rollout.sample import given_completions, roll_out
from gem.scoring.records import feature_rows, finite, token_rows
from gem.scoring.score import ScoredRollout, score_rollout
from gem.terminal.console import print_warning
from gem.use.scorer import Scorer, make_scorer


@dataclass(frozen=True)
class ScoreRow:
    """One row of the input: its prompt, and its answers by the name of their column."""

    where: str
    prompt: Prompt
    given: tuple[tuple[str, str], ...]
    answer: str | None


def load_score_rows(
    source: Source, form: TextFormat, context: int | None, settings: ScoreSettings
) -> tuple[list[ScoreRow], RowReport]:
    """Every row as a prompt with its answers, and the report of rows left out.

    Where answers are sampled those of the rows are not read, and max_completion_length tokens must fit. Raises one
    `UserError` for all rows that the settings do not let pass.
    """
    rows = read_rows(source, settings.split)
    room = settings.max_completion_length if settings.num_generations else 0
    names = () if room else (settings.completion_column, settings.chosen_column, settings.rejected_column)
    found: list[ScoreRow] = []
    problems: list[RowProblem] = []
    for row in rows:
        parsed = row.values if isinstance(row.values, str) else _score_row(row, names, settings)
        kind = "bad"
        try:
            if not isinstance(parsed, str) and (what := overlong(parsed, form, context, room)):
                kind, parsed = "overlong", what
        except PromptError as error:
            parsed = str(error)
        if isinstance(parsed, str):
            problems.append(RowProblem(row.where, kind, parsed))
        else:
            found.append(parsed)
    made = report(source, rows, problems, settings)
    if not found:
        raise UserError(f"{source}: no prompts in it; write one JSON object per line with at least a prompt")
    return found, made


def score_data(
    model: ModelLike, data: Source, settings: ScoreSettings, score: Score | str | Path | None, console: Console
) -> Iterator[dict[str, Any]]:
    """All of `gem score`. Mistakes are raised before the weights are loaded, at the first row that is asked for."""
    settings = as_in_run(model, settings, console)
    opened = open_model(model, settings)
    scorer = make_scorer(score, settings, opened.name, lambda words: print_warning(console, words))
    console.print(f"Loading {opened.name}", highlight=False, markup=False)
    rows, made = load_score_rows(data, opened.form, opened.context, settings)
    if str(made):
        print_warning(console, str(made))
    policy, form = opened.policy(settings.device, settings.dtype)
    with progress(console, "Scoring", len(rows)) as bar:
        yield from score_rows(policy, form, rows, scorer, settings, bar)


def score_rows(
    policy: Policy, form: TextFormat, rows: Sequence[ScoreRow], scorer: Scorer, settings: UseSettings, bar: Bar
) -> Iterator[dict[str, Any]]:
    """The results of each row, in the order of the file: of its answers, or of `num_generations` sampled candidates,
    or of the best of these."""
    size = settings.num_generations
    for start in range(0, len(rows), settings.batch_size):
        part = rows[start : start + settings.batch_size]
        if size:
            rollout = roll_out(
                policy, form, [form.prompt_ids(row.prompt) for row in part], settings, seed=settings.seed, step=start,
                batch_size=settings.batch_size, stats_temperature=settings.score_temperature,
            )  # fmt: skip
            groups = [range(i * size, (i + 1) * size) for i in range(len(part))]
        else:
            flat = [(row, text) for row in part for _, text in row.given]
            prompts = [form.prompt_ids(row.prompt) for row, _ in flat]
            rollout = given_completions(form, prompts, [form.answer_ids(text) for _, text in flat])
            ends = torch.tensor([0, *(len(row.given) for row in part)]).cumsum(0).tolist()
            groups = [range(*bounds) for bounds in pairwise(ends)]
        scored = score_rollout(policy, rollout, scorer.scoring, linear=scorer.linear, batch_size=settings.batch_size)
        yield from _results(policy, form, part, groups, start, scored, scorer, settings)
        bar.advance(len(part))


def best_candidate(scored: ScoredRollout, group: Sequence[int]) -> int:
    """The valid candidate of the highest score, of equal ones the first; the first of all where none is valid."""
    values = scored.scores.score.double().masked_fill(~scored.scores.valid, -torch.inf).nan_to_num(nan=-torch.inf)
    return max(group, key=lambda i: float(values[i]))


def agreement(answers: Sequence[str | None], answer: str | None) -> float | None:
    """The share of candidates with this answer, after normalisation; None where there is none."""
    if answer is None:
        return None
    same = normalize_answer(answer)
    return sum(other is not None and normalize_answer(other) == same for other in answers) / len(answers)


def _results(
    policy: Policy,
    form: TextFormat,
    part: Sequence[ScoreRow],
    groups: Sequence[range],
    first: int,
    scored: ScoredRollout,
    scorer: Scorer,
    settings: UseSettings,
) -> Iterator[dict[str, Any]]:
    """Rows of a scored batch, whose prompts count from `first`."""
    sampled, answers = settings.num_generations > 0, scored.rollout.spans.answers
    probabilities = scorer.probabilities(scored, groups, sampled)
    features = feature_rows(scored)
    tokens: list[dict[str, Any]] = [{} for _ in answers]
    if settings.tokens:
        top = None
        if settings.top:
            top = top_tokens(
                policy, scored.rollout.batch, settings.top, temperature=settings.score_temperature,
                batch_size=settings.batch_size,
            )  # fmt: skip
        tokens = token_rows(scored, form.tokenizer, scorer.scoring.top_m, top)
    for place, (row, group) in enumerate(zip(part, groups)):
        for i in [best_candidate(scored, group)] if settings.best else group:
            candidate = i - group.start
            result = {
                "row": row.where,
                "prompt_index": first + place,
                "candidate": candidate,
                "source": "sampled" if sampled else row.given[candidate][0],
                "prompt": row.prompt if isinstance(row.prompt, str) else _messages(row.prompt),
                **_result(scored, i),
                **probabilities[i],
            }
            if row.answer is not None:
                result["correct"] = answers_match(answers[i], row.answer)
            if settings.best:
                agree = agreement([answers[j] for j in group], answers[i])
                result |= {"num_candidates": len(group), "agreement": agree}
            elif sampled:
                result |= {"advantage": finite(float(scored.advantages[i])), "strength": float(scored.strengths[i])}
            yield {**result, "features": features[i], **tokens[i]}


def _score_row(row: Row, names: Sequence[str], settings: RowSettings) -> ScoreRow | str:
    present = [name for name in names if name in row.values]
    if names and not present:
        wanted = f'"{names[0]}", or "{names[1]}" and "{names[2]}"'
        return f"no answer to score: add {wanted}, or sample answers with --sample 8 (Python: num_generations=8)"
    parsed = answers_from_row(row, present, settings)
    if isinstance(parsed, str):
        return parsed
    prompt, given, answer = parsed
    return ScoreRow(row.where, prompt, tuple(zip(present, given)), answer)


def overlong(row: ScoreRow, form: TextFormat, context: int | None, room: int) -> str | None:
    """What keeps a prompt with its answers, or with room for one, from the model's context, or None."""
    needed = max([room, *(len(form.answer_ids(text)) for _, text in row.given)])
    num_tokens = len(form.prompt_ids(row.prompt)) + needed
    if context is None or num_tokens <= context:
        return None
    return f"prompt and answer need {num_tokens} tokens, more than the model's context of {context}: shorten it"


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in prompt]


def _result(scored: ScoredRollout, i: int) -> dict[str, Any]:
    rollout, scores = scored.rollout, scored.scores
    finder = int(rollout.spans.found_by[i])
    return {
        "completion": rollout.texts[i],
        "score": finite(float(scores.score[i])),
        "score_standard_error": finite(float(scored.standard_errors[i])),
        "h_final": finite(float(scores.final_entropy[i])),
        "h_fork": finite(float(scores.fork_entropy[i])),
        "valid": bool(scores.valid[i]),
        "num_tokens": int(rollout.batch.lengths[i]),
        "truncated": bool(rollout.truncated[i]),
        "final_answer": rollout.spans.answers[i],
        "found_by": None if finder < 0 else rollout.spans.finders[finder],
    }
