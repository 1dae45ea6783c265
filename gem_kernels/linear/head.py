"""The arguments of a linear head, checked: `Head`, and the rows that go through it, `TokenRows`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import arguments
from ..backends.rows import check_values
from . import vocab_parallel
from .active_vocab import check_threshold

WORKSPACE_BYTES = 128 * 2**20
# A CPU's products lose nothing at 300 rows a chunk, and the workspace counts beside a small model's own memory.
WORKSPACE_BYTES_CPU = 64 * 2**20


@dataclass(frozen=True)
class Head:
    """logits = softcap(logit_scale * (hidden @ weight.T + bias)), and how to go about it. Checked by `check_head`.

    The scale costs nothing: the row kernels see hidden @ weight.T + bias, with softcap / scale and temperature / scale.
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    softcap: float | None
    """of the unscaled product"""
    logits_dtype: torch.dtype
    ignore_index: int
    backend: str
    workspace_bytes: int
    shards: vocab_parallel.Shards | None = None
    """Where `weight` is one shard of several. Then `ignore_index` is that of local targets."""
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


@dataclass(frozen=True)
class TokenRows:
    """The rows of a call, flat: hidden [N, D], targets [N] int64, one temperature or one for each row."""

    hidden: Tensor
    targets: Tensor
    temperature: float
    temperatures: Tensor | None
    kept: Tensor | None
    """Indices of the rows that count among `total`, or None for all. Only on the CPU: a count would wait for a GPU."""
    total: int
    ignore_index: int

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def chunk(self, begin: int, end: int) -> tuple[Tensor, Tensor, float, Tensor | None]:
        temperatures = None if self.temperatures is None else self.temperatures[begin:end]
        hidden, targets = self.hidden[begin:end], self.targets[begin:end]
        if hidden.is_cuda:
            # Ignored rows are still here; whatever they hold must not reach dWeight as 0 * NaN.
            hidden = hidden.masked_fill((targets == self.ignore_index)[:, None], 0.0)
        return hidden, targets, self.temperature, temperatures

    def spread(self, values: Tensor) -> Tensor:
        """[len(self), ...] -> [total, ...], zeros where a row was dropped."""
        if self.kept is None:
            return values
        return values.new_zeros(self.total, *values.shape[1:]).index_copy_(0, self.kept, values)

    def gather(self, values: Tensor) -> Tensor:
        """[total] -> [len(self)]."""
        return values.contiguous() if self.kept is None else values[self.kept]


def check_head(
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
    backend, process_group=None, vocab_starts=None, active_vocab=None,
) -> tuple[Head, float, Tensor | None]:  # fmt: skip
    """-> the head, and the temperature of the unscaled product: a number, or one for each row."""
    sharded = vocab_parallel.check_group(process_group, vocab_starts) > 1
    try:
        head, number, rows = _check_own(
            hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype,
            workspace_bytes, backend,
        )  # fmt: skip
    except ValueError:
        if sharded:
            vocab_parallel.meet(process_group, vocab_starts, None, targets, ignore_index)
        raise
    V = weight.shape[0]
    if sharded:
        needs_hidden = hidden.requires_grad and torch.is_grad_enabled()
        dtypes = (arguments.LOGIT_DTYPES.index(x) for x in (hidden.dtype, head.logits_dtype))
        facts = (V, targets.numel(), hidden.shape[-1], needs_hidden, *dtypes, head.workspace_bytes, ignore_index)
        shards = vocab_parallel.meet(process_group, vocab_starts, facts, targets, ignore_index)
        head, V = replace(head, shards=shards, ignore_index=vocab_parallel.IGNORED), shards.starts[-1]
    elif vocab_starts is not None and vocab_starts[1] != V:
        arguments.fail("vocab_starts", f"(0, {V}), as `weight` has it", vocab_starts)
    check_values(targets, rows, ignore_index, V)
    head = replace(head, active_vocab=check_threshold(active_vocab, sharded))
    return head, number / logit_scale, None if rows is None else rows / logit_scale


def _check_own(
    hidden, weight, targets, bias, temperature, softcap, logit_scale, ignore_index, logits_dtype, workspace_bytes,
    backend,
) -> tuple[Head, float, Tensor | None]:  # fmt: skip
    """`check_head` of what this rank holds, but for the values inside tensors; the temperature as it was given."""
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
    arguments.check_number("logit_scale", logit_scale, above=0.0)
    softcap = arguments.check_softcap(softcap)
    number, rows = arguments.check_temperature(temperature, targets.shape, hidden.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        arguments.fail("ignore_index", "an integer", repr(ignore_index))
    if logits_dtype is None:
        logits_dtype = hidden.dtype
    if logits_dtype not in (hidden.dtype, torch.float32):
        arguments.fail("logits_dtype", f"{hidden.dtype} or torch.float32", logits_dtype)
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES_CPU if hidden.device.type == "cpu" else WORKSPACE_BYTES
    arguments.check_count("workspace_bytes", workspace_bytes)
    head = Head(
        weight.detach(),
        None if bias is None else bias.detach(),
        None if softcap is None else softcap / logit_scale,
        logits_dtype,
        ignore_index,
        arguments.check_backend(backend, hidden.device),
        workspace_bytes,
    )
    return head, number, rows


def token_rows(
    hidden: Tensor, targets: Tensor, temperature: float, temperatures: Tensor | None, head: Head
) -> TokenRows:
    """Flattens; on the CPU rows that are ignored are dropped, before any product."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    if head.shards is not None:
        targets = head.shards.local_targets(targets)
    total, kept = hidden.shape[0], None
    if hidden.device.type == "cpu" and bool((targets == head.ignore_index).any()):
        kept = (targets != head.ignore_index).nonzero()[:, 0]
        hidden, targets = hidden[kept], targets[kept]
        temperatures = None if temperatures is None else temperatures[kept]
    return TokenRows(hidden, targets.contiguous(), temperature, temperatures, kept, total, head.ignore_index)
