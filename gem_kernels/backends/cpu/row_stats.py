"""A row of logits -> log-probability and entropy, and the gradient with respect to the logits, on the CPU.

With x = c tanh(z/c) (or z), m = max x, d = (x - m) / tau, s = sum e^d, t = sum e^d d:

    row_max = m     log_sum = log s     logprob = d_y - log s     H = log s - t / s          (nats)
    dL/dz_v = 1/tau (1 - (x_v/c)^2) [a (1[v = y] - p_v) - b p_v (log p_v + H)],   log p_v = d_v - log_sum

Two implementations with the same arguments: `forward` and `backward` run compiled code (build.py; one read of each
row), `forward_torch` and `backward_torch` plain torch on any device, a few rows at a time. log s is log1p of the sum
without its largest term in both, so a row with one overwhelming word keeps the digits of its small entropy.

Arguments, the same everywhere. N = R1 * R2 rows; all checked by the caller:

    logits         [R1, R2, V] float32, bfloat16 or float16, last stride 1, the others any; row r is [r // R2, r % R2]
    targets        [N] int64, contiguous; `ignore_index` marks a row that is not used: its results are 0
    options        RowOptions: tau (a float, or [N] float32, contiguous), c, ignore_index
    extra          RowExtra: [N] float32 for each statistic that is wanted besides; docs/math.md has their formulas
    vectors        RowGradients: entropy, row_max, log_sum, dL/dlogprobs, dL/dentropy, [N] float32

A logit of -inf, or at or below FLOOR, is a probability of 0. A row holding NaN or +inf, or nothing but masked words, or
whose target is outside [0, V), gives NaN, in value and gradient; no other row is touched by it. (row_max of a row of
masked words is -inf.) The target NO_TARGET, one that is elsewhere, gives a log-prob of NaN and a gradient without
1[v = y].
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...types import EXTRA_STATS
from ..types import FLOOR, NO_TARGET, RowExtra, RowGradients, RowOptions, RowStats
from . import build
from .threads import run_on_threads

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

NO_EXTRA = RowExtra()

# Below this many logits one thread is done before a second has started.
ELEMENTS_PER_THREAD = 1 << 16


def row_stats_forward(
    logits: Tensor, targets: Tensor, options: RowOptions, outputs: RowStats, extra: RowExtra = NO_EXTRA
) -> RowStats:
    """Writes to `outputs` and `extra`; by compiled code if options.backend is "cpu" and it can be had."""
    function = forward if options.backend == "cpu" and available(logits) else forward_torch
    return function(logits, targets, options, outputs, extra)


def row_stats_backward(
    grad_logits: Tensor, logits: Tensor, targets: Tensor, options: RowOptions, vectors: RowGradients
) -> None:
    """Writes dL/dlogits into `grad_logits` (may be `logits`); by compiled code as in `row_stats_forward`."""
    function = backward if options.backend == "cpu" and available(logits) else backward_torch
    function(grad_logits, logits, targets, options, vectors)


def available(logits: Tensor) -> bool:
    """Whether compiled code can take these logits. Compiles on the first call."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and build.load() is not None


# Compiled.


class _Rows(ctypes.Structure):
    """GemRows of row_stats.cpp, field by field."""

    _fields_ = [
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("N", "R2", "V", "s1", "s2")),
        ("targets", ctypes.c_void_p),
        ("tau_rows", ctypes.c_void_p),
        ("tau", ctypes.c_double),
        ("softcap", ctypes.c_double),
        ("ignore_index", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("logprobs", "entropy", "row_max", "log_sum")),
        *((name, ctypes.c_void_p) for name in ("grad_logprobs", "grad_entropy", "grad_logits")),
        ("g1", ctypes.c_int64),
        ("g2", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in RowExtra._fields),
    ]


def _rows(logits: Tensor, targets: Tensor, options: RowOptions) -> _Rows:
    temperatures = options.temperatures
    return _Rows(
        logits=logits.data_ptr(),
        N=logits.shape[0] * logits.shape[1],
        R2=logits.shape[1],
        V=logits.shape[2],
        s1=logits.stride(0),
        s2=logits.stride(1),
        targets=targets.data_ptr(),
        tau_rows=None if temperatures is None else temperatures.data_ptr(),
        tau=options.temperature,
        softcap=0.0 if options.softcap is None else options.softcap,
        ignore_index=options.ignore_index,
        dtype=DTYPES[logits.dtype],
    )


def forward(
    logits: Tensor, targets: Tensor, options: RowOptions, outputs: RowStats, extra: RowExtra = NO_EXTRA
) -> RowStats:
    """Ignored rows are not read."""
    rows = _rows(logits, targets, options)
    for name, output in (*outputs._asdict().items(), *extra._asdict().items()):
        if output is not None:
            setattr(rows, name, output.data_ptr())
    _run("gem_row_stats_forward", rows)
    return outputs


def backward(grad_logits: Tensor, logits: Tensor, targets: Tensor, options: RowOptions, vectors: RowGradients) -> None:
    """Writes dL/dlogits into `grad_logits`: the shape and dtype of `logits`, strides of its own, or `logits` itself.

    Ignored rows are not read and get 0. So do rows where both upstream gradients are 0 and the statistics are numbers.
    """
    vectors = RowGradients(*(v.contiguous() for v in vectors))
    rows = _rows(logits, targets, options)
    for name, vector in vectors._asdict().items():
        setattr(rows, name, vector.data_ptr())
    rows.grad_logits, rows.g1, rows.g2 = grad_logits.data_ptr(), grad_logits.stride(0), grad_logits.stride(1)
    _run("gem_row_stats_backward", rows)


def _run(name: str, rows: _Rows) -> None:
    run_on_threads(getattr(build.load(), name), rows, min(rows.N, 1 + rows.N * rows.V // ELEMENTS_PER_THREAD))


# Plain torch.

# Float32 copies of a chunk of rows that are alive at once, measured (test_cpu_kernels.py holds it to that).
LIVE_COPIES = 5
SHARE_OF_LOGITS = 0.08
CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_ELSEWHERE = 256 << 20

# e^LOWEST is 0 in float32, and LOWEST * 0 is 0 where -inf * 0 is NaN.
LOWEST = -200.0


def _chunks(logits: Tensor, targets: Tensor, ignore_index: int) -> Sequence[Tensor]:
    """Row numbers, a chunk at a time. On the CPU the ignored rows are left out; elsewhere that would synchronise."""
    if logits.device.type == "cpu":
        rows = (targets != ignore_index).nonzero()[:, 0]
    else:
        rows = torch.arange(targets.shape[0], dtype=torch.int64, device=logits.device)
    row_bytes = LIVE_COPIES * 4 * max(1, logits.shape[2])
    share = SHARE_OF_LOGITS * logits.shape[0] * logits.shape[1] * logits.shape[2] * logits.element_size()
    most = min(share, CHUNK_BYTES.get(logits.device.type, CHUNK_BYTES_ELSEWHERE))
    return rows.split(max(1, int(most) // row_bytes))


def _masked(logits: Tensor) -> Tensor:
    """In place: what is at or below FLOOR is -inf."""
    return logits.masked_fill_(logits <= FLOOR, -torch.inf)


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """x and its derivative 1 - (x/c)^2 (None without a softcap); an infinite logit stays, with derivative 1."""
    if softcap is None:
        return logits, None
    infinite = logits.isinf()
    u = (logits / softcap).tanh_()
    return torch.where(infinite, logits, u * softcap), u.square_().neg_().add_(1.0).masked_fill_(infinite, 1.0)


def _select(vector: float | Tensor, rows: Tensor) -> float | Tensor:
    return vector[rows, None] if isinstance(vector, Tensor) else vector


# What is still to be added to some of the extra statistics, in units of log_sum.
LOG_SUMS = {"self_certainty": 1.0, "log_sum_sq_probs": -2.0, "top_logprob": -1.0}


def _of_logits(x: Tensor, i_max: Tensor, y: Tensor, tau: float | Tensor, extra: RowExtra) -> dict[str, Tensor]:
    """Those that are asked for, of the capped logits."""
    more = {}
    if extra.is_top1 is not None:
        more["is_top1"] = (i_max == y)[:, 0].float()
    if extra.mean_logits is not None:
        more["mean_logits"] = x.mean(-1) / (tau[:, 0] if isinstance(tau, Tensor) else tau)
    return more


def _of_shifted(d: Tensor, i_max: Tensor, extra: RowExtra) -> dict[str, Tensor]:
    """The same of d = (x - m) / tau."""
    more = {}
    if extra.self_certainty is not None:
        more["self_certainty"] = -d.mean(-1) - math.log(d.shape[-1])
    if extra.margin is not None:
        more["margin"] = -d.scatter(-1, i_max, -torch.inf).amax(-1)
    return more


def forward_torch(
    logits: Tensor, targets: Tensor, options: RowOptions, outputs: RowStats, extra: RowExtra = NO_EXTRA
) -> RowStats:
    """`forward` in plain torch, on the device of `logits`, without synchronising a GPU."""
    for output in (*outputs, *extra):
        if output is not None:
            output.zero_()
    ignore_index = options.ignore_index
    V = logits.shape[2]
    for rows in _chunks(logits, targets, ignore_index):
        z = _masked(logits[rows // logits.shape[1], rows % logits.shape[1]].float())
        y, tau = targets[rows, None], _select(options.tau, rows)
        x = _capped(z, options.softcap)[0]
        del z
        m, i_max = x.max(-1, keepdim=True)
        more = _of_logits(x, i_max, y, tau, extra)
        d = x.sub_(m).div_(tau)
        d_y = d.gather(-1, y.clamp(0, V - 1))[:, 0]
        more |= _of_shifted(d, i_max, extra)
        e = d.exp().scatter_(-1, i_max, 0.0)
        rest = e.sum(-1)
        d.clamp_(min=LOWEST)
        if extra.log_sum_sq_probs is not None:
            more["log_sum_sq_probs"] = e.square().sum(-1).log1p_()
        if extra.varentropy is not None:
            mean = ((e * d).sum(-1) / (1.0 + rest))[:, None]  # the largest word's own d is 0
            more["varentropy"] = ((d - mean).square_().mul_(e).sum(-1) + mean[:, 0].square()) / (1.0 + rest)
        t = e.mul_(d).sum(-1)
        del x, d, e
        log_sum = rest.log1p()
        m, y = m[:, 0], y[:, 0]
        outside = (y < 0) | (y >= V)
        bad = ~m.isfinite() | (outside & (y != NO_TARGET))
        log_sum = log_sum.masked_fill(bad, torch.nan)
        values = ((d_y - log_sum).masked_fill(outside, torch.nan), log_sum - t / (1.0 + rest), m, log_sum)
        for output, value in zip(outputs, values):
            output[rows] = torch.where(y != ignore_index, value, 0.0)
        for name in EXTRA_STATS:
            if getattr(extra, name) is not None:
                value = more.get(name, 0.0) + LOG_SUMS.get(name, 0.0) * log_sum
                value = value.masked_fill(bad, 0.0 if name == "is_top1" else torch.nan)
                getattr(extra, name)[rows] = torch.where(y != ignore_index, value, 0.0)
    return outputs


def backward_torch(
    grad_logits: Tensor, logits: Tensor, targets: Tensor, options: RowOptions, vectors: RowGradients
) -> None:
    """`backward` in plain torch, on the device of `logits`, without synchronising a GPU."""
    R2, V = logits.shape[1:]
    ignore_index = options.ignore_index
    if logits.device.type == "cpu":
        ignored = (targets == ignore_index).nonzero()[:, 0]
        grad_logits[ignored // R2, ignored % R2] = 0.0
    for rows in _chunks(logits, targets, ignore_index):
        z = _masked(logits[rows // R2, rows % R2].float())
        y, tau = targets[rows, None], _select(options.tau, rows)
        H, m, L, a, b = (vector[rows, None] for vector in vectors)
        absent = y == NO_TARGET
        outside = ((y < 0) | (y >= V)) & ~absent
        i_y = y.clamp(0, V - 1)
        x, slope = _capped(z, options.softcap)
        del z
        log_p = x.sub_(m).div_(tau).sub_(L.masked_fill(outside, torch.nan))
        log_p_y = log_p.gather(-1, i_y).clamp_(max=0.0)
        p = log_p.exp()
        gradient = log_p.clamp_(min=LOWEST).mul_(b).add_(a + b * H).mul_(p).neg_()
        del x, p, log_p
        at_target = -a * log_p_y.expm1() - b * log_p_y.exp() * (log_p_y.clamp(min=LOWEST) + H)
        at_target = torch.where(absent, gradient.gather(-1, i_y), at_target)
        gradient.scatter_(-1, i_y, at_target).div_(tau)
        if slope is not None:
            gradient.mul_(slope)
            del slope
        gradient = torch.where(y != ignore_index, gradient, 0.0) if logits.device.type != "cpu" else gradient
        grad_logits[rows // R2, rows % R2] = gradient.to(grad_logits.dtype)
