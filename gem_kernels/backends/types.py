"""What travels with rows of logits: how they are read, and the vectors of one number a row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from ..types import FLOOR

__all__ = ["FLOOR", "NO_TARGET", "RowGradients", "RowOptions", "RowStats"]

NO_TARGET = -(2**62)
"""A target for the row kernels alone: the row has statistics and a gradient, but its target is in none of its words.
Log-prob NaN, gradient without the term of its target. A shard of a vocabulary sees most targets so.
"""


@dataclass(frozen=True)
class RowOptions:
    """z = c tanh(logits / c) / tau, and which rows count. Checked by whoever makes it."""

    temperature: float = 1.0
    """tau of all rows, where `temperatures` is None."""
    temperatures: Tensor | None = None
    """tau of each row, [N] float32, contiguous."""
    softcap: float | None = None
    """c; None: no cap."""
    ignore_index: int = -100
    backend: str = "cpu"
    """"triton"; "torch" (any device); "cpu": compiled where that is possible, else "torch"."""
    extra: tuple[str, ...] = ()
    """Those of EXTRA_STATS that a forward pass makes too."""

    @property
    def tau(self) -> float | Tensor:
        return self.temperature if self.temperatures is None else self.temperatures

    def of(self, rows: slice | Tensor) -> RowOptions:
        """Those of some of the rows."""
        return self if self.temperatures is None else replace(self, temperatures=self.temperatures[rows])


class RowStats(NamedTuple):
    """What a forward pass makes of each row; all [N] float32. With x = c tanh(logits / c): row_max = max x,
    log_sum = log sum e^((x - row_max) / tau)."""

    logprobs: Tensor
    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor


class RowExtra(NamedTuple):
    """What else a forward pass makes of each row, where `RowOptions.extra` names it; [N] float32, else None. The fields
    are those of EXTRA_STATS; `is_top1` is 1 or 0."""

    self_certainty: Any = None
    varentropy: Any = None
    log_sum_sq_probs: Any = None
    mean_logits: Any = None
    is_top1: Any = None
    top_logprob: Any = None
    margin: Any = None

    @staticmethod
    def of(options: RowOptions, vectors: Tensor | None) -> RowExtra:
        """vectors: one row for each name, [len(options.extra), N]; each contiguous."""
        return RowExtra(**dict(zip(options.extra, () if vectors is None else vectors)))


class RowGradients(NamedTuple):
    """What a backward pass reads of each row: its statistics, and the gradients that came; all [N] float32."""

    entropy: Tensor
    row_max: Tensor
    log_sum: Tensor
    grad_logprobs: Tensor
    grad_entropy: Tensor


class Completions(NamedTuple):
    """Token statistics of completions, [B, T] with a mask or [N] with offsets; float32, contiguous."""

    entropy: Tensor
    logprobs: Tensor | None
    completion_mask: Any
    """Tensor or None: one of this and `cu_seqlens` is given."""
    cu_seqlens: Any
    answer_start: Tensor
    valid: Tensor | None


class ScoreRule(NamedTuple):
    """How completions are scored: the weight of each feature, and m = numerator * n // denominator (0: a count)."""

    weights: list[float]
    numerator: int
    denominator: int
    exclude: bool
    """A completion without an answer is invalid."""
