"""Starts the Triton kernels: shapes, grids and launch options. Nothing is checked."""

from __future__ import annotations

import torch
from torch import Tensor

from ...types import extra_bits
from ..types import Completions, RowGradients, RowOptions, RowStats, ScoreRule
from . import row_gradient, row_stats
from . import span_scores as spans

OCCUPANCY = 2
"""Programs of the forward pass on each multiprocessor, and rows are cut among several until there are so many.

2: with the registers that the compiler likes (93 of a bf16 pass on sm_90). 4: with MOST_REGISTERS, for 0.2 instructions
an element more and no spill, except under a softcap, which would spill. To be decided by a run on a GPU.
"""
MOST_REGISTERS = 64
MOST_REGISTERS_EXTRA = 128
"""Of a forward pass of float32 with optional statistics: left alone, ptxas spills two of them to stay at 80."""
ORDERED = torch.version.hip is None
"""A barrier of the threads of a program waits for their stores to memory. gfx942's does not (seen in its code)."""


def _split_count(n_rows: int, V: int, block: int, device: torch.device) -> int:
    """Programs per row: 1 when the rows alone fill the device, else enough to fill it, each with a block at least."""
    if device.type != "cuda":
        return 1
    programs = OCCUPANCY * torch.cuda.get_device_properties(device).multi_processor_count
    if n_rows >= programs:
        return 1
    return max(1, min(64, -(-programs // n_rows), V // block))


def _span(V: int, block: int, splits: int) -> int:
    """Columns per split, a multiple of `block`; the splits together cover V."""
    return max(1, -(-V // (block * splits))) * block


def _options(rows: Tensor, options: RowOptions) -> dict:
    nvidia = rows.device.type == "cuda" and torch.version.hip is None
    return {
        "TEMPERATURE_TENSOR": options.temperatures is not None,
        "SOFTCAP": options.softcap is not None,
        "PTX": nvidia,
    }


def _register_limit(rows: Tensor, options: RowOptions, PTX: bool) -> dict[str, int]:
    if PTX and OCCUPANCY == 4 and options.softcap is None and not options.extra:
        return {"maxnreg": MOST_REGISTERS}
    if PTX and options.extra and rows.element_size() == 4:
        return {"maxnreg": MOST_REGISTERS_EXTRA}
    return {}


def _from_boundary(rows: Tensor) -> tuple[Tensor, int]:
    """What `rows` lie in, from the 16-byte boundary before them (where that is theirs too), and where they begin there.

    Triton compiles once for pointers that are aligned and once for others, with narrower loads.
    """
    base = rows.data_ptr() % 16 // rows.element_size()
    if base == 0 or base > rows.storage_offset():
        return rows, 0
    return rows.as_strided((1,), (1,), rows.storage_offset() - base), base


def _alike(one: tuple[int, ...], other: tuple[int, ...], align: int) -> bool:
    """Whether base and strides differ by multiples of `align`."""
    return all((a - b) % align == 0 for a, b in zip(one, other))


def row_stats_forward(
    rows: Tensor,
    targets: Tensor,
    options: RowOptions,
    out: RowStats,
    splits: int | None = None,
    extra: Tensor | None = None,
) -> RowStats:
    """[R1, R2, V] and targets [N] int64 -> `out`, and `extra` [len(options.extra), N] where the options ask for it.
    splits: programs a row, to be chosen here if None."""
    R1, R2, V = rows.shape
    N = R1 * R2
    if N == 0:
        return out
    launch = row_stats.launch_options(V, rows.element_size())
    splits = splits or _split_count(N, V, launch.block, rows.device)
    constants = _options(rows, options)
    constants["WANTED"] = extra_bits(options.extra)
    width = 3 + row_stats.EXTRA_WIDTH.value if options.extra else 3
    partial = torch.empty(N, splits, width, dtype=torch.float32, device=rows.device) if splits > 1 else out.logprobs
    more = (extra, 0 if extra is None else extra.stride(0))
    tau, softcap = (options.temperature, options.temperatures), options.softcap or 1.0
    memory, base = _from_boundary(rows)
    args = (memory, targets, *tau, softcap, *out, partial)
    shape = (V, R2, base, rows.stride(0), rows.stride(1))
    with torch.cuda.device_of(rows):
        row_stats.row_stats_forward[(N, splits)](
            *args,
            *shape,
            _span(V, launch.block, splits),
            splits,
            options.ignore_index,
            *more,
            **constants,
            SPLIT=splits > 1,
            BLOCK=launch.block,
            LANES=launch.lanes,
            ALIGN=launch.align,
            num_warps=launch.num_warps,
            **_register_limit(rows, options, constants["PTX"]),
        )
        if splits > 1:
            row_stats.row_stats_combine[(N,)](
                *args,
                *shape,
                splits,
                options.ignore_index,
                *more,
                **constants,
                MAX_SPLITS=row_stats.MAX_SPLITS,
                num_warps=1,
            )
    return out


def row_stats_backward(
    grad: Tensor,
    rows: Tensor,
    targets: Tensor,
    options: RowOptions,
    vectors: RowGradients,
    splits: int | None = None,
) -> None:
    """Writes dL/drows into `grad`, which may be `rows`."""
    R1, R2, V = rows.shape
    N = R1 * R2
    if N == 0:
        return
    launch = row_stats.launch_options(V, rows.element_size())
    (memory, base), (grad_memory, grad_base) = _from_boundary(rows), _from_boundary(grad)
    alike = _alike((grad_base, *grad.stride()), (base, *rows.stride()), launch.align)
    block = launch.block if alike else row_stats.apart(launch.block)
    splits = splits or _split_count(N, V, block, rows.device)
    with torch.cuda.device_of(rows):
        row_gradient.row_stats_backward[(N, splits)](
            grad_memory,
            memory,
            targets,
            options.temperature,
            options.temperatures,
            options.softcap or 1.0,
            vectors.grad_logprobs,
            vectors.grad_entropy,
            vectors.entropy,
            vectors.row_max,
            vectors.log_sum,
            V,
            R2,
            base,
            rows.stride(0),
            rows.stride(1),
            grad_base,
            grad.stride(0),
            grad.stride(1),
            _span(V, block, splits),
            options.ignore_index,
            **_options(rows, options),
            ALIKE=alike,
            ORDERED=ORDERED,
            BLOCK=block,
            ALIGN=launch.align,
            num_warps=launch.num_warps,
        )


def span_scores(given: Completions, rule: ScoreRule) -> tuple[Tensor, Tensor, Tensor]:
    """features [9, B] float32, score [B] float32, valid [B] bool."""
    entropy, logprobs, completion_mask, cu_seqlens, answer_start, valid = given
    B = answer_start.shape[0]
    features = torch.empty(len(rule.weights), B, dtype=torch.float32, device=entropy.device)
    score = torch.empty(B, dtype=torch.float32, device=entropy.device)
    ok = torch.empty(B, dtype=torch.bool, device=entropy.device)
    if B == 0:
        return features, score, ok
    mask = None if completion_mask is None else completion_mask.contiguous().view(torch.int8)
    with torch.cuda.device_of(entropy):
        spans.span_scores[(B,)](
            entropy,
            logprobs,
            mask,
            None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous(),
            answer_start.to(torch.int64).contiguous(),
            None if valid is None else valid.contiguous().view(torch.int8),
            features,
            score,
            ok.view(torch.int8),
            entropy.numel(),
            entropy.shape[-1],
            *rule.weights,
            rule.numerator,
            rule.denominator,
            PACKED=cu_seqlens is not None,
            EXCLUDE=rule.exclude,
            HAS_VALID=valid is not None,
            HAS_LOGPROBS=logprobs is not None,
            BLOCK=spans.BLOCK,
            num_warps=8,
        )
    return features, score, ok


def group_advantages(scores: Tensor, group_size: int, valid: Tensor | None, mapping: int, scale: bool, eps: float):
    """[B] -> [B]."""
    advantages = torch.empty_like(scores)
    if scores.numel() == 0:
        return advantages
    with torch.cuda.device_of(scores):
        spans.group_advantages[(scores.shape[0] // group_size,)](
            advantages,
            scores,
            None if valid is None else valid.contiguous().view(torch.int8),
            group_size,
            eps,
            MAPPING=mapping,
            SCALE=scale,
            HAS_VALID=valid is not None,
            BLOCK=max(2, 1 << (group_size - 1).bit_length()),
            num_warps=1 if group_size <= 128 else 4,
        )
    return advantages
