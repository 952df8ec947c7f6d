// Quantised weights and AMX: a group is expanded once to signed bytes as TDPBSSD reads them, then
// multiplied with both planes of the activations, 16 tokens at a time. The integers are those of
// the dot-product kernels (tile.h) and so is every rounding after them: a result has the same bits
// on either path. It stands apart so that tiers that cannot use it compile none of it.
#pragma once

#include "matmul/amx_tiles.h"
#include "matmul/tile.h"

namespace greenroom {

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// 16 rows x 32 columns: x = scale * code - min, the zero point taken off the codes.
struct Expanded {
    simd::Codes codes[8];  // columns 4j .. 4j + 3
    simd::Floats scale[2], min[2];
};

template <class F>
void expand_quantised(const std::uint8_t* group, std::int64_t blocks, Expanded* out) {
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols;
    const std::uint8_t* records = group + blocks * block_bytes;
    for (std::int64_t i = 0; i < blocks; ++i, group += block_bytes, ++out) {
        prefetch_lines<block_bytes>(group + prefetch_ahead);
        formats::decode<F>(group, out->codes);
        if constexpr (F::zero >= 0)
            for (simd::Codes& quad : out->codes)
                quad = simd::subtract(quad, simd::splat_byte(1 << F::zero));
        const int b = static_cast<int>(i % per_raw);
        F::factors(records + i / per_raw * F::record_bytes, b, out->scale, out->min);
    }
}

namespace amx {

// Blocks per pass: the weights of a few groups and the activations of 16 tokens stay in L1.
constexpr std::int64_t blocks_at_once = 4;

// Sums of one block: tokens x rows.
template <int Parts>
struct alignas(64) BlockSums {
    std::int32_t high[Parts][16][16], low[Parts][16][16];
};

// Set: which half of the tile registers, so that consecutive products need not wait.
template <int Parts, int Set>
void product_of_part(Tiles& tiles, const Expanded& w, const XBlock* x, int part,
                     BlockSums<Parts>& out) {
    tiles.template load<6 + Set>(&w.codes[part * 8 / Parts], formats::line_bytes);
    tiles.template load<4>(x->high + part * 32 / Parts, sizeof(XBlock));
    tiles.template load<5>(x->low + part * 32 / Parts, sizeof(XBlock));
    tiles.template zero<2 * Set>();
    tiles.template zero<2 * Set + 1>();
    tiles.template multiply_int8<2 * Set, 4, 6 + Set>();
    tiles.template multiply_int8<2 * Set + 1, 5, 6 + Set>();
    tiles.template store<2 * Set>(out.high[part], 64);
    tiles.template store<2 * Set + 1>(out.low[part], 64);
}

template <int Parts>
void product_of_block(Tiles& tiles, const Expanded& w, const XBlock* x, bool odd,
                      BlockSums<Parts>& out) {
    if constexpr (Parts == 2) {
        product_of_part<Parts, 0>(tiles, w, x, 0, out);
        product_of_part<Parts, 1>(tiles, w, x, 1, out);
    } else if (odd) {
        product_of_part<Parts, 1>(tiles, w, x, 0, out);
    } else {
        product_of_part<Parts, 0>(tiles, w, x, 0, out);
    }
}

// As add_block in tile.h, the integers known.
template <int Parts, bool HasMin>
[[gnu::always_inline]] inline void add_sums(const BlockSums<Parts>& sums, const Expanded& w,
                                            const XBlock* x, simd::Floats* acc) {
    using namespace simd;
    unrolled<Parts>([&](auto p) __attribute__((always_inline)) {
        unrolled<16>([&](auto t) __attribute__((always_inline)) {
            const Ints sum = shift_left<8>(load_ints(sums.high[p][t])) + load_ints(sums.low[p][t]);
            acc[t] = fma(to_floats(sum), w.scale[p] * splat(x[t].scale), acc[t]);
            if constexpr (HasMin) {
                const float part = Parts == 1 ? x[t].sum : x[t].part_sum[p];
                acc[t] = fnma(w.min[p], splat(part), acc[t]);
            }
        });
    });
}

// out (16 tokens, ld) gains some blocks of one group. The tiles run one block ahead of the sums.
template <int Parts, bool HasMin>
void add_blocks(Tiles& tiles, const Expanded* w, std::int64_t blocks, const XBlock* x, float* out,
                std::int64_t ld, bool first) {
    using namespace simd;
    BlockSums<Parts> sums[2];
    Floats acc[16];
    unrolled<16>([&](auto t) { acc[t] = first ? simd::zero() : simd::load(out + t * ld); });
    product_of_block<Parts>(tiles, w[0], x, false, sums[0]);
    for (std::int64_t b = 0; b < blocks; ++b) {
        if (b + 1 < blocks)
            product_of_block<Parts>(tiles, w[b + 1], x + 16 * (b + 1), b % 2 == 0,
                                    sums[(b + 1) % 2]);
        add_sums<Parts, HasMin>(sums[b % 2], w[b], x + 16 * b, acc);
    }
    unrolled<16>([&](auto t) { simd::store(out + t * ld, acc[t]); });
}

// out (tokens, 16 * groups) for whole tiles of 16 tokens.
template <int Parts, bool HasMin>
void multiply_expanded(const Expanded* weights, std::int64_t groups, const Activations& x,
                       std::int64_t tokens, float* out) {
    Tiles tiles(TileConfig(32 / Parts));
    const std::int64_t ld = groups * 16;
    for (std::int64_t b = 0; b < x.blocks; b += blocks_at_once)
        for (std::int64_t t = 0; t < tokens; t += 16)
            for (std::int64_t g = 0; g < groups; ++g)
                add_blocks<Parts, HasMin>(
                    tiles, weights + g * x.blocks + b, std::min(blocks_at_once, x.blocks - b),
                    x.quantised_tile(t) + 16 * b, out + t * ld + g * 16, ld, b == 0);
}

}  // namespace amx

template <class F>
constexpr ExpandKernel expand_of = expand_quantised<F>;
template <class F>
constexpr ExpandedKernel expanded_of = amx::multiply_expanded<F::parts, F::has_min>;

#else

struct Expanded {};
template <class F>
constexpr ExpandKernel expand_of = nullptr;
template <class F>
constexpr ExpandedKernel expanded_of = nullptr;

#endif

}  // namespace greenroom
