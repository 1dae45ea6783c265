"""A row of logits -> (logprob, entropy, max, log sum), and the statistics of row_extra.py where they are wanted.

With x the softcapped logits, m = max x and d = (x - m) / temperature:

    s = sum e^d     t = sum e^d d     log_sum = log s     H = log s - t / s     logprob(y) = d_y - log s

One read of the row. Each lane keeps its own s and t; the maximum is one scalar per block, and when it
moves from m to m' each lane rescales, t <- r (t + s (m - m')), s <- r s, r = e^(m - m'). No sum leaves the lanes
before the row ends, so on a confident row the small terms survive beside the 1 of the maximum.

`x - m` and then the multiplication, not one FMA of x with m folded in: only so is d exactly 0 at the maximum.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .row_extra import (
    EXTRA_WIDTH,
    _combine_extra,
    _end_extra,
    _fold_extra,
    _look_again,
    _no_extra,
    _store_extra,
    _store_no_extra,
    _store_part,
)
from .row_math import (
    FLOOR,
    INF,
    LOG2E,
    NO_TARGET,
    VECTORS,
    _cuts,
    _edge,
    _exp2,
    _inv_temperature,
    _log1p,
    _logit,
    _logits,
    _row_offset,
    _sum_less,
)


@triton.jit
def _fold(m, s, t, x, scale, PTX: tl.constexpr):
    """One block [R, LANES] into the running maximum m (scalar) and the lanes s, t [LANES] (t in units of x).

    Also returned, for row_extra.py: e, d, and how far the maximum moved.
    """
    m_new = tl.maximum(m, tl.max(tl.max(x, 0), 0))
    shift = m - m_new
    r = tl.exp2(shift * scale)
    d = x - m_new
    e = _exp2(d * scale, PTX)
    t = r * (t + s * shift) + tl.sum(e * d, 0)
    s = r * s + tl.sum(e, 0)
    return m_new, s, t, e, d, shift


@triton.jit
def _store_stats(row, m, rest, t, x_y, y, V, inv_temperature, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr):
    """rest = s - 1. A row of -inf alone, or a target outside the vocabulary, comes out NaN, but for its maximum."""
    log_sum = _log1p(rest)
    outside = (y < 0) | (y >= V)
    log_sum = tl.where((m <= FLOOR) | (outside & (y != NO_TARGET)), float("nan"), log_sum)
    d_y = tl.where(x_y <= FLOOR, -INF, (x_y - m) * inv_temperature)
    d_y = tl.where(outside, float("nan"), d_y)
    tl.store(logprob_ptr + row, d_y - log_sum)
    tl.store(entropy_ptr + row, log_sum - t * inv_temperature / (1.0 + rest))
    tl.store(max_ptr + row, tl.where(rest == rest, m, float("nan")))
    tl.store(log_sum_ptr + row, log_sum)
    return log_sum


@triton.jit(
    do_not_specialize=[
        "V",
        "n_inner",
        "base",
        "stride_outer",
        "stride_inner",
        "span",
        "n_splits",
        "ignore_index",
        "extra_stride",
    ],
    do_not_specialize_on_alignment=VECTORS,
)
def row_stats_forward(
    logits_ptr,
    targets_ptr,
    temperature,
    temperature_ptr,
    softcap,
    logprob_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    partial_ptr,
    V,
    n_inner,
    base,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    span,
    n_splits,
    ignore_index,
    extra_ptr,
    extra_stride: tl.int64,
    TEMPERATURE_TENSOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANTED: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid (N, n_splits). With SPLIT each program leaves (m, s - 1, t) in partial[row, split] for row_stats_combine.

    WANTED: a bit for each of EXTRA_STATS; they go to extra_ptr, a row of extra_stride for each that is wanted.
    """
    row = tl.program_id(0)
    i_split = tl.program_id(1)
    y = tl.load(targets_ptr + row)
    if y == ignore_index:
        if not SPLIT:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(max_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
            _store_no_extra(extra_ptr, extra_stride, row, WANTED)
        return
    inv_temperature = _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR)
    scale = inv_temperature * LOG2E
    begin = _row_offset(row, base, n_inner, stride_outer, stride_inner)
    end = begin + V
    lo, full, hi, body, body_end = _cuts(begin, end, i_split, span, BLOCK, ALIGN)

    m = tl.full([], FLOOR, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    lanes = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    if WANTED:
        extra = _no_extra(LANES)
    for offset in range(lo, full, BLOCK):
        x = _logits(tl.load(logits_ptr + offset + lanes), softcap, SOFTCAP, PTX)
        m, s, t, e, d, shift = _fold(m, s, t, x, scale, PTX)
        if WANTED:
            before = offset - lo, begin + y >= offset + BLOCK
            extra = _fold_extra(extra, m, x, x, e, d, d, shift, scale, before, WANTED)
    if full < hi:
        x = tl.load(logits_ptr + full + lanes, mask=full + lanes < hi, other=-INF)
        x = _logits(x, softcap, SOFTCAP, PTX)
        m, s, t, e, d, shift = _fold(m, s, t, x, scale, PTX)
        if WANTED:
            before = full - lo, begin + y >= hi
            x_counted = tl.where(full + lanes < hi, x, 0.0)
            d_counted = tl.where(full + lanes < hi, d, 0.0)
            extra = _fold_extra(extra, m, x, x_counted, e, d, d_counted, shift, scale, before, WANTED)

    # The edge last, so that nothing of it waits in registers through the loop.
    o_edge, m_edge = _edge(begin, end, body, body_end, i_split, ALIGN)
    x_edge = _logit(tl.load(logits_ptr + o_edge, mask=m_edge, other=-INF), softcap, SOFTCAP, PTX)
    m_lanes = m
    m = tl.maximum(m, tl.max(x_edge, 0))
    shift = m_lanes - m
    r = tl.exp2(shift * scale)
    t = r * (t + s * shift)
    s = r * s
    d_edge = x_edge - m
    s_edge = tl.where(m_edge, tl.exp2(d_edge * scale), 0.0)
    t_sum = tl.sum(t, 0) + tl.sum(s_edge * d_edge, 0)
    largest, largest_edge = tl.max(s, 0), tl.max(s_edge, 0)
    one = tl.where(largest >= largest_edge, 1.0, 0.0)  # where the maximum is: in the lanes, or in the edge
    rest = _sum_less(one, s) + _sum_less(1.0 - one, s_edge)
    if WANTED:
        edge = x_edge, s_edge, d_edge, m_edge, o_edge
        part = _end_extra(extra, m_lanes, m, scale, edge, hi - lo, begin + y, WANTED)
        part = _look_again(part, extra, logits_ptr, lo, hi, begin + y, m_lanes, lanes, softcap, WANTED, SOFTCAP, PTX)
    if SPLIT:
        WIDTH: tl.constexpr = 3 if WANTED == 0 else EXTRA_WIDTH + 3
        o_partial = (row.to(tl.int64) * n_splits + i_split) * WIDTH
        tl.store(partial_ptr + o_partial, m)
        tl.store(partial_ptr + o_partial + 1, rest)
        tl.store(partial_ptr + o_partial + 2, t_sum)
        if WANTED:
            _store_part(partial_ptr + o_partial + 3, part)
    else:
        x_y = tl.load(logits_ptr + begin + y, mask=(y >= 0) & (y < V), other=0.0)
        x_y = _logit(x_y, softcap, SOFTCAP, PTX)
        log_sum = _store_stats(
            row, m, rest, t_sum, x_y, y, V, inv_temperature, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr
        )
        if WANTED:
            x_y = tl.where((y >= 0) & (y < V), x_y, FLOOR)
            _store_extra(extra_ptr, extra_stride, row, part, m, rest, log_sum, x_y, V, inv_temperature, WANTED)


@triton.jit(
    do_not_specialize=[
        "V",
        "n_inner",
        "base",
        "stride_outer",
        "stride_inner",
        "n_splits",
        "ignore_index",
        "extra_stride",
    ],
    do_not_specialize_on_alignment=VECTORS,
)
def row_stats_combine(
    logits_ptr,
    targets_ptr,
    temperature,
    temperature_ptr,
    softcap,
    logprob_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    partial_ptr,
    V,
    n_inner,
    base,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    n_splits,
    ignore_index,
    extra_ptr,
    extra_stride: tl.int64,
    TEMPERATURE_TENSOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WANTED: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid (N,). The splits' (m, s - 1, t) of one row into its statistics."""
    row = tl.program_id(0)
    y = tl.load(targets_ptr + row)
    if y == ignore_index:
        tl.store(logprob_ptr + row, 0.0)
        tl.store(entropy_ptr + row, 0.0)
        tl.store(max_ptr + row, 0.0)
        tl.store(log_sum_ptr + row, 0.0)
        _store_no_extra(extra_ptr, extra_stride, row, WANTED)
        return
    inv_temperature = _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR)
    begin = _row_offset(row, base, n_inner, stride_outer, stride_inner)
    i = tl.arange(0, MAX_SPLITS)
    WIDTH: tl.constexpr = 3 if WANTED == 0 else EXTRA_WIDTH + 3
    p = partial_ptr + (row.to(tl.int64) * n_splits + i) * WIDTH
    m_of = tl.load(p, mask=i < n_splits, other=FLOOR)
    rest_of = tl.load(p + 1, mask=i < n_splits, other=-1.0)
    t_of = tl.load(p + 2, mask=i < n_splits, other=0.0)
    m = tl.max(m_of, 0)
    shift = m_of - m
    r = tl.exp2(shift * (inv_temperature * LOG2E))
    top = i == tl.argmax(m_of, 0)
    rest = tl.sum(tl.where(top, rest_of, r * (1.0 + rest_of)), 0)
    t = tl.sum(r * (t_of + (1.0 + rest_of) * shift), 0)
    x_y = tl.load(logits_ptr + begin + y, mask=(y >= 0) & (y < V), other=0.0)
    x_y = _logit(x_y, softcap, SOFTCAP, PTX)
    log_sum = _store_stats(row, m, rest, t, x_y, y, V, inv_temperature, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr)
    if WANTED:
        part = _combine_extra(p + 3, i < n_splits, m_of, rest_of, t_of, shift, r, top)
        x_y = tl.where((y >= 0) & (y < V), x_y, FLOOR)
        _store_extra(extra_ptr, extra_stride, row, part, m, rest, log_sum, x_y, V, inv_temperature, WANTED)


MAX_SPLITS = 64


class Launch(NamedTuple):
    block: int
    lanes: int
    align: int
    num_warps: int


def launch_options(V: int, itemsize: int) -> Launch:
    """Blocks of 8,192 16-bit elements on 8 warps (32 a lane, four 16-byte loads in flight); of 4,096 when fp32."""
    largest = 8192 if itemsize == 2 else 4096
    block = min(largest, max(256, triton.next_power_of_2(V)))
    num_warps = 8 if block >= 4096 else 4 if block >= 1024 else 1
    align = 16 // itemsize
    return Launch(block, min(block, num_warps * 32 * align), align, num_warps)


def apart(block: int) -> int:
    """The block of a backward pass whose gradient is not ALIKE: the narrow stores of a whole block spill registers."""
    return max(256, block // 4)
