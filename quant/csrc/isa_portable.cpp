// Plain C++ for every other processor; written so that compilers vectorise the loops over the 16 rows.
#include <math.h>
#include <string.h>

#include "half.h"
#include "isa.h"
#include "pocketmoe_cpu.h"

namespace {

using Vec = float;
constexpr int WIDTH = 1;
constexpr int PANEL_BLOCKS = 1, PANEL_TILE = 4, PANEL_GROUPS = 16, PANEL_ROWS = 64, PANEL_FROM = 1, DIRECT_TILE = 0;

PM_INLINE Vec vload(const float* p) { return *p; }
PM_INLINE void vstore(float* p, Vec v) { *p = v; }
PM_INLINE Vec vset(float x) { return x; }
PM_INLINE Vec vadd(Vec a, Vec b) { return a + b; }
PM_INLINE Vec vsub(Vec a, Vec b) { return a - b; }
PM_INLINE Vec vmul(Vec a, Vec b) { return a * b; }
PM_INLINE Vec vdiv(Vec a, Vec b) { return a / b; }
#ifdef FP_FAST_FMAF
PM_INLINE Vec vfma(Vec a, Vec b, Vec c) { return fmaf(a, b, c); }
#else
PM_INLINE Vec vfma(Vec a, Vec b, Vec c) { return a * b + c; }  // fmaf would be a library call
#endif
PM_INLINE Vec vmin(Vec a, Vec b) { return a < b ? a : b; }  // b where either is NaN
PM_INLINE Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
PM_INLINE float vsum(Vec a) { return a; }
// Adding and subtracting 1.5 * 2^23 rounds to the nearest integer, ties to even.
PM_INLINE Vec vround(Vec a) { return (a + pm::MAGIC) - pm::MAGIC; }
PM_INLINE Vec vscale2(Vec a, Vec n) {  // a * 2^n for -126 <= n <= 127; NaN stays NaN
    const Vec bounded = n >= -126.0f && n <= 127.0f ? n : 0.0f;
    const int32_t bits = (static_cast<int32_t>(bounded) + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return a * power;
}

PM_INLINE void prefetch_later(const uint8_t*, int64_t) {}

PM_INLINE uint32_t max_magnitude_bits(const float* x) {
    uint32_t largest = 0;
    for (int c = 0; c < pm::COLUMNS; c++) {
        uint32_t bits;
        memcpy(&bits, x + c, 4);
        bits &= 0x7FFFFFFFu;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

PM_INLINE int32_t round_codes(const float* x, float inverse, int8_t* codes) {
    int32_t sum = 0;
    for (int c = 0; c < pm::COLUMNS; c++) {
        const float value = inverse == 0.0f ? 0.0f : x[c] * inverse;  // inverse 0: x may be NaN
        const int32_t code = static_cast<int32_t>(vround(value));
        codes[c] = static_cast<int8_t>(code);
        sum += code;
    }
    return sum;
}

PM_INLINE Vec load_half(const uint8_t* p) { return pm::half_float(p); }

PM_INLINE void load_halves(const uint8_t* p, float* out) {
    for (int r = 0; r < pm::ROW_BLOCK; r++) out[r] = pm::half_float(p + 2 * r);
}

PM_INLINE void load_exponents(const uint8_t* p, float* out) {
    for (int r = 0; r < pm::ROW_BLOCK; r++) {
        const uint32_t bits = static_cast<uint32_t>(p[r]) << 23;
        memcpy(out + r, &bits, 4);
    }
}

PM_INLINE void load_words(const uint8_t* p, float* scales, float* minimums) {
    for (int r = 0; r < pm::ROW_BLOCK; r++) {
        uint16_t word;
        memcpy(&word, p + 2 * r, 2);
        const uint32_t bits = (static_cast<uint32_t>(word & pm::WORD_SCALE) << 12) + pm::WORD_BIAS;
        memcpy(scales + r, &bits, 4);
        minimums[r] = static_cast<float>(word & pm::WORD_ZERO) * (scales[r] * pm::WORD_STEP);
    }
}

// Packed chunks of 8 columns to two chunks of 4 columns each, bytes to multiply by.
template <int FORMAT>
PM_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* to, int chunks) {
    for (int c = 0; c < chunks; c++) {
        for (int i = 0; i < 64; i++) to[128 * c + i] = from[64 * c + i] & 15;
        for (int i = 0; i < 64; i++) to[128 * c + 64 + i] = from[64 * c + i] >> 4;
    }
    if (FORMAT == PM_MXFP4)
        for (int i = 0; i < 128 * chunks; i++) to[i] = pm::E2M1[to[i]];
}

// The four columns of each row.
template <typename Integer>
PM_INLINE void add_fours(const Integer* lanes, int32_t* sum) {
    for (int r = 0; r < pm::ROW_BLOCK; r++)
        sum[r] = lanes[4 * r] + lanes[4 * r + 1] + lanes[4 * r + 2] + lanes[4 * r + 3];
}

// acc[16] += weights x activations for one group; `codes` are 8 chunks of 4 columns of 16 rows.
template <int FORMAT>
PM_INLINE void add_group(const uint8_t* codes, const float* scale, const float* minimum, const pm::Group& x,
                         float* acc) {
    constexpr int ZERO = FORMAT == PM_INT4 ? 8 : FORMAT == PM_INT8 ? 128 : FORMAT == PM_MXFP4 ? pm::E2M1_ZERO : 0;
    constexpr int LANES = 4 * pm::ROW_BLOCK;
    int32_t sum[pm::ROW_BLOCK];
    if (FORMAT == PM_INT8) {
        int32_t lanes[LANES] = {};
        for (int c = 0; c < 8; c++) {
            int16_t q[8];
            for (int j = 0; j < 8; j++) q[j] = x.codes[4 * c + j % 4];
            for (int i = 0; i < LANES; i += 8)
                for (int j = 0; j < 8; j++) lanes[i + j] += static_cast<int16_t>(codes[64 * c + i + j] - ZERO) * q[j];
        }
        add_fours(lanes, sum);
    } else {
        // 16 bits hold eight products of at most 15 * 127.
        int16_t lanes[LANES] = {};
        for (int c = 0; c < 8; c++) {
            int16_t q[8];
            for (int j = 0; j < 8; j++) q[j] = x.codes[4 * c + j % 4];
            for (int i = 0; i < LANES; i += 8)
                for (int j = 0; j < 8; j++)
                    lanes[i + j] = static_cast<int16_t>(lanes[i + j] + (codes[64 * c + i + j] - ZERO) * q[j]);
        }
        add_fours(lanes, sum);
    }
    for (int r = 0; r < pm::ROW_BLOCK; r++) {
        acc[r] = vfma(scale[r], x.scale * static_cast<float>(sum[r]), acc[r]);
        if (pm::HAS_MINIMUM<FORMAT>) acc[r] = vfma(minimum[r], x.sum, acc[r]);
    }
}

template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_tile(const uint8_t* const* codes, const float* scales, const float* minimums, int groups,
                          const pm::Group* const* rows, float* out) {
    for (int b = 0; b < BLOCKS; b++)
        for (int g = 0; g < groups; g++)
            for (int t = 0; t < ROWS; t++) {
                const int64_t lane = (g * BLOCKS + b) * pm::ROW_BLOCK;
                add_group<FORMAT>(codes[b] + 512 * g, scales + lane, minimums + lane, rows[t][g],
                                  out + (t * BLOCKS + b) * pm::ROW_BLOCK);
            }
}

uint64_t read(const uint8_t* data, int64_t nbytes) {
    uint64_t sum[8] = {}, total = 0;
    int64_t i = 0;
    for (; i + 64 <= nbytes; i += 64) {
        uint64_t words[8];
        memcpy(words, data + i, 64);
        for (int j = 0; j < 8; j++) sum[j] ^= words[j];
    }
    for (uint64_t word : sum) total ^= word;
    for (; i < nbytes; i++) total ^= data[i];
    return total;
}

bool always() { return true; }

}  // namespace

#include "kernels.h"

namespace pm {
const Isa isa_portable = {"portable", always, PM_KERNELS};
}
