"""A row of logits -> (logprob, entropy, max, log sum); the row's gradient, in place if wanted.

With x the softcapped logits, m = max x and d = (x - m) / temperature:

    s = sum e^d     t = sum e^d d     log_sum = log s     H = log s - t / s     logprob(y) = d_y - log s
    dL/dz_v = (1 - (x_v/c)^2) / temperature * [ a (1[v = y] - p_v) - b p_v (log p_v + H) ]

Forward: one read of the row. Each lane keeps its own s and t; the maximum is one scalar per block, and when it
moves from m to m' each lane rescales, t <- r (t + s (m - m')), s <- r s, r = e^(m - m'). No sum leaves the lanes
before the row ends, so on a confident row the small terms survive beside the 1 of the maximum.

A row is cut into a head and a tail of fewer than ALIGN elements (one masked vector of 2 * ALIGN), whole blocks
without any mask, and one block masked at a multiple of ALIGN. Blocks begin where the address is a multiple of 16 bytes
whatever the row stride, so an odd vocabulary loads as wide as an even one. `base` is where the first row
begins, counted from such an address.

`x - m` and then the multiplication, not one FMA of x with m folded in: only so is d exactly 0 at the maximum.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import types

# -inf is raised to it so that e^d * d is 0 and never 0 * inf. Not lower: a count of lanes times FLOOR must stay finite.
FLOOR = tl.constexpr(types.FLOOR)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
NO_TARGET = tl.constexpr(types.NO_TARGET)

# One number a row: several share a buffer, so whether they are aligned depends on N, and must not compile again.
VECTORS = [
    "targets_ptr",
    "temperature_ptr",
    "logprob_ptr",
    "entropy_ptr",
    "max_ptr",
    "log_sum_ptr",
    "partial_ptr",
    "grad_logprob_ptr",
    "grad_entropy_ptr",
]


@triton.jit
def _exp2(x, PTX: tl.constexpr):
    """2^x. PTX: the flushing instruction of NVIDIA GPUs, one instead of four (plain exp2 rescales denormals)."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1 / x. PTX: one instruction, to the last bit but one, instead of eight."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def _bend(x, softcap, PTX: tl.constexpr):
    """r = 1 / (1 + e^(2x/c)), from which come c tanh(x/c) = c - 2c r and its slope 1 - tanh^2 = 4 r (1 - r)."""
    return _reciprocal(1.0 + _exp2(x * (2.0 * LOG2E / softcap), PTX), PTX)


@triton.jit
def _capped(x, r, softcap):
    """c tanh(x/c), FLOOR of a masked word, and NaN of +inf, whose row is NaN in any case (x * 0 costs least)."""
    return tl.where(x <= FLOOR, FLOOR, tl.fma(x, 0.0, tl.fma(-2.0 * softcap, r, softcap)))


@triton.jit
def _logit(x, softcap, SOFTCAP: tl.constexpr, PTX: tl.constexpr):
    """The logit in fp32, after the softcap; what is below FLOOR becomes it."""
    x = x.to(tl.float32)
    if SOFTCAP:
        return _capped(x, _bend(x, softcap, PTX), softcap)
    else:
        return tl.maximum(x, FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _logits(x, softcap, SOFTCAP: tl.constexpr, PTX: tl.constexpr):
    """_logit of a block. With PTX, bf16 is clamped and widened two elements at a time: 1.5 instructions each, not 2.5.

    0xf14a is the bf16 next below FLOOR.
    """
    if PTX and not SOFTCAP and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            """
            {
            .reg .b32 x, low;
            mov.b32 low, 0xf14af14a;
            max.NaN.bf16x2 x, $2, low;
            shl.b32 $0, x, 16;
            and.b32 $1, x, 0xffff0000;
            }
            """,
            "=f,=f,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return _logit(x, softcap, SOFTCAP, PTX)


@triton.jit
def _fold(m, s, t, x, scale, PTX: tl.constexpr):
    """One block [R, LANES] into the running maximum m (scalar) and the lanes s, t [LANES] (t in units of x)."""
    m_new = tl.maximum(m, tl.max(tl.max(x, 0), 0))
    shift = m - m_new
    r = tl.exp2(shift * scale)
    d = x - m_new
    e = _exp2(d * scale, PTX)
    t = r * (t + s * shift) + tl.sum(e * d, 0)
    s = r * s + tl.sum(e, 0)
    return m_new, s, t


@triton.jit
def _row_offset(row, base, n_inner, stride_outer, stride_inner):
    return base + (row // n_inner).to(tl.int64) * stride_outer + (row % n_inner).to(tl.int64) * stride_inner


@triton.jit
def _cuts(begin, end, i_split, span, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    """The aligned part of [begin, end) that falls to this split, as [lo, full) of whole blocks and [full, hi).

    `span` is a multiple of BLOCK. Also returned: where the aligned part of the whole row begins and ends.
    """
    body = (begin + (ALIGN - 1)) // ALIGN * ALIGN
    body_end = tl.maximum(end // ALIGN * ALIGN, body)
    lo = body + i_split * span
    hi = tl.maximum(tl.minimum(lo + span, body_end), lo)
    full = lo + (hi - lo) // BLOCK * BLOCK
    # Every one is a multiple of ALIGN by construction; the compiler loses sight of it in minimum and maximum.
    return tl.multiple_of(lo, ALIGN), tl.multiple_of(full, ALIGN), tl.multiple_of(hi, ALIGN), body, body_end


@triton.jit
def _edge(begin, end, body, body_end, i_split, ALIGN: tl.constexpr):
    """Offsets and mask of the fewer than ALIGN elements on each side of the aligned part; they fall to split 0."""
    i = tl.arange(0, 2 * ALIGN)
    offsets = tl.where(i < ALIGN, begin + i, body_end + (i - ALIGN))
    m_edge = tl.where(i < ALIGN, offsets < tl.minimum(body, end), offsets < end) & (i_split == 0)
    return offsets, m_edge


@triton.jit
def _sum_less(one, s):
    """sum(s) - one, the maximum's own 1 being taken from the largest lane, before the sum.

    log(1 + that) keeps the small terms of a confident row, which 1 + ... in fp32 would round away.
    """
    largest = tl.arange(0, s.shape[0]) == tl.argmax(s, 0)
    return tl.sum(tl.where(largest, s - one, s), 0)


@triton.jit
def _log1p(r):
    """log(1 + r) to full relative accuracy for small r (W. Kahan's correction)."""
    u = 1.0 + r
    return tl.where(u == 1.0, r, tl.log(u) * (r / tl.where(u == 1.0, 1.0, u - 1.0)))


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


@triton.jit
def _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR: tl.constexpr):
    if TEMPERATURE_TENSOR:
        temperature = tl.load(temperature_ptr + row)
    return 1.0 / temperature


@triton.jit(
    do_not_specialize=["V", "n_inner", "base", "stride_outer", "stride_inner", "span", "n_splits", "ignore_index"],
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
    TEMPERATURE_TENSOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
    PTX: tl.constexpr,
):
    """Grid (N, n_splits). With SPLIT each program leaves (m, s - 1, t) in partial[row, split] for row_stats_combine."""
    row = tl.program_id(0)
    i_split = tl.program_id(1)
    y = tl.load(targets_ptr + row)
    if y == ignore_index:
        if not SPLIT:
            tl.store(logprob_ptr + row, 0.0)
            tl.store(entropy_ptr + row, 0.0)
            tl.store(max_ptr + row, 0.0)
            tl.store(log_sum_ptr + row, 0.0)
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
    for offset in range(lo, full, BLOCK):
        x = _logits(tl.load(logits_ptr + offset + lanes), softcap, SOFTCAP, PTX)
        m, s, t = _fold(m, s, t, x, scale, PTX)
    if full < hi:
        x = tl.load(logits_ptr + full + lanes, mask=full + lanes < hi, other=-INF)
        m, s, t = _fold(m, s, t, _logits(x, softcap, SOFTCAP, PTX), scale, PTX)

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
    if SPLIT:
        o_partial = (row.to(tl.int64) * n_splits + i_split) * 3
        tl.store(partial_ptr + o_partial, m)
        tl.store(partial_ptr + o_partial + 1, rest)
        tl.store(partial_ptr + o_partial + 2, t_sum)
    else:
        x_y = tl.load(logits_ptr + begin + y, mask=(y >= 0) & (y < V), other=0.0)
        x_y = _logit(x_y, softcap, SOFTCAP, PTX)
        _store_stats(row, m, rest, t_sum, x_y, y, V, inv_temperature, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr)


@triton.jit(
    do_not_specialize=["V", "n_inner", "base", "stride_outer", "stride_inner", "n_splits", "ignore_index"],
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
    TEMPERATURE_TENSOR: tl.constexpr,
    SOFTCAP: tl.constexpr,
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
        return
    inv_temperature = _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR)
    begin = _row_offset(row, base, n_inner, stride_outer, stride_inner)
    i = tl.arange(0, MAX_SPLITS)
    p = partial_ptr + (row.to(tl.int64) * n_splits + i) * 3
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
    _store_stats(row, m, rest, t, x_y, y, V, inv_temperature, logprob_ptr, entropy_ptr, max_ptr, log_sum_ptr)


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
