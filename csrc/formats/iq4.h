// IQ4_NL (x = d * T[n]) and IQ4_XS (256 columns, 32 share a 6-bit scale: x = d * (s - 32) * T[n]).
// The table's codes are T + 128.
#pragma once

#include "formats/q4.h"

namespace greenroom::formats {

struct IQ4_NL : Q4_0 {
    static constexpr int type = 20, max_code = 241, zero = 7;

    // ggml's kvalues_iq4nl {-127, -104, ..., 89, 113}, each plus 128.
    static const std::uint8_t* table() {
        static constexpr std::uint8_t codes[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                   129, 141, 153, 166, 181, 197, 217, 241};
        return codes;
    }
};

// A record: d of 16 rows, then 8 x 16 signed bytes s - 32.
struct IQ4_XS {
    using Payload = Bits4;
    static constexpr int type = 23, raw_cols = 256, raw_bytes = 136;
    static constexpr int record_bytes = 160;
    static constexpr int max_code = 241, zero = 7, parts = 1;
    static constexpr bool has_min = false;

    static const std::uint8_t* table() { return IQ4_NL::table(); }
    static void codes(const std::uint8_t* raw, int b, Quads& out) {
        split_nibbles(raw + 8 + 16 * b, 16, out.data());
    }
    static void scales(const std::uint8_t* raw, std::uint8_t* record, int row) {
        const int high = u16_at(raw + 2);
        put_u16(record, row, raw);
        for (int b = 0; b < 8; ++b) {
            const int low = (raw[4 + b / 2] >> (4 * (b % 2))) & 15;
            const int s = low | (((high >> (2 * b)) & 3) << 4);
            record[32 + 16 * b + row] = static_cast<std::uint8_t>(s - 32);
        }
    }
    static Affine affine(const std::uint8_t* record, int row, int part) {
        const auto s = static_cast<std::int8_t>(record[32 + 16 * part + row]);
        return {f16_at(record + 2 * row) * static_cast<float>(s), 0.0f};
    }
    static void factors(const std::uint8_t* record, int b, simd::Floats* scale, simd::Floats*) {
        scale[0] = simd::load_f16(record) * simd::load_i8(record + 32 + 16 * b);
    }
};

}  // namespace greenroom::formats
