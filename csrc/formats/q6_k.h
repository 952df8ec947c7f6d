// Q6_K: 256 columns, 16 of them share a signed 8-bit scale: x = d * s * (n - 32).
// A record: d of 16 rows, then 16 x 16 signed bytes s.
#pragma once

#include "formats/q3_k.h"

namespace greenroom::formats {

struct Q6_K : Q3_K {
    using Payload = Bits6;
    static constexpr int type = 14, raw_bytes = 210, max_code = 63, zero = 5;

    static void codes(const std::uint8_t* raw, int b, std::uint8_t* out) {
        const int half = b / 4, g = b % 4;
        const std::uint8_t* low = raw + 64 * half + 32 * (g % 2);
        const std::uint8_t* high = raw + 128 + 32 * half;
        for (int l = 0; l < 32; ++l)
            out[l] = static_cast<std::uint8_t>(((low[l] >> (4 * (g / 2))) & 15u) |
                                               (((high[l] >> (2 * g)) & 3u) << 4));
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        put_u16(record, row, raw + 208);
        for (int k = 0; k < 16; ++k) record[32 + 16 * k + row] = raw[192 + k];
    }
};

}  // namespace greenroom::formats
