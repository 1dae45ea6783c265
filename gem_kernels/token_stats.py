"""Logits -> the log-probability of each target and the entropy of each row, with both gradients."""

from __future__ import annotations

from typing import Optional

import torch
from torch import Tensor

from . import arguments
from .types import TokenStats

# Rows are cut among several programs until this many programs share each multiprocessor.
PROGRAMS_PER_SM = 2


def row_view(logits: Tensor) -> Tensor | None:
    """[..., V] -> a view [R1, R2, V] of rows that are contiguous and apart, or None where only a copy will do."""
    V = logits.shape[-1]
    if V > 1 and logits.stride(-1) != 1:
        return None
    if logits.dim() == 1:
        return logits[None, None]
    if logits.dim() == 2:
        view = logits[None]
    elif logits.dim() == 3:
        view = logits
    else:
        try:
            view = logits.view(logits.shape[0], -1, V)
        except RuntimeError:
            return None
    R1, R2, _ = view.shape
    outer, inner = view.stride(0), view.stride(1)
    within = R2 <= 1 or inner >= V
    apart = R1 <= 1 or outer >= (R2 - 1) * inner + V
    transposed = outer >= V and inner >= (R1 - 1) * outer + V
    return view if (within and apart) or transposed else None


def _gradient_like(logits: Tensor) -> Tensor:
    """Empty, with the strides of `logits` where that wastes no memory (loads and stores then align alike)."""
    view = row_view(logits)
    extent = 1 + sum((n - 1) * s for n, s in zip(logits.shape, logits.stride()))
    if view is not None and extent <= logits.numel() * 1.25:
        return torch.empty_strided(logits.shape, logits.stride(), dtype=logits.dtype, device=logits.device)
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _split_count(n_rows: int, V: int, block: int, device: torch.device) -> int:
    """Programs per row: 1 when the rows alone fill the device, else enough to fill it, each with a block at least."""
    if device.type != "cuda":
        return 1
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count
    if n_rows >= programs:
        return 1
    return max(1, min(64, -(-programs // n_rows), V // block))


def _span(V: int, block: int, splits: int) -> int:
    """Columns per split, a multiple of `block`; the splits together cover V."""
    return max(1, -(-V // (block * splits))) * block


def _triton_options(rows: Tensor, softcap: float | None, temperatures: Tensor | None) -> dict:
    nvidia = rows.device.type == "cuda" and torch.version.hip is None
    return {"TEMPERATURE_TENSOR": temperatures is not None, "SOFTCAP": softcap is not None, "PTX": nvidia}


def _forward_triton(rows, targets, temperature, temperatures, softcap, ignore_index, splits=None):
    from .backends.triton import row_stats

    R1, R2, V = rows.shape
    N = R1 * R2
    logprobs, entropy, row_max, log_sum = torch.empty(4, N, dtype=torch.float32, device=rows.device).unbind()
    if N == 0:
        return logprobs, entropy, row_max, log_sum
    launch = row_stats.launch_options(V, rows.element_size())
    splits = splits or _split_count(N, V, launch.block, rows.device)
    options = _triton_options(rows, softcap, temperatures)
    partial = torch.empty(N, splits, 3, dtype=torch.float32, device=rows.device) if splits > 1 else logprobs
    args = (rows, targets, temperature, temperatures, softcap or 1.0, logprobs, entropy, row_max, log_sum, partial)
    shape = (V, R2, rows.stride(0), rows.stride(1))
    with torch.cuda.device_of(rows):
        row_stats.row_stats_forward[(N, splits)](
            *args,
            *shape,
            _span(V, launch.block, splits),
            splits,
            ignore_index,
            **options,
            SPLIT=splits > 1,
            BLOCK=launch.block,
            LANES=launch.lanes,
            ALIGN=launch.align,
            num_warps=launch.num_warps,
        )
        if splits > 1:
            del options["PTX"]
            row_stats.row_stats_combine[(N,)](
                *args, *shape, splits, ignore_index, **options, MAX_SPLITS=row_stats.MAX_SPLITS, num_warps=1
            )
    return logprobs, entropy, row_max, log_sum


def _backward_triton(grad, rows, targets, temperature, temperatures, softcap, ignore_index, stats, splits=None):
    """stats: row_max, log_sum, entropy, grad_logprobs, grad_entropy, each [N] float32. Writes `grad`."""
    from .backends.triton import row_stats

    R1, R2, V = rows.shape
    N = R1 * R2
    if N == 0:
        return
    row_max, log_sum, entropy, grad_logprobs, grad_entropy = stats
    launch = row_stats.launch_options(V, rows.element_size())
    splits = splits or _split_count(N, V, launch.block, rows.device)
    with torch.cuda.device_of(rows):
        row_stats.row_stats_backward[(N, splits)](
            grad,
            rows,
            targets,
            temperature,
            temperatures,
            softcap or 1.0,
            grad_logprobs,
            grad_entropy,
            entropy,
            row_max,
            log_sum,
            V,
            R2,
            rows.stride(0),
            rows.stride(1),
            grad.stride(0),
            grad.stride(1),
            _span(V, launch.block, splits),
            ignore_index,
            **_triton_options(rows, softcap, temperatures),
            SAME_LAYOUT=grad.stride() == rows.stride(),
            BLOCK=launch.block,
            ALIGN=launch.align,
            num_warps=launch.num_warps,
        )


def rows_forward(rows, targets, temperature, temperatures, softcap, ignore_index, backend):
    """[R1, R2, V] (see row_view), targets [N] int64 -> logprobs, entropy, row_max, log_sum [N]. Nothing is checked."""
    if backend == "triton":
        return _forward_triton(rows, targets, temperature, temperatures, softcap, ignore_index)
    from .backends.cpu import row_stats as cpu

    tau = temperature if temperatures is None else temperatures
    return cpu.row_stats_forward(rows, targets, tau, softcap, ignore_index, compiled=backend == "cpu")


def rows_backward(grad, rows, targets, temperature, temperatures, softcap, ignore_index, stats, backend):
    """Writes dL/drows into `grad` [R1, R2, V], which may be `rows`.

    stats: row_max, log_sum, entropy, dL/dlogprobs, dL/dentropy, each [N] float32 and contiguous.
    """
    if backend == "triton":
        _backward_triton(grad, rows, targets, temperature, temperatures, softcap, ignore_index, stats)
        return
    from .backends.cpu import row_stats as cpu

    tau = temperature if temperatures is None else temperatures
    cpu.row_stats_backward(grad, rows, targets, tau, softcap, ignore_index, *stats, compiled=backend == "cpu")


def check_values(targets: Tensor, temperatures: Tensor | None, ignore_index: int, V: int) -> None:
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bool(outside.any()):
        value = int(targets[outside][0])
        arguments.fail("targets", f"in [0, {V}) or ignore_index ({ignore_index})", f"{value}")
    if temperatures is not None and not bool((torch.isfinite(temperatures) & (temperatures > 0)).all()):
        arguments.fail("temperature", "finite and above 0 everywhere", f"a minimum of {float(temperatures.min())}")


# The operators. Optional[...] is spelled out because torch.library infers their schema from the annotations.


@torch.library.custom_op("gem_kernels::row_stats", mutates_args=())
def row_stats_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Optional[Tensor],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    ignore_index: int,
    inplace_backward: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[..., V], [...] -> logprobs, entropy, row_max, log_sum, each [...] float32."""
    check_values(targets, temperatures, ignore_index, logits.shape[-1])
    rows = row_view(logits)
    if rows is None:
        rows = row_view(logits.contiguous())
    flat = targets.reshape(-1).to(torch.int64).contiguous()
    out = rows_forward(rows, flat, temperature, temperatures, softcap, ignore_index, backend)
    # Four results of their own: an operator may not return views of one buffer.
    return tuple(x.reshape(targets.shape).clone() for x in out)


@row_stats_op.register_fake
def _(logits, targets, temperature, temperatures, softcap, ignore_index, inplace_backward, backend):
    return tuple(torch.empty(targets.shape, dtype=torch.float32, device=logits.device) for _ in range(4))


def _backward_into(
    grad, logits, targets, temperature, temperatures, softcap, ignore_index, row_max, log_sum, entropy, a, b, backend
):
    rows = row_view(logits)
    if rows is None:
        rows = row_view(logits.contiguous())
    flat = targets.reshape(-1).to(torch.int64).contiguous()
    stats = [x.reshape(-1).contiguous() for x in (row_max, log_sum, entropy, a, b)]
    rows_backward(row_view(grad), rows, flat, temperature, temperatures, softcap, ignore_index, stats, backend)


@torch.library.custom_op("gem_kernels::row_stats_backward", mutates_args=())
def row_stats_backward_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Optional[Tensor],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    ignore_index: int,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    backend: str,
) -> Tensor:
    """dL/dlogits [..., V] in the dtype of `logits`."""
    grad = _gradient_like(logits)
    _backward_into(
        grad,
        logits,
        targets,
        temperature,
        temperatures,
        softcap,
        ignore_index,
        row_max,
        log_sum,
        entropy,
        grad_logprobs,
        grad_entropy,
        backend,
    )
    return grad


@row_stats_backward_op.register_fake
def _(logits, *args):
    return _gradient_like(logits)


@torch.library.custom_op("gem_kernels::row_stats_backward_", mutates_args={"logits"})
def row_stats_backward_inplace_op(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    temperatures: Optional[Tensor],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    ignore_index: int,
    row_max: Tensor,
    log_sum: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    backend: str,
) -> None:
    """Writes dL/dlogits over `logits`."""
    _backward_into(
        logits,
        logits,
        targets,
        temperature,
        temperatures,
        softcap,
        ignore_index,
        row_max,
        log_sum,
        entropy,
        grad_logprobs,
        grad_entropy,
        backend,
    )


def _setup_context(ctx, inputs, output):
    logits, targets, temperature, temperatures, softcap, ignore_index, inplace_backward, backend = inputs
    _, entropy, row_max, log_sum = output
    ctx.save_for_backward(logits, targets, temperatures, row_max, log_sum, entropy)
    ctx.options = (temperature, softcap, ignore_index, inplace_backward, backend)
    ctx.mark_non_differentiable(row_max, log_sum)


def _backward(ctx, grad_logprobs, grad_entropy, _max, _sum):
    logits, targets, temperatures, row_max, log_sum, entropy = ctx.saved_tensors
    temperature, softcap, ignore_index, inplace_backward, backend = ctx.options
    zeros = torch.zeros_like(entropy)
    a = zeros if grad_logprobs is None else grad_logprobs
    b = zeros if grad_entropy is None else grad_entropy
    args = (targets, temperature, temperatures, softcap, ignore_index, row_max, log_sum, entropy, a, b, backend)
    if inplace_backward and not torch.compiler.is_compiling():
        with torch.no_grad():
            row_stats_backward_inplace_op(logits, *args)
        # An alias, not the tensor itself: autograd must not take the logits' own history for the gradient's.
        grad = logits.detach()
    else:
        grad = row_stats_backward_op(logits, *args)
    return grad, None, None, None, None, None, None, None


row_stats_op.register_autograd(_backward, setup_context=_setup_context)


def token_stats(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    backend: str = "auto",
) -> TokenStats:
    """Log-probability of each target and entropy of each row, from one read of the logits.

    With z = softcap * tanh(logits / softcap) / temperature:

        logprobs = z_y - log sum_v e^(z_v)        entropy = -sum_v p_v log p_v,  p = softmax(z)        (nats)
        dL/dz_v = a (1[v = y] - p_v) - b p_v (log p_v + entropy),     a = dL/dlogprobs, b = dL/dentropy

    Nothing of the size of the logits is allocated forward (a copy is made only of logits whose last axis is strided,
    or whose leading axes cannot be walked with two strides). The entropy is computed from shifted logits and keeps its
    digits on confident rows. A logit of -inf is a probability of 0. A row holding NaN or +inf, or only -inf, is NaN.

    Args:
        logits: [..., V], float32, bfloat16 or float16, any strides. Row t predicts `targets[t]`: for a causal model
            that is `model(ids).logits[:, :-1]` with `ids[:, 1:]`.
        targets: [...], int64 or int32, in [0, V) or `ignore_index`.
        temperature: a positive float, or a tensor that broadcasts to `targets` (one per token or sequence).
        softcap: c of z <- c tanh(z / c) (Gemma 2), or None. Applied before the temperature; infinities pass.
        ignore_index: rows with this target are never read; their results and gradients are 0.
        inplace_backward: backward writes the gradient over `logits` and returns that memory: 0 bytes extra. A second
            backward, or another user of `logits`, then gets autograd's error on modified tensors. Under torch.compile
            a new tensor is written.
        backend: "auto" (Triton on a GPU; compiled C++ on a CPU, plain torch where no compiler is found), "triton"
            (or an error), "torch" (plain torch).

    Returns:
        TokenStats(logprobs, entropy), shaped like `targets`, float32. Gradients flow through both to `logits`.

    Raises:
        ValueError: an argument is not as above. A target outside [0, V) raises on the CPU; on a GPU its row is NaN.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
        >>> token_stats(logits, torch.tensor([2])).entropy.exp()
        tensor([4.0000])

    Source: the token entropies of GEM (arXiv 2511.13007), Eq. 1; derivations in docs/math.md.
    """
    arguments.check_logits(logits, targets)
    temperature, temperatures = arguments.check_temperature(temperature, targets.shape, logits.device)
    softcap = arguments.check_softcap(softcap)
    arguments.check_ignore_index(ignore_index)
    arguments.check_flag("inplace_backward", inplace_backward)
    if inplace_backward and row_view(logits) is None:
        arguments.fail("inplace_backward", "False for logits whose rows are strided or overlap", "True")
    backend = arguments.check_backend(backend, logits.device)
    logprobs, entropy, _, _ = row_stats_op(
        logits, targets, temperature, temperatures, softcap, ignore_index, inplace_backward, backend
    )
    return TokenStats(logprobs, entropy)
