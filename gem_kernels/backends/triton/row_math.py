"""What the row kernels are made of: logits as they are read, the cuts of a row, and sums that keep small terms.

A row is cut into a head and a tail of fewer than ALIGN elements (one masked vector of 2 * ALIGN), whole blocks
without any mask, and one block masked at a multiple of ALIGN. Blocks begin where the address is a multiple of 16 bytes
whatever the row stride, so an odd vocabulary loads as wide as an even one. `base` is where the first row
begins, counted from such an address.
"""

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
def _inv_temperature(temperature, temperature_ptr, row, TEMPERATURE_TENSOR: tl.constexpr):
    if TEMPERATURE_TENSOR:
        temperature = tl.load(temperature_ptr + row)
    return 1.0 / temperature
