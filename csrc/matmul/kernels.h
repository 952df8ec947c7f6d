// One group of 16 weight rows times one tile of tokens, for every format: the innermost loops.
// Each token's sums are formed in the same order whatever the tile, so a result does not depend
// on how many tokens were computed together.
#pragma once

#include <cstdint>
#include <iterator>

#include "matmul/activations.h"

namespace greenroom {

// out[t * ld + row] for t < width, 16 rows. group: one packed group; blocks: columns / 32;
// first: the tile's first token; width: its tokens; next: the group that will be read after this
// one (this one, if that is not known), or null if this one is in the cache.
using TileKernel = void (*)(const std::uint8_t* group, std::int64_t blocks, const Activations& x,
                            std::int64_t first, int width, const std::uint8_t* next, float* out,
                            std::int64_t ld);

// Some blocks of 32 columns of one group as tiles of bfloat16, tile_bytes for each of one or two
// parts (expand.h).
using ExpandKernel = void (*)(const std::uint8_t* group, std::int64_t blocks, std::int64_t first,
                              std::int64_t count, std::uint8_t* out);

struct Kernels {
    TileKernel tiles[std::size(simd::tile_widths)] = {};
    ExpandKernel expand = nullptr;  // null: not in AMX tiles of bfloat16
    int expanded_parts = 0;

    TileKernel of_width(int width) const {
        int i = 0;
        while (simd::tile_widths[i] < width) ++i;
        return tiles[i];
    }
};

// Null pointers for a type without kernels.
const Kernels& kernels_of(int type);

}  // namespace greenroom
