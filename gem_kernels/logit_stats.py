"""Logits -> the log-probability of each target and the entropy of each row, with both gradients."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active as in_torch_func
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import arguments
from .backends.rows import check_values, row_view, rows_backward, rows_forward
from .backends.types import RowGradients, RowOptions, RowStats
from .types import TokenStats, VocabParallel
from .vocab_parallel import IGNORED, LOGITS_FACTS, MERGED_BYTES, Shards, check_group, check_whole, meet


def _gradient_like(logits: Tensor) -> Tensor:
    """Empty. Row by row it is off a 16-byte boundary by as much as `logits`, so that stores are as wide as loads.

    Its rows are contiguous but for the few elements between them that this takes.
    """
    view = row_view(logits)
    align = 16 // logits.element_size()
    base = logits.storage_offset() % align
    if view is None or (logits.is_contiguous() and base == 0):
        return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    R1, R2, V = view.shape
    inner = V + (view.stride(1) - V) % align
    outer = R2 * inner + (view.stride(0) - R2 * inner) % align
    memory = torch.empty(base + R1 * outer, dtype=logits.dtype, device=logits.device)
    return memory.as_strided((R1, R2, V), (outer, inner, 1), base).view(logits.shape)


# The operators, whose arguments are flat. Optional[...] is spelled out where torch.library infers the schema from it.


def _flat_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-> rows [R1, R2, V], a copy only where no view will do, and targets [N] int64."""
    rows = row_view(logits)
    if rows is None:
        rows = row_view(logits.contiguous())  # shaped like the view of a gradient, which is walked beside it
        assert rows is not None
    return rows, targets.reshape(-1).to(torch.int64).contiguous()


def _four_vectors(logits: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(4))


def _row_stats(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Optional[Tensor],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[..., V], [...] -> logprobs, entropy, row_max, log_sum, each [...] float32."""
    options = RowOptions(temperature, temperatures, softcap, ignore_index, backend)
    check_values(targets, options, logits.shape[-1])
    # Four tensors of their own: an operator may not return views of one buffer.
    logprobs, entropy, row_max, log_sum = _four_vectors(logits, targets)
    out = RowStats(*(x.view(-1) for x in (logprobs, entropy, row_max, log_sum)))
    rows_forward(*_flat_rows(logits, targets), options, out)
    return logprobs, entropy, row_max, log_sum


row_stats_op = torch.library.custom_op("gem_kernels::row_stats", _row_stats, mutates_args=())
row_stats_op.register_fake(_four_vectors)


# The two backward operators take the same: a RowOptions and a RowGradients.
AFTER_LOGITS = (
    "Tensor targets, float temperature, Tensor? temperatures, float? softcap, SymInt ignore_index, "
    "Tensor row_max, Tensor log_sum, Tensor entropy, Tensor grad_logprobs, Tensor grad_entropy, str backend"
)


def _write_gradient(grad: Tensor, logits: Tensor, targets: Tensor, *flat: Any) -> None:
    """dL/dlogits to `grad`, which may be `logits`."""
    temperature, temperatures, softcap, ignore_index, row_max, log_sum, entropy, a, b, backend = flat
    options = RowOptions(temperature, temperatures, softcap, ignore_index, backend)
    into = row_view(grad)
    assert into is not None
    vectors = RowGradients(*(x.reshape(-1).contiguous() for x in (entropy, row_max, log_sum, a, b)))
    rows_backward(into, *_flat_rows(logits, targets), options, vectors)


def _row_stats_backward(logits, *after):
    """dL/dlogits [..., V] in the dtype of `logits`."""
    grad = _gradient_like(logits)
    _write_gradient(grad, logits, *after)
    return grad


row_stats_backward_op = torch.library.custom_op(
    "gem_kernels::row_stats_backward",
    _row_stats_backward,
    mutates_args=(),
    schema=f"(Tensor logits, {AFTER_LOGITS}) -> Tensor",
)


@row_stats_backward_op.register_fake
def _(logits, *after):
    return _gradient_like(logits)


@torch.library.custom_op(
    "gem_kernels::row_stats_backward_", mutates_args={"logits"}, schema=f"(Tensor(a!) logits, {AFTER_LOGITS}) -> ()"
)
def row_stats_backward_inplace_op(logits, *after):
    """Writes dL/dlogits over `logits`."""
    _write_gradient(logits, logits, *after)


# Autograd: the same two functions for the operator, as torch.compile traces it, and for a call without it. The latter
# serves torch.func too, and refuses aloud what it cannot do: forward mode (it has no `jvp`) and second derivatives.

NO_SECOND = "token_stats has no second derivative: its gradient is a constant of the graph (leave out create_graph)"


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, temperatures, softcap, ignore_index, backend = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, targets, temperatures, row_max, log_sum, entropy)
    ctx.numbers = (temperature, softcap, ignore_index, backend)
    ctx.mark_non_differentiable(row_max, log_sum)


def _after_logits(ctx, grad_logprobs, grad_entropy):
    """What a backward operator takes after the logits."""
    _, targets, temperatures, *stats = ctx.saved_tensors
    temperature, softcap, ignore_index, backend = ctx.numbers
    a, b = (torch.zeros_like(stats[2]) if g is None else g for g in (grad_logprobs, grad_entropy))
    return (targets, temperature, temperatures, softcap, ignore_index, *stats, a, b, backend)


class _RowStatsGradient(torch.autograd.Function):
    """Only where a graph of the gradient is wanted: by create_graph, or by torch.func, which always asks for one."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return row_stats_backward_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError(NO_SECOND)


def _unwatched(logits: Tensor) -> bool:
    """Whether nothing would look at the call of an operator: then its body is called, a third faster with few rows."""
    return type(logits) in (Tensor, torch.nn.Parameter) and not is_in_torch_dispatch_mode() and not in_torch_func()


def _backward(ctx, grad_logprobs, grad_entropy, _max, _sum):
    logits = ctx.saved_tensors[0]
    make: Any = row_stats_backward_op
    if not torch.compiler.is_compiling():
        if torch.is_grad_enabled():
            make = _RowStatsGradient.apply
        elif _unwatched(logits):
            make = _row_stats_backward
    grad = make(logits, *_after_logits(ctx, grad_logprobs, grad_entropy))
    return grad, None, None, None, None, None, None


row_stats_op.register_autograd(_backward, setup_context=_setup_context)


def _sharded_row_stats(
    logits: Tensor, shards: Shards, targets: Tensor, temperature: float, temperatures: Any, softcap: Any, *rest: Any
) -> tuple[Tensor, ...]:
    """As `_row_stats`, of the whole vocabulary: `logits` are this rank's, `targets` local. One all_gather, or a few."""
    options = RowOptions(temperature, temperatures, softcap, *rest)
    stats = torch.empty(4, targets.numel(), dtype=torch.float32, device=logits.device)
    rows, flat = _flat_rows(logits, targets)
    rows_forward(rows, flat, options, RowStats(*stats.unbind()))
    shards.merge_all(stats, flat, options, MERGED_BYTES, 1)
    return tuple(x.reshape(targets.shape).clone() for x in stats)


class _ShardedRowStats(torch.autograd.Function):
    """Backward is this rank's alone: the gradient of its words needs the statistics of the whole row, which it has."""

    @staticmethod
    def forward(ctx, logits, shards, *after):
        out = _sharded_row_stats(logits, shards, *after)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, (logits, *after), out)
        return out

    @staticmethod
    def backward(ctx, *upstream):
        grad, *others = _backward(ctx, *upstream)
        return grad, None, *others


class _RowStats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, *after):
        out = (_row_stats if _unwatched(logits) else row_stats_op)(logits, *after)
        ctx.set_materialize_grads(False)
        _setup_context(ctx, (logits, *after), out)
        return out

    backward = staticmethod(_backward)


class _RowStatsInTorchFunc(torch.autograd.Function):
    """The same in the form that torch.func asks for, and which takes longer to call."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs):
        return row_stats_op(*inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        _setup_context(ctx, inputs, output)

    backward = staticmethod(_backward)


class _RowStatsInPlace(torch.autograd.Function):
    """Of the slice of `memory`; backward writes over it, zeros the rest of `memory`, and returns that."""

    @staticmethod
    def forward(ctx, memory, where, shards, *after):
        logits = memory[where] if where else memory
        if shards is not None:
            out = _sharded_row_stats(logits, shards, *after)
        else:
            out = (_row_stats if _unwatched(memory) else row_stats_op)(logits, *after)
        ctx.set_materialize_grads(False)
        ctx.where = where
        _setup_context(ctx, (memory, *after), out)
        return out

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy, _max, _sum):
        if torch.is_grad_enabled():
            raise RuntimeError(f"{NO_SECOND}, and inplace_backward can make no graph of it")
        memory = ctx.saved_tensors[0]
        logits = memory[ctx.where] if ctx.where else memory
        row_stats_backward_inplace_op(logits, *_after_logits(ctx, grad_logprobs, grad_entropy))
        for axis, part in enumerate(ctx.where):
            for start, stop in ((0, part.start), (part.stop, memory.shape[axis])):
                if start < stop:
                    memory.narrow(axis, start, stop - start).zero_()
        # An alias, not the tensor itself: autograd must not take the logits' own history for the gradient's.
        return memory.detach(), *[None] * 8


def _sliced_from(logits: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What `logits` is a slice of (`model(ids).logits[:, :-1]`), and where it lies in it; else itself, and nothing.

    The gradient of a slice is a copy, among zeros, of the size of the whole tensor. Given straight to that tensor, it
    can be written where its rows are. Hooks on `logits` want to see it, so then it goes the usual way.
    """
    memory, node = logits._base, logits.grad_fn
    if memory is None or node is None or logits._backward_hooks or logits.retains_grad:
        return logits, ()
    source = memory.grad_fn
    while node is not None and node is not source and node.name() == "SliceBackward0":
        node = node.next_functions[0][0]
    reached = node is source if source is not None else getattr(node, "variable", None) is memory
    if not reached or memory.stride() != logits.stride() or not memory.is_contiguous():
        return logits, ()
    where, offset = [], logits.storage_offset() - memory.storage_offset()
    for n, stride in zip(logits.shape, logits.stride()):
        where.append(slice(offset // stride, offset // stride + n))
        offset %= stride
    return memory, tuple(where)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
    vocab_parallel: VocabParallel | None = None,
) -> TokenStats:
    """Log-probability of each target and entropy of each row, from one read of the logits.

    With z = softcap * tanh(logits / softcap) / temperature:

        logprobs = z_y - log sum_v e^(z_v)        entropy = -sum_v p_v log p_v,  p = softmax(z)        (nats)
        dL/dz_v = a (1[v = y] - p_v) - b p_v (log p_v + entropy),     a = dL/dlogprobs, b = dL/dentropy

    Nothing of the size of the logits is allocated forward (a copy is made only of logits whose last axis is strided,
    or whose leading axes cannot be walked with two strides). The entropy is computed from shifted logits and keeps its
    digits on confident rows. A logit of -inf, or at or below -1e30 (bfloat16's or float32's `finfo.min`, say), is a
    masked word: a probability of 0. A row holding NaN or +inf, or masked words alone, is NaN.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides. Row t predicts `targets[t]`: for a causal model
            that is `model(ids).logits[:, :-1]` with `ids[:, 1:]`.
        targets: [...], int64 or int32, in [0, V) or `ignore_index`.
        temperature: a positive float, or a tensor that broadcasts to `targets` (one per token or sequence).
        softcap: c of z <- c tanh(z / c) (Gemma 2), or None. Applied before the temperature; infinities pass.
        ignore_index: rows with this target are never read; their results and gradients are 0.
        inplace_backward: backward writes the gradient over `logits` and returns that memory: 0 bytes extra. A second
            backward, or another user of `logits`, then gets autograd's error on modified tensors. Where `logits` is a
            slice of another tensor, such as `model(ids).logits[:, :-1]`, all of that tensor is overwritten: with zeros
            outside of the slice. Of a leaf, `.grad` is the leaf's own memory. Under torch.compile a new tensor is
            written.
        backend: "auto" (Triton on a GPU; compiled C++ on a CPU, plain torch where no compiler is found), "triton"
            (or an error), "torch" (plain torch).
        vocab_parallel: a VocabParallel where the last axis of `logits` is this rank's shard of a vocabulary that
            several ranks share (tensor-parallel logits). `targets` are ids of the whole vocabulary, the same on all
            ranks. The results are those of the whole rows, on every rank; the gradient is this shard's, and backward
            needs no other rank. Under torch.compile the graph breaks.

    Returns:
        TokenStats(logprobs, entropy), shaped like `targets`, float32. Gradients flow through both to `logits`, in
        torch.func.grad too; forward mode and second derivatives raise an error.

    Raises:
        ValueError: an argument is not as above. A target outside [0, V) raises on the CPU; on a GPU its row is NaN. Of
            shards without `vocab_starts`, on all ranks if it is on one.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> token_stats(logits, torch.tensor([2])).entropy.exp()
        tensor([4.0000])

    Source: the token entropies of GEM (arXiv 2511.13007), Eq. 1; derivations in docs/math.md.
    """
    given = (logits, targets, temperature, softcap, ignore_index, inplace_backward, backend)
    return _whole(given) if vocab_parallel is None else _sharded(given, vocab_parallel)


def _whole(given: tuple) -> TokenStats:
    after, logits, inplace_backward = _checked(*given), given[0], given[5]
    if torch.compiler.is_compiling():
        logprobs, entropy, _, _ = row_stats_op(logits, *after)
    elif inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        logprobs, entropy, _, _ = _RowStatsInPlace.apply(*_sliced_from(logits), None, *after)
    else:
        logprobs, entropy, _, _ = (_RowStatsInTorchFunc if in_torch_func() else _RowStats).apply(logits, *after)
    return TokenStats(logprobs, entropy)


def _checked(
    logits: Any, targets: Any, temperature: Any, softcap: Any, ignore_index: Any, inplace_backward: Any, backend: Any
) -> tuple:
    """What a row operator takes after the logits."""
    arguments.check_logits(logits, targets)
    number, temperatures = arguments.check_temperature(temperature, targets.shape, logits.device)
    softcap = arguments.check_softcap(softcap)
    arguments.check_ignore_index(ignore_index, targets)
    arguments.check_flag("inplace_backward", inplace_backward)
    if inplace_backward and row_view(logits) is None:
        arguments.fail("inplace_backward", "False for logits whose rows are strided or overlap", "True")
    return targets, number, temperatures, softcap, ignore_index, arguments.check_backend(backend, logits.device)


@arguments.not_compiled
def _sharded(given: tuple, parallel: VocabParallel) -> TokenStats:
    logits, targets, _, _, ignore_index, inplace_backward, _ = given
    if check_group(parallel) == 1:
        stats = _whole(given)
        check_whole(parallel, logits.shape[-1], "logits")
        return stats
    try:
        _, temperature, temperatures, softcap, _, backend = _checked(*given)
    except ValueError:
        meet(parallel, None, targets, ignore_index, LOGITS_FACTS, "logits")
        raise
    facts = (logits.shape[-1], targets.numel(), ignore_index)
    shards = meet(parallel, facts, targets, ignore_index, LOGITS_FACTS, "logits")
    assert shards is not None
    check_values(targets, RowOptions(temperature, temperatures, softcap, ignore_index), shards.starts[-1])
    local = shards.local_targets(targets.to(torch.int64))
    after = (local, temperature, temperatures, softcap, IGNORED, backend)
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        logprobs, entropy, _, _ = _RowStatsInPlace.apply(*_sliced_from(logits), shards, *after)
    else:
        logprobs, entropy, _, _ = _ShardedRowStats.apply(logits, shards, *after)
    return TokenStats(logprobs, entropy)
