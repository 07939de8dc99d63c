// float16 for processors and remainders without instructions for it.
#ifndef POCKETMOE_HALF_H
#define POCKETMOE_HALF_H

#include <stdint.h>
#include <string.h>

namespace pm {

static inline float half_float(const uint8_t* p) {
    uint16_t half;
    memcpy(&half, p, 2);
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7FFFu;
    uint32_t bits;
    float value;
    if (magnitude >= 0x7C00u) {
        bits = 0x7F800000u | (magnitude & 0x3FFu) << 13;
    } else if (magnitude < 0x400u) {
        value = static_cast<float>(magnitude) * (1.0f / 16777216);  // subnormal: magnitude * 2^-24
        memcpy(&bits, &value, 4);
    } else {
        bits = (magnitude << 13) + (112u << 23);
    }
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
}

// To the nearest, ties to even; beyond the range the largest finite number; NaN stays NaN.
static inline uint16_t float_half(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u;
    if (magnitude >= 0x477FF000u) return sign | 0x7BFFu;  // 65520 and more
    if (magnitude < 0x38800000u) {                        // below 2^-14: steps of 2^-24
        float positive;
        memcpy(&positive, &magnitude, 4);
        const float shifted = positive + 0.5f;  // whose last bit is worth 2^-24
        memcpy(&bits, &shifted, 4);
        return sign | static_cast<uint16_t>(bits - 0x3F000000u);
    }
    const uint32_t rounded = magnitude + 0xFFFu + (magnitude >> 13 & 1u);
    return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

}  // namespace pm
#endif
