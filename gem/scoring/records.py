"""What a row of a completions file says of a completion beside its text: its features, and its tokens with their
numbers. `gem.report.records` has the format."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from gem.data.answers import decode
from gem.scoring.forks import fork_tokens
from gem.scoring.score import ScoredRollout

# Digits after the point of a token's numbers, nats: float32 has no more to give for a log-prob of -100.
DIGITS = 4


def feature_rows(scored: ScoredRollout) -> list[dict[str, float | None]]:
    """Every feature of each completion by its name; zeros where the completion is not valid."""
    names = [field.name for field in dataclasses.fields(scored.features) if field.name != "valid"]
    table = torch.stack([getattr(scored.features, name).double() for name in names], 1).tolist()
    return [{name: finite(value) for name, value in zip(names, row)} for row in table]


def token_rows(
    scored: ScoredRollout,
    tokenizer: PreTrainedTokenizerBase,
    top_m: float | int,
    top: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[dict[str, Any]]:
    """tokens, entropy, logprob, fork and answer_start of each completion; "top" where it is given.

    top: the likeliest tokens [B, T, K] int64 in place of each token, and their log-probs.
    """
    batch, starts = scored.rollout.batch, scored.rollout.spans.answer_start.tolist()
    forks = fork_tokens(scored.entropy, batch.completion_mask, scored.rollout.spans.answer_start, top_m)
    rows = []
    for i, length in enumerate(batch.lengths.tolist()):
        ids = batch.completion_ids[i, :length].tolist()
        row = {
            "tokens": token_texts(tokenizer, ids),
            "entropy": _rounded(scored.entropy[i, :length]),
            "logprob": _rounded(scored.logprobs[i, :length]),
            "fork": forks[i, :length].tolist(),
            "answer_start": min(starts[i], length),
        }
        if top is not None:
            row["top"] = _alternatives(tokenizer, top[0][i, :length], top[1][i, :length])
        rows.append(row)
    return rows


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token: joined they are the text of all. A token that ends within a character is empty, and the
    one that completes it has the whole character."""
    if not ids:
        return []
    whole = decode(tokenizer, [ids])[0]
    pieces = decode(tokenizer, [[token] for token in ids])
    if "".join(pieces) == whole:
        return pieces
    if tokenizer.is_fast:
        stream = DecodeStream(skip_special_tokens=False)
        pieces = [stream.step(tokenizer.backend_tokenizer, token) or "" for token in ids]
        said = "".join(pieces)
        if whole.startswith(said):
            return [*pieces[:-1], pieces[-1] + whole[len(said) :]]
    prefixes = [len(text) for text in decode(tokenizer, [ids[: i + 1] for i in range(len(ids))])]
    ends = [0, *prefixes[:-1], len(whole)]
    return [whole[start:end] for start, end in itertools.pairwise(ends)]


def finite(value: float) -> float | None:
    """The number as JSON has it: null where it is not finite."""
    return value if math.isfinite(value) else None


def _rounded(values: torch.Tensor) -> list[float | None]:
    return [round(value, DIGITS) if math.isfinite(value) else None for value in values.double().tolist()]


def _alternatives(
    tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor, logprobs: torch.Tensor
) -> list[list[list[Any]]]:
    """[[token, log-prob], ...] for each token, the likeliest first."""
    known = sorted(set(ids.flatten().tolist()))
    texts = dict(zip(known, decode(tokenizer, [[token] for token in known])))
    return [
        [[texts[token], value] for token, value in zip(row, _rounded(values))]
        for row, values in zip(ids.tolist(), logprobs)
    ]
