// Q4_0 (x = d * (n - 8)) and Q4_1 (x = d * n + m).
#pragma once

#include "formats/format.h"

namespace greenroom::formats {

struct Q4_0 {
    using Payload = Bits4;
    static constexpr int type = 2, raw_cols = 32, raw_bytes = 18;
    static constexpr int record_bytes = 32;
    static constexpr int max_code = 15, zero = 3, parts = 1;
    static constexpr bool has_min = false;

    static void codes(const std::uint8_t* raw, int, Quads& out) {
        split_nibbles(raw + 2, 16, out.data());
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        put_u16(record, row, raw);
    }
    static Affine affine(const std::uint8_t* record, int row, int) {
        return {f16_at(record + 2 * row), 0.0f};
    }
    static void factors(const std::uint8_t* record, int, simd::Floats* scale, simd::Floats*) {
        scale[0] = simd::load_f16(record);
    }
};

// A record holds d of 16 rows, then m.
struct Q4_1 {
    using Payload = Bits4;
    static constexpr int type = 3, raw_cols = 32, raw_bytes = 20;
    static constexpr int record_bytes = 64;
    static constexpr int max_code = 15, zero = -1, parts = 1;
    static constexpr bool has_min = true;

    static void codes(const std::uint8_t* raw, int, Quads& out) {
        split_nibbles(raw + 4, 16, out.data());
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        put_u16(record, row, raw);
        put_u16(record + 32, row, raw + 2);
    }
    static Affine affine(const std::uint8_t* record, int row, int) {
        return {f16_at(record + 2 * row), -f16_at(record + 32 + 2 * row)};
    }
    static void factors(const std::uint8_t* record, int, simd::Floats* scale, simd::Floats* min) {
        scale[0] = simd::load_f16(record);
        min[0] = simd::zero() - simd::load_f16(record + 32);
    }
};

}  // namespace greenroom::formats
