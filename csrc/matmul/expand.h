// Weights as bfloat16 B tiles for the AMX path: a line holds columns k and k + 1 of 16 rows. It
// stands apart so that tiers that cannot use it compile none of it.
#pragma once

#include "formats/all.h"
#include "matmul/kernels.h"

namespace greenroom {

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// Byte B of each row's word as floats.
template <int B>
inline simd::Floats column(simd::Codes codes) {
    return simd::to_floats(simd::shift_right<8 * B>(simd::as_ints(codes)) & 255);
}

template <class F>
void expand_block(const std::uint8_t* lines, const std::uint8_t* record, int b, std::uint8_t* out) {
    using namespace simd;
    Codes codes[8];
    Floats scale[2], min[2], offset[2];
    formats::decode<F>(lines, codes);
    F::factors(record, b, scale, min);
    for (int p = 0; p < F::parts; ++p) {
        offset[p] = F::has_min ? min[p] : zero();
        if constexpr (F::zero >= 0) offset[p] = scale[p] * splat(static_cast<float>(1 << F::zero));
    }
    for (int j = 0; j < 8; ++j) {
        const int p = j * F::parts / 8;
        const auto value = [&](Floats code) { return code * scale[p] - offset[p]; };
        store_bf16_pairs(out + 128 * j, value(column<0>(codes[j])), value(column<1>(codes[j])));
        store_bf16_pairs(out + 128 * j + 64, value(column<2>(codes[j])),
                         value(column<3>(codes[j])));
    }
}

template <class F>
void expand_quantised(const std::uint8_t* group, std::int64_t blocks, std::uint8_t* out) {
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols;
    const std::uint8_t* records = group + blocks * block_bytes;
    for (std::int64_t i = 0; i < blocks; ++i)
        expand_block<F>(group + i * block_bytes, records + i / per_raw * F::record_bytes,
                        static_cast<int>(i % per_raw), out + i * 1024);
}

#else

template <class F>
constexpr ExpandKernel expand_quantised = nullptr;

#endif

}  // namespace greenroom
