"""Rows of logits to the backend that was chosen. What is given was checked; values inside tensors by `check_values`."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import arguments
from .cpu import row_stats as cpu
from .types import RowExtra, RowGradients, RowOptions, RowStats


def row_view(logits: Tensor) -> Tensor | None:
    """[..., V] -> a view [R1, R2, V] of rows that are contiguous and apart, or None where only a copy will do."""
    V = logits.shape[-1]
    if logits.numel() == 0:  # no row, whatever the strides
        return logits.reshape(1, 0, V)
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


def rows_forward(
    rows: Tensor,
    targets: Tensor,
    options: RowOptions,
    out: RowStats | None = None,
    extra: Tensor | None = None,
) -> RowStats:
    """[R1, R2, V] (see row_view), targets [N] int64, contiguous -> `out`, made here if None. Nothing is checked.

    extra: [len(options.extra), N] float32, its rows contiguous: what the options ask for is written to it.
    """
    if out is None:
        out = RowStats(*torch.empty(4, targets.shape[0], dtype=torch.float32, device=rows.device).unbind())
    if options.backend != "triton":
        return cpu.row_stats_forward(rows, targets, options, out, RowExtra.of(options, extra))
    from .triton import launch

    return launch.row_stats_forward(rows, targets, options, out, extra=extra)


def rows_backward(grad: Tensor, rows: Tensor, targets: Tensor, options: RowOptions, vectors: RowGradients) -> None:
    """Writes dL/drows into `grad` [R1, R2, V], which may be `rows`. The vectors are contiguous."""
    if options.backend != "triton":
        cpu.row_stats_backward(grad, rows, targets, options, vectors)
        return
    from .triton import launch

    launch.row_stats_backward(grad, rows, targets, options, vectors)


def check_values(targets: Tensor, options: RowOptions, V: int) -> None:
    """On the CPU: targets in [0, V) or ignored, temperatures finite and above 0."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    ignore_index, temperatures = options.ignore_index, options.temperatures
    outside = (targets != ignore_index) & ((targets < 0) | (targets >= V))
    if bool(outside.any()):
        value = int(targets[outside][0])
        arguments.fail("targets", f"in [0, {V}) or ignore_index ({ignore_index})", f"{value}")
    if temperatures is not None and not bool((torch.isfinite(temperatures) & (temperatures > 0)).all()):
        arguments.fail("temperature", "finite and above 0 everywhere", f"a minimum of {float(temperatures.min())}")
