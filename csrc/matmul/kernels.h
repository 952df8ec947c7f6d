// One group of 16 weight rows times one tile of tokens, for every format: the innermost loops.
// Each token's sums are formed in the same order whatever the tile, so a result does not depend
// on how many tokens were computed together.
#pragma once

#include <cstdint>

#include "matmul/activations.h"

namespace greenroom {

// out[t * ld + row] for t < width, 16 rows. group: one packed group; blocks: columns / 32;
// first: the tile's first token.
using TileKernel = void (*)(const std::uint8_t* group, std::int64_t blocks, const Activations& x,
                            std::int64_t first, float* out, std::int64_t ld);

// One group as bfloat16 tiles of 1 KiB per 32 columns, each 16 lines of 16 column pairs: the
// second operand of TDPBF16PS.
using ExpandKernel = void (*)(const std::uint8_t* group, std::int64_t blocks, std::uint8_t* out);

struct Kernels {
    TileKernel one = nullptr, four = nullptr, wide = nullptr;
    ExpandKernel expand = nullptr;  // null: no AMX path (the weights carry more than bfloat16)
};

// Null pointers for a type without kernels.
const Kernels& kernels_of(int type);

}  // namespace greenroom
