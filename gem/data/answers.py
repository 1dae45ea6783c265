"""Where the final answer of a completion is, in tokens of the sampler's own ids, and whether it is the right one.

The text is never tokenized again: a second tokenization may cut it elsewhere. Token boundaries are found by decoding
prefixes of the ids themselves. A prefix that ends within a multi-byte character decodes to replacement characters, so
lengths of prefixes mean little; but "prefix i decodes to something that starts with the text up to character c" is
false up to one token and true after it, and bisection finds that token in log2(T) batched decodes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from transformers import PreTrainedTokenizerBase

from gem.data.limits import time_limit
from gem.errors import UserError


@dataclass(frozen=True)
class AnswerFinder:
    """One way to find the final answer: `name` is its setting, `place` gives its characters [start, end) in a text."""

    name: str
    place: Callable[[str], tuple[int, int] | None]
    last_tokens: int = 0  # more than 0: the answer is this many tokens, and `place` is not asked

    @property
    def explicit(self) -> bool:
        """True where the text itself says that this is the answer, False where the answer is taken by position."""
        return not self.last_tokens and self.name != "last_sentence"


@dataclass(frozen=True)
class AnswerSpans:
    """answer_start [B]: offset from the completion's first token, its length or more where no answer was found."""

    answer_start: torch.Tensor
    found: torch.Tensor  # [B] bool
    answers: tuple[str | None, ...]  # the answer's text, first line
    finders: tuple[str, ...] = ()  # their names, in the order they were tried
    found_by: torch.Tensor | None = None  # [B] int64: index into `finders`, -1 where none found it

    @property
    def hit_rate(self) -> float:
        """Share of completions whose final answer was found."""
        return self.found.float().mean().item() if len(self.answers) else 0.0

    @property
    def hit_rates(self) -> dict[str, float]:
        """Share of completions whose final answer was found by each finder, the first that found it; they add up."""
        if self.found_by is None or not len(self.answers):
            return dict.fromkeys(self.finders, 0.0)
        return {name: (self.found_by == i).double().mean().item() for i, name in enumerate(self.finders)}


def answer_finders(names: Sequence[str], marker: str = "Final Answer:") -> tuple[AnswerFinder, ...]:
    """The finders of the setting `answer_span`, to be tried in this order; `UserError` for a name it does not know.

        marker           after the last `marker`; "Final Answer: 7"
        boxed            the content of the last \\boxed{...} or \\fbox{...} whose braces balance
        answer_tag       the content of the last <answer>...</answer>
        after_think      all after the last </think>
        last_sentence    the last sentence or line
        last_tokens:N    the last N tokens, an end token not counted
        regex:PATTERN    the last match of Python's re: its group 1 where it has groups, else all of it

    An answer of white space alone is none. A span runs from the answer's first token to the end of the completion.
    """
    finders = []
    for name in names:
        kind, _, argument = name.partition(":")
        if name == "marker":
            finders.append(AnswerFinder(name, lambda text: _after(text, marker)))
        elif name in _PLACES:
            finders.append(AnswerFinder(name, _PLACES[name]))
        elif kind == "last_tokens" and argument.isdecimal() and int(argument) > 0:
            finders.append(AnswerFinder(name, lambda text: None, int(argument)))
        elif kind == "regex" and argument:
            finders.append(AnswerFinder(name, _regex_place(argument)))
        else:
            raise UserError(f"answer_span: expected one of {', '.join(SPAN_FINDERS)}, got {name!r}")
    if not finders:
        raise UserError(f"answer_span: expected one or more of {', '.join(SPAN_FINDERS)}, got none")
    return tuple(finders)


def find_answer_spans(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: torch.Tensor,
    completion_mask: torch.Tensor,
    finders: Sequence[AnswerFinder] | str,
    end_token_ids: Sequence[int] = (),
) -> AnswerSpans:
    """The final answer of each completion, by the first finder that finds one, as the index of its first token.

    completion_ids, completion_mask [B, T]: padded on the right. An end token closes a completion and is not part of
    its text. A token that holds both the end of what stands before and the answer's first character belongs to the
    answer. `finders` may be a marker.
    """
    finders = answer_finders(["marker"], finders) if isinstance(finders, str) else finders
    lengths = completion_mask.sum(1)
    rows = [ids[:n] for ids, n in zip(completion_ids.tolist(), lengths.tolist())]
    rows = [ids[:-1] if ids and ids[-1] in end_token_ids else ids for ids in rows]
    texts = decode(tokenizer, rows)
    found_by = torch.full_like(lengths, -1, dtype=torch.int64)
    answer_start = lengths.to(torch.int64).clone()
    answers: list[str | None] = [None] * len(rows)
    places: dict[int, int] = {}
    for i, (ids, text) in enumerate(zip(rows, texts)):
        for index, finder in enumerate(finders):
            if finder.last_tokens:
                start = max(0, len(ids) - finder.last_tokens)
                answer = decode(tokenizer, [ids[start:]])[0] if text.strip() else ""
            else:
                place = finder.place(text)
                answer = text[slice(*place)] if place else ""
            if not answer.strip():
                continue
            found_by[i], answers[i] = index, first_line(answer)
            if finder.last_tokens:
                answer_start[i] = start
            else:
                places[i] = place[0]
            break
    hits = list(places)
    starts = _first_tokens(tokenizer, [rows[i] for i in hits], [texts[i] for i in hits], [places[i] for i in hits])
    for i, start in zip(hits, starts):
        answer_start[i] = start
    return AnswerSpans(answer_start, found_by >= 0, tuple(answers), tuple(f.name for f in finders), found_by)


def explicit_answer(text: str, finders: Sequence[AnswerFinder]) -> str | None:
    """The final answer that the text itself points out (first line), None where it does not: nothing by position."""
    for finder in finders:
        place = finder.place(text) if finder.explicit else None
        if place is not None and text[slice(*place)].strip():
            return first_line(text[slice(*place)])
    return None


def extract_answer(text: str, marker: str) -> str | None:
    """The final answer's text (its first line), None where the marker or the answer is missing."""
    return explicit_answer(text, answer_finders(["marker"], marker))


def _after(text: str, marker: str) -> tuple[int, int] | None:
    """From the first character that is not white space after the last marker."""
    at = text.rfind(marker)
    if at < 0:
        return None
    rest = text[at + len(marker) :]
    return (len(text) - len(rest.lstrip()), len(text)) if rest.strip() else None


def _boxed(text: str) -> tuple[int, int] | None:
    """Content of the last \\boxed{...} whose braces balance; an escaped brace is a character."""
    for match in reversed(list(_BOXED.finditer(text))):
        depth = 1
        for brace in _BRACES.finditer(text, match.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return _inner(text, match.end(), brace.start())
    return None


def _answer_tag(text: str) -> tuple[int, int] | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    return None if start < 0 else _inner(text, start + len("<answer>"), end)


def _last_sentence(text: str) -> tuple[int, int] | None:
    end = len(text.rstrip())
    breaks = [match.end() for match in _SENTENCE_END.finditer(text, 0, end)]
    return _inner(text, breaks[-1] if breaks else 0, end)


def _regex_place(pattern: str) -> Callable[[str], tuple[int, int] | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what future versions of Python read in another way
            compiled = re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"answer_span: regex:{pattern} is not a regular expression: {error}") from error
    group = 1 if compiled.groups else 0

    def place(text: str) -> tuple[int, int] | None:
        with time_limit(f"answer_span: regex:{pattern}: on one answer it"):
            matches = [match.span(group) for match in compiled.finditer(text) if match.group(group)]
        return _inner(text, *matches[-1]) if matches else None

    return place


def _inner(text: str, start: int, end: int) -> tuple[int, int] | None:
    """[start, end) less the white space around it, None where nothing is left."""
    inner = text[start:end]
    return (end - len(inner.lstrip()), start + len(inner.rstrip())) if inner.strip() else None


SPAN_FINDERS = ("marker", "boxed", "answer_tag", "after_think", "last_sentence", "last_tokens:N", "regex:PATTERN")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
# After a full stop and white space ("3.5" is none), after a Chinese or Japanese one, or a new line.
_SENTENCE_END = re.compile(r"[.!?][\"')\]*]*\s+|[。！？]\s*|\n\s*")
_PLACES: dict[str, Callable[[str], tuple[int, int] | None]] = {
    "boxed": _boxed,
    "answer_tag": _answer_tag,
    "after_think": lambda text: _after(text, "</think>"),
    "last_sentence": _last_sentence,
}


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
