// Q6_K: 256 columns, 16 of them share a signed 8-bit scale: x = d * s * (n - 32).
// A record: d of 16 rows, then 16 x 16 signed bytes s.
#pragma once

#include "formats/q3_k.h"

namespace greenroom::formats {

struct Q6_K : Q3_K {
    using Payload = Bits6;
    static constexpr int type = 14, raw_bytes = 210, max_code = 63, zero = 5;

    static void codes(const std::uint8_t* raw, int b, Quads& out) {
        const int half = b / 4, g = b % 4;
        const std::uint8_t* low = raw + 64 * half + 32 * (g % 2);
        const std::uint8_t* high = raw + 128 + 32 * half;
        for (int i = 0; i < 8; ++i)
            out[i] = ((word_at(low + 4 * i) >> (4 * (g / 2))) & 0x0f0f0f0fu) |
                     (((word_at(high + 4 * i) >> (2 * g)) & 0x03030303u) << 4);
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        put_u16(record, row, raw + 208);
        for (int k = 0; k < 16; ++k) record[32 + 16 * k + row] = raw[192 + k];
    }
};

}  // namespace greenroom::formats
