// The optional statistics of a row of logits: part of row_stats.cpp, inside its namespace.
//
// With p = e^d / s and H as there; V words; x the largest logits first:
//
//     self_certainty = log s - log V - mean d       varentropy = sum p (log p + H)^2       top_logprob = -log s
//     log_sum_sq_probs = log sum e^2d - 2 log s     mean_logits = mean x / tau             margin = (x_1 - x_2) / tau
//
// Each goes once more over a block that is in the first-level cache. Parts of a row merge by their means of d, so that
// a varentropy is a sum of squares everywhere and never a difference of large numbers.

enum { SELF_CERTAINTY, VARENTROPY, LOG_SUM_SQ_PROBS, MEAN_LOGITS, IS_TOP1, TOP_LOGPROB, MARGIN, EXTRA };

struct Extra {
    bool wanted[EXTRA];
    float values[EXTRA];

    void all(float value) {
        for (float &x : values) x = value;
        values[IS_TOP1] = 0;
    }
};

// Sum x over `n` elements; -inf with a masked word. Eight at a time are added in float32, the rest in double.
INLINE double sum_of_logits(const float *x, int64_t n) {
    double sum = 0;
    int64_t i = 0;
    for (; i + 8 * STEP <= n; i += 8 * STEP) {
        vf lanes[U] = {};
        for (int64_t j = i; j < i + 8 * STEP; j += STEP)
            for (int u = 0; u < U; ++u) {
                const vf v = load(x + j + u * W);
                lanes[u] += v <= FLOOR ? splat(-INF) : v;
            }
        sum += reduce_sum(lanes);
    }
    for (; i < n; ++i) sum += x[i] <= FLOOR ? -INF : x[i];
    return sum;
}

struct ExtraSums {
    double s = 0, k = 0, q = 0; // sum e^d, the mean of d by e^d, sum e^d (d - k)^2
    double rest2 = 0;           // sum e^2d without one element that attains the maximum
    double x = 0;               // sum x
    float first = -INF, second = -INF, before = -INF; // the two largest; the largest before the target
    bool tie = false;           // in the target's block a word before it is as large

    // Of a block that begins `y` elements before the target.
    inline void of_logits(const Extra &extra, const float *p, int64_t n, int64_t padded, int64_t y, float block_max) {
        if (extra.wanted[SELF_CERTAINTY] || extra.wanted[MEAN_LOGITS]) x += sum_of_logits(p, n);
        if (extra.wanted[MARGIN]) two_largest(p, padded);
        if (extra.wanted[IS_TOP1] && y >= n && block_max > before) before = block_max;
        if (extra.wanted[IS_TOP1] && y >= 0 && y < n) {
            int ties = 0;
            for (int64_t i = 0; i < y; ++i) ties |= p[i] >= p[y];
            tie = ties != 0;
        }
    }

    inline void two_largest(const float *p, int64_t n) {
        vf a[U], b[U];
        for (int u = 0; u < U; ++u) a[u] = b[u] = splat(-INF);
        for (int64_t i = 0; i < n; i += STEP)
            for (int u = 0; u < U; ++u) {
                const vf v = load(p + i + u * W);
                b[u] = max_skipping_nan(v < a[u] ? v : a[u], b[u]);
                a[u] = max_skipping_nan(v, a[u]);
            }
        for (int u = 0; u < U; ++u)
            for (int k = 0; k < 2 * W; ++k) {
                const float v = k < W ? a[u][k] : b[u][k - W];
                second = v > first ? first : (v > second ? v : second);
                first = v > first ? v : first;
            }
    }

    // The maximum moves up from `m`.
    inline void move(float m, float to, double tau) {
        if (m == -INF) return;
        const double d0 = ((double)m - (double)to) / tau, a = std::exp(d0);
        s *= a;
        q *= a;
        k += d0;
        rest2 = a * a * (1.0 + rest2);
    }

    // Of a block whose sums of e^d and e^d d are `sums`. leave_out: as in block_sums.
    template <bool leave_out>
    inline void of_shifted(const Extra &extra, const float *p, int64_t n, float m, float inv_tau, Sums sums) {
        if (!(extra.wanted[VARENTROPY] || extra.wanted[LOG_SUM_SQ_PROBS]) || !(sums.s > 0)) return;
        const double mean = sums.t / sums.s;
        const float near = (float)mean;
        vf squares[U] = {}, e2[U] = {};
        vi ties = {};
        for (int64_t i = 0; i < n; i += STEP)
            for (int u = 0; u < U; ++u) {
                const vf v = load(p + i + u * W);
                vf d = (v - m) * inv_tau;
                const vf e = exp_clamping(d);
                const vf from = d - near;
                squares[u] += e * from * from;
                vf square = e * e;
                if (leave_out) {
                    const vi top = v == m;
                    square = top ? vf{} : square;
                    ties -= top;
                }
                e2[u] += square;
            }
        rest2 += reduce_sum(e2);
        if (leave_out) {
            rest2 -= 1;
            for (int i = 0; i < W; ++i) rest2 += ties[i];
        }
        const double total = s + sums.s, apart = mean - k, share = sums.s / total;
        q += reduce_sum(squares) + apart * apart * s * share;
        k += apart * share;
        s = total;
    }

    inline void finish(Extra &extra, int64_t V, float m, float x_y, double tau, double log_sum) const {
        const double mean = x / (double)V;
        float *out = extra.values;
        out[SELF_CERTAINTY] = (float)(log_sum - std::log((double)V) - (mean - (double)m) / tau);
        out[VARENTROPY] = (float)(q / s);
        out[LOG_SUM_SQ_PROBS] = (float)(std::log1p(rest2) - 2 * log_sum);
        out[MEAN_LOGITS] = (float)(mean / tau);
        out[IS_TOP1] = x_y == m && !tie && !(before >= m);
        out[TOP_LOGPROB] = (float)-log_sum;
        out[MARGIN] = second <= FLOOR ? INF : (float)(((double)first - (double)second) / tau);
    }
};
