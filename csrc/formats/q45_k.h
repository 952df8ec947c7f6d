// Q4_K and Q5_K: 256 columns, 32 of them share a 6-bit scale and a 6-bit min:
// x = d * s * n - dmin * m. A record: d of 16 rows, dmin, then 8 x 16 bytes s, 8 x 16 bytes m.
#pragma once

#include "formats/format.h"

namespace greenroom::formats {

struct Q4_K {
    using Payload = Bits4;
    static constexpr int type = 12, raw_cols = 256, raw_bytes = 144;
    static constexpr int record_bytes = 320;
    static constexpr int max_code = 15, zero = -1, parts = 1;
    static constexpr bool has_min = true;

    static void nibbles(const std::uint8_t* qs, int b, Quads& out) {
        const std::uint8_t* bytes = qs + 32 * (b / 2);
        for (int i = 0; i < 8; ++i)
            out[i] = (word_at(bytes + 4 * i) >> (4 * (b % 2))) & 0x0f0f0f0fu;
    }
    static void codes(const std::uint8_t* raw, int b, Quads& out) { nibbles(raw + 16, b, out); }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        const std::uint8_t* s = raw + 4;
        put_u16(record, row, raw);
        put_u16(record + 32, row, raw + 2);
        for (int b = 0; b < 8; ++b) {
            const int i = b % 4;
            const int scale = b < 4 ? s[i] & 63 : (s[i + 8] & 15) | ((s[i] >> 6) << 4);
            const int min = b < 4 ? s[i + 4] & 63 : (s[i + 8] >> 4) | ((s[i + 4] >> 6) << 4);
            record[64 + 16 * b + row] = static_cast<std::uint8_t>(scale);
            record[192 + 16 * b + row] = static_cast<std::uint8_t>(min);
        }
    }
    static Affine affine(const std::uint8_t* record, int row, int part) {
        const std::uint8_t* s = record + 64 + 16 * part + row;
        return {f16_at(record + 2 * row) * static_cast<float>(s[0]),
                f16_at(record + 32 + 2 * row) * static_cast<float>(s[128])};
    }
    static void factors(const std::uint8_t* record, int b, simd::Floats* scale, simd::Floats* min) {
        const std::uint8_t* s = record + 64 + 16 * b;
        scale[0] = simd::load_f16(record) * simd::load_u8(s);
        min[0] = simd::load_f16(record + 32) * simd::load_u8(s + 128);
    }
};

struct Q5_K : Q4_K {
    using Payload = Bits5;
    static constexpr int type = 13, raw_bytes = 176, max_code = 31;

    static void codes(const std::uint8_t* raw, int b, Quads& out) {
        nibbles(raw + 48, b, out);
        const std::uint8_t* high = raw + 16;
        for (int i = 0; i < 8; ++i) out[i] |= ((word_at(high + 4 * i) >> b) & 0x01010101u) << 4;
    }
};

}  // namespace greenroom::formats
