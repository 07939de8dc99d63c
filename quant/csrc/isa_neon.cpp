// ARM NEON with the dot product instructions of ARMv8.2: Apple silicon, Snapdragon, Graviton 2 and later.
#include <arm_neon.h>
#include <string.h>

#include "isa.h"
#include "pocketmoe_cpu.h"

namespace {

using Vec = float32x4_t;
constexpr int WIDTH = 4;
constexpr int PANEL_BLOCKS = 1, PANEL_TILE = 4, PANEL_GROUPS = 16, PANEL_ROWS = 64, PANEL_FROM = 5, DIRECT_TILE = 2;

PM_INLINE Vec vload(const float* p) { return vld1q_f32(p); }
PM_INLINE void vstore(float* p, Vec v) { vst1q_f32(p, v); }
PM_INLINE Vec vset(float x) { return vdupq_n_f32(x); }
PM_INLINE Vec vadd(Vec a, Vec b) { return vaddq_f32(a, b); }
PM_INLINE Vec vsub(Vec a, Vec b) { return vsubq_f32(a, b); }
PM_INLINE Vec vmul(Vec a, Vec b) { return vmulq_f32(a, b); }
PM_INLINE Vec vdiv(Vec a, Vec b) { return vdivq_f32(a, b); }
PM_INLINE Vec vfma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
PM_INLINE Vec vmin(Vec a, Vec b) { return vminq_f32(a, b); }  // NaN where either is NaN
PM_INLINE Vec vmax(Vec a, Vec b) { return vmaxq_f32(a, b); }
PM_INLINE Vec vround(Vec a) { return vrndnq_f32(a); }
PM_INLINE Vec vscale2(Vec a, Vec n) {  // a * 2^n for -127 < n < 128
    const int32x4_t exponent = vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127)), 23);
    return vmulq_f32(a, vreinterpretq_f32_s32(exponent));
}

PM_INLINE float vsum(Vec a) { return vaddvq_f32(a); }

PM_INLINE void prefetch_later(const uint8_t*, int64_t) {}  // these processors' own prefetchers do well

PM_INLINE uint32_t max_magnitude_bits(const float* x) {
    uint32x4_t largest = vdupq_n_u32(0);
    for (int c = 0; c < pm::COLUMNS; c += 4) {
        const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(x + c));
        largest = vmaxq_u32(largest, vandq_u32(bits, vdupq_n_u32(0x7FFFFFFFu)));
    }
    return vmaxvq_u32(largest);
}

PM_INLINE int32_t round_codes(const float* x, float inverse, int8_t* codes) {
    int32x4_t sum = vdupq_n_s32(0);
    for (int c = 0; c < pm::COLUMNS; c += 8) {
        const int32x4_t a = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + c), inverse));
        const int32x4_t b = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + c + 4), inverse));
        vst1_s8(codes + c, vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b))));
        sum = vaddq_s32(sum, vaddq_s32(a, b));
    }
    return vaddvq_s32(sum);
}

PM_INLINE Vec load_half(const uint8_t* p) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }

// 16 halves to floats.
PM_INLINE void load_halves(const uint8_t* p, float* out) {
    for (int r = 0; r < pm::ROW_BLOCK; r += 4) {
        uint16x4_t bits;
        memcpy(&bits, p + 2 * r, 8);
        vst1q_f32(out + r, vcvt_f32_f16(vreinterpret_f16_u16(bits)));
    }
}

// 16 exponents of float32 to floats.
PM_INLINE void load_exponents(const uint8_t* p, float* out) {
    const uint8x16_t bytes = vld1q_u8(p);
    const uint16x8_t words[2] = {vmovl_u8(vget_low_u8(bytes)), vmovl_u8(vget_high_u8(bytes))};
    for (int half = 0; half < 2; half++) {
        vst1q_f32(out + 8 * half, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_low_u16(words[half])), 23)));
        vst1q_f32(out + 8 * half + 4, vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vget_high_u16(words[half])), 23)));
    }
}

// 16 words of scale and zero point to scales and minimums.
PM_INLINE void load_words(const uint8_t* p, float* scales, float* minimums) {
    for (int r = 0; r < pm::ROW_BLOCK; r += 4) {
        uint16x4_t halves;
        memcpy(&halves, p + 2 * r, 8);
        const uint32x4_t words = vmovl_u16(halves);
        const uint32x4_t bits = vshlq_n_u32(vandq_u32(words, vdupq_n_u32(pm::WORD_SCALE)), 12);
        const Vec scale = vreinterpretq_f32_u32(vaddq_u32(bits, vdupq_n_u32(pm::WORD_BIAS)));
        const Vec zero = vcvtq_f32_u32(vandq_u32(words, vdupq_n_u32(pm::WORD_ZERO)));
        vstore(scales + r, scale);
        vstore(minimums + r, vmulq_f32(zero, vmulq_n_f32(scale, pm::WORD_STEP)));
    }
}

// Packed chunks of 8 columns to two chunks of 4 columns each: codes, for signed_weights.
template <int FORMAT>
PM_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* to, int chunks) {
    for (int c = 0; c < chunks; c++) {
        for (int h = 0; h < 64; h += 16) {
            const uint8x16_t w = vld1q_u8(from + 64 * c + h);
            vst1q_u8(to + 128 * c + h, vandq_u8(w, vdupq_n_u8(15)));
            vst1q_u8(to + 128 * c + 64 + h, vshrq_n_u8(w, 4));
        }
    }
}

// Codes to the signed weights they stand for.
template <int FORMAT>
PM_INLINE int8x16_t signed_weights(uint8x16_t codes) {
    if (FORMAT == PM_INT4) return vreinterpretq_s8_u8(vsubq_u8(codes, vdupq_n_u8(8)));
    if (FORMAT == PM_INT8) return vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(128)));
    if (FORMAT == PM_MXFP4) {
        const uint8x16_t table = vsubq_u8(vld1q_u8(pm::E2M1), vdupq_n_u8(pm::E2M1_ZERO));
        return vreinterpretq_s8_u8(vqtbl1q_u8(table, codes));
    }
    return vreinterpretq_s8_u8(codes);
}

// One group's activations: eight words of four columns.
struct Columns {
    int8x16_t low, high;
    PM_INLINE_MEMBER explicit Columns(const pm::Group& x) : low(vld1q_s8(x.codes)), high(vld1q_s8(x.codes + 16)) {}
};

// sum + weights (4 rows) x word `WORD` of the activations.
template <int WORD>
PM_INLINE int32x4_t dot_word(int32x4_t sum, int8x16_t weights, const Columns& x) {
    return WORD < 4 ? vdotq_laneq_s32(sum, weights, x.low, WORD & 3) : vdotq_laneq_s32(sum, weights, x.high, WORD & 3);
}

// acc += weights x activations for one group of 4 weight rows. Here the sums are exact already; see MAGIC in isa.h.
template <int FORMAT>
PM_INLINE Vec add_group(Vec acc, int32x4_t sum, Vec scale, Vec minimum, const pm::Group& x) {
    acc = vfmaq_f32(acc, scale, vmulq_n_f32(vcvtq_f32_s32(sum), x.scale));
    return pm::HAS_MINIMUM<FORMAT> ? vfmaq_f32(acc, minimum, vdupq_n_f32(x.sum)) : acc;
}

template <int FORMAT, int ROWS, int CHUNK>
PM_INLINE void add_chunk(const uint8_t* codes, const Columns* columns, int32x4_t (*sum)[4]) {
    for (int r = 0; r < 4; r++) {
        const uint8x16_t w = vld1q_u8(codes + 64 * CHUNK + 16 * r);
        if (FORMAT == PM_INT8) {
            const int8x16_t weights = signed_weights<FORMAT>(w);
            for (int t = 0; t < ROWS; t++) sum[t][r] = dot_word<CHUNK>(sum[t][r], weights, columns[t]);
        } else {
            const int8x16_t first = signed_weights<FORMAT>(vandq_u8(w, vdupq_n_u8(15)));
            const int8x16_t second = signed_weights<FORMAT>(vshrq_n_u8(w, 4));
            for (int t = 0; t < ROWS; t++) {
                sum[t][r] = dot_word<2 * (CHUNK & 3)>(sum[t][r], first, columns[t]);
                sum[t][r] = dot_word<2 * (CHUNK & 3) + 1>(sum[t][r], second, columns[t]);
            }
        }
    }
}

template <int FORMAT, int ROWS, bool PREFETCH>
PM_INLINE void dot_tile(const pm::DotArgs& a, const uint8_t* block, const pm::Group* const* rows, float (*out)[16]) {
    constexpr int CODE_BYTES = FORMAT == PM_INT8 ? 512 : 256;
    Vec acc[ROWS][4];
    for (int t = 0; t < ROWS; t++)
        for (int r = 0; r < 4; r++) acc[t][r] = vset(0.0f);
    const uint8_t* codes = block + a.head_bytes;
    int64_t k = 0;
    for (int32_t g = 0; g < a.weight_groups; g++) {
        float scale[16], minimum[16] = {};
        if (FORMAT == PM_MXFP4) load_exponents(block + g * pm::SCALE_BYTES<FORMAT>, scale);
        else if (FORMAT == PM_INT4_ZERO_POINT) load_words(block + g * pm::SCALE_BYTES<FORMAT>, scale, minimum);
        else load_halves(block + g * pm::SCALE_BYTES<FORMAT>, scale);
        if (FORMAT == PM_INT4_ASYMMETRIC) load_halves(block + (a.weight_groups + g) * 32, minimum);
        for (int32_t s = 0; s < a.groups_per_scale; s++, k++, codes += CODE_BYTES) {
            int32x4_t sum[ROWS][4];
            const Columns columns[2] = {Columns(rows[0][k]), Columns(rows[ROWS - 1][k])};
            for (int t = 0; t < ROWS; t++)
                for (int r = 0; r < 4; r++) sum[t][r] = vdupq_n_s32(0);
            add_chunk<FORMAT, ROWS, 0>(codes, columns, sum);
            add_chunk<FORMAT, ROWS, 1>(codes, columns, sum);
            add_chunk<FORMAT, ROWS, 2>(codes, columns, sum);
            add_chunk<FORMAT, ROWS, 3>(codes, columns, sum);
            if (FORMAT == PM_INT8) {
                add_chunk<FORMAT, ROWS, 4>(codes, columns, sum);
                add_chunk<FORMAT, ROWS, 5>(codes, columns, sum);
                add_chunk<FORMAT, ROWS, 6>(codes, columns, sum);
                add_chunk<FORMAT, ROWS, 7>(codes, columns, sum);
            }
            for (int r = 0; r < 4; r++) {
                const Vec s4 = vload(scale + 4 * r), m4 = vload(minimum + 4 * r);
                for (int t = 0; t < ROWS; t++) acc[t][r] = add_group<FORMAT>(acc[t][r], sum[t][r], s4, m4, rows[t][k]);
            }
        }
    }
    for (int t = 0; t < ROWS; t++)
        for (int r = 0; r < 4; r++) vstore(out[t] + 4 * r, acc[t][r]);
}

template <int FORMAT, int ROWS, int WORD>
PM_INLINE void add_panel_word(const uint8_t* codes, const Columns* columns, int32x4_t (*sum)[2]) {
    for (int r = 0; r < 2; r++) {
        const int8x16_t weights = signed_weights<FORMAT>(vld1q_u8(codes + 64 * WORD + 16 * r));
        for (int t = 0; t < ROWS; t++) sum[t][r] = dot_word<WORD>(sum[t][r], weights, columns[t]);
    }
}

// Eight weight rows at a time: their sums for four rows of activations fit the 32 registers.
template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_tile(const uint8_t* const* codes, const float* scales, const float* minimums, int groups,
                          const pm::Group* const* rows, float* out) {
    for (int half = 0; half < 2 * BLOCKS; half++) {
        const int lane = 8 * half;
        Vec acc[ROWS][2];
        for (int t = 0; t < ROWS; t++)
            for (int r = 0; r < 2; r++) acc[t][r] = vload(out + t * BLOCKS * 16 + lane + 4 * r);
        const uint8_t* w = codes[half / 2] + 32 * (half % 2);
        for (int g = 0; g < groups; g++, w += 512) {
            const Columns columns[4] = {Columns(rows[0][g]), Columns(rows[1 % ROWS][g]), Columns(rows[2 % ROWS][g]),
                                        Columns(rows[3 % ROWS][g])};
            int32x4_t sum[ROWS][2];
            for (int t = 0; t < ROWS; t++) sum[t][0] = sum[t][1] = vdupq_n_s32(0);
            add_panel_word<FORMAT, ROWS, 0>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 1>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 2>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 3>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 4>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 5>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 6>(w, columns, sum);
            add_panel_word<FORMAT, ROWS, 7>(w, columns, sum);
            for (int r = 0; r < 2; r++) {
                const int64_t at = g * BLOCKS * 16 + lane + 4 * r;
                const Vec scale = vload(scales + at);
                const Vec minimum = pm::HAS_MINIMUM<FORMAT> ? vload(minimums + at) : scale;
                for (int t = 0; t < ROWS; t++)
                    acc[t][r] = add_group<FORMAT>(acc[t][r], sum[t][r], scale, minimum, rows[t][g]);
            }
        }
        for (int t = 0; t < ROWS; t++)
            for (int r = 0; r < 2; r++) vstore(out + t * BLOCKS * 16 + lane + 4 * r, acc[t][r]);
    }
}

// Reads every byte; the four sums keep the loads independent.
uint64_t read(const uint8_t* data, int64_t nbytes) {
    uint8x16_t sum[4] = {vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0), vdupq_n_u8(0)};
    int64_t i = 0;
    for (; i + 64 <= nbytes; i += 64)
        for (int j = 0; j < 4; j++) sum[j] = veorq_u8(sum[j], vld1q_u8(data + i + 16 * j));
    const uint64x2_t words = vreinterpretq_u64_u8(veorq_u8(veorq_u8(sum[0], sum[1]), veorq_u8(sum[2], sum[3])));
    uint64_t total = vgetq_lane_u64(words, 0) ^ vgetq_lane_u64(words, 1);
    for (; i < nbytes; i++) total ^= data[i];
    return total;
}

}  // namespace

#include "kernels.h"

namespace pm {
const Isa isa_neon = {"neon", cpu_has_dot_product, PM_KERNELS};
}
