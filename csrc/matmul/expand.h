// Weights as AMX wants them: bfloat16 with their scale and minimum worked in, 16 rows x 32 columns
// to a tile of 16 lines, each a pair of columns. In one part where that is exact, else in two, of
// which the second holds what the first leaves over. It stands apart so that tiers that cannot use
// it compile none of it.
#pragma once

#include "matmul/tile.h"

namespace greenroom {

// Short codes times scales of few bits fit the 8 bits of a bfloat16. One part for the others moved
// a model's logits visibly (docs/slab-layout.md).
template <class F>
constexpr int expanded_parts = 2;
template <>
constexpr int expanded_parts<formats::BF16> = 1;
template <>
constexpr int expanded_parts<formats::NVFP4> = 1;

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// A pair of columns of each part; the second part's tile follows the first's.
template <int Parts>
[[gnu::always_inline]] inline void store_pair(std::uint8_t* line, simd::Floats even,
                                              simd::Floats odd) {
    using namespace simd;
    store_line(line, upper_halves(even, odd));
    if constexpr (Parts == 2)
        store_line(line + tile_bytes, upper_halves(even - upper_half(even), odd - upper_half(odd)));
}

// A code becomes the float 256 + code by setting mantissa bits. What that adds is taken off again
// within the multiply-add: 256 and the zero point times a scale of at most 18 bits are exact.
template <class F>
void expand_quantised(const std::uint8_t* group, std::int64_t blocks, std::int64_t first,
                      std::int64_t count, std::uint8_t* out) {
    using namespace simd;
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols, parts = expanded_parts<F>;
    constexpr float shifted = 256 + (F::zero < 0 ? 0 : 1 << F::zero);
    const std::uint8_t* records = group + blocks * block_bytes;
    for (std::int64_t i = first; i < first + count; ++i, out += parts * tile_bytes) {
        Codes codes[8];
        Floats scale[2], min[2] = {simd::zero(), simd::zero()}, offset[2];
        formats::decode<F>(group + i * block_bytes, codes);
        F::factors(records + i / per_raw * F::record_bytes, static_cast<int>(i % per_raw), scale,
                   min);
        for (int p = 0; p < F::parts; ++p)
            offset[p] = fnma(scale[p], splat(shifted), simd::zero() - min[p]);
        unrolled<8>([&](auto j) __attribute__((always_inline)) {
            constexpr int p = j * F::parts / 8;
            Floats x[4];
            unrolled<4>([&](auto b) __attribute__((always_inline)) {
                x[b] = fma(floats_256<b>(codes[j]), scale[p], offset[p]);
            });
            store_pair<parts>(out + 128 * j, x[0], x[1]);
            store_pair<parts>(out + 128 * j + 64, x[2], x[3]);
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
constexpr ExpandKernel expand_of<formats::MXFP4> = nullptr;  // amx_int8.h
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
