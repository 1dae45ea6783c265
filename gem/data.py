"""Preference pairs from JSONL, checked as a whole before anything else happens, and as padded batches of tokens."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from gem.errors import UserError


@dataclass(frozen=True)
class PreferencePair:
    prompt: str
    chosen: str
    rejected: str
    answer: str | None  # the known final answer, for exact match
    source: str  # "file:line"


@dataclass(frozen=True)
class TokenizedPair:
    """A pair as token ids; both answers close with the token that ends the assistant's turn."""

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]
    answer: str | None


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

    def prompt_ids(self, prompt: str) -> tuple[int, ...]:
        """Token ids of system prompt and question, up to where the answer begins."""
        if self.tokenizer.chat_template:
            text = self._render(prompt)
            return tuple(self.tokenizer.encode(text, add_special_tokens=False))
        head = f"{self.system_prompt}\n\n" if self.system_prompt else ""
        # The beginning-of-text token, where the tokenizer has one; an end token it may append is not part of a prompt.
        first = [t for t in self.tokenizer.encode("") if t != self.tokenizer.eos_token_id][:1]
        return tuple(first + self.tokenizer.encode(f"{head}Question: {prompt}\nAnswer:\n", add_special_tokens=False))

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Token ids of a whole answer, closed by the end-of-turn token."""
        return (*self.tokenizer.encode(answer, add_special_tokens=False), self.end_of_turn)

    def _render(self, prompt: str) -> str:
        user = {"role": "user", "content": prompt}
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        try:
            return self.tokenizer.apply_chat_template([*system, user], tokenize=False, add_generation_prompt=True)
        except Exception:
            # Some templates (Gemma's) raise on a system message: its text then opens the question.
            if not system:
                raise
            joined = {"role": "user", "content": f"{self.system_prompt}\n\n{prompt}"}
            return self.tokenizer.apply_chat_template([joined], tokenize=False, add_generation_prompt=True)


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


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """Every line of a JSONL file as a pair; raises one `UserError` that names each bad line."""
    pairs: list[PreferencePair] = []
    problems: list[tuple[int, str]] = []
    for line, row in read_rows(path):
        pair = row if isinstance(row, str) else _pair_or_problem(row, f"{path}:{line}")
        if isinstance(pair, str):
            problems.append((line, pair))
        else:
            pairs.append(pair)
    raise_problems(path, problems)
    if not pairs:
        raise UserError(f"{path}: no pairs in it; write one JSON object per line with prompt, chosen and rejected")
    return pairs


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any] | str]]:
    """(line number, object) for each line that is not blank; a string in place of an object says what is wrong."""
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from error
    return [(number, _row_or_problem(line)) for number, line in enumerate(lines, 1) if line.strip()]


def raise_problems(path: str | Path, problems: Sequence[tuple[int, str]]) -> None:
    """One error for all bad lines: the first in full, the others by number."""
    if not problems:
        return
    line, what = problems[0]
    others = [str(number) for number, _ in problems[1:]]
    more = ""
    if others:
        more = f" ({len(others)} more bad: line {', '.join(others[:8])}{', ...' if len(others) > 8 else ''})"
    raise UserError(f"{path}:{line}: {what}{more}")


def check_lengths(
    pairs: Sequence[PreferencePair], form: PromptFormat, context: int | None, max_completion_length: int
) -> list[TokenizedPair]:
    """The pairs as tokens; raises one `UserError` where a prompt leaves no room for an answer in the context."""
    tokenized = []
    problems: dict[str, list[tuple[int, str]]] = {}
    for pair in pairs:
        tokens = TokenizedPair(
            form.prompt_ids(pair.prompt), form.answer_ids(pair.chosen), form.answer_ids(pair.rejected), pair.answer
        )
        tokenized.append(tokens)
        room = max(len(tokens.chosen_ids), len(tokens.rejected_ids), max_completion_length)
        if context is not None and len(tokens.prompt_ids) + room > context:
            path, _, line = pair.source.rpartition(":")
            problems.setdefault(path, []).append((int(line), (
                f"the prompt has {len(tokens.prompt_ids)} tokens and its answers need up to {room}, more than the "
                f"model's context of {context}: shorten or delete this line, or lower max_completion_length"
            )))  # fmt: skip
    for path, bad in problems.items():
        raise_problems(path, bad)
    return tokenized


def split_pairs(
    pairs: Sequence[PreferencePair], fraction: float, seed: int
) -> tuple[list[PreferencePair], list[PreferencePair]]:
    """(train, held out): a seeded share of the prompts is held out; pairs of one prompt stay on one side."""
    prompts = sorted({pair.prompt for pair in pairs})
    random.Random(seed).shuffle(prompts)
    num_held = max(1, round(fraction * len(prompts)))
    if num_held >= len(prompts):
        raise UserError(
            f"train_file: {len(prompts)} different prompts cannot be split with eval_fraction={fraction}: "
            "add pairs or set eval_file"
        )
    held = set(prompts[:num_held])
    return [p for p in pairs if p.prompt not in held], [p for p in pairs if p.prompt in held]


def collate(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int) -> CompletionBatch:
    """P prompts and P * G completions as one padded batch."""
    prompt_ids, prompt_mask = pad_rows(prompts, pad_id, left=True)
    completion_ids, completion_mask = pad_rows(completions, pad_id, left=False)
    return CompletionBatch(prompt_ids, prompt_mask, completion_ids, completion_mask, len(completions) // len(prompts))


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


def _row_or_problem(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return "not UTF-8: save the file as UTF-8"
    except json.JSONDecodeError as error:
        return f"not valid JSON ({error.msg} at column {error.colno}): write one complete JSON object per line"
    if not isinstance(row, dict):
        return f"a JSON object is expected, got {type(row).__name__}: write one complete JSON object per line"
    return row


def _pair_or_problem(row: dict[str, Any], source: str) -> PreferencePair | str:
    texts = []
    for key in ("prompt", "chosen", "rejected"):
        if key not in row:
            return f'the key "{key}" is missing: each line needs "prompt", "chosen" and "rejected"'
        problem = text_problem(row, key)
        if problem:
            return problem
        texts.append(row[key])
    if texts[1] == texts[2]:
        return '"chosen" and "rejected" are the same text: change one or delete this line'
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        return f'"answer" must be text or a number, got {type(answer).__name__}: correct it or leave it out'
    if isinstance(answer, str) and not answer.strip():
        return '"answer" is empty: fill it in or leave it out'
    return PreferencePair(*texts, None if answer is None else str(answer), source)


def text_problem(row: dict[str, Any], key: str) -> str | None:
    """What keeps `row[key]` from being a usable text, or None."""
    if not isinstance(row[key], str):
        return f'"{key}" must be text, got {type(row[key]).__name__}: put it in quotes'
    if not row[key].strip():
        return f'"{key}" is empty: fill it in or delete this line'
    if any("\ud800" <= c <= "\udfff" for c in row[key]):
        return f'"{key}" holds half a character (a lone \\ud8xx escape): correct it or delete this line'
    return None
