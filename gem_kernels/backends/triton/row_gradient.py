"""The gradient of a row of logits, in place if wanted. With x the softcapped logits and the letters of row_stats.py:

dL/dz_v = (1 - (x_v/c)^2) / temperature * [ a (1[v = y] - p_v) - b p_v (log p_v + H) ]
"""

import triton
import triton.language as tl

from .row_math import (
    FLOOR,
    INF,
    LN2,
    LOG2E,
    VECTORS,
    _bend,
    _capped,
    _cuts,
    _edge,
    _exp2,
    _inv_temperature,
    _logits,
    _row_offset,
)


@triton.jit
def _gradient(x, m, scale, log2_sum, c1, c2, softcap, SOFTCAP: tl.constexpr, PTX: tl.constexpr):
    """p (c1 + c2 log2 p), with log2 p = (x - m) scale - log2 sum; times a quarter of the softcap's slope."""
    if SOFTCAP:
        x = x.to(tl.float32)
        r = _bend(x, softcap, PTX)
        log2_p = (_capped(x, r, softcap) - m) * scale - log2_sum
        return _exp2(log2_p, PTX) * (c1 + c2 * log2_p) * tl.fma(-r, r, r)
    else:
        log2_p = (_logits(x, softcap, SOFTCAP, PTX) - m) * scale - log2_sum
        return _exp2(log2_p, PTX) * (c1 + c2 * log2_p)


@triton.jit
def _at_target(x, a, softcap, SOFTCAP: tl.constexpr, PTX: tl.constexpr):
    """The target's own term, a times the softcap's slope. A masked word has slope 1: as a target it gets a."""
    if SOFTCAP:
        x = x.to(tl.float32)
        r = _bend(x, softcap, PTX)
        return tl.where(x <= FLOOR, a, a * 4.0 * tl.fma(-r, r, r))
    else:
        return a


@triton.jit(
    do_not_specialize=[
        "V",
        "n_inner",
        "base",
        "stride_outer",
        "stride_inner",
        "grad_base",
        "grad_outer",
        "grad_inner",
        "span",
        "ignore_index",
    ],
    do_not_specialize_on_alignment=VECTORS,
)
def row_stats_backward(
    grad_ptr,
    logits_ptr,
    targets_ptr,
    temperature,
    temperature_ptr,
    softcap,
    grad_logprob_ptr,
    grad_entropy_ptr,
    entropy_ptr,
    max_ptr,
    log_sum_ptr,
    V,
    n_inner,
    base,
    stride_outer: tl.int64,
    stride_inner: tl.int64,
    grad_base,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    span,
    ignore_index,
    TEMPERATURE_TENSOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ALIKE: tl.constexpr,
    ORDERED: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid (N, n_splits). Ignored rows are zeroed unread. grad may be logits.

    ALIKE: each row of grad is a multiple of ALIGN away from that of logits: what is aligned in one is so in the other.

    The target's own term is one scalar, stored after the row: a comparison in the loop costs two instructions an
    element. The barriers order it against the other threads' reads and writes of the same address. Where a barrier does
    not wait for stores to memory (AMD), ORDERED is False, and the comparison is paid.
    """
    row = tl.program_id(0)
    i_split = tl.program_id(1)
    y = tl.load(targets_ptr + row)
    begin = _row_offset(row, base, n_inner, stride_outer, stride_inner)
    end = begin + V
    lo, full, hi, body, body_end = _cuts(begin, end, i_split, span, BLOCK, ALIGN)
    o_edge, m_edge = _edge(begin, end, body, body_end, i_split, ALIGN)
    lanes = tl.arange(0, BLOCK)
    dtype = grad_ptr.dtype.element_ty
    apart = _row_offset(row, grad_base, n_inner, grad_outer, grad_inner) - begin
    grad_ptr += tl.multiple_of(apart, ALIGN) if ALIKE else apart
    if y == ignore_index:
        tl.store(grad_ptr + o_edge, tl.zeros([2 * ALIGN], dtype), mask=m_edge)
        for offset in range(lo, hi, BLOCK):
            tl.store(grad_ptr + offset + lanes, tl.zeros([BLOCK], dtype), mask=offset + lanes < hi)
        return

    inv_temperature = _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR)
    scale = inv_temperature * LOG2E
    m = tl.load(max_ptr + row)
    log2_sum = tl.load(log_sum_ptr + row) * LOG2E
    a = tl.load(grad_logprob_ptr + row)
    b = tl.load(grad_entropy_ptr + row)
    c1 = -(a + b * tl.load(entropy_ptr + row)) * inv_temperature
    c2 = -b * LN2 * inv_temperature
    if SOFTCAP:
        c1 *= 4.0
        c2 *= 4.0

    o_y = begin + y
    a_y = a * inv_temperature
    mine = ((o_y >= lo) & (o_y < hi)) | ((i_split == 0) & ((o_y < body) | (o_y >= body_end)))
    mine = mine & (y >= 0) & (y < V)
    x_y = tl.load(logits_ptr + o_y, mask=mine, other=0.0)
    g_y = _gradient(x_y, m, scale, log2_sum, c1, c2, softcap, SOFTCAP, PTX)
    g_y += _at_target(x_y, a_y, softcap, SOFTCAP, PTX)
    if ORDERED:
        tl.debug_barrier()

    x_edge = tl.load(logits_ptr + o_edge, mask=m_edge, other=-INF)
    g_edge = _gradient(x_edge, m, scale, log2_sum, c1, c2, softcap, SOFTCAP, PTX)
    if not ORDERED:
        g_edge = tl.where(o_edge == o_y, g_edge + _at_target(x_edge, a_y, softcap, SOFTCAP, PTX), g_edge)
    tl.store(grad_ptr + o_edge, g_edge.to(dtype), mask=m_edge)
    for offset in range(lo, full, BLOCK):
        x = tl.load(logits_ptr + offset + lanes)
        g = _gradient(x, m, scale, log2_sum, c1, c2, softcap, SOFTCAP, PTX)
        if not ORDERED:
            g = tl.where(offset + lanes == o_y, g + _at_target(x, a_y, softcap, SOFTCAP, PTX), g)
        tl.store(grad_ptr + offset + lanes, g.to(dtype))
    if full < hi:
        m_tail = full + lanes < hi
        x = tl.load(logits_ptr + full + lanes, mask=m_tail, other=-INF)
        g = _gradient(x, m, scale, log2_sum, c1, c2, softcap, SOFTCAP, PTX)
        if not ORDERED:
            g = tl.where(full + lanes == o_y, g + _at_target(x, a_y, softcap, SOFTCAP, PTX), g)
        tl.store(grad_ptr + full + lanes, g.to(dtype), mask=m_tail)
    if ORDERED:
        tl.debug_barrier()
        tl.store(grad_ptr + o_y, g_y.to(dtype), mask=mine)
