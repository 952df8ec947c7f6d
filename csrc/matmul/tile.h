// The kernel templates behind kernels.h; included by the files that instantiate them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formats/all.h"
#include "matmul/kernels.h"

namespace greenroom {

// Bytes between the weights being used and those that are asked for: into L2 far enough ahead for
// memory to answer, into L1 a little ahead. Asking for the far ones in L1 takes up the few line
// fill buffers that L1 has for as long as memory needs (docs/slab-layout.md).
constexpr std::int64_t far_ahead = 8192, near_ahead = 2048;

template <int Bytes>
inline void prefetch_lines(const std::uint8_t* p) {
    for (int i = 0; i < Bytes; i += 64) simd::prefetch_far(p + i);
}

// Asks for the payload of a group a block at a time, and at its end for that of the next one.
template <int BlockBytes>
class Ahead {
    static constexpr std::int64_t distance = (far_ahead + BlockBytes - 1) / BlockBytes;

  public:
    // next: null if all weights are in the cache already.
    Ahead(const std::uint8_t* group, const std::uint8_t* next, std::int64_t blocks)
        : next_(next), left_(std::max<std::int64_t>(blocks - distance, 0)) {
        at_ = left_ ? group + distance * BlockBytes : next;
    }
    // block: the one that will be used now.
    void step(const std::uint8_t* block) {
        if (!next_) return;
        prefetch_lines<BlockBytes>(at_);
        at_ = --left_ ? at_ + BlockBytes : next_;
        for (int i = 0; i < BlockBytes; i += 64) simd::prefetch(block + near_ahead + i);
    }

  private:
    const std::uint8_t *next_, *at_;
    std::int64_t left_;  // blocks of this group to be asked for
};

// Whether a kernel for tiles of `Tokens` takes narrower ones too.
template <int Tokens>
constexpr bool flexible = simd::any_width && Tokens > 1;

// body(t) for the tokens of a tile.
template <int Tokens, class Body>
[[gnu::always_inline]] inline void each_token(int width, Body body) {
    if constexpr (flexible<Tokens>)
        for (int t = 0; t < width; ++t) body(t);
    else
        unrolled<Tokens>(body);
}

// body(count, first token) for runs of `Together` tokens of a tile, and for a shorter last one.
template <int Tokens, int Together, class Body>
[[gnu::always_inline]] inline void in_runs(int width, Body body) {
    int t = 0;
    for (; t + Together <= (flexible<Tokens> ? width : Tokens); t += Together)
        body(std::integral_constant<int, Together>{}, t);
    if constexpr (flexible<Tokens>)
        unrolled<Together - 1>([&](auto i) __attribute__((always_inline)) {
            if (width - t == i + 1) body(std::integral_constant<int, i + 1>{}, t);
        });
}

// Four columns of 16 rows, as simd::dots wants them for tiles of that many tokens.
template <int Tokens>
using Quad = std::conditional_t<Tokens == 1, simd::Codes, simd::Words>;

template <class F, int Tokens>
[[gnu::always_inline]] inline void decode_quads(const std::uint8_t* lines, Quad<Tokens>* out) {
    simd::Codes codes[8];
    formats::decode<F>(lines, codes);
    unrolled<8>([&](auto j) {
        if constexpr (Tokens == 1)
            out[j] = codes[j];
        else
            out[j] = simd::widen<F::zero>(codes[j]);
    });
}

// acc[t] += 32 columns of one group times token t, for a few tokens.
template <class F, int Tokens, class Q>
[[gnu::always_inline]] inline void add_block(const Q* codes, const simd::Floats* scale,
                                             const simd::Floats* min, const XBlock* x,
                                             simd::Floats* acc) {
    using namespace simd;
    constexpr int quads = 8 / F::parts;
    unrolled<F::parts>([&](auto p) __attribute__((always_inline)) {
        const std::int32_t* neg = F::parts == 1 ? &x->neg_sum : &x->neg_part_sum[p];
        Ints sums[Tokens];
        dots<F::max_code, F::zero, quads, Tokens>(codes + p * quads, x->high, p * quads, neg, sums);
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            Floats sum = fma(to_floats(sums[t]), scale[p] * splat(x[t].scale), acc[t]);
            if constexpr (F::has_min) {
                const float all = F::parts == 1 ? x[t].sum : x[t].part_sum[p];
                sum = fnma(min[p], splat(all), sum);
            }
            acc[t] = sum;
        });
    });
}

// add_block for a whole tile.
template <class F, int Tokens, class Q>
[[gnu::always_inline]] inline void add_tile(const Q* codes, const simd::Floats* scale,
                                            const simd::Floats* min, const XBlock* x, int width,
                                            simd::Floats* acc) {
    constexpr int together = std::min(Tokens, simd::interleave);
    in_runs<Tokens, together>(width, [&](auto count, int t) __attribute__((always_inline)) {
        add_block<F, count>(codes, scale, min, x + t, acc + t);
    });
}

// Where tiles have any width it stands apart, so that what the caller holds in registers does not
// drive the sums out of them: that cost 15 %, with VNNI more, and hung on code far from here.
template <class F, int Tokens, class Q>
[[gnu::noinline]] void add_tile_apart(const Q* codes, const simd::Floats* scale,
                                      const simd::Floats* min, const XBlock* x, int width,
                                      simd::Floats* acc) {
    add_tile<F, Tokens>(codes, scale, min, x, width, acc);
}

template <class F, int Tokens>
void tile_quantised(const std::uint8_t* group, std::int64_t blocks, const Activations& a,
                    std::int64_t first, int width, const std::uint8_t* next, float* out,
                    std::int64_t ld) {
    using namespace simd;
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols;
    const std::uint8_t* records = group + blocks * block_bytes;
    // Records lie behind the payload and are needed from the first block on: a whole group ahead.
    const std::uint8_t* next_records = next ? next + blocks * block_bytes : nullptr;
    Ahead<block_bytes> ahead(group, next, blocks);
    const XBlock* x = a.quantised_tile(first);
    Floats acc[Tokens];
    each_token<Tokens>(width, [&](auto t) { acc[t] = zero(); });
    for (std::int64_t i = 0; i < blocks; i += per_raw) {
        for (int b = 0; b < per_raw; ++b, group += block_bytes, x += width) {
            ahead.step(group);
            Quad<Tokens> codes[8];
            Floats scale[2], min[2];
            decode_quads<F, Tokens>(group, codes);
            F::factors(records, b, scale, min);
            if constexpr (flexible<Tokens>)
                add_tile_apart<F, Tokens>(codes, scale, min, x, width, acc);
            else
                add_tile<F, Tokens>(codes, scale, min, x, width, acc);
        }
        records += F::record_bytes;
        if (!next) continue;
        prefetch_lines<F::record_bytes>(next_records);
        next_records += F::record_bytes;
    }
    each_token<Tokens>(width, [&](auto t) { store(out + t * ld, acc[t]); });
}

// Some tokens of a tile of `width`. Two sums per token, of even and of odd columns, hide the
// latency of the additions.
template <class F, int Tokens>
void some_floats(const std::uint8_t* group, std::int64_t blocks, const float* x, int width,
                 const std::uint8_t* next, float* out, std::int64_t ld) {
    using namespace simd;
    constexpr int per_line = F::cols_per_line, step = 2 / per_line;
    Floats even[Tokens], odd[Tokens];
    Ahead<step * 64> ahead(group, next, blocks * 16);
    unrolled<Tokens>([&](auto t) { even[t] = odd[t] = zero(); });
    for (std::int64_t pair = 0; pair < blocks * 16; ++pair, x += 2 * width) {
        Floats w[2];
        ahead.step(group);
        unrolled<step>([&](auto i) { F::split(group + 64 * i, w + i); });
        group += step * 64;
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            even[t] = fma(w[0], splat(x[t]), even[t]);
            odd[t] = fma(w[1], splat(x[width + t]), odd[t]);
        });
    }
    unrolled<Tokens>([&](auto t) { store(out + t * ld, even[t] + odd[t]); });
}

template <class F, int Tokens>
void tile_floats(const std::uint8_t* group, std::int64_t blocks, const Activations& a,
                 std::int64_t first, int width, const std::uint8_t* next, float* out,
                 std::int64_t ld) {
    constexpr int each = std::min(Tokens, simd::float_tile);
    const float* x = a.float_tile(first);
    in_runs<Tokens, each>(width, [&](auto count, int t) {
        some_floats<F, count>(group, blocks, x + t, width, t ? nullptr : next, out + t * ld, ld);
    });
}

}  // namespace greenroom
