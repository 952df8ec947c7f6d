// The small vector language all kernels are written in. Everything is 16 lanes wide because a
// packed line holds 16 rows (docs/slab-layout.md):
//   Floats  16 x float32          Ints  16 x int32
//   Codes   one 64-byte line: 16 rows x 4 unsigned bytes
// Each tier's header defines these types and the same functions; a narrower machine keeps a
// vector in two registers or in an array. Knows nothing of block formats.
//
// dots<MaxCode, Zero, N, Tokens>(quads, x, first, neg_sum, out) is the heart: for each token and
// each of the 16 rows it forms the sum over 4N columns of (code - 2^Zero) * x, exactly, where codes
// are at most MaxCode and *neg_sum is minus the sum of those x. Zero < 0 means that no zero point
// is subtracted. x holds 32 values in 64 bytes (XBlock), of which quads first .. first + N - 1 are
// meant. Tokens lie token_bytes apart and are at most simd::interleave. In tiles of one token the
// quads are Codes and x is two planes: 256 times the byte at x plus the byte plane_bytes further
// on. In wider ones they are what widen<Zero>() makes of them, and x what planes_to_words() makes
// of it.
//
// wide_tile is the most tokens a tile has, float_tile how many of them meet float weights at once.
// any_width says whether there are tiles of every width up to it, or those of tile_widths only,
// each for tile_least tokens or more: what is left of fewer is cheaper in narrower tiles, as
// measured. Kernels there are for tile_widths in both cases.
#pragma once

#include <utility>

namespace greenroom::simd {
constexpr int plane_bytes = 32, token_bytes = 128;
}

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)
#include "simd/avx512.h"
#elif defined(GREENROOM_TIER_avx2) || defined(GREENROOM_TIER_avxvnni)
#include "simd/avx2.h"
#else
#include "simd/portable.h"
#endif

namespace greenroom {

// body(integral_constant<0>) .. body(integral_constant<N - 1>): with indices the compiler knows
// from the start, arrays of accumulators become registers.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
    [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
        (body(std::integral_constant<int, I>{}), ...);
    }(std::make_integer_sequence<int, N>{});
}

}  // namespace greenroom
