// AVX-512 with VNNI: 16 rows in one register, four columns of each in one instruction.
#include <immintrin.h>
#include <string.h>

#include "pocketmoe_cpu.h"
#include "prefetch_x86.h"

namespace {

using Vec = __m512;
constexpr int WIDTH = 16;
// 2 x 6 accumulators of each kind fill the 32 registers.
constexpr int PANEL_BLOCKS = 2, PANEL_TILE = 6, PANEL_GROUPS = 16, PANEL_ROWS = 64, PANEL_FROM = 10, DIRECT_TILE = 8;

PM_INLINE Vec vload(const float* p) { return _mm512_loadu_ps(p); }
PM_INLINE void vstore(float* p, Vec v) { _mm512_storeu_ps(p, v); }
PM_INLINE Vec vset(float x) { return _mm512_set1_ps(x); }
PM_INLINE Vec vadd(Vec a, Vec b) { return _mm512_add_ps(a, b); }
PM_INLINE Vec vsub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
PM_INLINE Vec vmul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
PM_INLINE Vec vdiv(Vec a, Vec b) { return _mm512_div_ps(a, b); }
PM_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
PM_INLINE Vec vmin(Vec a, Vec b) { return _mm512_min_ps(a, b); }  // b where either is NaN
PM_INLINE Vec vmax(Vec a, Vec b) { return _mm512_max_ps(a, b); }
PM_INLINE Vec vround(Vec a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PM_INLINE Vec vscale2(Vec a, Vec n) { return _mm512_scalef_ps(a, n); }  // a * 2^n

PM_INLINE float vsum(Vec a) { return _mm512_reduce_add_ps(a); }

PM_INLINE uint32_t max_magnitude_bits(const float* x) {
    const __m512i mask = _mm512_set1_epi32(0x7FFFFFFF);
    const __m512i a = _mm512_and_si512(_mm512_loadu_si512(x), mask);
    const __m512i b = _mm512_and_si512(_mm512_loadu_si512(x + 16), mask);
    return static_cast<uint32_t>(_mm512_reduce_max_epi32(_mm512_max_epi32(a, b)));
}

PM_INLINE int32_t round_codes(const float* x, float inverse, int8_t* codes) {
    const Vec scale = vset(inverse);
    const __m512i a = _mm512_cvtps_epi32(vmul(vload(x), scale));
    const __m512i b = _mm512_cvtps_epi32(vmul(vload(x + 16), scale));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes), _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16), _mm512_cvtepi32_epi8(b));
    return _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
}

PM_INLINE Vec load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

PM_INLINE __m512i four_columns(const int8_t* codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm512_set1_epi32(word);
}

PM_INLINE Vec load_exponent(const uint8_t* p) {
    const __m512i bits = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 23));
}

// Words of scale and zero point; the scales; the minimums.
PM_INLINE __m512i load_word(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
PM_INLINE Vec word_scale(__m512i words) {
    const __m512i bits = _mm512_slli_epi32(_mm512_and_si512(words, _mm512_set1_epi32(pm::WORD_SCALE)), 12);
    return _mm512_castsi512_ps(_mm512_add_epi32(bits, _mm512_set1_epi32(pm::WORD_BIAS)));
}
PM_INLINE Vec word_minimum(__m512i words, Vec scale) {
    const __m512i zero = _mm512_and_si512(words, _mm512_set1_epi32(pm::WORD_ZERO));
    return vmul(_mm512_cvtepi32_ps(zero), vmul(scale, vset(pm::WORD_STEP)));
}

// 16 halves, exponents of float32, or words to floats.
PM_INLINE void load_halves(const uint8_t* p, float* out) { vstore(out, load_half(p)); }
PM_INLINE void load_exponents(const uint8_t* p, float* out) { vstore(out, load_exponent(p)); }
PM_INLINE void load_words(const uint8_t* p, float* scales, float* minimums) {
    const __m512i words = load_word(p);
    vstore(scales, word_scale(words));
    vstore(minimums, word_minimum(words, word_scale(words)));
}

// Codes of 4 bits to the unsigned bytes to multiply by.
template <int FORMAT>
PM_INLINE __m512i look_up(__m512i codes) {
    if (FORMAT != PM_MXFP4) return codes;
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(pm::E2M1));
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes);
}

// Packed chunks of 8 columns to two chunks of 4 columns each.
template <int FORMAT>
PM_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* to, int chunks) {
    const __m512i low = _mm512_set1_epi8(15);
    for (int c = 0; c < chunks; c++) {
        const __m512i w = _mm512_loadu_si512(from + 64 * c);
        _mm512_store_si512(to + 128 * c, look_up<FORMAT>(_mm512_and_si512(w, low)));
        _mm512_store_si512(to + 128 * c + 64, look_up<FORMAT>(_mm512_and_si512(_mm512_srli_epi16(w, 4), low)));
    }
}

// acc += weights x activations for one group, whose integer dot products are in `sum`.
template <int FORMAT>
PM_INLINE Vec add_group(Vec acc, __m512i sum, Vec scale, Vec minimum, const pm::Group& x) {
    const Vec part = vfma(_mm512_castsi512_ps(sum), vset(x.scale), vset(x.shift));
    acc = vfma(scale, part, acc);
    return pm::HAS_MINIMUM<FORMAT> ? vfma(minimum, vset(x.sum), acc) : acc;
}

template <int FORMAT, int ROWS, bool PREFETCH>
PM_INLINE void dot_tile(const pm::DotArgs& a, const uint8_t* block, const pm::Group* const* rows, float (*out)[16]) {
    constexpr int SCALES = pm::SCALE_BYTES<FORMAT>;
    constexpr int GROUP_BYTES = (FORMAT == PM_INT8 ? 512 : 256) + (FORMAT == PM_INT4_ASYMMETRIC ? 64 : SCALES);
    const __m512i low = _mm512_set1_epi8(15);
    const pm::Group* x[ROWS];
    Vec acc[ROWS];
    PM_UNROLL for (int t = 0; t < ROWS; t++) {
        x[t] = rows[t];
        acc[t] = _mm512_setzero_ps();
    }
    const uint8_t* codes = block + a.head_bytes;
    const uint8_t* position = block;
    for (int32_t g = 0; g < a.weight_groups; g++) {
        const uint8_t* const of_group = block + g * SCALES;
        Vec scale, minimum;
        if (FORMAT == PM_INT4_ZERO_POINT) {
            const __m512i words = load_word(of_group);
            scale = word_scale(words);
            minimum = word_minimum(words, scale);
        } else {
            scale = FORMAT == PM_MXFP4 ? load_exponent(of_group) : load_half(of_group);
            minimum = FORMAT == PM_INT4_ASYMMETRIC ? load_half(of_group + a.weight_groups * 32) : scale;
        }
        for (int32_t s = 0; s < a.groups_per_scale; s++) {
            __m512i sum[ROWS];
            PM_UNROLL for (int t = 0; t < ROWS; t++) sum[t] = _mm512_set1_epi32(x[t]->start);
            if (FORMAT == PM_INT8) {
                PM_UNROLL for (int c = 0; c < 8; c++) {
                    const __m512i w = _mm512_loadu_si512(codes + 64 * c);
                    PM_UNROLL for (int t = 0; t < ROWS; t++)
                        sum[t] = _mm512_dpbusd_epi32(sum[t], w, four_columns(x[t]->codes + 4 * c));
                }
                codes += 512;
            } else {
                PM_UNROLL for (int c = 0; c < 4; c++) {
                    const __m512i w = _mm512_loadu_si512(codes + 64 * c);
                    const __m512i first = look_up<FORMAT>(_mm512_and_si512(w, low));
                    const __m512i second = look_up<FORMAT>(_mm512_and_si512(_mm512_srli_epi16(w, 4), low));
                    PM_UNROLL for (int t = 0; t < ROWS; t++) {
                        sum[t] = _mm512_dpbusd_epi32(sum[t], first, four_columns(x[t]->codes + 8 * c));
                        sum[t] = _mm512_dpbusd_epi32(sum[t], second, four_columns(x[t]->codes + 8 * c + 4));
                    }
                }
                codes += 256;
            }
            if (PREFETCH) prefetch_bytes<GROUP_BYTES>(position);
            PM_UNROLL for (int t = 0; t < ROWS; t++) {
                acc[t] = add_group<FORMAT>(acc[t], sum[t], scale, minimum, *x[t]);
                x[t]++;
            }
        }
    }
    PM_UNROLL for (int t = 0; t < ROWS; t++) vstore(out[t], acc[t]);
}

template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_tile(const uint8_t* const* codes, const float* scales, const float* minimums, int groups,
                          const pm::Group* const* rows, float* out) {
    const pm::Group* x[ROWS];
    const uint8_t* w[BLOCKS];
    Vec acc[ROWS][BLOCKS];
    PM_UNROLL for (int b = 0; b < BLOCKS; b++) w[b] = codes[b];
    PM_UNROLL for (int t = 0; t < ROWS; t++) {
        x[t] = rows[t];
        PM_UNROLL for (int b = 0; b < BLOCKS; b++) acc[t][b] = vload(out + (t * BLOCKS + b) * 16);
    }
    for (int g = 0; g < groups; g++) {
        __m512i sum[ROWS][BLOCKS];
        PM_UNROLL for (int t = 0; t < ROWS; t++)
            PM_UNROLL for (int b = 0; b < BLOCKS; b++) sum[t][b] = _mm512_set1_epi32(x[t]->start);
        PM_UNROLL for (int c = 0; c < 8; c++) {
            __m512i chunk[BLOCKS];
            PM_UNROLL for (int b = 0; b < BLOCKS; b++) chunk[b] = _mm512_loadu_si512(w[b] + 64 * c);
            PM_UNROLL for (int t = 0; t < ROWS; t++) {
                const __m512i q = four_columns(x[t]->codes + 4 * c);
                PM_UNROLL for (int b = 0; b < BLOCKS; b++) sum[t][b] = _mm512_dpbusd_epi32(sum[t][b], chunk[b], q);
            }
        }
        Vec scale[BLOCKS], minimum[BLOCKS];
        PM_UNROLL for (int b = 0; b < BLOCKS; b++) {
            scale[b] = vload(scales + (g * BLOCKS + b) * 16);
            minimum[b] = pm::HAS_MINIMUM<FORMAT> ? vload(minimums + (g * BLOCKS + b) * 16) : scale[b];
            w[b] += 512;
        }
        PM_UNROLL for (int t = 0; t < ROWS; t++) {
            PM_UNROLL for (int b = 0; b < BLOCKS; b++)
                acc[t][b] = add_group<FORMAT>(acc[t][b], sum[t][b], scale[b], minimum[b], *x[t]);
            x[t]++;
        }
    }
    PM_UNROLL for (int t = 0; t < ROWS; t++)
        PM_UNROLL for (int b = 0; b < BLOCKS; b++) vstore(out + (t * BLOCKS + b) * 16, acc[t][b]);
}

// Reads every byte; the four sums keep the loads independent.
uint64_t read(const uint8_t* data, int64_t nbytes) {
    __m512i sum[4] = {};
    int64_t i = 0;
    for (; i + 256 <= nbytes; i += 256) {
        PM_UNROLL for (int j = 0; j < 4; j++) {
            prefetch_line(data + i + 64 * j);
            sum[j] = _mm512_xor_si512(sum[j], _mm512_loadu_si512(data + i + 64 * j));
        }
    }
    uint64_t words[8], total = 0;
    _mm512_storeu_si512(words, _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3])));
    for (uint64_t word : words) total ^= word;
    for (; i < nbytes; i++) total ^= data[i];
    return total;
}

}  // namespace

#include "kernels.h"

namespace pm {
const Isa isa_avx512 = {"avx512vnni", cpu_has_avx512vnni, PM_KERNELS};
}
