"""The arguments of a linear head, checked: `HeadParameters`, and the rows that go through it, `TokenRows`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import arguments, vocab_parallel
from ..backends.rows import check_values
from ..backends.types import RowOptions
from .active_vocab import check_threshold

WORKSPACE_BYTES = 2**30
# Of a GPU's chunk by default: its products are cut into tiles of so many rows at most.
TILE_ROWS = 256
# Elements between the rows of a workspace are a multiple of it: the libraries' fast kernels want rows at 16 bytes.
ALIGNED = 8
# A CPU's products lose nothing at 300 rows a chunk, and the workspace counts beside a small model's own memory.
WORKSPACE_BYTES_CPU = 64 * 2**20
# Device types on which autocast is asked for.
AUTOCAST = ("cpu", "cuda")


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
    rows: Any = None
    compute_dtype: Any = None
    """As `products_dtype` found it."""


def products_dtype(hidden: Any, compute_dtype: Any) -> Any:
    """`compute_dtype`; where that is None, autocast's dtype if autocast is on for the device of `hidden`, else None."""
    if compute_dtype is not None or not isinstance(hidden, Tensor) or hidden.device.type not in AUTOCAST:
        return compute_dtype
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@dataclass(frozen=True)
class HeadParameters:
    """logits = hidden @ weight.T + bias, and how to go about it. Made by `check_head`.

    A scale of the logits costs nothing: the row kernels see the unscaled product, with softcap / scale and
    temperature / scale in their RowOptions.
    """

    weight: Tensor
    """[V, D]"""
    bias: Tensor | None
    compute_dtype: torch.dtype
    """Of the operands of the products. hidden, weight and bias, and their gradients, may have others."""
    logits_dtype: torch.dtype
    workspace_bytes: int
    shards: vocab_parallel.Shards | None = None
    """Where `weight` is one shard of several. Then targets and `ignore_index` of the rows are local."""
    active_vocab: float | None = None
    """Of the backward products: see active_vocab.py."""
    tile_rows: int = 1
    """A chunk's rows are a multiple of it, where that many fit."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """Of dL/dlogits, an operand of the backward products: a GPU multiplies 16-bit numbers, a CPU what it has."""
        return self.compute_dtype if arguments.on_gpu(self.weight) else self.logits_dtype

    @property
    def rows_per_chunk(self) -> int:
        V = self.weight.shape[0] if self.shards is None else self.shards.largest
        bytes_per_logit = self.logits_dtype.itemsize
        if self.gradient_dtype != self.logits_dtype:
            bytes_per_logit += self.gradient_dtype.itemsize
        n = self.workspace_bytes // (row_stride(V) * bytes_per_logit)
        return max(1, n - n % self.tile_rows if n >= self.tile_rows else n)

    def workspace(self, n_rows: int, dtype: torch.dtype) -> Tensor:
        """Empty, [n_rows, V]; `row_stride(V)` elements from row to row."""
        V = self.weight.shape[0]
        return torch.empty(n_rows, row_stride(V), dtype=dtype, device=self.weight.device)[:, :V]


class HostLayout(NamedTuple):
    """The layout of a call, on the device, and what of it the host knows without a wait."""

    mask: Any
    cu_seqlens: Any
    rows: Tensor | None
    """Indices of the rows that count."""
    offsets: list[int] | None
    """`cu_seqlens`."""


def host_layout(targets: Tensor, mask: Any, cu_seqlens: Any) -> HostLayout:
    """A mask or offsets that are on the CPU while `targets` is on a GPU are copied there."""
    rows = offsets = None
    if torch.compiler.is_compiling():  # a look at values would break the graph
        moved = (x.to(targets.device) if isinstance(x, Tensor) else x for x in (mask, cu_seqlens))
        return HostLayout(next(moved), next(moved), None, None)
    gpu = arguments.on_gpu(targets)
    if isinstance(mask, Tensor) and gpu and mask.device.type == "cpu":
        arguments.check_tensor("completion_mask", mask, shape=targets.shape, dtypes=(torch.bool,))
        rows, mask = mask.reshape(-1).nonzero()[:, 0], arguments.to_device(mask, targets.device)
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type == "cpu" and cu_seqlens.dim() == 1:
        offsets = cu_seqlens.tolist()
        if gpu:
            if not offsets or offsets[0] != 0 or offsets[-1] != targets.shape[0] or offsets != sorted(offsets):
                arguments.fail(
                    "cu_seqlens", f"non-decreasing from 0 to N = {targets.shape[0]}", arguments.shown(offsets)
                )
            cu_seqlens = arguments.to_device(cu_seqlens, targets.device)
    return HostLayout(mask, cu_seqlens, rows, offsets)


def row_stride(V: int) -> int:
    return V + -V % ALIGNED


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
    """Indices of the rows that count among `total`, on the device; None for all. On a GPU only where the caller knows
    them: a count would wait for the device."""
    kept_on_host: Tensor | None
    """The same, where group bounds are looked up in them."""
    total: int
    dtype: torch.dtype
    """Of a chunk's hidden states: `compute_dtype`."""

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def chunk(self, begin: int, end: int) -> Chunk:
        hidden, targets = self.hidden[begin:end].to(self.dtype), self.targets[begin:end]
        if arguments.on_gpu(hidden):
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
        dtypes = (arguments.LOGIT_DTYPES.index(x) for x in (hidden.dtype, head.compute_dtype, head.logits_dtype))
        needs_head = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in (given.weight, given.bias)
        )
        workspace = 0 if given.workspace_bytes is None else head.workspace_bytes
        sizes = (V, targets.numel(), hidden.shape[-1])
        facts = (*sizes, needs_hidden, needs_head, *dtypes, workspace, given.ignore_index, parallel.reduce_hidden_grad)
        shards = vocab_parallel.meet(parallel, facts, targets, given.ignore_index)
        assert shards is not None
        head, V = replace(head, shards=shards), shards.starts[-1]
        scaled = replace(scaled, ignore_index=vocab_parallel.IGNORED)
    else:
        vocab_parallel.check_whole(parallel, V, "weight")
    check_values(counted_rows(targets, given.rows, given.ignore_index), options, V)
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
    compute_dtype = hidden.dtype if given.compute_dtype is None else given.compute_dtype
    if compute_dtype not in arguments.LOGIT_DTYPES:
        arguments.fail("compute_dtype", f"None or {' or '.join(map(str, arguments.LOGIT_DTYPES))}", compute_dtype)
    for name, x in (("weight", weight), ("bias", weight if bias is None else bias)):
        arguments.check_tensor(name, x, dtypes=arguments.LOGIT_DTYPES, device=hidden.device)
        if given.compute_dtype is None and x.dtype != hidden.dtype:
            arguments.fail(name, f"of the dtype of `hidden`, {hidden.dtype}, where no compute_dtype is given", x.dtype)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 1:
        arguments.fail("weight", f"of shape [V, {hidden.shape[-1]}]", tuple(weight.shape))
    arguments.check_tensor("targets", targets, dtypes=(torch.int64, torch.int32), device=hidden.device)
    if targets.shape != hidden.shape[:-1]:
        arguments.fail(
            "targets", f"of shape {tuple(hidden.shape[:-1])}, `hidden` less its last axis", tuple(targets.shape)
        )
    if bias is not None:
        arguments.check_tensor("bias", bias, shape=weight.shape[:1])
    arguments.check_number("logit_scale", given.logit_scale, above=0.0)
    softcap = arguments.check_softcap(given.softcap)
    number, temperatures = arguments.check_temperature(given.temperature, targets.shape, hidden.device)
    arguments.check_ignore_index(given.ignore_index, targets)
    logits_dtype = compute_dtype if given.logits_dtype is None else given.logits_dtype
    if logits_dtype not in (compute_dtype, torch.float32):
        arguments.fail("logits_dtype", f"{compute_dtype} or torch.float32", logits_dtype)
    workspace_bytes, tile_rows = given.workspace_bytes, 1
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES_CPU
        if arguments.on_gpu(hidden):
            workspace_bytes, tile_rows = WORKSPACE_BYTES, TILE_ROWS
    arguments.check_count("workspace_bytes", workspace_bytes)
    _check_rows(given.rows, targets.numel())
    backend = arguments.check_backend(given.backend, hidden.device)
    bias = None if bias is None else bias.detach()
    head = HeadParameters(weight.detach(), bias, compute_dtype, logits_dtype, workspace_bytes, tile_rows=tile_rows)
    return head, RowOptions(number, temperatures, softcap, given.ignore_index, backend)


def _check_rows(rows: Any, total: int) -> None:
    if rows is None:
        return
    arguments.check_tensor("rows", rows, dtypes=(torch.int64,))
    if rows.dim() != 1 or rows.device.type != "cpu":
        arguments.fail("rows", "of shape [n], on the CPU", f"{tuple(rows.shape)} on {rows.device}")
    fine = len(rows) == 0 or (int(rows[0]) >= 0 and int(rows[-1]) < total and bool((rows[1:] > rows[:-1]).all()))
    if not fine:
        arguments.fail("rows", f"increasing, from 0 to below the number of targets, {total}", arguments.shown(rows))


def counted_rows(targets: Tensor, rows: Tensor | None, ignore_index: int) -> Tensor:
    """On the CPU `targets`, those that `rows` leaves out replaced by `ignore_index`. On a GPU nothing reads them."""
    if rows is None or targets.device.type != "cpu":
        return targets
    flat = targets.reshape(-1)
    return torch.full_like(flat, ignore_index).index_copy_(0, rows, flat[rows]).view(targets.shape)


def token_rows(
    hidden: Tensor, targets: Tensor, head: HeadParameters, options: RowOptions, known: Tensor | None = None
) -> TokenRows:
    """Flattens, and drops rows that do not count before any product: on the CPU those that are ignored; on a GPU those
    that are not among `known`, indices on the host."""
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1).to(torch.int64)
    if head.shards is not None:
        targets = head.shards.local_targets(targets)
    total, kept = hidden.shape[0], known
    if hidden.device.type == "cpu":
        targets = counted_rows(targets, known, options.ignore_index)
        counted = targets != options.ignore_index
        kept = known = None if bool(counted.all()) else counted.nonzero()[:, 0]
    elif known is not None:
        kept = None if len(known) == total else arguments.to_device(known, hidden.device)
    if kept is not None:
        hidden, targets, options = hidden[kept], targets[kept], options.of(kept)
    return TokenRows(hidden, targets.contiguous(), options, kept, known, total, head.compute_dtype)
