"""Where the final answer of each completion begins, from the ids of a marker's tokens or from character offsets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import arguments

INTEGERS = (torch.int64, torch.int32)


def answer_start(
    token_ids: Tensor,
    marker: Sequence[int] | Sequence[Sequence[int]],
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The first token after the last marker of each completion, as the `answer_start` of the other functions.

        answer_start = (end of the last run of tokens equal to a marker) - (first token of the completion)

    A marker is found where all its tokens are counted ones, side by side. A tokenizer may write the same text in
    several ways (with a space before it, at the start of a line): give each as a marker of its own, and the one that
    ends last counts. It runs on the device and does not wait for it.

    Args:
        token_ids: [B, T] with `completion_mask`, or [N] with `cu_seqlens`; int64 or int32: the ids of the tokens
            themselves (the `targets` of the other functions).
        marker: the ids of a marker's tokens, [n] with n at least 1; or several such markers.
        completion_mask, cu_seqlens: as for `entropy_scores`.

    Returns:
        [B] int64, counted from the completion's first token; -1 where there is no marker. A marker at the very end
        gives the completion's length, which means no answer too.

    Raises:
        ValueError: an argument is not as above. `cu_seqlens` is looked at on the CPU; on a GPU it is clamped to [0, N].

    Example:
        >>> markers = [tokenizer.encode(text, add_special_tokens=False) for text in ("####", " ####", "\\n####")]
        >>> start = answer_start(completion_ids, markers, completion_mask=completion_mask)
    """
    arguments.check_tensor("token_ids", token_ids, dtypes=INTEGERS)
    markers = _markers(marker)
    tokens = _tokens(token_ids, "token_ids", completion_mask, cu_seqlens)
    B, ids, last = tokens.B, token_ids.reshape(-1), tokens.first - 1
    for one in markers:
        length, begins = len(one), ids.shape[0] - len(one) + 1
        if begins < 1:
            continue
        found = tokens.sequence[:begins] == tokens.sequence[length - 1 :]
        for k, word in enumerate(one):
            found = found & (ids[k : k + begins] == word) & tokens.counted[k : k + begins]
        end = torch.arange(length, length + begins, dtype=torch.int64, device=ids.device)
        last = last.scatter_reduce(0, tokens.sequence[:begins], torch.where(found, end, -1), "amax")
    return (last - tokens.first)[:B]


def answer_start_from_offsets(
    offsets: Tensor,
    answer_offset: Tensor,
    *,
    completion_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """The first token that reaches beyond a character, as the `answer_start` of the other functions.

        answer_start = (first counted token with end > answer_offset) - (first token of the completion)

    For answers found in text: a token that holds the answer's first character belongs to the answer, were its beginning
    before it. It runs on the device and does not wait for it.

    Args:
        offsets: [B, T, 2] with `completion_mask`, or [N, 2] with `cu_seqlens`; int64 or int32: first character and end
            of each token in its completion's text, as fast tokenizers give them (`return_offsets_mapping`).
        answer_offset: [B], int64 or int32: the character at which the answer begins; negative: there is none.
        completion_mask, cu_seqlens: as for `entropy_scores`.

    Returns:
        [B] int64, counted from the completion's first token; -1 where there is no such token or no answer.

    Raises:
        ValueError: an argument is not as above. `cu_seqlens` is looked at on the CPU; on a GPU it is clamped to [0, N].
    """
    arguments.check_tensor("offsets", offsets, dtypes=INTEGERS)
    if offsets.dim() < 1 or offsets.shape[-1] != 2:
        arguments.fail("offsets", "of shape [B, T, 2] or [N, 2]", tuple(offsets.shape))
    tokens = _tokens(offsets[..., 1], "offsets", completion_mask, cu_seqlens)
    B = tokens.B
    arguments.check_tensor("answer_offset", answer_offset, shape=(B,), dtypes=INTEGERS, device=offsets.device)
    ends = offsets[..., 1].reshape(-1).long()
    wanted = torch.nn.functional.pad(answer_offset.long(), (0, 1), value=-1)[tokens.sequence]
    reached = tokens.counted & (ends > wanted) & (wanted >= 0)
    nowhere = ends.shape[0]
    at = torch.arange(nowhere, dtype=torch.int64, device=ends.device)
    found = torch.full_like(tokens.first, nowhere).scatter_reduce(
        0, tokens.sequence, torch.where(reached, at, nowhere), "amin"
    )
    return torch.where(found < nowhere, found - tokens.first, -1)[:B]


@dataclass(frozen=True)
class _Tokens:
    """The tokens of all completions, flat."""

    sequence: Tensor
    """[N] int64, in [0, B]; B where it is in none."""
    counted: Tensor
    """[N] bool."""
    first: Tensor
    """[B + 1] int64: the completion's first token, as an index of the flat tokens."""

    @property
    def B(self) -> int:
        return self.first.shape[0] - 1


def _tokens(values: Tensor, name: str, completion_mask: Any, cu_seqlens: Any) -> _Tokens:
    completion_mask = arguments.as_mask("completion_mask", completion_mask)
    B = arguments.check_layout(values, name, completion_mask, cu_seqlens)
    N, device = values.numel(), values.device
    at = torch.arange(N, dtype=torch.int64, device=device)
    if completion_mask is not None:
        counted = completion_mask.reshape(-1)
        sequence = at // max(1, values.shape[1])
        first = torch.full((B + 1,), N, dtype=torch.int64, device=device)
        return _Tokens(sequence, counted, first.scatter_reduce(0, sequence, torch.where(counted, at, N), "amin"))
    arguments.check_offsets(cu_seqlens, N)
    ends = cu_seqlens.long().clamp(0, N)
    sequence = torch.searchsorted(ends[1:].contiguous(), at, right=True)
    # A GPU's offsets may leave tokens out, before the first and after the last.
    return _Tokens(sequence, (sequence < B) & (at >= ends[0]), ends)


def _markers(marker: Any) -> list[list[int]]:
    if isinstance(marker, Tensor):
        marker = marker.tolist()
    if isinstance(marker, Sequence) and not isinstance(marker, str) and marker:
        markers = [marker] if all(isinstance(word, int) for word in marker) else list(marker)
        if all(_is_marker(one) for one in markers):
            return [list(one) for one in markers]
    arguments.fail("marker", "the ids of its tokens (at least one), or several such lists", arguments.shown(marker))


def _is_marker(one: Any) -> bool:
    words = isinstance(one, Sequence) and not isinstance(one, str) and len(one) > 0
    return words and all(isinstance(word, int) and not isinstance(word, bool) for word in one)
