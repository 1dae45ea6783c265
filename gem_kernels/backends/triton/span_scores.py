"""Entropies and log-probs [tokens] -> features and score of each sequence; scores -> group advantages.

    final = mean H over the answer span      fork = mean of the m largest H of the reasoning span
    S = sum_f w_f x_f (the paper: -final + fork_weight * fork)
    A_i = f(S_i) - mean f(S), over the valid members of the group

The m-th largest is found by radix selection: four passes of 8 bits over the sequence (it stays in the L2 cache), each
a histogram of the values that share the digits found so far. Then sum of all above it, plus it for the rest: exact,
with any number of ties, and no sort.
"""

import triton
import triton.language as tl

INF = tl.constexpr(float("inf"))
BINS = tl.constexpr(256)


@triton.jit
def _ordered(x):
    """float32 -> uint32 of the same order: all bits of a negative are flipped, the sign bit of a positive.

    NaN, of either sign, is above all numbers.
    """
    bits = x.to(tl.uint32, bitcast=True)
    return tl.where(x != x, 0xFFFFFFFF, tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000))


@triton.jit
def _unordered(key):
    bits = tl.where(key >> 31 == 1, key & 0x7FFFFFFF, key ^ 0xFFFFFFFF)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _counted(mask_ptr, o_row, position, length, PACKED: tl.constexpr):
    """Whether the token at this position of the row counts."""
    inside = position < length
    if PACKED:
        return inside
    else:
        return tl.load(mask_ptr + o_row + position, mask=inside, other=0).to(tl.int32) != 0


@triton.jit
def _extent(mask_ptr, o_row, length, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """First counted position, and one past the last; (0, 0) when none counts."""
    if PACKED:
        return 0, length
    else:
        lanes = tl.arange(0, BLOCK)
        first = tl.full([BLOCK], 0x7FFFFFFF, tl.int32)
        last = tl.full([BLOCK], -1, tl.int32)
        for offset in range(0, length, BLOCK):
            position = offset + lanes
            counted = _counted(mask_ptr, o_row, position, length, PACKED)
            first = tl.minimum(first, tl.where(counted, position, 0x7FFFFFFF))
            last = tl.maximum(last, tl.where(counted, position, -1))
        end = tl.max(last, 0) + 1
        return tl.minimum(tl.min(first, 0), end), end


@triton.jit
def _mean_of_top(entropy_ptr, mask_ptr, o_row, first, answer, length, m, PACKED: tl.constexpr, BLOCK: tl.constexpr):
    """Mean of the m largest counted entropies in [first, answer); m is between 1 and their number."""
    lanes = tl.arange(0, BLOCK)
    bins = tl.arange(0, BINS)
    prefix = tl.zeros([], tl.uint32)
    wanted = m.to(tl.int32)
    for i_digit in tl.static_range(4):
        shift = 24 - 8 * i_digit
        histogram = tl.zeros([BINS], tl.int32)
        for offset in range(first, answer, BLOCK):
            position = offset + lanes
            candidate = _counted(mask_ptr, o_row, position, length, PACKED) & (position < answer)
            key = _ordered(tl.load(entropy_ptr + o_row + position, mask=candidate, other=0.0))
            if i_digit > 0:
                candidate = candidate & (key >> (shift + 8) == prefix)
            histogram += tl.histogram(((key >> shift) & 0xFF).to(tl.int32), BINS, mask=candidate)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        digit = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > digit, histogram, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    above = tl.zeros([BLOCK], tl.float32)
    for offset in range(first, answer, BLOCK):
        position = offset + lanes
        candidate = _counted(mask_ptr, o_row, position, length, PACKED) & (position < answer)
        h = tl.load(entropy_ptr + o_row + position, mask=candidate, other=0.0)
        above += tl.where(candidate & (_ordered(h) > prefix), h, 0.0)
    return (tl.sum(above, 0) + wanted.to(tl.float32) * _unordered(prefix)) / m.to(tl.float32)


@triton.jit
def _or_nan(value, witness):
    """`value`, or NaN where the witness is NaN: maxima and minima pass a NaN over."""
    return tl.where(witness != witness, witness, value)


@triton.jit
def _weighted(weight, feature):
    """weight * feature; 0 where the weight is 0, whatever the feature."""
    return tl.where(weight == 0.0, 0.0, weight * feature)


@triton.jit(
    do_not_specialize=["N", "T", "top_numerator", "top_denominator"],
    do_not_specialize_on_alignment=[
        "entropy_ptr",
        "logprobs_ptr",
        "mask_ptr",
        "cu_seqlens_ptr",
        "answer_start_ptr",
        "valid_ptr",
        "features_ptr",
        "score_ptr",
        "ok_ptr",
    ],
)
def span_scores(
    entropy_ptr,
    logprobs_ptr,
    mask_ptr,
    cu_seqlens_ptr,
    answer_start_ptr,
    valid_ptr,
    features_ptr,
    score_ptr,
    ok_ptr,
    N,
    T,
    w_final,
    w_fork,
    w_reasoning,
    w_mean,
    w_max,
    w_mean_logprob,
    w_sum_logprob,
    w_min_logprob,
    w_length,
    top_numerator: tl.int64,
    top_denominator: tl.int64,
    PACKED: tl.constexpr,
    EXCLUDE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    HAS_LOGPROBS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (B,). m = max(1, top_numerator * n // top_denominator), or top_numerator where the denominator is 0.

    features [9, B], in the order of the weights; those of the log-probs are 0 without them.
    """
    i = tl.program_id(0)
    if PACKED:
        # Clamped: offsets that are wrong give a wrong score, but never read outside the N entropies.
        o_row = tl.minimum(tl.maximum(tl.load(cu_seqlens_ptr + i), 0), N).to(tl.int64)
        length = (tl.minimum(tl.load(cu_seqlens_ptr + i + 1), N) - o_row).to(tl.int32)
        length = tl.maximum(length, 0)
    else:
        o_row = i.to(tl.int64) * T
        length = T
    first, end = _extent(mask_ptr, o_row, length, PACKED, BLOCK)
    n = end - first
    start = tl.load(answer_start_ptr + i)
    found = (start >= 0) & (start < n)
    answer = first + tl.where(found, start, 4 * n.to(tl.int64) // 5).to(tl.int32)

    lanes = tl.arange(0, BLOCK)
    sum_final = tl.zeros([BLOCK], tl.float32)
    sum_before = tl.zeros([BLOCK], tl.float32)
    n_final = tl.zeros([BLOCK], tl.int32)
    n_reasoning = tl.zeros([BLOCK], tl.int32)
    largest = tl.full([BLOCK], -INF, tl.float32)
    sum_logprobs = tl.zeros([BLOCK], tl.float32)
    smallest = tl.full([BLOCK], INF, tl.float32)
    for offset in range(first, end, BLOCK):
        position = offset + lanes
        counted = _counted(mask_ptr, o_row, position, length, PACKED) & (position < end)
        in_answer = position >= answer
        h = tl.load(entropy_ptr + o_row + position, mask=counted, other=0.0)
        sum_final += tl.where(in_answer, h, 0.0)
        sum_before += tl.where(in_answer, 0.0, h)
        n_final += (counted & in_answer).to(tl.int32)
        n_reasoning += (counted & (position < answer)).to(tl.int32)
        largest = tl.maximum(largest, tl.where(counted, h, -INF))
        if HAS_LOGPROBS:
            logprob = tl.load(logprobs_ptr + o_row + position, mask=counted, other=0.0)
            sum_logprobs += logprob
            smallest = tl.minimum(smallest, tl.where(counted, logprob, INF))
    n_answer = tl.sum(n_final, 0)
    n_before = tl.sum(n_reasoning, 0)

    ok = n_answer > 0
    if EXCLUDE:
        ok = ok & found
    if HAS_VALID:
        ok = ok & (tl.load(valid_ptr + i).to(tl.int32) != 0)
    x_final, x_fork, x_reasoning, x_mean, x_max = 0.0, 0.0, 0.0, 0.0, 0.0
    x_mean_logprob, x_sum_logprob, x_min_logprob, x_length = 0.0, 0.0, 0.0, 0.0
    if ok:
        x_length = (n_answer + n_before).to(tl.float32)
        answer_sum = tl.sum(sum_final, 0)
        before_sum = tl.sum(sum_before, 0)
        x_final = answer_sum / n_answer.to(tl.float32)
        x_mean = (answer_sum + before_sum) / x_length
        x_max = _or_nan(tl.max(largest, 0), x_mean)
        if HAS_LOGPROBS:
            x_sum_logprob = tl.sum(sum_logprobs, 0)
            x_mean_logprob = x_sum_logprob / x_length
            x_min_logprob = _or_nan(tl.min(smallest, 0), x_sum_logprob)
        if n_before > 0:
            x_reasoning = before_sum / n_before.to(tl.float32)
            if top_denominator == 0:
                m = tl.minimum(top_numerator, n_before.to(tl.int64))
            else:
                m = tl.maximum(top_numerator * n_before // top_denominator, 1)
            x_fork = _mean_of_top(entropy_ptr, mask_ptr, o_row, first, answer, length, m, PACKED, BLOCK)
    score = _weighted(w_final, x_final) + _weighted(w_fork, x_fork) + _weighted(w_reasoning, x_reasoning)
    score += _weighted(w_mean, x_mean) + _weighted(w_max, x_max) + _weighted(w_length, x_length)
    score += _weighted(w_mean_logprob, x_mean_logprob) + _weighted(w_sum_logprob, x_sum_logprob)
    score += _weighted(w_min_logprob, x_min_logprob)
    B = tl.num_programs(0).to(tl.int64)
    tl.store(features_ptr + i, x_final)
    tl.store(features_ptr + B + i, x_fork)
    tl.store(features_ptr + 2 * B + i, x_reasoning)
    tl.store(features_ptr + 3 * B + i, x_mean)
    tl.store(features_ptr + 4 * B + i, x_max)
    tl.store(features_ptr + 5 * B + i, x_mean_logprob)
    tl.store(features_ptr + 6 * B + i, x_sum_logprob)
    tl.store(features_ptr + 7 * B + i, x_min_logprob)
    tl.store(features_ptr + 8 * B + i, x_length)
    tl.store(score_ptr + i, score)
    tl.store(ok_ptr + i, ok.to(tl.int8))


@triton.jit(do_not_specialize=["G"], do_not_specialize_on_alignment=["advantages_ptr", "scores_ptr", "valid_ptr"])
def group_advantages(
    advantages_ptr,
    scores_ptr,
    valid_ptr,
    G,
    eps,
    MAPPING: tl.constexpr,
    SCALE: tl.constexpr,
    HAS_VALID: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (P,). MAPPING: 0 identity, 1 softmax, 2 rank. SCALE: divide by the sample standard deviation + eps."""
    o_group = tl.program_id(0).to(tl.int64) * G
    i = tl.arange(0, BLOCK)
    member = i < G
    s = tl.load(scores_ptr + o_group + i, mask=member, other=0.0)
    if HAS_VALID:
        member = member & (tl.load(valid_ptr + o_group + i, mask=member, other=0).to(tl.int32) != 0)
    n = tl.sum(member.to(tl.float32), 0)
    top = tl.max(tl.where(member, s, -INF), 0)
    if MAPPING == 0:
        r = s
    elif MAPPING == 1:
        e = tl.where(member, tl.exp(s - top), 0.0)
        r = e / tl.sum(e, 0)
    else:
        r = tl.zeros([BLOCK], tl.float32)
        for j in range(0, G):
            s_j = tl.load(scores_ptr + o_group + j)
            beaten = tl.where(s > s_j, 1.0, tl.where(s == s_j, 0.5, 0.0))
            if HAS_VALID:
                beaten = tl.where(tl.load(valid_ptr + o_group + j).to(tl.int32) != 0, beaten, 0.0)
            r += beaten
        r = (r - 0.5) / tl.maximum(n - 1.0, 1.0)
    # Less the largest, so that equal members are exact zeros before the mean is taken.
    r = tl.where(member, r - tl.max(tl.where(member, r, -INF), 0), 0.0)
    a = tl.where(member, r - tl.sum(r, 0) / tl.maximum(n, 1.0), 0.0)
    if SCALE:
        # Equal members stay zeros, whatever eps.
        a = tl.where(a == 0.0, 0.0, a / (tl.sqrt(tl.sum(a * a, 0) / tl.maximum(n - 1.0, 1.0)) + eps))
    a = tl.where(member, tl.where(n > 1.0, a, 0.0), 0.0)
    tl.store(advantages_ptr + o_group + i, a, mask=i < G)


BLOCK = 2048
