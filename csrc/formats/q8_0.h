// Q8_0: x = d * q with q int8, stored here as q + 128.
#pragma once

#include "formats/q4.h"

namespace greenroom::formats {

struct Q8_0 : Q4_0 {
    using Payload = Bits8;
    static constexpr int type = 8, raw_bytes = 34, max_code = 255, zero = 7;

    static void codes(const std::uint8_t* raw, int, Quads& out) {
        for (int i = 0; i < 8; ++i) out[i] = word_at(raw + 2 + 4 * i) ^ 0x80808080u;
    }
};

}  // namespace greenroom::formats
