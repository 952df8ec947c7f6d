// The kernel templates behind kernels.h; included by the files that instantiate them.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formats/all.h"
#include "matmul/kernels.h"

namespace greenroom {

// Float weights, read straight on: bytes ahead of the running line that are asked for. The hardware
// prefetcher alone leaves a fifth of the bandwidth unused (docs/slab-layout.md).
constexpr std::int64_t prefetch_ahead = 8192;

template <int Bytes>
inline void prefetch_lines(const std::uint8_t* p) {
    for (int i = 0; i < Bytes; i += 64) simd::prefetch(p + i);
}

// Asks for the next group while this one is computed, payload and records in the order of their
// addresses, an equal share of lines with every block. Records lie behind the payload and are
// needed from the first block on: reading less than a group ahead would come too late for them.
class NextGroup {
  public:
    NextGroup(const std::uint8_t* next, std::int64_t blocks, std::int64_t group_bytes)
        : next_(next), step_(next ? (group_bytes / 64 << 16) / blocks + 1 : 0) {}
    void block() {
        due_ += step_;
        for (; line_ < due_ >> 16; ++line_) simd::prefetch(next_ + 64 * line_);
    }

  private:
    const std::uint8_t* next_;
    std::int64_t step_, due_ = 0, line_ = 0;  // step and due in 2^-16 of a line
};

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
            out[j] = simd::widen(codes[j]);
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
            acc[t] = fma(to_floats(sums[t]), scale[p] * splat(x[t].scale), acc[t]);
            if constexpr (F::has_min) {
                const float sum = F::parts == 1 ? x[t].sum : x[t].part_sum[p];
                acc[t] = fnma(min[p], splat(sum), acc[t]);
            }
        });
    });
}

template <class F, int Tokens>
void tile_quantised(const std::uint8_t* group, std::int64_t blocks, const Activations& a,
                    std::int64_t first, const std::uint8_t* next, float* out, std::int64_t ld) {
    using namespace simd;
    constexpr int block_bytes = F::Payload::lines * formats::line_bytes;
    constexpr int per_raw = F::raw_cols / formats::block_cols;
    constexpr int together = std::min(Tokens, simd::interleave);
    const std::uint8_t* records = group + blocks * block_bytes;
    const std::int64_t record_bytes = blocks / per_raw * F::record_bytes;
    NextGroup ahead(next, blocks, (blocks * block_bytes + record_bytes + 63) / 64 * 64);
    const XBlock* x = a.quantised_tile(first);
    Floats acc[Tokens];
    unrolled<Tokens>([&](auto t) { acc[t] = zero(); });
    for (std::int64_t i = 0; i < blocks; i += per_raw) {
        for (int b = 0; b < per_raw; ++b, group += block_bytes, x += Tokens) {
            ahead.block();
            Quad<Tokens> codes[8];
            Floats scale[2], min[2];
            decode_quads<F, Tokens>(group, codes);
            F::factors(records, b, scale, min);
            for (int t = 0; t < Tokens; t += together)
                add_block<F, together>(codes, scale, min, x + t, acc + t);
        }
        records += F::record_bytes;
    }
    unrolled<Tokens>([&](auto t) { store(out + t * ld, acc[t]); });
}

// Some tokens of a tile of `Width`. Two sums per token, of even and of odd columns, hide the
// latency of the additions.
template <class F, int Tokens, int Width>
void some_floats(const std::uint8_t* group, std::int64_t blocks, const float* x, float* out,
                 std::int64_t ld) {
    using namespace simd;
    constexpr int per_line = F::cols_per_line, step = 2 / per_line;
    Floats even[Tokens], odd[Tokens];
    unrolled<Tokens>([&](auto t) { even[t] = odd[t] = zero(); });
    for (std::int64_t pair = 0; pair < blocks * 16; ++pair, x += 2 * Width) {
        Floats w[2];
        prefetch_lines<step * 64>(group + prefetch_ahead);
        unrolled<step>([&](auto i) { F::split(group + 64 * i, w + i); });
        group += step * 64;
        unrolled<Tokens>([&](auto t) __attribute__((always_inline)) {
            even[t] = fma(w[0], splat(x[t]), even[t]);
            odd[t] = fma(w[1], splat(x[Width + t]), odd[t]);
        });
    }
    unrolled<Tokens>([&](auto t) { store(out + t * ld, even[t] + odd[t]); });
}

template <class F, int Tokens>
void tile_floats(const std::uint8_t* group, std::int64_t blocks, const Activations& a,
                 std::int64_t first, const std::uint8_t*, float* out, std::int64_t ld) {
    constexpr int each = std::min(Tokens, simd::float_tile);
    for (int t = 0; t < Tokens; t += each)
        some_floats<F, each, Tokens>(group, blocks, a.float_tile(first) + t, out + t * ld, ld);
}

}  // namespace greenroom
