"""Preference pairs from rows, checked as a whole before anything else happens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gem.config.settings import RowSettings, TrainConfig
from gem.data.answers import explicit_answer
from gem.data.batches import TokenizedPair
from gem.data.pair_warnings import marker_notes, overlap_warnings, row_warnings
from gem.data.prompts import ROLES, Conversation, Prompt, PromptError, TextFormat
from gem.data.sources import Row, RowProblem, RowReport, Source, answer_problem, read_rows, report, text_problem
from gem.errors import UserError


@dataclass(frozen=True)
class PreferencePair:
    prompt: Prompt
    chosen: str
    rejected: str
    answer: str | None  # the known final answer, for exact match
    where: str  # "file:line", or a dataset's row


def load_pairs(
    source: Source,
    form: TextFormat,
    context: int | None,
    settings: RowSettings,
    split: str = "train",
    *,
    room: int = 0,
) -> tuple[list[TokenizedPair], RowReport]:
    """The pairs of a file or dataset as tokens, with the report of rows left out.

    Malformed, empty and duplicate rows, and rows that do not fit `context` tokens, are one report; `UserError` where
    the settings refuse some, or no pair is left. room: tokens that must fit after each prompt whatever its answers.
    """
    rows = read_rows(source, split)
    pairs, problems = parse_pairs(rows, settings)
    kept = []
    for pair in pairs:
        try:
            tokens = tokenize_pair(pair, form)
        except PromptError as error:
            problems.append(RowProblem(pair.where, "bad", str(error)))
            continue
        if what := _overlong(tokens, context, room):
            problems.append(RowProblem(pair.where, "overlong", what))
        else:
            kept.append(tokens)
    made = report(source, rows, problems, settings)
    if not kept:
        left = f": {made}" if rows else ""
        raise UserError(f"{source}: no pairs in it; each row needs prompt, chosen and rejected{left}")
    return kept, made


def load_run_pairs(
    config: TrainConfig, form: TextFormat, context: int | None
) -> tuple[list[TokenizedPair], list[TokenizedPair], list[RowReport | str]]:
    """(train, held out, reports and warnings): the two sources, or one of which a share of the prompts is held out."""
    room = config.max_completion_length
    train, made = load_pairs(config.train_file, form, context, config, config.train_split, room=room)
    words = [*row_warnings(config.train_file, train), *marker_notes(config, train)]
    if config.eval_file is None:
        return *split_pairs(train, config.eval_fraction, config.seed), [made, *words]
    held_out, other = load_pairs(config.eval_file, form, context, config, config.eval_split, room=room)
    words += row_warnings(config.eval_file, held_out)
    words += overlap_warnings(train, held_out, config.train_file, config.eval_file)
    return train, held_out, [made, other, *words]


def load_prompts(config: TrainConfig, form: TextFormat, context: int | None) -> tuple[list[TokenizedPair], RowReport]:
    """The prompts of `prompts_file` without answers to learn from, and the report of rows left out."""
    source = config.prompts_file
    rows = read_rows(source, config.train_split)
    found: list[TokenizedPair] = []
    problems: list[RowProblem] = []
    for row in rows:
        parsed: Any = row.values
        if isinstance(parsed, dict):
            name = config.prompt_column
            words = f'the key "{name}" is missing: each line needs it; another name is set by prompt_column'
            parsed = answers_from_row(row, (), config) if name in parsed else words
        if isinstance(parsed, str):
            problems.append(RowProblem(row.where, "bad", parsed))
            continue
        prompt, _, answer = parsed
        try:
            ids = form.prompt_ids(prompt)
        except PromptError as error:
            problems.append(RowProblem(row.where, "bad", str(error)))
            continue
        if context is not None and len(ids) + config.max_completion_length > context:
            what = f"prompt of {len(ids)} tokens and max_completion_length do not fit the context of {context} tokens"
            problems.append(RowProblem(row.where, "overlong", f"{what}: shorten it"))
            continue
        found.append(TokenizedPair(ids, (), (), answer))
    made = report(source, rows, problems, config)
    if not found:
        raise UserError(f"{source}: no prompts in it; write one JSON object per line with at least a prompt")
    return found, made


def parse_pairs(rows: Sequence[Row], settings: RowSettings) -> tuple[list[PreferencePair], list[RowProblem]]:
    """Rows as pairs; every malformed, empty or repeated one is a problem instead."""
    pairs: list[PreferencePair] = []
    problems: list[RowProblem] = []
    first: dict[tuple[Prompt, str, str], str] = {}
    for row in rows:
        pair = row.values if isinstance(row.values, str) else _pair_or_problem(row, settings)
        if isinstance(pair, str):
            problems.append(RowProblem(row.where, "bad", pair))
            continue
        stood = first.setdefault((pair.prompt, pair.chosen, pair.rejected), pair.where)
        if stood != pair.where and settings.duplicate_rows != "keep":
            problems.append(RowProblem(row.where, "duplicate", f"the same pair stands at {stood}: delete one"))
            continue
        pairs.append(pair)
    return pairs, problems


def tokenize_pair(pair: PreferencePair, form: TextFormat) -> TokenizedPair:
    return TokenizedPair(
        prompt_ids=form.prompt_ids(pair.prompt),
        chosen_ids=form.answer_ids(pair.chosen),
        rejected_ids=form.answer_ids(pair.rejected),
        answer=pair.answer,
        sft_ids=form.answer_ids(sft_target(pair.chosen, pair.answer, form)),
    )


def sft_target(chosen: str, answer: str | None, form: TextFormat) -> str:
    """The chosen answer as SFT teaches it: with its final answer where the score will look for it.

    Only where `answer_span` looks for the marker, and nothing in the text points out its final answer (position, such
    as last_sentence, does not count), is one added: "marker answer" as a last line where the answer is known, else
    the marker before the last line. Without chain of thought the target is the marked final answer alone: the one
    pointed out, else the known one, else the last line.
    """
    found = explicit_answer(chosen, form.finders)
    head, _, last = chosen.rstrip().rpartition("\n")
    if not form.chain_of_thought:
        return f"{form.marker} {found or answer or last.strip()}"
    if found is not None or all(finder.name != "marker" for finder in form.finders):
        return chosen
    if answer is not None:
        return f"{chosen.rstrip()}\n{form.marker} {answer}"
    return f"{head}\n{form.marker} {last.strip()}" if head else f"{form.marker} {last.strip()}"


def _overlong(pair: TokenizedPair, context: int | None, max_completion_length: int) -> str | None:
    room = max(len(pair.chosen_ids), len(pair.rejected_ids), len(pair.sft_ids), max_completion_length)
    if context is None or len(pair.prompt_ids) + room <= context:
        return None
    return (
        f"the prompt has {len(pair.prompt_ids)} tokens and its answers need up to {room}, more than the model's "
        f"context of {context}: shorten or delete this row, or lower max_completion_length"
    )


def split_pairs(
    pairs: Sequence[TokenizedPair], fraction: float, seed: int
) -> tuple[list[TokenizedPair], list[TokenizedPair]]:
    """(train, held out): a seeded share of the prompts is held out; pairs of one prompt stay on one side."""
    prompts = sorted({pair.prompt_ids for pair in pairs})
    random.Random(seed).shuffle(prompts)
    num_held = max(1, round(fraction * len(prompts)))
    if num_held >= len(prompts):
        raise UserError(
            f"train_file: {len(prompts)} different prompts cannot be split with eval_fraction={fraction}: "
            "add pairs or set eval_file"
        )
    held = set(prompts[:num_held])
    return [p for p in pairs if p.prompt_ids not in held], [p for p in pairs if p.prompt_ids in held]


def answers_from_row(
    row: Row, names: Sequence[str], settings: RowSettings
) -> tuple[Prompt, list[str], str | None] | str:
    """(prompt, the answer in each of the columns `names`, the known final answer), or what is wrong with the row."""
    answers: list[str | Conversation] = []
    for name in names:
        if name not in row.values:
            return _missing(name, settings)
        parsed = _text_or_messages(name, row.values[name])
        if isinstance(parsed, _Wrong):
            return parsed.what
        answers.append(parsed)
    name = settings.prompt_column
    prompt = _text_or_messages(name, row.values[name]) if name in row.values else None
    if isinstance(prompt, _Wrong):
        return prompt.what
    chats = [answer for answer in answers if not isinstance(answer, str)]
    if chats and len(chats) < len(answers):
        return f"{_quoted(names)} must all be text or all be messages: change one"
    if chats:
        split = _split_chats(prompt, chats, names, settings)
        if isinstance(split, str):
            return split
        prompt, answers = split
    if prompt is None:
        return _missing(settings.prompt_column, settings)
    if not isinstance(prompt, str) and prompt[-1][0] not in ("user", "tool"):
        return f'"{settings.prompt_column}" must end with a message of the user, it ends with one of "{prompt[-1][0]}"'
    answer = row.values.get(settings.answer_column)
    if isinstance(answer, float) and math.isnan(answer):  # how tables of numbers spell a missing one
        answer = None
    if problem := answer_problem(settings.answer_column, answer):
        return problem
    return prompt, answers, None if answer is None else str(answer)


def _pair_or_problem(row: Row, settings: RowSettings) -> PreferencePair | str:
    names = (settings.chosen_column, settings.rejected_column)
    found = answers_from_row(row, names, settings)
    if isinstance(found, str):
        return found
    prompt, (chosen, rejected), answer = found
    if chosen == rejected:
        return f"{_quoted(names)} are the same text: change one or delete this line"
    return PreferencePair(prompt, chosen, rejected, answer, row.where)


@dataclass(frozen=True)
class _Wrong:
    what: str


def _missing(name: str, settings: RowSettings) -> str:
    needed = f'"{settings.prompt_column}", "{settings.chosen_column}" and "{settings.rejected_column}"'
    return f'the key "{name}" is missing: each line needs {needed}; other names are set by --prompt-column and so on'


def _text_or_messages(name: str, value: Any) -> str | Conversation | _Wrong:
    """A text, or a list of {"role", "content"} messages; or what is wrong with it."""
    if not isinstance(value, list | tuple):
        problem = text_problem(name, value)
        return value if problem is None else _Wrong(problem)
    messages = []
    for message in value:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return _Wrong(f'"{name}" must be text or a list of messages {{"role": ..., "content": ...}}: correct it')
        role, content = message["role"], message["content"]
        if role not in ROLES or (role == "system" and messages):
            place = " after the first message" if role == "system" else ""
            return _Wrong(f'"{name}" has a message of role {role!r}{place}; expected {", ".join(ROLES)}: correct it')
        if problem := text_problem(f"{name}: content", content):
            return _Wrong(problem)
        messages.append((role, content))
    return tuple(messages) if messages else _Wrong(f'"{name}" is empty: fill it in or delete this line')


def _split_chats(
    prompt: Prompt | None, chats: Sequence[Conversation], names: Sequence[str], settings: RowSettings
) -> tuple[Prompt | None, list[str]] | str:
    """(prompt, the text of each answer) of answers given as messages, or what is wrong with them.

    What they share at their beginning is the prompt; it stands in place of a prompt given as text, and must be the
    prompt given as messages. One message of the assistant is left of each.
    """
    shared = 0
    while shared < min(map(len, chats)) - 1 and len({chat[shared] for chat in chats}) == 1:
        shared += 1
    if shared and not isinstance(prompt, str | None) and prompt != chats[0][:shared]:
        return f'{_quoted(names)} begin with other messages than "{settings.prompt_column}" has: correct one'
    for name, messages in zip(names, chats):
        if len(messages) != shared + 1 or messages[-1][0] != "assistant":
            return f'"{name}" must be one message of the assistant, after those that all answers share: correct it'
    return (chats[0][:shared] if shared else prompt), [messages[-1][1] for messages in chats]


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)
