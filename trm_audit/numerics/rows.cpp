// Sums over rows of logits for a CPU: what torch_rows.py computes, in one visit to each row.
//
// A row is read in blocks that fit the L1 cache, float16 and bfloat16 being widened on the way. Each exponential is
// taken once: relative to its block's maximum at first, brought to the row's maximum by one factor per block. Products
// are summed in float32 lanes for the length of a block and in float64 from there on.
//
// A NaN or +inf makes its row's mass NaN, a row of -inf has none: log-sum-exp is not finite in either case.
// Every function works on one range of rows and touches nothing else, so ranges can run side by side.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif
constexpr int LANES = BYTES / 4;
constexpr int BLOCK = 1024;     // native.py allocates by it
constexpr int BUCKETS = 1024;
constexpr float OUTSIDE = -1e30f;  // stands for -inf in shifted logits
constexpr float SMALL = 0.5f;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

typedef float Floats __attribute__((vector_size(BYTES)));
typedef int32_t Ints __attribute__((vector_size(BYTES)));
typedef double Doubles __attribute__((vector_size(2 * BYTES)));

enum Type { FLOAT32, FLOAT16, BFLOAT16 };

struct Row {
    const void* logits;
    int type;
    int64_t vocab;
};

template <class To, class From>
To bits(From value) {
    static_assert(sizeof(To) == sizeof(From), "");
    To out;
    std::memcpy(&out, &value, sizeof out);
    return out;
}

Floats load(const float* at) {
    Floats out;
    std::memcpy(&out, at, sizeof out);
    return out;
}

void store(float* at, Floats value) { std::memcpy(at, &value, sizeof value); }

Floats all(float value) { return Floats{} + value; }

double sum(Floats lanes) {
    double total = 0;
    for (int i = 0; i < LANES; ++i) total += lanes[i];
    return total;
}

bool any(Ints lanes) {
    int32_t found = 0;
    for (int i = 0; i < LANES; ++i) found |= lanes[i];
    return found != 0;
}

float largest(Floats lanes) {
    float out = lanes[0];
    for (int i = 1; i < LANES; ++i) out = lanes[i] > out ? lanes[i] : out;
    return out;
}

// Exact, subnormal halves included: their bits are a float's subnormal bits, and the product makes them normal.
float from_half(uint16_t half) {
    uint32_t magnitude = uint32_t(half & 0x7fff) << 13;
    uint32_t scaled = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
    uint32_t special = magnitude | 0x7f800000;
    return bits<float>((magnitude >= 0x0f800000 ? special : scaled) | uint32_t(half & 0x8000) << 16);
}

void from_halves(const uint16_t* in, int n, float* out) {
    int i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
#endif
    for (; i < n; ++i) out[i] = from_half(in[i]);
}

// Logits at .. at + BLOCK as float32, -inf beyond the end of the row; where nothing has to be done, where they lie.
const float* widen(const Row& row, int64_t at, float* out) {
    int n = int(std::min<int64_t>(BLOCK, row.vocab - at));
    if (row.type == FLOAT32) {
        const float* in = static_cast<const float*>(row.logits) + at;
        if (n == BLOCK) return in;
        std::memcpy(out, in, n * sizeof(float));
    } else {
        const uint16_t* in = static_cast<const uint16_t*>(row.logits) + at;
        if (row.type == FLOAT16)
            from_halves(in, n, out);
        else
            for (int i = 0; i < n; ++i) out[i] = bits<float>(uint32_t(in[i]) << 16);
    }
    std::fill(out + n, out + BLOCK, -INF);
    return out;
}

// exp(x) for x <= 0 to about an ulp; 0 below -87.3, where float32 has no normal numbers; NaN stays NaN.
// Cephes' polynomial on [-log(2)/2, log(2)/2].
Floats exponential(Floats x) {
    const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Floats rounded = x * 1.44269504088896341f + magic;
    Floats n = rounded - magic;
    Floats r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    Floats y = all(1.9875691500e-4f);
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    Ints exponent = (bits<Ints>(rounded) - bits<Ints>(magic) + 127) << 23;
    return x < -87.3f ? all(0) : y * bits<Floats>(exponent);
}

// Logits less a maximum; -inf becomes OUTSIDE, so that what is computed with it stays a number. NaN stays NaN.
Floats shifted(const float* logits, float peak) {
    Floats s = load(logits) - peak, least = all(OUTSIDE);
    return least > s ? least : s;
}

float block_peak(const float* logits) {
    Floats peak = all(-INF), other = peak;
    for (int i = 0; i < BLOCK; i += 2 * LANES) {
        Floats a = load(logits + i), b = load(logits + i + LANES);
        peak = a > peak ? a : peak;
        other = b > other ? b : other;
    }
    return largest(peak > other ? peak : other);
}

// Sums over a row, relative to its maximum: of exp(s), and of s exp(s).
struct Mass {
    double peak = -std::numeric_limits<float>::max();
    double mass = 0, dot = 0;

    void add(double at, double block_mass, double block_dot) {
        if (block_mass == 0) return;  // nothing but -inf
        if (at > peak) {
            double shrink = std::exp(peak - at);
            dot = shrink * (dot + (peak - at) * mass);
            mass *= shrink;
            peak = at;
        }
        double grow = std::exp(at - peak);
        mass += grow * block_mass;
        dot += grow * (block_dot + (at - peak) * block_mass);
    }
    double logsumexp() const { return peak + std::log(mass); }
    double entropy() const { return std::log(mass) - dot / mass; }
};

// One row's sums; with `kept`, its exponentials too, block by block, and after them each block's maximum.
Mass scan(const Row& row, float* kept, float* peaks) {
    alignas(BYTES) float buffer[BLOCK];
    Mass out;
    for (int64_t at = 0; at < row.vocab; at += BLOCK) {
        const float* logits = widen(row, at, buffer);
        float peak = block_peak(logits);
        float origin = peak > -INF ? peak : 0;
        Floats mass{}, dot{};
        for (int i = 0; i < BLOCK; i += LANES) {
            Floats s = shifted(logits + i, origin);
            Floats e = exponential(s);
            if (kept) store(kept + at + i, e);
            mass += e;
            dot += e * s;
        }
        if (kept) peaks[at / BLOCK] = origin;
        out.add(peak, sum(mass), sum(dot));
    }
    return out;
}

struct Pair {
    double forward = 0, reverse = 0, gap = 0, distance = 0, slope = 0;
    bool excluded_by_q = false, excluded_by_p = false;
};

// A block of both distributions; `p` and `q` are exponentials, scale_p and scale_q what makes them probabilities.
void compare(const float* a, const float* b, const float* p, const float* q, float peak_a, float peak_b,
             float scale_p, float scale_q, float log_ratio, Pair& out) {
    Floats forward{}, reverse{}, gap{}, distance{}, slope{};
    Ints by_q{}, by_p{};
    for (int i = 0; i < BLOCK; i += LANES) {
        Floats sa = shifted(a + i, peak_a), sb = shifted(b + i, peak_b);
        Floats pi = load(p + i) * scale_p, qi = load(q + i) * scale_q;
        Floats x = (sb - sa) - log_ratio;  // log q - log p
        Floats size = x < 0 ? -x : x;
        Floats xx = x * x;
        Floats even = xx * (1.f / 2 + xx * (1.f / 24 + xx * (1.f / 720 + xx * (1.f / 40320))));
        Floats odd = x * xx * (1.f / 6 + xx * (1.f / 120 + xx * (1.f / 5040 + xx * (1.f / 362880))));
        Floats d = size < SMALL ? pi * (x + even + odd) : qi - pi;  // q - p, with all digits where they are close
        forward += size < SMALL ? pi * (even + odd) : d - pi * x;
        reverse += size < SMALL ? qi * (even - odd) : qi * x - d;
        gap += d;
        distance += d < 0 ? -d : d;
        slope += d > 0 ? qi : -qi;
        Ints out_a = sa == OUTSIDE, out_b = sb == OUTSIDE;
        by_q |= out_b & ~out_a;
        by_p |= out_a & ~out_b;
    }
    out.forward += sum(forward);
    out.reverse += sum(reverse);
    out.gap += sum(gap);
    out.distance += sum(distance);
    out.slope += sum(slope);
    out.excluded_by_q |= any(by_q);
    out.excluded_by_p |= any(by_p);
}

double token(const Row& row, int64_t id) {
    alignas(BYTES) float buffer[BLOCK];
    if (id < 0 || id >= row.vocab) return NOT_A_NUMBER;
    return widen(row, id / BLOCK * BLOCK, buffer)[id % BLOCK];
}

Pair pair(const Row& rollout, const Row& trainer, const Mass& a, const Mass& b, const float* p, const float* q,
          const float* peaks_p, const float* peaks_q) {
    alignas(BYTES) float buffer_a[BLOCK], buffer_b[BLOCK];
    float log_ratio = float(std::log(b.mass) - std::log(a.mass));
    Pair out;
    for (int64_t at = 0; at < rollout.vocab; at += BLOCK) {
        float scale_p = float(std::exp(peaks_p[at / BLOCK] - a.peak) / a.mass);
        float scale_q = float(std::exp(peaks_q[at / BLOCK] - b.peak) / b.mass);
        compare(widen(rollout, at, buffer_a), widen(trainer, at, buffer_b), p + at, q + at, float(a.peak),
                float(b.peak), scale_p, scale_q, log_ratio, out);
    }
    return out;
}

// Buckets of equal width between two finite values, outside which nothing lies but -inf below (in the first bucket).
// NaN is in none. Halves, because the difference of two floats can be too large for one.
struct Buckets {
    float half, scale;

    Buckets(float low, float high)
        : half(high < low ? 0 : low / 2), scale(high > low ? (BUCKETS - 1) / (high / 2 - low / 2) : 1) {}
    Floats operator()(Floats values) const {
        Floats at = (values * 0.5f - half) * scale;
        return at < 0 ? all(0) : at;
    }
};

// Sum of the values below bucket `place`; those in it go to `buffer`. values: padded with NaN to a multiple of LANES.
double sum_below(const float* values, int64_t n, const Buckets& bucket, int place, float* buffer, int64_t* kept) {
    Doubles total{};
    *kept = 0;
    for (int64_t i = 0; i < n; i += LANES) {
        Floats v = load(values + i), at = bucket(v);
        total += __builtin_convertvector(at < float(place) ? v : all(0), Doubles);
        Ints here = (at >= float(place)) & (at < float(place + 1));
        if (any(here))
            for (int j = 0; j < LANES; ++j)
                if (here[j]) buffer[(*kept)++] = v[j];
    }
    double out = 0;
    for (int i = 0; i < LANES; ++i) out += total[i];
    return out;
}

// The `count` smallest of n values: their sum, and the next one (0 if there is none). `values` as above, no NaN.
void smallest(const float* values, int64_t n, int64_t count, float low, float high, float* buffer, double* low_sum,
              double* next) {
    Buckets bucket(low, high);
    int64_t counts[BUCKETS] = {};
    for (int64_t i = 0; i < n; i += LANES) {
        Floats at = bucket(load(values + i));
        for (int j = 0; j < LANES && i + j < n; ++j) ++counts[int(at[j])];
    }
    int64_t below = 0, kept = 0;
    int place = 0;
    while (place < BUCKETS && below + counts[place] <= count) below += counts[place++];
    *low_sum = sum_below(values, n, bucket, place, buffer, &kept);
    *next = 0;
    if (place == BUCKETS) return;
    std::nth_element(buffer, buffer + (count - below), buffer + kept);
    for (int64_t i = 0; i < count - below; ++i) *low_sum += buffer[i];
    *next = buffer[count - below];
}

// Copies a row without the tokens of `ids` (k, ascending, repeated or not); returns how many are left.
int64_t without(const Row& row, const int64_t* ids, int64_t k, float* values) {
    for (int64_t at = 0; at < row.vocab; at += BLOCK) {
        const float* block = widen(row, at, values + at);
        if (block != values + at) std::memcpy(values + at, block, BLOCK * sizeof(float));
    }
    int64_t n = 0, next = 0;
    for (int64_t j = 0; j <= k; ++j) {
        int64_t end = j < k ? std::min(ids[j], row.vocab) : row.vocab;
        if (end > next) {
            std::memmove(values + n, values + next, (end - next) * sizeof(float));
            n += end - next;
        }
        next = std::max(next, end + 1);
    }
    return n;
}

Row row_of(const void* logits, int type, int64_t stride, int64_t vocab, int64_t i) {
    return Row{static_cast<const char*>(logits) + i * stride * (type == FLOAT32 ? 4 : 2), type, vocab};
}

}  // namespace

extern "C" {

// Per row of `out`: log-probability of ids[i] (NaN without ids), entropy, log-sum-exp.
void trm_single(const void* logits, int type, int64_t stride, int64_t rows, int64_t vocab, const int64_t* ids,
                double* out) {
    for (int64_t i = 0; i < rows; ++i, out += 3) {
        Row row = row_of(logits, type, stride, vocab, i);
        Mass sums = scan(row, nullptr, nullptr);
        out[0] = ids ? token(row, ids[i]) - sums.logsumexp() : NOT_A_NUMBER;
        out[1] = sums.entropy();
        out[2] = sums.logsumexp();
    }
}

// Per row of `out`: KL(a || b), KL(b || a), TV; of a and of b: entropies, log-probabilities (NaN without ids),
// log-sum-exps. scratch: 2 * (padded + padded / BLOCK) floats, `padded` being vocab rounded up to a multiple of BLOCK.
void trm_pair(const void* a, int type_a, int64_t stride_a, const void* b, int type_b, int64_t stride_b, int64_t rows,
              int64_t vocab, const int64_t* ids, float* scratch, double* out) {
    int64_t padded = (vocab + BLOCK - 1) / BLOCK * BLOCK;
    float *p = scratch, *q = p + padded, *peaks_p = q + padded, *peaks_q = peaks_p + padded / BLOCK;
    for (int64_t i = 0; i < rows; ++i, out += 9) {
        Row rollout = row_of(a, type_a, stride_a, vocab, i), trainer = row_of(b, type_b, stride_b, vocab, i);
        Mass left = scan(rollout, p, peaks_p), right = scan(trainer, q, peaks_q);
        out[3] = left.entropy();
        out[4] = right.entropy();
        out[5] = ids ? token(rollout, ids[i]) - left.logsumexp() : NOT_A_NUMBER;
        out[6] = ids ? token(trainer, ids[i]) - right.logsumexp() : NOT_A_NUMBER;
        out[7] = left.logsumexp();
        out[8] = right.logsumexp();
        out[0] = out[1] = out[2] = NOT_A_NUMBER;
        if (!std::isfinite(out[7]) || !std::isfinite(out[8])) continue;
        Pair sums = pair(rollout, trainer, left, right, p, q, peaks_p, peaks_q);
        out[0] = sums.excluded_by_q ? INF : sums.forward;
        out[1] = sums.excluded_by_p ? INF : sums.reverse;
        double tv = (sums.distance - sums.gap * sums.slope) / 2;  // see torch_rows.py
        out[2] = std::min(std::max(tv, 0.0), 1.0);
    }
}

// Per row of `out`, of the tokens that are not in ids: how many, log-sum-exp, sum of the `count` smallest, the next one,
// the smallest, the largest. ids: k ascending per row, repeated or not. scratch: 2 * padded floats.
void trm_tail(const void* logits, int type, int64_t stride, int64_t rows, int64_t vocab, const int64_t* ids, int64_t k,
              const int64_t* count, float* scratch, double* out) {
    float* values = scratch;
    float* buffer = scratch + (vocab + BLOCK - 1) / BLOCK * BLOCK;
    for (int64_t i = 0; i < rows; ++i, ids += k, out += 6) {
        int64_t n = without(row_of(logits, type, stride, vocab, i), ids, k, values);
        Mass sums = scan(Row{values, FLOAT32, n}, nullptr, nullptr);
        std::fill(out, out + 6, 0.0);
        out[0] = double(n);
        out[1] = sums.logsumexp();
        if (n == 0) continue;
        if (std::isnan(out[1])) {
            std::fill(out + 2, out + 6, NOT_A_NUMBER);
            continue;
        }
        std::fill(values + n, values + (n + LANES - 1) / LANES * LANES, float(NOT_A_NUMBER));
        Floats least = all(INF), low = least, high = -least;
        for (int64_t j = 0; j < n; j += LANES) {
            Floats v = load(values + j);
            least = v < least ? v : least;
            low = (v > -INF) & (v < low) ? v : low;
            high = v > high ? v : high;
        }
        out[4] = -largest(-least);
        out[5] = largest(high);
        smallest(values, n, std::min(count[i], n), -largest(-low), largest(high), buffer, out + 2, out + 3);
    }
}
}
