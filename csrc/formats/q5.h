// Q5_0 (x = d * (n - 16)) and Q5_1 (x = d * n + m): Q4_0 and Q4_1 with a fifth bit in a word of
// its own.
#pragma once

#include "formats/q4.h"

namespace greenroom::formats {

inline void add_fifth_bits(const std::uint8_t* bits, std::uint8_t* codes) {
    const std::uint32_t word = word_at(bits);
    for (int i = 0; i < 32; ++i) codes[i] |= static_cast<std::uint8_t>(((word >> i) & 1u) << 4);
}

struct Q5_0 : Q4_0 {
    using Payload = Bits5;
    static constexpr int type = 6, raw_bytes = 22, max_code = 31, zero = 4;

    static void codes(const std::uint8_t* raw, int, std::uint8_t* out) {
        split_nibbles(raw + 6, 16, out);
        add_fifth_bits(raw + 2, out);
    }
};

struct Q5_1 : Q4_1 {
    using Payload = Bits5;
    static constexpr int type = 7, raw_bytes = 24, max_code = 31;

    static void codes(const std::uint8_t* raw, int, std::uint8_t* out) {
        split_nibbles(raw + 8, 16, out);
        add_fifth_bits(raw + 4, out);
    }
};

}  // namespace greenroom::formats
