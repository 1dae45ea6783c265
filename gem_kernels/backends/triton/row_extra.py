"""The optional statistics of a row, each a bit of the constant WANTED: without it none of its code is compiled.

With d, s, t, m, p and H as in row_stats.py, x_1 >= x_2 the two largest logits, V words:

    self_certainty = log s - log V - mean d       varentropy = sum p (log p + H)^2       top_logprob = -log s
    log_sum_sq_probs = log sum e^2d - 2 log s     mean_logits = mean x / tau             margin = (x_1 - x_2) / tau

Varentropy: a block has s_b, the mean k_b of its d by e^d, and q_b = sum e^d (d - k_b)^2; two parts merge to

    q = q_1 + q_2 + (k_1 - k_2)^2 s_1 s_2 / (s_1 + s_2)

so it is a sum of squares everywhere. (sum e^d d^2 less its mean's square would lose the digits of a flat row.)

Of the target's rank and the second logit nothing is kept for each element: the maximum of what lies in blocks before
the target, and the maximum of each lane. What is left is looked at again after the row: the target's block, and the
lane of the maximum.

A masked word is FLOOR here, so where one is, sums of logits are below FLOOR / 2.
"""

import triton
import triton.language as tl

from ... import types
from .row_math import FLOOR, INF, _log1p, _logit, _logits, _sum_less

SELF_CERTAINTY = tl.constexpr(types.extra_bits(["self_certainty"]))
VARENTROPY = tl.constexpr(types.extra_bits(["varentropy"]))
LOG_SUM_SQ_PROBS = tl.constexpr(types.extra_bits(["log_sum_sq_probs"]))
MEAN_LOGITS = tl.constexpr(types.extra_bits(["mean_logits"]))
IS_TOP1 = tl.constexpr(types.extra_bits(["is_top1"]))
TOP_LOGPROB = tl.constexpr(types.extra_bits(["top_logprob"]))
MARGIN = tl.constexpr(types.extra_bits(["margin"]))
EXTRA_COUNT = tl.constexpr(len(types.EXTRA_STATS))
EXTRA_WIDTH = tl.constexpr(7)
"""Numbers of a part of a row: rest2 = sum e^2d - 1, sum x, sum d, words, q, second, the maximum before the target."""
AGAIN = tl.constexpr(128)


@triton.jit
def _merge(s, k, q, s_b, k_b, q_b):
    """In an order in which a mean of FLOOR times a sum of 0 is 0."""
    total = s + s_b
    share = s_b / tl.where(total > 0, total, 1.0)
    apart = k_b - k
    return total, (1.0 - share) * k + share * k_b, q + q_b + (apart * s) * apart * share


@triton.jit
def _no_extra(LANES: tl.constexpr):
    zeros = tl.zeros([LANES], tl.float32)
    zero = tl.full([], 0.0, tl.float32)
    return zeros, zeros, zeros, zeros + FLOOR, zeros, zero, zero, zero, zero + FLOOR


@triton.jit
def _fold_extra(extra, m, x, x_counted, e, d, d_counted, shift, scale, before, WANTED: tl.constexpr):
    """One block [R, LANES] into `extra`, its maximum having moved by `shift` to m.

    x_counted, d_counted: 0 past the end. before: elements before the block, and whether the target comes after it.
    """
    squares, x_sum, d_sum, tops, within, v_s, v_k, between, before_y = extra
    r = tl.exp2(shift * scale)
    if LOG_SUM_SQ_PROBS & WANTED:
        squares = (r * r) * squares + tl.sum(e * e, 0)
    if MEAN_LOGITS & WANTED:
        x_sum += tl.sum(x_counted, 0)
    if SELF_CERTAINTY & WANTED:
        d_sum += (before[0] // tops.shape[0]).to(tl.float32) * shift + tl.sum(d_counted, 0)
    if MARGIN & WANTED:
        tops = tl.maximum(tops, tl.max(x, 0))
    if VARENTROPY & WANTED:
        s_b = tl.sum(tl.sum(e, 0), 0)
        k_b = tl.sum(tl.sum(e * d, 0), 0) / tl.where(s_b > 0, s_b, 1.0)
        from_mean = d - k_b
        within = r * within + tl.sum(e * from_mean * from_mean, 0)
        v_s, v_k, between = _merge(r * v_s, v_k + shift, r * between, s_b, k_b, 0.0)
    if IS_TOP1 & WANTED:
        before_y = tl.where(before[1], m, before_y)
    return squares, x_sum, d_sum, tops, within, v_s, v_k, between, before_y


@triton.jit
def _end_extra(extra, m_lanes, m, scale, edge, span, o_y, WANTED: tl.constexpr):
    """`extra` of the blocks, `span` elements with the maximum m_lanes, and the edge -> a part of the row, with m."""
    squares, x_sum, d_sum, _, within, v_s, v_k, between, before_y = extra
    x_edge, s_edge, d_edge, m_edge, o_edge = edge
    shift = m_lanes - m
    r = tl.exp2(shift * scale)
    rest2 = tl.full([], 0.0, tl.float32)
    of_x = tl.full([], 0.0, tl.float32)
    of_d = tl.full([], 0.0, tl.float32)
    q = tl.full([], 0.0, tl.float32)
    if LOG_SUM_SQ_PROBS & WANTED:
        squares = (r * r) * squares
        squares_edge = s_edge * s_edge
        one = tl.where(tl.max(squares, 0) >= tl.max(squares_edge, 0), 1.0, 0.0)
        rest2 = _sum_less(one, squares) + _sum_less(1.0 - one, squares_edge)
    if MEAN_LOGITS & WANTED:
        of_x = tl.sum(x_sum, 0) + tl.sum(tl.where(m_edge, x_edge, 0.0), 0)
    if SELF_CERTAINTY & WANTED:
        of_d = tl.sum(d_sum, 0) + span.to(tl.float32) * shift + tl.sum(tl.where(m_edge, d_edge, 0.0), 0)
    if VARENTROPY & WANTED:
        s_b = tl.sum(s_edge, 0)
        k_b = tl.sum(s_edge * d_edge, 0) / tl.where(s_b > 0, s_b, 1.0)
        from_mean = d_edge - k_b
        q_b = tl.sum(s_edge * from_mean * from_mean, 0)
        v_s, v_k, q = _merge(r * v_s, v_k + shift, r * (between + tl.sum(within, 0)), s_b, k_b, q_b)
    second = tl.full([], FLOOR, tl.float32)
    if MARGIN & WANTED:
        first, second = _two_largest(x_edge)
        second = tl.maximum(second, tl.minimum(first, m_lanes))
    if IS_TOP1 & WANTED:
        before_y = tl.maximum(before_y, tl.max(tl.where(o_edge < o_y, x_edge, FLOOR), 0))
    n = (span + tl.sum(m_edge.to(tl.int32), 0)).to(tl.float32)
    return rest2, of_x, of_d, n, q, second, before_y


@triton.jit
def _two_largest(x):
    i = tl.arange(0, x.shape[0])
    return tl.max(x, 0), tl.max(tl.where(i == tl.argmax(x, 0), FLOOR, x), 0)


@triton.jit
def _look_again(
    part,
    extra,
    logits_ptr,
    lo,
    hi,
    o_y,
    m_lanes,
    lanes,
    softcap,
    WANTED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
):
    """What of [lo, hi) decides: the next one in the lane of the largest logit, and the target's block before it."""
    rest2, x_sum, d_sum, n, q, second, before_y = part
    LANES: tl.constexpr = lanes.shape[1]
    BLOCK: tl.constexpr = lanes.shape[0] * lanes.shape[1]
    if MARGIN & WANTED:
        tops = extra[3]
        lane = tl.argmax(tops, 0)
        others = tl.max(tl.where(tl.arange(0, LANES) == lane, FLOOR, tops), 0)
        largest = tl.full([], FLOOR, tl.float32)
        next_one = tl.full([], FLOOR, tl.float32)
        for i in range(lo + lane, hi, LANES * AGAIN):
            offsets = i + tl.arange(0, AGAIN) * LANES
            x = _logit(tl.load(logits_ptr + offsets, mask=offsets < hi, other=-INF), softcap, SOFTCAP, PTX)
            here, below = _two_largest(x)
            next_one = tl.maximum(tl.maximum(next_one, below), tl.minimum(largest, here))
            largest = tl.maximum(largest, here)
        # `second` so far is the next of the edge, and the smaller of its maximum and that of the lanes.
        second = tl.maximum(second, tl.maximum(others, next_one))
    if IS_TOP1 & WANTED:
        offsets = lo + tl.maximum(o_y - lo, 0) // BLOCK * BLOCK + lanes
        mask = (offsets < o_y) & (o_y >= lo) & (o_y < hi)
        x = _logits(tl.load(logits_ptr + offsets, mask=mask, other=-INF), softcap, SOFTCAP, PTX)
        before_y = tl.maximum(before_y, tl.max(tl.max(x, 0), 0))
    return rest2, x_sum, d_sum, n, q, second, before_y


@triton.jit
def _store_part(p, part):
    rest2, x_sum, d_sum, n, q, second, before_y = part
    tl.store(p, rest2)
    tl.store(p + 1, x_sum)
    tl.store(p + 2, d_sum)
    tl.store(p + 3, n)
    tl.store(p + 4, q)
    tl.store(p + 5, second)
    tl.store(p + 6, before_y)


@triton.jit
def _combine_extra(p, mask, m_of, rest_of, t_of, shift, r, top):
    """The parts of a row, one a lane -> the row's. top: the part that the maximum is in."""
    rest2_of = tl.load(p, mask=mask, other=-1.0)
    x_sum = tl.sum(tl.load(p + 1, mask=mask, other=0.0), 0)
    n_of = tl.load(p + 3, mask=mask, other=0.0)
    d_sum = tl.sum(tl.load(p + 2, mask=mask, other=0.0) + n_of * shift, 0)
    q_of = tl.load(p + 4, mask=mask, other=0.0)
    second_of = tl.load(p + 5, mask=mask, other=FLOOR)
    before_y = tl.max(tl.load(p + 6, mask=mask, other=FLOOR), 0)
    rest2 = tl.sum(tl.where(top, rest2_of, (r * r) * (1.0 + rest2_of)), 0)
    s_of = r * (1.0 + rest_of)
    k_of = tl.where(s_of > 0, t_of / tl.where(s_of > 0, 1.0 + rest_of, 1.0) + shift, 0.0)
    from_mean = k_of - tl.sum(s_of * k_of, 0) / tl.sum(s_of, 0)
    q = tl.sum(r * q_of + s_of * from_mean * from_mean, 0)
    second = tl.max(tl.where(top, second_of, m_of), 0)
    return rest2, x_sum, d_sum, tl.sum(n_of, 0), q, second, before_y


@triton.jit
def _store_extra(extra_ptr, extra_stride, row, part, m, rest, log_sum, x_y, V, inv_temperature, WANTED: tl.constexpr):
    """x_y: FLOOR where the target is in none of the words. A row whose log_sum is NaN is NaN."""
    rest2, x_sum, d_sum, _, q, second, before_y = part
    p = extra_ptr + row
    nan = log_sum * 0.0
    if SELF_CERTAINTY & WANTED:
        from_uniform = -tl.log(V.to(tl.float32)) - d_sum / V * inv_temperature
        tl.store(p, tl.where(d_sum <= 0.5 * FLOOR, INF, from_uniform) + log_sum)
        p += extra_stride
    if VARENTROPY & WANTED:
        tl.store(p, q / (1.0 + rest) * inv_temperature * inv_temperature + nan)
        p += extra_stride
    if LOG_SUM_SQ_PROBS & WANTED:
        tl.store(p, _log1p(rest2) - 2.0 * log_sum)
        p += extra_stride
    if MEAN_LOGITS & WANTED:
        tl.store(p, tl.where(x_sum <= 0.5 * FLOOR, -INF, x_sum / V * inv_temperature) + nan)
        p += extra_stride
    if IS_TOP1 & WANTED:
        tl.store(p, tl.where((x_y >= m) & (before_y < m) & (log_sum == log_sum), 1.0, 0.0))
        p += extra_stride
    if TOP_LOGPROB & WANTED:
        tl.store(p, -log_sum)
        p += extra_stride
    if MARGIN & WANTED:
        tl.store(p, tl.where(second <= FLOOR, INF, (m - second) * inv_temperature) + nan)


@triton.jit
def _store_no_extra(extra_ptr, extra_stride, row, WANTED: tl.constexpr):
    """Of an ignored row."""
    p = extra_ptr
    for i in tl.static_range(EXTRA_COUNT):
        if (WANTED >> i) & 1:
            tl.store(p + row, 0.0)
            p += extra_stride
