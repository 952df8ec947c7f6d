// Q3_K: 256 columns, 16 of them share a signed 6-bit scale: x = d * s * (n - 4).
// A record: d of 16 rows, then 16 x 16 signed bytes s.
#pragma once

#include "formats/q2_k.h"

namespace greenroom::formats {

struct Q3_K {
    using Payload = Bits3;
    static constexpr int type = 11, raw_cols = 256, raw_bytes = 110;
    static constexpr int record_bytes = 288;
    static constexpr int max_code = 7, zero = 2, parts = 2;
    static constexpr bool has_min = false;

    static void codes(const std::uint8_t* raw, int b, Quads& out) {
        split_pairs(raw + 32, b, out);
        for (int i = 0; i < 8; ++i) out[i] |= ((word_at(raw + 4 * i) >> b) & 0x01010101u) << 2;
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        const std::uint8_t* s = raw + 96;
        put_u16(record, row, raw + 108);
        for (int k = 0; k < 16; ++k) {
            const int low = k < 8 ? s[k] & 15 : s[k - 8] >> 4;
            const int high = (s[8 + k % 4] >> (2 * (k / 4))) & 3;
            record[32 + 16 * k + row] = static_cast<std::uint8_t>((low | (high << 4)) - 32);
        }
    }
    static Affine affine(const std::uint8_t* record, int row, int part) {
        const auto s = static_cast<std::int8_t>(record[32 + 16 * part + row]);
        return {f16_at(record + 2 * row) * static_cast<float>(s), 0.0f};
    }
    static void factors(const std::uint8_t* record, int b, simd::Floats* scale, simd::Floats*) {
        const auto d = simd::load_f16(record);
        for (int h = 0; h < 2; ++h) scale[h] = d * simd::load_i8(record + 32 + 16 * (2 * b + h));
    }
};

}  // namespace greenroom::formats
