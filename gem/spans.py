"""Where the final answer of a completion is, in tokens of the sampler's own ids, and whether it is the right one.

The text is never tokenized again: a second tokenization may cut it elsewhere. Token boundaries are found by decoding
prefixes of the ids themselves. A prefix that ends within a multi-byte character decodes to replacement characters, so
lengths of prefixes mean little; but "prefix i decodes to something that starts with the text up to character c" is
false up to one token and true after it, and bisection finds that token in log2(T) batched decodes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class AnswerSpans:
    """answer_start [B]: offset from the completion's first token, its length or more where no answer was found."""

    answer_start: torch.Tensor
    found: torch.Tensor  # [B] bool
    answers: tuple[str | None, ...]  # the answer's text, first line

    @property
    def hit_rate(self) -> float:
        """Share of completions whose final answer was found."""
        return self.found.float().mean().item() if len(self.answers) else 0.0


def find_answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    marker: str,
    end_token_ids: Sequence[int] = (),
) -> AnswerSpans:
    """The text after the last `marker` of each completion, as the index of its first token.

    completion_ids, completion_mask [B, T]: padded on the right. An end token closes a completion and is not part of
    its text. A marker with nothing after it is no answer. A token that holds both the end of the marker and the
    answer's first character belongs to the answer.
    """
    lengths = completion_mask.sum(1)
    rows = [ids[:n] for ids, n in zip(completion_ids.tolist(), lengths.tolist())]
    rows = [ids[:-1] if ids and ids[-1] in end_token_ids else ids for ids in rows]
    texts = decode(tokenizer, rows)
    places = [answer_place(text, marker) for text in texts]
    hits = [i for i, place in enumerate(places) if place is not None]
    starts = _first_tokens(tokenizer, [rows[i] for i in hits], [texts[i] for i in hits], [places[i] for i in hits])
    answer_start = lengths.to(torch.int64).clone()
    found = torch.zeros_like(lengths, dtype=torch.bool)
    for i, start in zip(hits, starts):
        answer_start[i], found[i] = start, True
    answers = tuple(None if place is None else first_line(text[place:]) for text, place in zip(texts, places))
    return AnswerSpans(answer_start, found, answers)


def answer_place(text: str, marker: str) -> int | None:
    """Index of the first character that is not white space after the last marker, None where there is none."""
    at = text.rfind(marker)
    if at < 0:
        return None
    rest = text[at + len(marker) :]
    return len(text) - len(rest.lstrip()) if rest.strip() else None


def extract_answer(text: str, marker: str) -> str | None:
    """The final answer's text (its first line), None where the marker or the answer is missing."""
    place = answer_place(text, marker)
    return None if place is None else first_line(text[place:])


def first_line(text: str) -> str:
    return text.strip().splitlines()[0].strip()


_NUMBER = re.compile(r"(?<![\w.])[-+]?[$€£]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?(?![\d/])")


def normalize_answer(text: str) -> str:
    """What exact match compares: the number, where the answer holds exactly one; else its words, in lower case.

    "$1,200.00." and "1200 dollars" are both "1200"; "x = 7" is "7"; units are not compared. "5/8" and "2 h 30 min"
    stay text, without outer punctuation and with single spaces.
    """
    value = text.rpartition("=")[2] if "=" in text else text
    numbers = [match.group() for match in _NUMBER.finditer(value) if any(c.isdigit() for c in match.group())]
    digits = re.findall(r"\d[\d,.]*", value)
    if len(numbers) == 1 and len(digits) == 1:
        number = Decimal(re.sub(r"[,$€£+]", "", numbers[0]))
        return format(number.normalize() + 0, "f")  # + 0: no negative zero
    return " ".join(value.lower().split()).strip(" .,;:!?*\"'`")


def answers_match(answer: str | None, truth: str) -> bool:
    """Exact match after `normalize_answer`; no answer never matches."""
    return answer is not None and normalize_answer(answer) == normalize_answer(truth)


def decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[int]]) -> list[str]:
    """Token ids -> text exactly as the ids spell it: special tokens kept, no spaces cleaned up."""
    return tokenizer.batch_decode(list(rows), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _first_tokens(
    tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], texts: list[str], places: list[int]
) -> list[int]:
    """For each row the index of the token in which character `place` of its text begins."""
    low, high = [0] * len(rows), [len(ids) for ids in rows]  # the least prefix that covers text[:place]
    open_rows = [i for i in range(len(rows)) if low[i] < high[i]]
    while open_rows:
        middles = [(low[i] + high[i]) // 2 for i in open_rows]
        prefixes = decode(tokenizer, [rows[i][:middle] for i, middle in zip(open_rows, middles)])
        for i, middle, prefix in zip(open_rows, middles, prefixes):
            if prefix.startswith(texts[i][: places[i]]):
                high[i] = middle
            else:
                low[i] = middle + 1
        open_rows = [i for i in open_rows if low[i] < high[i]]
    covers = decode(tokenizer, [ids[:n] for ids, n in zip(rows, high)])
    # A covering prefix that says more than text[:place] has the character's first byte in its last token.
    return [n - 1 if len(cover) > place else n for n, cover, place in zip(high, covers, places)]
