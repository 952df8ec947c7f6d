// Q8_0: x = d * q with q int8, stored here as q + 128.
#pragma once

#include "formats/q4.h"

namespace greenroom::formats {

struct Q8_0 : Q4_0 {
    using Payload = Bits8;
    static constexpr int type = 8, raw_bytes = 34, max_code = 255, zero = 7;

    static void codes(const std::uint8_t* raw, int, std::uint8_t* out) {
        for (int i = 0; i < 32; ++i) out[i] = raw[2 + i] ^ 0x80u;
    }
};

}  // namespace greenroom::formats
