"""Preference pairs from rows, checked as a whole before anything else happens, and as padded batches of tokens."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gem.config import DIRECT_SYSTEM_PROMPT, TrainConfig
from gem.errors import UserError
from gem.rows import (
    Row,
    RowPolicy,
    RowProblem,
    RowReport,
    answer_problem,
    read_rows,
    report,
    text_problem,
)
from gem.spans import AnswerFinder, answer_finders, explicit_answer

# (role, content) of each message. A prompt is one question or the messages of a chat up to the answer.
Conversation = tuple[tuple[str, str], ...]
Prompt = str | Conversation

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class PreferencePair:
    prompt: Prompt
    chosen: str
    rejected: str
    answer: str | None  # the known final answer, for exact match
    where: str  # "file:line", or a dataset's row


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; all answers close with the token that ends the assistant's turn.

    `sft_ids` is what SFT learns: the chosen answer in the form the prompt asks for (`sft_target`).
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    answer: str | None
    sft_ids: tuple[int, ...] = ()  # left out: the chosen answer as it is

    def __post_init__(self) -> None:
        if not self.sft_ids:
            object.__setattr__(self, "sft_ids", self.chosen_ids)


@dataclass(frozen=True)
class PairOptions:
    """How rows become pairs: names of columns, what is done about bad ones, and the form of SFT's answers."""

    prompt: str = "prompt"
    chosen: str = "chosen"
    rejected: str = "rejected"
    answer: str = "answer"
    policy: RowPolicy = field(default_factory=RowPolicy)
    max_completion_length: int = 0  # tokens that must fit the context after each prompt
    finders: tuple[AnswerFinder, ...] = field(default_factory=lambda: answer_finders(["marker"]))
    marker: str = "Final Answer:"
    chain_of_thought: bool = True


def pair_options(config: TrainConfig) -> PairOptions:
    """Of a run; `UserError` where its answers could never be found."""
    if not config.chain_of_thought and "marker" not in config.answer_span:
        raise UserError("answer_span: expected marker among them: with chain_of_thought: false answers are marked")
    return PairOptions(
        prompt=config.prompt_column,
        chosen=config.chosen_column,
        rejected=config.rejected_column,
        answer=config.answer_column,
        policy=RowPolicy(config.bad_rows, config.duplicate_rows, config.overlong_rows),
        max_completion_length=config.max_completion_length,
        finders=answer_finders(config.answer_span, config.answer_marker),
        marker=config.answer_marker,
        chain_of_thought=config.chain_of_thought,
    )


@dataclass(frozen=True)
class CompletionBatch:
    """P prompts with G completions each, B = P * G; completions of one prompt stand together.

    prompt_ids, prompt_mask [P, L]: padded on the left. completion_ids, completion_mask [B, T]: padded on the right.
    Masks are boolean, True counts; what lies under False is never attended to, scored or trained on.
    """

    prompt_ids: torch.Tensor
    prompt_mask: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    num_generations: int

    @property
    def lengths(self) -> torch.Tensor:
        """Completion tokens of each sequence [B]."""
        return self.completion_mask.sum(1)

    def select_prompts(self, start: int, stop: int) -> CompletionBatch:
        """Prompts start .. stop-1 with their completions, less the padding they no longer need."""
        prompt_mask = self.prompt_mask[start:stop]
        rows = slice(start * self.num_generations, stop * self.num_generations)
        mask = self.completion_mask[rows]
        left = prompt_mask.shape[1] - int(prompt_mask.sum(1).max())
        width = max(1, int(mask.sum(1).max()))
        return CompletionBatch(
            prompt_ids=self.prompt_ids[start:stop, left:],
            prompt_mask=prompt_mask[:, left:],
            completion_ids=self.completion_ids[rows, :width],
            completion_mask=mask[:, :width],
            num_generations=self.num_generations,
        )


@dataclass(frozen=True)
class PromptFormat:
    """How a question becomes the model's prompt, and which token ends an answer."""

    tokenizer: PreTrainedTokenizerBase
    system_prompt: str
    end_of_turn: int

    def prompt_ids(self, prompt: Prompt) -> tuple[int, ...]:
        """Token ids of system prompt and question or chat, up to where the answer begins.

        A system message within the prompt takes the place of the format's own.
        """
        messages = (("user", prompt),) if isinstance(prompt, str) else prompt
        if self.system_prompt and messages[0][0] != "system":
            messages = (("system", self.system_prompt), *messages)
        if self.tokenizer.chat_template:
            return tuple(self.tokenizer.encode(self._render(messages), add_special_tokens=False))
        # The beginning-of-text token, where the tokenizer has one; an end token it may append is not part of a prompt.
        first = [t for t in self.tokenizer.encode("") if t != self.tokenizer.eos_token_id][:1]
        return tuple(first + self.tokenizer.encode(_plain_chat(messages), add_special_tokens=False))

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of a whole answer, closed by the end-of-turn token."""
        return (*self.tokenizer.encode(answer, add_special_tokens=False), self.end_of_turn)

    def _render(self, messages: Conversation) -> str:
        try:
            return self._template(messages)
        except Exception:
            # Some templates (Gemma's) raise on a system message: its text then opens the question.
            if len(messages) < 2 or messages[0][0] != "system":
                raise
            (_, system), (role, first), *rest = messages
            return self._template(((role, f"{system}\n\n{first}"), *rest))

    def _template(self, messages: Conversation) -> str:
        chat = [{"role": role, "content": content} for role, content in messages]
        return self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def _plain_chat(messages: Conversation) -> str:
    """The format of a tokenizer without chat template, up to where the answer begins."""
    before = {"system": "", "user": "Question: ", "assistant": "Answer:\n", "tool": "Result: "}
    after = {"system": "\n\n"}
    return "".join(f"{before[role]}{text}{after.get(role, chr(10))}" for role, text in messages) + "Answer:\n"


def run_system_prompt(config: TrainConfig) -> str:
    """The system prompt of a run; without chain of thought one that asks for the answer alone."""
    return config.system_prompt if config.chain_of_thought else DIRECT_SYSTEM_PROMPT


def prompt_format(tokenizer: PreTrainedTokenizerBase, system_prompt: str) -> PromptFormat:
    """The format of this tokenizer: its chat template, or "Question: ... Answer:" where it has none."""
    end_of_turn = _template_end_token(tokenizer)
    if end_of_turn is None:
        end_of_turn = tokenizer.eos_token_id
    if end_of_turn is None:
        raise UserError("model: its tokenizer names no end token (eos_token), so answers cannot be closed")
    return PromptFormat(tokenizer, system_prompt, end_of_turn)


def _template_end_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The first special token that the chat template puts after an assistant's answer (<|im_end|>, <|eot_id|>, ...)."""
    if not tokenizer.chat_template:
        return None
    answer = "GEM ANSWER"
    messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": answer}]
    after = tokenizer.apply_chat_template(messages, tokenize=False).rpartition(answer)[2]
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((t for t in tokenizer.encode(after, add_special_tokens=False) if t in special), None)


def load_pairs(
    source: str | Path, form: PromptFormat, context: int | None, options: PairOptions, split: str = "train"
) -> tuple[list[TokenizedPair], RowReport]:
    """The pairs of a file or dataset as tokens, with the report of rows left out.

    Malformed, empty and duplicate rows, and rows that do not fit `context` tokens, are one report; `UserError` where
    the policy refuses some, or no pair is left.
    """
    rows = read_rows(source, split)
    pairs, problems = parse_pairs(rows, options)
    kept = []
    for pair in pairs:
        tokens = tokenize_pair(pair, form, options)
        if what := _overlong(tokens, context, options.max_completion_length):
            problems.append(RowProblem(pair.where, "overlong", what))
        else:
            kept.append(tokens)
    made = report(source, rows, problems, options.policy)
    if not kept:
        left = f": {made}" if rows else ""
        raise UserError(f"{source}: no pairs in it; each row needs prompt, chosen and rejected{left}")
    return kept, made


def load_run_pairs(
    config: TrainConfig, form: PromptFormat, context: int | None
) -> tuple[list[TokenizedPair], list[TokenizedPair], list[RowReport]]:
    """(train, held out, reports) of a run: the two sources, or one of which a share of the prompts is held out."""
    options = pair_options(config)
    train, made = load_pairs(config.train_file, form, context, options, config.train_split)
    if config.eval_file is None:
        return *split_pairs(train, config.eval_fraction, config.seed), [made]
    held_out, other = load_pairs(config.eval_file, form, context, options, config.eval_split)
    return train, held_out, [made, other]


def parse_pairs(rows: Sequence[Row], options: PairOptions) -> tuple[list[PreferencePair], list[RowProblem]]:
    """Rows as pairs; every malformed, empty or repeated one is a problem instead."""
    pairs: list[PreferencePair] = []
    problems: list[RowProblem] = []
    first: dict[tuple[Prompt, str, str], str] = {}
    for row in rows:
        pair = row.values if isinstance(row.values, str) else _pair_or_problem(row, options)
        if isinstance(pair, str):
            problems.append(RowProblem(row.where, "bad", pair))
            continue
        stood = first.setdefault((pair.prompt, pair.chosen, pair.rejected), pair.where)
        if stood != pair.where and options.policy.duplicate != "keep":
            problems.append(RowProblem(row.where, "duplicate", f"the same pair stands at {stood}: delete one"))
            continue
        pairs.append(pair)
    return pairs, problems


def tokenize_pair(pair: PreferencePair, form: PromptFormat, options: PairOptions) -> TokenizedPair:
    return TokenizedPair(
        prompt_ids=form.prompt_ids(pair.prompt),
        chosen_ids=form.answer_ids(pair.chosen),
        rejected_ids=form.answer_ids(pair.rejected),
        answer=pair.answer,
        sft_ids=form.answer_ids(sft_target(pair.chosen, pair.answer, options)),
    )


def sft_target(chosen: str, answer: str | None, options: PairOptions) -> str:
    """The chosen answer as SFT teaches it: with its final answer where the score will look for it.

    Only where `answer_span` looks for the marker, and nothing in the text points out its final answer (position, such
    as last_sentence, does not count), is one added: "marker answer" as a last line where the answer is known, else
    the marker before the last line. Without chain of thought the target is the marked final answer alone: the one
    pointed out, else the known one, else the last line.
    """
    found = explicit_answer(chosen, options.finders)
    head, _, last = chosen.rstrip().rpartition("\n")
    if not options.chain_of_thought:
        return f"{options.marker} {found or answer or last.strip()}"
    if found is not None or all(finder.name != "marker" for finder in options.finders):
        return chosen
    if answer is not None:
        return f"{chosen.rstrip()}\n{options.marker} {answer}"
    return f"{head}\n{options.marker} {last.strip()}" if head else f"{options.marker} {last.strip()}"


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


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> CompletionBatch:
    """P prompts and P * G completions as one padded batch."""
    prompt_ids, prompt_mask = pad_rows(prompts, pad_id, left=True)
    completion_ids, completion_mask = pad_rows(completions, pad_id, left=False)
    return CompletionBatch(prompt_ids, prompt_mask, completion_ids, completion_mask, len(completions) // len(prompts))


def collate_pairs(pairs: Sequence[TokenizedPair], pad_id: int) -> CompletionBatch:
    """Pairs as prompts with two completions each: chosen, rejected."""
    answers = [ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    return collate([pair.prompt_ids for pair in pairs], answers, pad_id)


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows -> (ids [R, W] int64, mask [R, W] bool)."""
    width = max(1, *(len(row) for row in rows)) if rows else 1
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where] = torch.tensor(row, dtype=torch.int64)
        mask[i, where] = True
    return ids, mask


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def answers_from_row(
    row: Row, names: Sequence[str], options: PairOptions
) -> tuple[Prompt, list[str], str | None] | str:
    """(prompt, the answer in each of the columns `names`, the known final answer), or what is wrong with the row."""
    answers: list[str | Conversation] = []
    for name in names:
        if name not in row.values:
            return _missing(name, options)
        parsed = _text_or_messages(name, row.values[name])
        if isinstance(parsed, _Wrong):
            return parsed.what
        answers.append(parsed)
    prompt = _text_or_messages(options.prompt, row.values[options.prompt]) if options.prompt in row.values else None
    if isinstance(prompt, _Wrong):
        return prompt.what
    chats = [answer for answer in answers if not isinstance(answer, str)]
    if chats and len(chats) < len(answers):
        return f"{_quoted(names)} must all be text or all be messages: change one"
    if chats:
        split = _split_chats(prompt, chats, names, options)
        if isinstance(split, str):
            return split
        prompt, answers = split
    if prompt is None:
        return _missing(options.prompt, options)
    if not isinstance(prompt, str) and prompt[-1][0] not in ("user", "tool"):
        return f'"{options.prompt}" must end with a message of the user, it ends with one of "{prompt[-1][0]}"'
    answer = row.values.get(options.answer)
    if isinstance(answer, float) and math.isnan(answer):  # how tables of numbers spell a missing one
        answer = None
    if problem := answer_problem(options.answer, answer):
        return problem
    return prompt, answers, None if answer is None else str(answer)


def _pair_or_problem(row: Row, options: PairOptions) -> PreferencePair | str:
    found = answers_from_row(row, (options.chosen, options.rejected), options)
    if isinstance(found, str):
        return found
    prompt, (chosen, rejected), answer = found
    if chosen == rejected:
        return f'"{options.chosen}" and "{options.rejected}" are the same text: change one or delete this line'
    return PreferencePair(prompt, chosen, rejected, answer, row.where)


@dataclass(frozen=True)
class _Wrong:
    what: str


def _missing(name: str, options: PairOptions) -> str:
    needed = f'"{options.prompt}", "{options.chosen}" and "{options.rejected}"'
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
    prompt: Prompt | None, chats: Sequence[Conversation], names: Sequence[str], options: PairOptions
) -> tuple[Prompt | None, list[str]] | str:
    """(prompt, the text of each answer) of answers given as messages, or what is wrong with them.

    What they share at their beginning is the prompt; it stands in place of a prompt given as text, and must be the
    prompt given as messages. One message of the assistant is left of each.
    """
    shared = 0
    while shared < min(map(len, chats)) - 1 and len({chat[shared] for chat in chats}) == 1:
        shared += 1
    if shared and not isinstance(prompt, str | None) and prompt != chats[0][:shared]:
        return f'{_quoted(names)} begin with other messages than "{options.prompt}" has: correct one'
    for name, messages in zip(names, chats):
        if len(messages) != shared + 1 or messages[-1][0] != "assistant":
            return f'"{name}" must be one message of the assistant, after those that all answers share: correct it'
    return (chats[0][:shared] if shared else prompt), [messages[-1][1] for messages in chats]


def _quoted(names: Sequence[str]) -> str:
    return " and ".join(f'"{name}"' for name in names)
