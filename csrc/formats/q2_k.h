// Q2_K: 256 columns, 16 of them share a 4-bit scale and a 4-bit min:
// x = d * (s & 15) * n - dmin * (s >> 4). A record: d of 16 rows, dmin, then 16 x 16 bytes s.
#pragma once

#include "formats/format.h"

namespace greenroom::formats {

// Q2_K and Q3_K keep the 2-bit values of columns l, l + 32, l + 64, l + 96 of a half in one byte.
inline void split_pairs(const std::uint8_t* qs, int b, Quads& out) {
    const std::uint8_t* half = qs + 32 * (b / 4);
    for (int i = 0; i < 8; ++i) out[i] = (word_at(half + 4 * i) >> (2 * (b % 4))) & 0x03030303u;
}

struct Q2_K {
    using Payload = Bits2;
    static constexpr int type = 10, raw_cols = 256, raw_bytes = 84;
    static constexpr int record_bytes = 320;
    static constexpr int max_code = 3, zero = -1, parts = 2;
    static constexpr bool has_min = true;

    static void codes(const std::uint8_t* raw, int b, Quads& out) { split_pairs(raw + 16, b, out); }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        put_u16(record, row, raw + 80);
        put_u16(record + 32, row, raw + 82);
        for (int i = 0; i < 16; ++i) record[64 + 16 * i + row] = raw[i];
    }
    static Affine affine(const std::uint8_t* record, int row, int part) {
        const int s = record[64 + 16 * part + row];
        return {f16_at(record + 2 * row) * static_cast<float>(s & 15),
                f16_at(record + 32 + 2 * row) * static_cast<float>(s >> 4)};
    }
    static void factors(const std::uint8_t* record, int b, simd::Floats* scale, simd::Floats* min) {
        const auto d = simd::load_f16(record), dmin = simd::load_f16(record + 32);
        for (int h = 0; h < 2; ++h) {
            const auto s = simd::bytes_u8(record + 64 + 16 * (2 * b + h));
            scale[h] = d * simd::to_floats(s & 15);
            min[h] = dmin * simd::to_floats(simd::shift_right<4>(s));
        }
    }
};

}  // namespace greenroom::formats
