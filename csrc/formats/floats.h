// F32, F16 and BF16 weights: lines of one (F32) or two columns, no scales. Columns are padded
// with zeros to a multiple of 32.
#pragma once

#include "formats/half.h"
#include "formats/planes.h"

namespace greenroom::formats {

struct F32 {
    static constexpr int type = 0, bytes = 4, cols_per_line = 1;
    static float value(const std::uint8_t* p) { return std::bit_cast<float>(word_at(p)); }
    static void split(const std::uint8_t* line, simd::Floats* out) {
        out[0] = simd::load(reinterpret_cast<const float*>(line));
    }
};

struct F16 {
    static constexpr int type = 1, bytes = 2, cols_per_line = 2;
    static float value(const std::uint8_t* p) { return f16_at(p); }
    static void split(const std::uint8_t* line, simd::Floats* out) {
        simd::split_f16(line, out[0], out[1]);
    }
};

struct BF16 {
    static constexpr int type = 30, bytes = 2, cols_per_line = 2;
    static float value(const std::uint8_t* p) { return bf16_at(p); }
    static void split(const std::uint8_t* line, simd::Floats* out) {
        simd::split_bf16(line, out[0], out[1]);
    }
};

}  // namespace greenroom::formats
