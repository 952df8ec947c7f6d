// MXFP4 and NVFP4: 4-bit floats E2M1 through a table of twice their value; the scales carry the
// factor 1/2. Codes are table + 16.
#pragma once

#include <cmath>

#include "formats/format.h"

namespace greenroom::formats {

// 2 * {0, .5, 1, 1.5, 2, 3, 4, 6, -0, -.5, -1, -1.5, -2, -3, -4, -6} + 16
inline const std::uint8_t* e2m1_codes() {
    static constexpr std::uint8_t codes[16] = {16, 17, 18, 19, 20, 22, 24, 28,
                                               16, 15, 14, 13, 12, 10, 8,  4};
    return codes;
}

// 32 columns share the power of two 2^(e - 127). A record: e of 16 rows.
struct MXFP4 {
    using Payload = Bits4;
    static constexpr int type = 39, raw_cols = 32, raw_bytes = 17;
    static constexpr int record_bytes = 16;
    static constexpr int max_code = 28, zero = 4, parts = 1;
    static constexpr bool has_min = false;

    static const std::uint8_t* table() { return e2m1_codes(); }
    static void codes(const std::uint8_t* raw, int, Quads& out) {
        split_nibbles(raw + 1, 16, out.data());
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        record[row] = raw[0];
    }
    static Affine affine(const std::uint8_t* record, int row, int) {
        return {std::ldexp(1.0f, record[row] - 128), 0.0f};
    }
    // 2^(e - 128); the two subnormal powers (e < 2) count as 0, 1e-37 below anything that matters.
    static void factors(const std::uint8_t* record, int, simd::Floats* scale, simd::Floats*) {
        const auto exponent = simd::subtract_to_zero(simd::bytes_u8(record), 1);
        scale[0] = simd::as_floats(simd::shift_left<23>(exponent));
    }
};

// 16 columns share an unsigned E4M3 scale; in the file 64 columns make a block. A record: 4 x 16
// scale bytes without the sign bit, the file's not-a-number 0x7f (worth 0) turned into 0.
struct NVFP4 {
    using Payload = Bits4;
    static constexpr int type = 40, raw_cols = 64, raw_bytes = 36;
    static constexpr int record_bytes = 64;
    static constexpr int max_code = 28, zero = 4, parts = 2;
    static constexpr bool has_min = false;

    static const std::uint8_t* table() { return e2m1_codes(); }
    static void codes(const std::uint8_t* raw, int b, Quads& out) {
        for (int h = 0; h < 2; ++h) split_nibbles(raw + 4 + 8 * (2 * b + h), 8, &out[4 * h]);
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        for (int i = 0; i < 4; ++i) record[16 * i + row] = raw[i] == 0x7f ? 0 : raw[i] & 0x7f;
    }
    // Four exponent and three mantissa bits moved to where a float32 has them, times 2^119: the
    // bias of 7 for that of 127, and 1/2.
    static Affine affine(const std::uint8_t* record, int row, int part) {
        const auto bits = static_cast<std::uint32_t>(record[16 * part + row]) << 20;
        return {std::bit_cast<float>(bits) * 0x1p119f, 0.0f};
    }
    static void factors(const std::uint8_t* record, int b, simd::Floats* scale, simd::Floats*) {
        for (int h = 0; h < 2; ++h) {
            const auto byte = simd::bytes_u8(record + 16 * (2 * b + h));
            scale[h] = simd::as_floats(simd::shift_left<20>(byte)) * simd::splat(0x1p119f);
        }
    }
};

}  // namespace greenroom::formats
