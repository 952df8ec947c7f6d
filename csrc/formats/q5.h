// Q5_0 (x = d * (n - 16)) and Q5_1 (x = d * n + m): Q4_0 and Q4_1 with a fifth bit in a word of
// its own.
#pragma once

#include "formats/q4.h"

namespace greenroom::formats {

inline void add_fifth_bits(const std::uint8_t* bits, Quads& codes) {
    const std::uint32_t word = word_at(bits);
    for (int i = 0; i < 8; ++i) {  // four copies of four bits, 7 bits apart, have one in each byte
        const std::uint32_t spread = ((word >> (4 * i)) & 15u) * 0x00204081u;
        codes[i] |= (spread & 0x01010101u) << 4;
    }
}

struct Q5_0 : Q4_0 {
    using Payload = Bits5;
    static constexpr int type = 6, raw_bytes = 22, max_code = 31, zero = 4;

    static void codes(const std::uint8_t* raw, int, Quads& out) {
        split_nibbles(raw + 6, 16, out.data());
        add_fifth_bits(raw + 2, out);
    }
};

struct Q5_1 : Q4_1 {
    using Payload = Bits5;
    static constexpr int type = 7, raw_bytes = 24, max_code = 31;

    static void codes(const std::uint8_t* raw, int, Quads& out) {
        split_nibbles(raw + 8, 16, out.data());
        add_fifth_bits(raw + 4, out);
    }
};

}  // namespace greenroom::formats
