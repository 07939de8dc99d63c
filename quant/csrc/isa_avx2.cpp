// AVX2: two registers of eight rows each. With PM_AVXVNNI (isa_avxvnni.cpp) the dot products are single instructions.
#include <immintrin.h>
#include <string.h>

#include "pocketmoe_cpu.h"
#include "prefetch_x86.h"

namespace {

using Vec = __m256;
constexpr int WIDTH = 8;
constexpr int PANEL_BLOCKS = 1, PANEL_TILE = 4, PANEL_GROUPS = 16, PANEL_ROWS = 64, PANEL_FROM = 12, DIRECT_TILE = 4;

PM_INLINE Vec vload(const float* p) { return _mm256_loadu_ps(p); }
PM_INLINE void vstore(float* p, Vec v) { _mm256_storeu_ps(p, v); }
PM_INLINE Vec vset(float x) { return _mm256_set1_ps(x); }
PM_INLINE Vec vadd(Vec a, Vec b) { return _mm256_add_ps(a, b); }
PM_INLINE Vec vsub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
PM_INLINE Vec vmul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
PM_INLINE Vec vdiv(Vec a, Vec b) { return _mm256_div_ps(a, b); }
PM_INLINE Vec vfma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
PM_INLINE Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }  // b where either is NaN
PM_INLINE Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
PM_INLINE Vec vround(Vec a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
PM_INLINE Vec vscale2(Vec a, Vec n) {  // a * 2^n for |n| < 127
    const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(a, _mm256_castsi256_ps(exponent));
}

PM_INLINE float vsum(Vec a) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

PM_INLINE __m256i load_bytes(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

PM_INLINE uint32_t max_magnitude_bits(const float* x) {
    const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
    __m256i m = _mm256_and_si256(load_bytes(x), mask);
    for (int c = 8; c < pm::COLUMNS; c += 8) m = _mm256_max_epi32(m, _mm256_and_si256(load_bytes(x + c), mask));
    __m128i h = _mm_max_epi32(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_max_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(h));
}

PM_INLINE int32_t round_codes(const float* x, float inverse, int8_t* codes) {
    const Vec scale = vset(inverse);
    __m256i v[4];
    PM_UNROLL for (int i = 0; i < 4; i++) v[i] = _mm256_cvtps_epi32(vmul(vload(x + 8 * i), scale));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(v[0], v[1]), _mm256_add_epi32(v[2], v[3]));
    // The packs work within 128-bit halves; the permutation puts the eight fours of bytes back in order.
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), _mm256_permutevar8x32_epi32(bytes, order));
    __m128i h = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0x4E));
    h = _mm_add_epi32(h, _mm_shuffle_epi32(h, 0xB1));
    return _mm_cvtsi128_si32(h);
}

PM_INLINE Vec load_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}

PM_INLINE __m256i four_columns(const int8_t* codes) {
    int32_t word;
    memcpy(&word, codes, 4);
    return _mm256_set1_epi32(word);
}

PM_INLINE Vec load_exponent(const uint8_t* p) {
    const __m256i bits = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(bits, 23));
}

// Words of scale and zero point; the scales; the minimums.
PM_INLINE __m256i load_word(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
PM_INLINE Vec word_scale(__m256i words) {
    const __m256i bits = _mm256_slli_epi32(_mm256_and_si256(words, _mm256_set1_epi32(pm::WORD_SCALE)), 12);
    return _mm256_castsi256_ps(_mm256_add_epi32(bits, _mm256_set1_epi32(pm::WORD_BIAS)));
}
PM_INLINE Vec word_minimum(__m256i words, Vec scale) {
    const __m256i zero = _mm256_and_si256(words, _mm256_set1_epi32(pm::WORD_ZERO));
    return vmul(_mm256_cvtepi32_ps(zero), vmul(scale, vset(pm::WORD_STEP)));
}

// 16 halves, exponents of float32, or words to floats.
PM_INLINE void load_halves(const uint8_t* p, float* out) {
    vstore(out, load_half(p));
    vstore(out + 8, load_half(p + 16));
}
PM_INLINE void load_exponents(const uint8_t* p, float* out) {
    vstore(out, load_exponent(p));
    vstore(out + 8, load_exponent(p + 8));
}
PM_INLINE void load_words(const uint8_t* p, float* scales, float* minimums) {
    for (int r = 0; r < pm::ROW_BLOCK; r += 8) {
        const __m256i words = load_word(p + 2 * r);
        vstore(scales + r, word_scale(words));
        vstore(minimums + r, word_minimum(words, word_scale(words)));
    }
}

// Codes of 4 bits to the unsigned bytes to multiply by.
template <int FORMAT>
PM_INLINE __m256i look_up(__m256i codes) {
    if (FORMAT != PM_MXFP4) return codes;
    const __m128i table = _mm_load_si128(reinterpret_cast<const __m128i*>(pm::E2M1));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes);
}

// Packed chunks of 8 columns to two chunks of 4 columns each.
template <int FORMAT>
PM_INLINE void unpack_nibbles(const uint8_t* from, uint8_t* to, int chunks) {
    const __m256i low = _mm256_set1_epi8(15);
    for (int c = 0; c < chunks; c++) {
        for (int h = 0; h < 64; h += 32) {
            const __m256i w = load_bytes(from + 64 * c + h);
            __m256i* const out = reinterpret_cast<__m256i*>(to + 128 * c + h);
            _mm256_store_si256(out, look_up<FORMAT>(_mm256_and_si256(w, low)));
            _mm256_store_si256(out + 2, look_up<FORMAT>(_mm256_and_si256(_mm256_srli_epi16(w, 4), low)));
        }
    }
}

// GCC turns a chain of integer additions into a tree, keeps all the products for it and spills them: a third slower.
PM_INLINE void keep_order(__m256i& sum) {
#if defined(__GNUC__)
    __asm__("" : "+x"(sum));
#else
    (void)sum;
#endif
}

// Integer dot products of 8 weight rows with one group of activations, biased by MAGIC_BITS.
#ifdef PM_AVXVNNI
template <int FORMAT>
struct Sum {
    __m256i value;
    PM_INLINE_MEMBER void start(const pm::Group& x) { value = _mm256_set1_epi32(x.start); }
    PM_INLINE_MEMBER void nibbles(__m256i w, const int8_t* q) {
        value = _mm256_dpbusd_avx_epi32(value, w, four_columns(q));
    }
    PM_INLINE_MEMBER void bytes(__m256i w, const int8_t* q) { nibbles(w, q); }
    PM_INLINE_MEMBER void half_way() {}
    PM_INLINE_MEMBER __m256i finish_nibbles(const pm::Group&) const { return value; }
    PM_INLINE_MEMBER __m256i finish_bytes() const { return value; }
};
#else
template <int FORMAT>
struct Sum {
    __m256i value, first_half;
    PM_INLINE_MEMBER void start(const pm::Group&) { value = _mm256_setzero_si256(); }
    // 16-bit lanes: two products of at most 15 * 127 each, eight times in a group: 30,480 fits.
    PM_INLINE_MEMBER void nibbles(__m256i w, const int8_t* q) {
        value = _mm256_add_epi16(value, _mm256_maddubs_epi16(w, four_columns(q)));
        keep_order(value);
    }
    // maddubs would saturate on codes up to 255, so |x| takes the unsigned side and the weight gets the sign of x;
    // codes are 1..255, so that the weight never is -128, which has no opposite.
    PM_INLINE_MEMBER void bytes(__m256i w, const int8_t* q) {
        const __m256i x = four_columns(q);
        const __m256i weight = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(weight, x));
        value = _mm256_add_epi32(value, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
        keep_order(value);
    }
    // After 16 of the 32 columns: the bytes of MXFP4 reach 24, and two products four times, 24,384, is what fits.
    PM_INLINE_MEMBER void half_way() {
        if (FORMAT != PM_MXFP4) return;
        first_half = _mm256_madd_epi16(value, _mm256_set1_epi16(1));
        value = _mm256_setzero_si256();
    }
    PM_INLINE_MEMBER __m256i finish_nibbles(const pm::Group& x) const {
        const __m256i n = _mm256_add_epi32(_mm256_madd_epi16(value, _mm256_set1_epi16(1)), _mm256_set1_epi32(x.start));
        return FORMAT == PM_MXFP4 ? _mm256_add_epi32(n, first_half) : n;
    }
    PM_INLINE_MEMBER __m256i finish_bytes() const { return _mm256_add_epi32(value, _mm256_set1_epi32(pm::MAGIC_BITS)); }
};
#endif

// acc += weights x activations for one group of 8 weight rows.
template <int FORMAT>
PM_INLINE Vec add_group(Vec acc, const Sum<FORMAT>& sum, Vec scale, Vec minimum, const pm::Group& x) {
    const __m256i n = FORMAT == PM_INT8 ? sum.finish_bytes() : sum.finish_nibbles(x);
    const Vec part = vfma(_mm256_castsi256_ps(n), vset(x.scale), vset(x.shift));
    acc = vfma(scale, part, acc);
    return pm::HAS_MINIMUM<FORMAT> ? vfma(minimum, vset(x.sum), acc) : acc;
}

// One row takes both halves of each chunk in one pass over the bytes; more rows need the registers, and take the halves
// one after the other.
template <int FORMAT, int ROWS, bool PREFETCH>
PM_INLINE void dot_tile(const pm::DotArgs& a, const uint8_t* block, const pm::Group* const* rows, float (*out)[16]) {
    constexpr int PASSES = ROWS == 1 ? 1 : 2, HALVES = 2 / PASSES, CODE_BYTES = FORMAT == PM_INT8 ? 512 : 256;
    constexpr int SCALES = pm::SCALE_BYTES<FORMAT>;
    constexpr int GROUP_BYTES = CODE_BYTES + (FORMAT == PM_INT4_ASYMMETRIC ? 64 : SCALES);
    const __m256i low = _mm256_set1_epi8(15);
    for (int pass = 0; pass < PASSES; pass++) {
        const pm::Group* x[ROWS];
        Vec acc[ROWS][HALVES];
        PM_UNROLL for (int t = 0; t < ROWS; t++) {
            x[t] = rows[t];
            PM_UNROLL for (int h = 0; h < HALVES; h++) acc[t][h] = _mm256_setzero_ps();
        }
        const uint8_t* scales = block + SCALES / 2 * pass;
        const uint8_t* minimums = scales + a.weight_groups * 32;
        const uint8_t* codes = block + a.head_bytes + 32 * pass;
        const uint8_t* position = block;
        for (int32_t g = 0; g < a.weight_groups; g++) {
            Vec scale[HALVES], minimum[HALVES];
            PM_UNROLL for (int h = 0; h < HALVES; h++) {
                const uint8_t* of_rows = scales + g * SCALES + SCALES / 2 * h;
                if (FORMAT == PM_INT4_ZERO_POINT) {
                    const __m256i words = load_word(of_rows);
                    scale[h] = word_scale(words);
                    minimum[h] = word_minimum(words, scale[h]);
                } else {
                    scale[h] = FORMAT == PM_MXFP4 ? load_exponent(of_rows) : load_half(of_rows);
                    minimum[h] = FORMAT == PM_INT4_ASYMMETRIC ? load_half(minimums + g * 32 + 16 * h) : scale[h];
                }
            }
            for (int32_t s = 0; s < a.groups_per_scale; s++) {
                Sum<FORMAT> sum[ROWS][HALVES];
                PM_UNROLL for (int t = 0; t < ROWS; t++)
                    PM_UNROLL for (int h = 0; h < HALVES; h++) sum[t][h].start(*x[t]);
                PM_UNROLL for (int c = 0; c < CODE_BYTES / 64; c++) {
                    PM_UNROLL for (int h = 0; h < HALVES; h++) {
                        const __m256i w = load_bytes(codes + 64 * c + 32 * h);
                        if (FORMAT == PM_INT8) {
                            PM_UNROLL for (int t = 0; t < ROWS; t++) sum[t][h].bytes(w, x[t]->codes + 4 * c);
                        } else {
                            const __m256i first = look_up<FORMAT>(_mm256_and_si256(w, low));
                            const __m256i second = look_up<FORMAT>(_mm256_and_si256(_mm256_srli_epi16(w, 4), low));
                            PM_UNROLL for (int t = 0; t < ROWS; t++) {
                                sum[t][h].nibbles(first, x[t]->codes + 8 * c);
                                sum[t][h].nibbles(second, x[t]->codes + 8 * c + 4);
                                if (c == 1) sum[t][h].half_way();
                            }
                        }
                    }
                }
                codes += CODE_BYTES;
                if (PREFETCH && pass == 0) prefetch_bytes<GROUP_BYTES>(position);
                PM_UNROLL for (int t = 0; t < ROWS; t++) {
                    PM_UNROLL for (int h = 0; h < HALVES; h++)
                        acc[t][h] = add_group<FORMAT>(acc[t][h], sum[t][h], scale[h], minimum[h], *x[t]);
                    x[t]++;
                }
            }
        }
        PM_UNROLL for (int t = 0; t < ROWS; t++)
            PM_UNROLL for (int h = 0; h < HALVES; h++) vstore(out[t] + 8 * (pass + h), acc[t][h]);
    }
}

template <int FORMAT, int BLOCKS, int ROWS>
PM_INLINE void panel_tile(const uint8_t* const* codes, const float* scales, const float* minimums, int groups,
                          const pm::Group* const* rows, float* out) {
    for (int half = 0; half < 2 * BLOCKS; half++) {
        const uint8_t* w = codes[half / 2] + 32 * (half % 2);
        const int64_t lane = 8 * half;
        const pm::Group* x[ROWS];
        Vec acc[ROWS];
        PM_UNROLL for (int t = 0; t < ROWS; t++) {
            x[t] = rows[t];
            acc[t] = vload(out + t * BLOCKS * 16 + lane);
        }
        for (int g = 0; g < groups; g++, w += 512) {
            Sum<FORMAT> sum[ROWS];
            PM_UNROLL for (int t = 0; t < ROWS; t++) sum[t].start(*x[t]);
            PM_UNROLL for (int c = 0; c < 8; c++) {
                const __m256i chunk = load_bytes(w + 64 * c);
                PM_UNROLL for (int t = 0; t < ROWS; t++) {
                    if (FORMAT == PM_INT8) sum[t].bytes(chunk, x[t]->codes + 4 * c);
                    else sum[t].nibbles(chunk, x[t]->codes + 4 * c);
                    if (c == 3) sum[t].half_way();
                }
            }
            const Vec scale = vload(scales + g * BLOCKS * 16 + lane);
            const Vec minimum = pm::HAS_MINIMUM<FORMAT> ? vload(minimums + g * BLOCKS * 16 + lane) : scale;
            PM_UNROLL for (int t = 0; t < ROWS; t++) {
                acc[t] = add_group<FORMAT>(acc[t], sum[t], scale, minimum, *x[t]);
                x[t]++;
            }
        }
        PM_UNROLL for (int t = 0; t < ROWS; t++) vstore(out + t * BLOCKS * 16 + lane, acc[t]);
    }
}

// Reads every byte; the four sums keep the loads independent.
uint64_t read(const uint8_t* data, int64_t nbytes) {
    __m256i sum[4] = {};
    int64_t i = 0;
    for (; i + 128 <= nbytes; i += 128) {
        prefetch_line(data + i);
        prefetch_line(data + i + 64);
        PM_UNROLL for (int j = 0; j < 4; j++) sum[j] = _mm256_xor_si256(sum[j], load_bytes(data + i + 32 * j));
    }
    uint64_t words[4], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words),
                        _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3])));
    for (uint64_t word : words) total ^= word;
    for (; i < nbytes; i++) total ^= data[i];
    return total;
}

}  // namespace

#include "kernels.h"

namespace pm {
#ifdef PM_AVXVNNI
const Isa isa_avxvnni = {"avxvnni", cpu_has_avxvnni, PM_KERNELS};
#else
const Isa isa_avx2 = {"avx2", cpu_has_avx2, PM_KERNELS};
#endif
}  // namespace pm
