"""The arguments of a linear head, checked: `HeadParameters`, and the rows that go through it, `TokenRows`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments
from ..backends.rows import check_values
from ..backends.types import RowOptions
from . import vocab_parallel
from .active_vocab import check_threshold

WORKSPACE_BYTES = 128 * 2**20
# A CPU's products lose nothing at 300 rows a chunk, and the workspace counts beside a small model's own memory.
WORKSPACE_BYTES_CPU = 64 * 2**20


@dataclass(frozen=True)
class LinearArguments:
    """What every function of a linear head takes, as the caller gave it."""

    hidden: Any
    weight: Any
    targets: Any
    bias: Any
    temperature: Any
    softcap: Any
    logit_scale: Any
    ignore_index: Any
    logits_dtype: Any
    workspace_bytes: Any
    vocab_parallel: Any
    backend: Any
    active_vocab: Any = None


@dataclass(frozen=True)
class HeadParameters:
    """logits = hidden @ weight.T + bias, and how to go about it. Made by `check_head`.

    A scale of the logits costs nothing: the row kernels see the unscaled product, with softcap / scale and
    temperature / scale in their RowOptions.
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    logits_dtype: torch.dtype
    workspace_bytes: int
    shards: vocab_parallel.Shards | None = None
    """Where `weight` is one shard of several. Then targets and `ignore_index` of the rows are local."""
    active_vocab: float | None = None
    """Of the backward products: see active_vocab.py."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of dL/dlogits, an operand of the backward products: a GPU multiplies 16-bit numbers, a CPU what it has."""
        return self.weight.dtype if self.weight.is_cuda else self.logits_dtype

    @property
    def rows_per_chunk(self) -> int:
        V = self.weight.shape[0] if self.shards is None else self.shards.largest
        bytes_per_logit = self.logits_dtype.itemsize
        if self.gradient_dtype != self.logits_dtype:
            bytes_per_logit += self.gradient_dtype.itemsize
        return max(1, self.workspace_bytes // (V * bytes_per_logit))


class Chunk(NamedTuple):
    """Some of a call's rows: hidden [n, D], targets [n]."""

    hidden: Tensor
    targets: Tensor
    options: RowOptions


@dataclass(frozen=True)
class TokenRows:
    """The rows of a call, flat: hidden [N, D], targets [N] int64."""

    hidden: Tensor
    targets: Tensor
    options: RowOptions
    """Of the unscaled product."""
    kept: Tensor | None
    """Indices of the rows that count among `total`, or None for all. Only on the CPU: a count would wait for a GPU."""
    total: int

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def chunk(self, begin: int, end: int) -> Chunk:
        hidden, targets = self.hidden[begin:end], self.targets[begin:end]
        if hidden.is_cuda:
            # Ignored rows are still here; whatever they hold must not reach dWeight as 0 * NaN.
            hidden = hidden.masked_fill((targets == self.options.ignore_index)[:, None], 0.0)
        return Chunk(hidden, targets, self.options.of(slice(begin, end)))

    def spread(self, values: Tensor) -> Tensor:
        """[len(self), ...] -> [total, ...], zeros where a row was dropped."""
        if self.kept is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, values: Tensor) -> Tensor:
        """[total] -> [len(self)]."""
        return values.contiguous() if self.kept is None else values[self.kept]


def check_head(given: LinearArguments) -> tuple[HeadParameters, RowOptions]:
    """-> the head, and the options of the rows of its unscaled product."""
    targets, parallel = given.targets, given.vocab_parallel
    sharded = vocab_parallel.check_group(parallel) > 1
    try:
        head, options = _check_own(given)
    except ValueError:
        if sharded:
            vocab_parallel.meet(parallel, None, targets, given.ignore_index)
        raise
    V = head.weight.shape[0]
    scaled = _unscale(options, given.logit_scale)
    if sharded:
        hidden = given.hidden
        needs_hidden = hidden.requires_grad and torch.is_grad_enabled()
        dtypes = (arguments.LOGIT_DTYPES.index(x) for x in (hidden.dtype, head.logits_dtype))
        facts = (V, targets.numel(), hidden.shape[-1], needs_hidden, *dtypes, head.workspace_bytes, given.ignore_index)
        shards = vocab_parallel.meet(parallel, facts, targets, given.ignore_index)
        assert shards is not None
        head, V = replace(head, shards=shards), shards.starts[-1]
        scaled = replace(scaled, ignore_index=vocab_parallel.IGNORED)
    elif parallel is not None and parallel.vocab_starts is not None and parallel.vocab_starts[1] != V:
        arguments.fail("vocab_starts", f"(0, {V}), as `weight` has it", parallel.vocab_starts)
    check_values(targets, options, V)
    return replace(head, active_vocab=check_threshold(given.active_vocab, sharded)), scaled


def _unscale(options: RowOptions, logit_scale: float) -> RowOptions:
    """cap(scale * z) / tau, cap with c, is cap(z) / (tau / scale), cap with c / scale."""
    taus, softcap = options.temperatures, options.softcap
    return replace(
        options,
        temperature=options.temperature / logit_scale,
        temperatures=None if taus is None else taus / logit_scale,
        softcap=None if softcap is None else softcap / logit_scale,
    )


def _check_own(given: LinearArguments) -> tuple[HeadParameters, RowOptions]:
    """`check_head` of what this rank holds, but for the values inside tensors; the options as they were given."""
    hidden, weight, targets, bias = given.hidden, given.weight, given.targets, given.bias
    arguments.check_tensor("hidden", hidden, dtypes=arguments.LOGIT_DTYPES)
    if hidden.dim() < 1 or hidden.shape[-1] < 1:
        arguments.fail("hidden", "of shape [..., D] with D at least 1", tuple(hidden.shape))
    arguments.check_tensor("weight", weight, dtypes=(hidden.dtype,), device=hidden.device)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        arguments.fail("weight", f"of shape [V, {hidden.shape[-1]}]", tuple(weight.shape))
    arguments.check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=hidden.device)
    if targets.shape != hidden.shape[:-1]:
        arguments.fail(
            "targets", f"of shape {tuple(hidden.shape[:-1])}, `hidden` less its last axis", tuple(targets.shape)
        )
    if bias is not None:
        arguments.check_tensor("bias", bias, shape=weight.shape[:1], dtypes=(weight.dtype,), device=hidden.device)
    arguments.check_number("logit_scale", given.logit_scale, above=0.0)
    softcap = arguments.check_softcap(given.softcap)
    number, temperatures = arguments.check_temperature(given.temperature, targets.shape, hidden.device)
    arguments.check_ignore_index(given.ignore_index, targets)
    logits_dtype = hidden.dtype if given.logits_dtype is None else given.logits_dtype
    if logits_dtype not in (hidden.dtype, torch.float32):
        arguments.fail("logits_dtype", f"{hidden.dtype} or torch.float32", logits_dtype)
    workspace_bytes = given.workspace_bytes
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else WORKSPACE_BYTES
    arguments.check_count("workspace_bytes", workspace_bytes)
    backend = arguments.check_backend(given.backend, hidden.device)
    head = HeadParameters(weight.detach(), None if bias is None else bias.detach(), logits_dtype, workspace_bytes)
    return head, RowOptions(number, temperatures, softcap, given.ignore_index, backend)


def token_rows(hidden: Tensor, targets: Tensor, head: HeadParameters, options: RowOptions) -> TokenRows:
    """Flattens; on the CPU rows that are ignored are dropped, before any product."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    if head.shards is not None:
        targets = head.shards.local_targets(targets)
    total, kept = hidden.shape[0], None
    if hidden.device.type == "cpu" and bool((targets == options.ignore_index).any()):
        kept = (targets != options.ignore_index).nonzero()[:, 0]
        hidden, targets, options = hidden[kept], targets[kept], options.of(kept)
    return TokenRows(hidden, targets.contiguous(), options, kept, total)
