// Token entropies and log-probabilities of each completion -> its features and score.
//
//     final = mean H of the answer span          fork = mean of the m largest H of the reasoning span
//     reasoning, mean, max: of H over the reasoning span, all counted tokens, all counted tokens
//     mean, sum, min of the log-probabilities, and the number of counted tokens
//     score = sum over features of weight * feature, features of weight 0 left out
//
// One pass over the tokens, and a selection (expected linear time) in a copy of the reasoning span. Sums are
// double. A NaN makes NaN of what is made from it, in its own completion only.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

namespace {

constexpr int NUM_FEATURES = 9;
constexpr int64_t CLAIM_TOKENS = 4096; // tokens a thread takes at a time

} // namespace

extern "C" {

struct GemSpans {
    const float *entropy;   // [B, T] or [N]
    const float *logprobs;  // the same, or null: their features are 0
    const uint8_t *mask;    // [B, T] where padded
    const int64_t *offsets; // [B + 1] where packed, else null
    const int64_t *starts;  // [B]
    const uint8_t *valid;   // [B] or null
    float *features;        // [9, B]
    float *score;           // [B]
    uint8_t *ok;            // [B]
    int64_t B, T;
    int64_t numerator, denominator; // of the share of the reasoning span; denominator 0: a count
    int64_t exclude;
    double weights[NUM_FEATURES];
    int64_t *next;
};
}

namespace {

// Keys of the same order as the numbers: all bits of a negative are flipped, the sign bit of a positive.
inline uint32_t ordered(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

constexpr int DIGIT_SHIFT = 21; // the upper 11 bits: sign, exponent and three of the fraction
constexpr int BINS = 1 << (32 - DIGIT_SHIFT);
constexpr int64_t SHORT = 64; // below, a histogram costs more than it saves

// Mean of the m largest of `values`, which it reorders. A histogram of the upper digit finds the bin of the m-th
// largest; all above that bin count, and nth_element looks at that bin alone.
double mean_of_top(std::vector<float> &values, int64_t m) {
    double sum = 0;
    int64_t wanted = m, n = (int64_t)values.size();
    if (n > SHORT && m < n) {
        uint32_t histogram[BINS] = {};
        for (float x : values)
            ++histogram[ordered(x) >> DIGIT_SHIFT];
        uint32_t bin = BINS - 1;
        for (int64_t above = 0; (above += histogram[bin]) < m; --bin)
            wanted = m - above;
        n = 0;
        for (float x : values) {
            const uint32_t digit = ordered(x) >> DIGIT_SHIFT;
            sum += digit > bin ? (double)x : 0.0;
            values[n] = x; // kept where it is of the bin; writes never pass the read
            n += digit == bin;
        }
    }
    if (wanted < n)
        std::nth_element(values.begin(), values.begin() + (wanted - 1), values.begin() + n, std::greater<float>());
    for (int64_t k = 0; k < wanted; ++k)
        sum += values[k];
    return sum / (double)m;
}

void completion(const GemSpans *a, int64_t i, std::vector<float> &reasoning) {
    const bool packed = a->offsets != nullptr; // not by the mask: an empty tensor has no address
    const int64_t row = packed ? a->offsets[i] : i * a->T;
    const int64_t length = packed ? a->offsets[i + 1] - row : a->T;
    const uint8_t *mask = packed ? nullptr : a->mask + row;
    int64_t first = 0, end = length;
    if (!packed) {
        while (first < end && !mask[first])
            ++first;
        while (end > first && !mask[end - 1])
            --end;
    }
    const int64_t n = end - first, start = a->starts[i];
    const bool found = start >= 0 && start < n;
    const int64_t answer = first + (found ? start : 4 * n / 5);
    for (int f = 0; f < NUM_FEATURES; ++f)
        a->features[f * a->B + i] = 0;
    a->score[i] = 0;
    a->ok[i] = 0;
    if ((a->exclude && !found) || (a->valid && !a->valid[i]))
        return;

    constexpr double INF = std::numeric_limits<double>::infinity(), NaN = std::numeric_limits<double>::quiet_NaN();
    reasoning.clear();
    double sum_final = 0, sum_reasoning = 0, max_entropy = -INF, sum_logprob = 0, min_logprob = INF;
    int64_t n_final = 0;
    for (int64_t t = first; t < end; ++t) {
        if (mask && !mask[t])
            continue;
        const float h = a->entropy[row + t];
        if (t < answer) {
            reasoning.push_back(h);
            sum_reasoning += h;
        } else {
            sum_final += h;
            ++n_final;
        }
        max_entropy = h > max_entropy ? h : max_entropy;
        if (a->logprobs) {
            const float l = a->logprobs[row + t];
            sum_logprob += l;
            min_logprob = l < min_logprob ? l : min_logprob;
        }
    }
    if (n_final == 0)
        return;
    const int64_t n_reasoning = (int64_t)reasoning.size();
    const double count = (double)(n_reasoning + n_final);
    double fork = 0;
    if (n_reasoning > 0) {
        const int64_t most = a->denominator ? a->numerator * n_reasoning / a->denominator : a->numerator;
        // NaN has no place in an order; it is above all numbers, so it is among the largest.
        fork = std::isnan(sum_reasoning) ? NaN : mean_of_top(reasoning, std::clamp<int64_t>(most, 1, n_reasoning));
    }
    const double sum = sum_reasoning + sum_final;
    const double values[NUM_FEATURES] = {
        sum_final / (double)n_final,
        fork,
        n_reasoning ? sum_reasoning / (double)n_reasoning : 0,
        sum / count,
        std::isnan(sum) ? NaN : max_entropy,
        a->logprobs ? sum_logprob / count : 0,
        sum_logprob,
        !a->logprobs ? 0 : std::isnan(sum_logprob) ? NaN : min_logprob,
        count,
    };
    double score = 0;
    for (int f = 0; f < NUM_FEATURES; ++f) {
        a->features[f * a->B + i] = (float)values[f];
        if (a->weights[f] != 0)
            score += a->weights[f] * values[f];
    }
    a->score[i] = (float)score;
    a->ok[i] = 1;
}

} // namespace

extern "C" {

void gem_span_scores(const GemSpans *a) {
    std::vector<float> reasoning;
    const int64_t count = std::max<int64_t>(1, CLAIM_TOKENS / std::max<int64_t>(1, a->T));
    for (int64_t first; (first = __atomic_fetch_add(a->next, count, __ATOMIC_RELAXED)) < a->B;)
        for (int64_t i = first; i < std::min(a->B, first + count); ++i)
            completion(a, i, reasoning);
}
}
