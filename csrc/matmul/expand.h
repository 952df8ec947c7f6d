// Weights as AMX wants them: bfloat16 with their scale and minimum worked in, 16 rows x 32 columns
// to a tile of 16 lines, each a pair of columns. MXFP4, a power of two times a short code, and BF16
// lose nothing; others are rounded to 2^-9 of a weight. It stands apart so that tiers that cannot
// use it compile none of it.
#pragma once

#include "matmul/tile.h"

namespace greenroom {

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// A code becomes the float 256 + code by setting mantissa bits. What that adds is taken off again
// within the multiply-add: 256 and the zero point times a scale of at most 18 bits are exact.
template <class F>
void expand_quantised(const std::uint8_t* group, std::int64_t blocks, std::int64_t first,
                      std::int64_t count, std::uint8_t* out) {
    using namespace simd;
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols;
    constexpr float shifted = 256 + (F::zero < 0 ? 0 : 1 << F::zero);
    const std::uint8_t* records = group + blocks * block_bytes;
    for (std::int64_t i = first; i < first + count; ++i, out += tile_bytes) {
        Codes codes[8];
        Floats scale[2], min[2], offset[2];
        formats::decode<F>(group + i * block_bytes, codes);
        F::factors(records + i / per_raw * F::record_bytes, static_cast<int>(i % per_raw), scale,
                   min);
        unrolled<F::parts>([&](auto p) {
            if constexpr (F::has_min)
                offset[p] = fnma(scale[p], splat(shifted), simd::zero() - min[p]);
            else
                offset[p] = scale[p] * splat(-shifted);
        });
        unrolled<8>([&](auto j) __attribute__((always_inline)) {
            constexpr int p = j * F::parts / 8;
            const Codes quad = codes[j];
            store_line(out + 128 * j, bf16_pairs(fma(floats_256<0>(quad), scale[p], offset[p]),
                                                 fma(floats_256<1>(quad), scale[p], offset[p])));
            store_line(out + 128 * j + 64,
                       bf16_pairs(fma(floats_256<2>(quad), scale[p], offset[p]),
                                  fma(floats_256<3>(quad), scale[p], offset[p])));
        });
    }
}

// Packed lines of bfloat16 are pairs of columns already.
inline void expand_bf16(const std::uint8_t* group, std::int64_t, std::int64_t first,
                        std::int64_t count, std::uint8_t* out) {
    group += first * tile_bytes;
    for (std::int64_t i = 0; i < count * tile_bytes; i += formats::line_bytes)
        simd::store_line(out + i, simd::load_line(group + i));
}

template <class F>
constexpr ExpandKernel expand_of = expand_quantised<F>;
template <>
constexpr ExpandKernel expand_of<formats::BF16> = expand_bf16;
template <>
constexpr ExpandKernel expand_of<formats::F16> = nullptr;
template <>
constexpr ExpandKernel expand_of<formats::F32> = nullptr;

#else

template <class F>
constexpr ExpandKernel expand_of = nullptr;

#endif

}  // namespace greenroom
