// Scalar reads of little-endian 16-bit floats. Knows nothing of blocks.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

namespace greenroom {

inline std::uint16_t u16_at(const std::uint8_t* p) {
    return static_cast<std::uint16_t>(p[0] | (p[1] << 8));
}

// IEEE half to float, exact for every bit pattern.
inline float f16_to_float(std::uint16_t h) {
    const std::uint32_t sign = (h & 0x8000u) << 16, exponent = (h >> 10) & 31u,
                        mantissa = h & 1023u;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
        const float value = static_cast<float>(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    const std::uint32_t biased = exponent == 31 ? 255u : exponent + 112u;
    return std::bit_cast<float>(sign | (biased << 23) | (mantissa << 13));
}

inline float f16_at(const std::uint8_t* p) { return f16_to_float(u16_at(p)); }

inline float bf16_at(const std::uint8_t* p) {
    return std::bit_cast<float>(static_cast<std::uint32_t>(u16_at(p)) << 16);
}

// Nearest bfloat16, ties to even; not-a-number stays so.
inline std::uint16_t to_bf16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((bits >> 16) | 64u);
    return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace greenroom
