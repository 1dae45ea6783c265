// A row of logits -> log-probability, entropy, row maximum, log-sum; and the gradient with respect to the logits.
//
// With x the (soft-capped) logits, m = max x, d = (x - m) / tau, s = sum e^d, t = sum e^d d:
//
//     log_sum = log s        logprob(y) = d_y - log s        H = log s - t / s
//     dL/dz_v = 1/tau (1 - (x_v/c)^2) [a (1[v = y] - p_v) - b p_v (log p_v + H)],     log p_v = d_v - log_sum
//
// The row is read from memory once, in blocks that fit the first-level cache: the maximum of the block, then its sums.
// One element that attains the maximum is left out of s, so that log s = log1p(rest) and a row whose largest word has
// all the probability keeps its digits. Sums over a block are float32 lanes; across blocks they are double.
//
// Vectors are GCC/Clang vector extensions, as wide as the machine's registers; -ffast-math is neither needed nor
// allowed: NaN and infinity have a meaning here. The next block is prefetched while the current one is summed.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX512F__) || defined(__AVX__) || defined(__F16C__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

constexpr int U = 4;            // vectors in flight
constexpr int64_t STEP = U * W; // elements of one iteration
constexpr int64_t BLOCK = 4096; // 16 KiB of float32: half a first-level cache
constexpr int64_t CLAIM = 8192; // elements a thread takes at a time: short rows several at once

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float QNAN = std::numeric_limits<float>::quiet_NaN();

struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

INLINE vf splat(float x) { return x - vf{}; }

// The larger of each lane; a NaN in `x` is passed over, so NaN must be noticed elsewhere (it is: the sums become NaN).
INLINE vf max_skipping_nan(vf x, vf m) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, (__m512)m);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps((__m256)x, (__m256)m);
#else
    return x > m ? x : m;
#endif
}

// The larger of each lane; a NaN in `x` stays.
INLINE vf max_keeping_nan(vf x, float low) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#elif defined(__AVX__)
    return (vf)_mm256_max_ps(_mm256_set1_ps(low), (__m256)x);
#else
    return x < low ? splat(low) : x;
#endif
}

// e^d for d <= about 88, within one ulp; 0 where d < -87.3 (float32 subnormals are flushed). `d` is clamped so that
// d * e^d is 0, never inf * 0. NaN stays NaN. d = n ln 2 + f, |f| <= ln(2)/2, e^f = 1 + f + f^2 q(f) by minimax q.
INLINE vf exp_clamping(vf &d) {
    const float low = -87.33654f; // log of the smallest normal number
    d = max_keeping_nan(d, low - 1.0f);
    const vf magic = splat(12582912.0f); // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
    const vf shifted = d * 1.44269504f + magic;
    const vf n = shifted - magic;
    vf f = d - n * 0.693359375f;
    f = f - n * -2.12194440e-4f;
    vf q = f * 0.0013814534759148955f + 0.00836874540620514f;
    q = q * f + 0.04166839271783829f;
    q = q * f + 0.1666652113199234f;
    q = q * f + 0.4999999403953552f;
    q = q * f + 1.0f;
    q = q * f + 1.0f;
    const vf e = (vf)((vi)q + ((vi)shifted << 23));
    return d < low ? vf{} : e;
}

// tanh within about two ulp: an odd polynomial near zero (where 1 - 2 / (e^2u + 1) would cancel), exp elsewhere.
INLINE vf tanh_vector(vf u) {
    const vi sign = (vi)u & (int32_t)0x80000000;
    const vf a = (vf)((vi)u & 0x7fffffff);
    const vf z = a * a;
    vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    const vf near = p * z * a + a;
    vf minus_two_a = a * -2.0f;
    const vf e = exp_clamping(minus_two_a); // e^-2a: never overflows
    const vf far = 1.0f - 2.0f * e / (1.0f + e);
    const vf r = a < 0.625f ? near : far;
    return (vf)((vi)r | sign);
}

INLINE vi is_infinite(vf z) { return ((vi)z & 0x7fffffff) == 0x7f800000; }

INLINE vf load(const float *p) {
    vf x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

INLINE vf load(const BFloat *p) {
    vh h;
    std::memcpy(&h, p, sizeof h);
    return (vf)(__builtin_convertvector(h, vu) << 16);
}

INLINE vf load(const Half *p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
#elif defined(__AVX__) && defined(__F16C__)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
#else
    vh h;
    std::memcpy(&h, p, sizeof h);
    const vu bits = __builtin_convertvector(h, vu);
    const vu magnitude = (bits & 0x7fffu) << 13;
    const vu scaled = (vu)((vf)magnitude * 0x1p112f); // rebiases the exponent, subnormal halves included
    const vu special = magnitude | 0x7f800000u;       // infinity and NaN
    const vu value = magnitude >= 0x0f800000u ? special : scaled;
    return (vf)(value | ((bits & 0x8000u) << 16));
#endif
}

INLINE void store(float *p, vf x) { std::memcpy(p, &x, sizeof x); }

INLINE void store(BFloat *p, vf x) {
    const vu u = (vu)x;
    const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16; // to nearest, ties to even
    const vu nan = (u >> 16) | 0x40u;
    const vh h = __builtin_convertvector(x == x ? rounded : nan, vh);
    std::memcpy(p, &h, sizeof h);
}

INLINE void store(Half *p, vf x) {
#if defined(__AVX512F__)
    _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX__) && defined(__F16C__)
    _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
    const vu u = (vu)x;
    const vu magnitude = u & 0x7fffffffu;
    const vu normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000u; // the addition rounds at the last subnormal bit
    vu h = magnitude < 0x38800000u ? subnormal : normal;
    h = magnitude >= 0x477ff000u ? vu{} + 0x7c00u : h; // rounds past 65504
    h = magnitude > 0x7f800000u ? vu{} + 0x7e00u : h;
    const vh out = __builtin_convertvector(h | ((u >> 16) & 0x8000u), vh);
    std::memcpy(p, &out, sizeof out);
#endif
}

// One element, by way of the vector conversions: for tails and targets.
template <typename T> INLINE float load_one(const T *p) {
    T padded[W] = {};
    padded[0] = *p;
    return load(padded)[0];
}

template <typename T> INLINE void store_one(T *p, float x) {
    T padded[W];
    store(padded, splat(x));
    *p = padded[0];
}

// gem_kernels.types.FLOOR: a logit at or below it is a masked word and counts as -inf.
constexpr float FLOOR = -1.0e30f;

// What a softcap leaves as it is: masked words and +inf.
INLINE vi uncapped(vf z) { return (z <= FLOOR) | is_infinite(z); }

// c tanh(z / c)
INLINE vf softcapped(vf z, float c) { return uncapped(z) ? z : c * tanh_vector(z / c); }

INLINE float reduce_max(vf m) {
    float top = -INF;
    for (int i = 0; i < W; ++i) top = m[i] > top ? m[i] : top;
    return top;
}

INLINE double reduce_sum(const vf (&lanes)[U]) {
    double sum = 0;
    for (int u = 0; u < U; ++u)
        for (int i = 0; i < W; ++i) sum += (double)lanes[u][i];
    return sum;
}

// gem_kernels.types.NO_TARGET: the row is read, its target is elsewhere. Log-prob NaN, no term of the target's own.
constexpr int64_t NO_TARGET = -(INT64_C(1) << 62);

struct Sums {
    double s, t;
};

// Sums of e^d and e^d d over `n` elements, n a multiple of STEP. With `leave_out`, elements equal to m contribute
// nothing to the lanes; all but one of them (each e^0 = 1) are added by count at the end.
template <bool leave_out>
INLINE Sums block_sums(const float *x, int64_t n, float m, float inv_tau, const char *ahead, int64_t ahead_bytes) {
    vf s[U] = {}, t[U] = {};
    vi ties = {};
    for (int64_t i = 0; i < n; i += STEP) {
        // One prefetch for each 64 bytes of the next block; bf16 and fp16 blocks have half as many.
        const int64_t o = i * 4;
        if (o < ahead_bytes)
            for (int64_t k = 0; k < STEP * 4; k += 64) __builtin_prefetch(ahead + o + k);
        for (int u = 0; u < U; ++u) {
            const vf v = load(x + i + u * W);
            vf d = (v - m) * inv_tau;
            vf e = exp_clamping(d);
            if (leave_out) {
                const vi top = v == m;
                e = top ? vf{} : e;
                ties -= top;
            }
            s[u] += e;
            t[u] += e * d;
        }
    }
    Sums sums = {reduce_sum(s), reduce_sum(t)};
    if (leave_out) {
        double count = -1;
        for (int i = 0; i < W; ++i) count += ties[i];
        sums.s += count;
    }
    return sums;
}

struct Row {
    float logprob, entropy, row_max, log_sum;
};

#include "row_extra.h"

template <typename T, bool capped, bool more>
Row row_forward(const T *z, int64_t V, int64_t y, double tau, float c, Extra *extra) {
    constexpr bool direct = sizeof(T) == 4 && !capped; // whole blocks are summed where they lie
    alignas(64) float buffer[BLOCK];
    const float inv_tau = (float)(1.0 / tau);
    float m = -INF;
    double rest = 0, t = 0; // s = 1 + rest as soon as m is finite
    bool poisoned = false;
    float x_y = QNAN;
    ExtraSums sums_of_extra;
    for (int64_t begin = 0; begin < V; begin += BLOCK) {
        const int64_t n = V - begin < BLOCK ? V - begin : BLOCK;
        const int64_t whole = n / STEP * STEP;
        const int64_t padded = (n + STEP - 1) / STEP * STEP;
        const T *p = z + begin;
        const float *x = buffer;
        vf top[U];
        for (int u = 0; u < U; ++u) top[u] = splat(-INF);
        if (direct && whole == n) {
            x = reinterpret_cast<const float *>(p);
            for (int64_t i = 0; i < n; i += STEP)
                for (int u = 0; u < U; ++u) top[u] = max_skipping_nan(load(x + i + u * W), top[u]);
        } else {
            for (int64_t i = 0; i < whole; i += STEP)
                for (int u = 0; u < U; ++u) {
                    vf v = load(p + i + u * W);
                    if (capped) v = softcapped(v, c);
                    store(buffer + i + u * W, v);
                    top[u] = max_skipping_nan(v, top[u]);
                }
            for (int64_t i = whole; i < padded; i += W) {
                const int64_t left = n - i < 0 ? 0 : (n - i < W ? n - i : W);
                T tail[W] = {};
                if (left > 0) std::memcpy(tail, p + i, left * sizeof(T));
                vf v = load(tail);
                if (capped) v = softcapped(v, c);
                for (int k = (int)left; k < W; ++k) v[k] = -INF;
                store(buffer + i, v);
                top[0] = max_skipping_nan(v, top[0]);
            }
        }
        if (y >= begin && y - begin < n) x_y = x[y - begin];
        for (int u = 1; u < U; ++u) top[0] = max_skipping_nan(top[u], top[0]);
        const float block_max = reduce_max(top[0]);
        if (more) sums_of_extra.of_logits(*extra, x, n, padded, y - begin, block_max);
        if (block_max == INF) { // the row is NaN whatever follows
            poisoned = true;
            break;
        }
        if (block_max == -INF && m == -INF) { // nothing to shift by; only NaN counts
            for (int64_t i = 0; i < padded; ++i) poisoned |= x[i] != x[i];
            continue;
        }
        if (more && block_max > m) sums_of_extra.move(m, block_max, tau);
        const int64_t after = V - begin - n;
        const int64_t ahead_bytes = (after < BLOCK ? after : BLOCK) * (int64_t)sizeof(T);
        const char *ahead = reinterpret_cast<const char *>(p + n);
        if (block_max > m) {
            if (m != -INF) { // what was summed so far moves to the new maximum
                const double d0 = ((double)m - (double)block_max) / tau, a = std::exp(d0);
                t = a * (t + (1.0 + rest) * d0);
                rest = a * (1.0 + rest);
            }
            m = block_max;
            const Sums sums = block_sums<true>(x, padded, m, inv_tau, ahead, ahead_bytes);
            rest += sums.s;
            t += sums.t;
            if (more) sums_of_extra.template of_shifted<true>(*extra, x, padded, m, inv_tau, {1.0 + sums.s, sums.t});
        } else {
            const Sums sums = block_sums<false>(x, padded, m, inv_tau, ahead, ahead_bytes);
            rest += sums.s;
            t += sums.t;
            if (more) sums_of_extra.template of_shifted<false>(*extra, x, padded, m, inv_tau, sums);
        }
    }
    if (more) extra->all(QNAN);
    if (poisoned) return {QNAN, QNAN, QNAN, QNAN};
    if (m <= FLOOR) return {QNAN, QNAN, rest == rest ? -INF : QNAN, QNAN};
    if (x_y <= FLOOR) x_y = -INF;
    const double log_sum = std::log1p(rest);
    const double logprob = ((double)x_y - (double)m) / tau - log_sum;
    if (more && log_sum == log_sum) sums_of_extra.finish(*extra, V, m, x_y, tau, log_sum);
    return {(float)logprob, (float)(log_sum - t / (1.0 + rest)), m, (float)log_sum};
}

struct Upstream {
    float row_max, log_sum, entropy, a, b;
};

// g = -(A + B log p) p (1 - (x/c)^2),  A = (a + b H)/tau,  B = b/tau; the target is then written once more, with
// a (1 - p) as -a expm1(log p). `g` may be `z`: each vector is read before it is written.
template <typename T, bool capped>
void row_backward(T *g, const T *z, int64_t V, int64_t y, double tau, float c, const Upstream &up) {
    const float inv_tau = (float)(1.0 / tau);
    const bool inside = y >= 0 && y < V;
    const float log_sum = inside || y == NO_TARGET ? up.log_sum : QNAN;
    if (up.a == 0 && up.b == 0 && log_sum == log_sum) {
        std::memset(static_cast<void *>(g), 0, V * sizeof(T));
        return;
    }
    const float A = (up.a + up.b * up.entropy) * inv_tau, B = up.b * inv_tau;
    auto gradient = [&](vf v) __attribute__((always_inline)) {
        vf x = v, slope = {};
        if (capped) {
            const vf u = tanh_vector(v / c);
            x = uncapped(v) ? v : c * u;
            slope = 1.0f - u * u;
        }
        vf log_p = (x - up.row_max) * inv_tau - log_sum;
        const vf p = exp_clamping(log_p);
        vf out = -(p * (A + B * log_p));
        if (capped) out *= slope;
        return out;
    };
    float g_y = QNAN;
    if (inside) {
        const float z_y = load_one(z + y);
        double x = z_y, slope = 1;
        if (capped && !(z_y <= FLOOR || std::isinf(z_y))) { // by the same function as in forward: x equals the maximum when it was it
            x = softcapped(splat(z_y), c)[0];
            slope = 1 - (x / c) * (x / c);
        }
        double log_p = (x - up.row_max) / tau - log_sum;
        if (log_p > 0) log_p = 0;
        const double p = std::exp(log_p);
        const double from_entropy = p == 0 ? 0 : up.b * p * (log_p + up.entropy);
        g_y = (float)(slope / tau * (up.a * -std::expm1(log_p) - from_entropy));
    }
    int64_t i = 0;
    for (; i + W <= V; i += W) store(g + i, gradient(load(z + i)));
    if (i < V) {
        T tail[W] = {};
        std::memcpy(tail, z + i, (V - i) * sizeof(T));
        store(tail, gradient(load(tail)));
        std::memcpy(g + i, tail, (V - i) * sizeof(T));
    }
    if (inside) store_one(g + y, g_y);
}

} // namespace

extern "C" {

// Row r of the logits begins at element (r / R2) s1 + (r % R2) s2. Threads share `*next` and claim rows from it.
struct GemRows {
    const void *logits;
    int64_t N, R2, V, s1, s2;
    const int64_t *targets;
    const float *tau_rows; // [N], or null: then `tau`
    double tau, softcap;   // softcap 0: none
    int64_t ignore_index;
    int64_t dtype; // 0 float32, 1 bfloat16, 2 float16
    float *logprobs, *entropy, *row_max, *log_sum;
    const float *grad_logprobs, *grad_entropy;
    void *grad_logits;
    int64_t g1, g2;
    int64_t *next;
    float *extra[EXTRA]; // each null where it is not wanted
};
}

namespace {

// The next `count` rows for this thread begin at the number returned; past N there are none.
INLINE int64_t claim(const GemRows *a, int64_t count) { return __atomic_fetch_add(a->next, count, __ATOMIC_RELAXED); }

template <typename T, bool capped, bool more> void forward_rows_with(const GemRows *a) {
    Extra wanted = {};
    for (int i = 0; i < EXTRA; ++i) wanted.wanted[i] = a->extra[i] != nullptr;
    const int64_t count = a->V >= CLAIM ? 1 : CLAIM / (a->V > 0 ? a->V : 1);
    for (int64_t first; (first = claim(a, count)) < a->N;) {
        const int64_t end = first + count < a->N ? first + count : a->N;
        for (int64_t r = first; r < end; ++r) {
            const int64_t y = a->targets[r];
            Row out = {0, 0, 0, 0};
            Extra extra = wanted;
            if (y != a->ignore_index) {
                const T *z = static_cast<const T *>(a->logits) + (r / a->R2) * a->s1 + (r % a->R2) * a->s2;
                const double tau = a->tau_rows ? (double)a->tau_rows[r] : a->tau;
                if ((y < 0 || y >= a->V) && y != NO_TARGET) {
                    out = {QNAN, QNAN, QNAN, QNAN};
                    extra.all(QNAN);
                } else {
                    out = row_forward<T, capped, more>(z, a->V, y, tau, (float)a->softcap, &extra);
                }
            }
            a->logprobs[r] = out.logprob;
            a->entropy[r] = out.entropy;
            a->row_max[r] = out.row_max;
            a->log_sum[r] = out.log_sum;
            for (int i = 0; more && i < EXTRA; ++i)
                if (a->extra[i]) a->extra[i][r] = extra.values[i];
        }
    }
}

template <typename T, bool capped> void forward_rows(const GemRows *a) {
    for (const float *wanted : a->extra)
        if (wanted) return forward_rows_with<T, capped, true>(a);
    forward_rows_with<T, capped, false>(a);
}

template <typename T, bool capped> void backward_rows(const GemRows *a) {
    const int64_t count = a->V >= CLAIM ? 1 : CLAIM / (a->V > 0 ? a->V : 1);
    for (int64_t first; (first = claim(a, count)) < a->N;) {
        const int64_t end = first + count < a->N ? first + count : a->N;
        for (int64_t r = first; r < end; ++r) {
            T *g = static_cast<T *>(a->grad_logits) + (r / a->R2) * a->g1 + (r % a->R2) * a->g2;
            if (a->targets[r] == a->ignore_index) {
                std::memset(static_cast<void *>(g), 0, a->V * sizeof(T));
                continue;
            }
            const T *z = static_cast<const T *>(a->logits) + (r / a->R2) * a->s1 + (r % a->R2) * a->s2;
            const double tau = a->tau_rows ? (double)a->tau_rows[r] : a->tau;
            const Upstream up = {a->row_max[r], a->log_sum[r], a->entropy[r], a->grad_logprobs[r], a->grad_entropy[r]};
            row_backward<T, capped>(g, z, a->V, a->targets[r], tau, (float)a->softcap, up);
        }
    }
}

} // namespace

extern "C" {

#define DISPATCH(function)                                                                                             \
    const bool capped = a->softcap != 0;                                                                               \
    if (a->dtype == 0)                                                                                                 \
        capped ? function<float, true>(a) : function<float, false>(a);                                                 \
    else if (a->dtype == 1)                                                                                            \
        capped ? function<BFloat, true>(a) : function<BFloat, false>(a);                                               \
    else                                                                                                               \
        capped ? function<Half, true>(a) : function<Half, false>(a);

void gem_row_stats_forward(const GemRows *a) { DISPATCH(forward_rows) }

void gem_row_stats_backward(const GemRows *a) { DISPATCH(backward_rows) }
}
