// fp16, as weights' scales are stored, without instructions for it.
#pragma once

#include <cstdint>

namespace {

inline float from_half(const uint8_t* p) {
    uint16_t h;
    __builtin_memcpy(&h, p, sizeof h);
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    // Exponent and fraction moved into place, then the difference of the biases, 127 - 15, by a product: right for
    // denormals too. Infinities and NaN keep a full exponent.
    uint32_t bits = rest << 13;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    value *= 0x1p112f;
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits |= sign | (rest >= 0x7c00u ? 0x7f800000u : 0u);
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace
