#include "matmul/amx.h"

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

#include "matmul/amx_tiles.h"
#include "matmul/expand.h"
#include "matmul/kernels.h"

namespace greenroom::amx {

#if defined(GREENROOM_TIER_amx)
bool enabled = true;
#else
bool enabled = false;
#endif
std::atomic<std::int64_t> int8_calls{0};

namespace {

constexpr int bf16_type = 30;
constexpr std::int64_t tile_bytes = 1024;
// Fewer tokens leave most of a tile empty.
constexpr std::int64_t fewest_tokens = 12;

// Where the operands of one product of 16 or 32 tokens with 16 or 32 rows lie.
struct Operands {
    const std::uint16_t* tokens;  // first token's row
    const std::uint8_t* weights;  // first group's tiles, one per 32 columns
    std::int64_t row, group;      // bytes from a token to the next, from a group to the next
    std::int64_t blocks;
};

// Tiles 0-3 are sums (token tile x group), 4-5 tokens, 6-7 weights.
template <int TokenTiles, int Groups>
void add_products(Tiles& tiles, const Operands& o) {
    const auto* a = reinterpret_cast<const std::uint8_t*>(o.tokens);
    const std::uint8_t* b = o.weights;
    for (std::int64_t block = 0; block < o.blocks; ++block, a += 64, b += tile_bytes) {
        tiles.template load<4>(a, o.row);
        tiles.template load<6>(b, 64);
        tiles.template multiply<0, 4, 6>();
        if constexpr (Groups == 2) {
            tiles.template load<7>(b + o.group, 64);
            tiles.template multiply<1, 4, 7>();
        }
        if constexpr (TokenTiles == 2) {
            tiles.template load<5>(a + 16 * o.row, o.row);
            tiles.template multiply<2, 5, 6>();
            if constexpr (Groups == 2) tiles.template multiply<3, 5, 7>();
        }
    }
}

// out: (16 * TokenTiles, ld) float32, the columns of this product first.
template <int TokenTiles, int Groups>
void product(Tiles& tiles, Operands o, const std::uint16_t* low, float* out, std::int64_t ld) {
    tiles.template zero<0>();
    tiles.template zero<1>();
    tiles.template zero<2>();
    tiles.template zero<3>();
    add_products<TokenTiles, Groups>(tiles, o);
    o.tokens = low;
    add_products<TokenTiles, Groups>(tiles, o);
    tiles.template store<0>(out, ld * 4);
    if constexpr (Groups == 2) tiles.template store<1>(out + 16, ld * 4);
    if constexpr (TokenTiles == 2) {
        tiles.template store<2>(out + 16 * ld, ld * 4);
        if constexpr (Groups == 2) tiles.template store<3>(out + 16 * ld + 16, ld * 4);
    }
}

}  // namespace

bool in_bf16_tiles(int type, std::int64_t tokens) {
    return enabled && tokens >= fewest_tokens && type == bf16_type;
}

void multiply_bf16(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   float* out) {
    const std::int64_t group = layout_of(m.type).group_bytes(m.cols), ld = groups * 16;
    const std::uint8_t* weights = m.data + first * group;
    Tiles tiles;
    const std::int64_t rows = padded_rows(x.tokens), row = x.blocks * 32;
    for (std::int64_t t = 0; t < rows; t += 32)
        for (std::int64_t g = 0; g < groups; g += 2) {
            const Operands o{x.high + t * row, weights + g * group, 2 * row, group, x.blocks};
            const std::uint16_t* low = x.low + t * row;
            float* to = out + t * ld + g * 16;
            const bool pair = t + 16 < rows, two = g + 1 < groups;
            if (pair && two)
                product<2, 2>(tiles, o, low, to, ld);
            else if (pair)
                product<2, 1>(tiles, o, low, to, ld);
            else if (two)
                product<1, 2>(tiles, o, low, to, ld);
            else
                product<1, 1>(tiles, o, low, to, ld);
        }
}

std::int64_t in_int8_tiles(int type, std::int64_t tokens) {
    if (!enabled || !kernels_of(type).expand) return 0;
    std::int64_t count = 0;
    while (tokens - count > 0 && tile_width(tokens - count) == simd::wide_tile)
        count += simd::wide_tile;
    return count;
}

std::int64_t int8_scratch(const Matrix& m, std::int64_t groups) {
    return groups * ((m.cols + 31) / 32) * static_cast<std::int64_t>(sizeof(Expanded));
}

void multiply_int8(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   std::int64_t tokens, float* out, std::uint8_t* scratch) {
    int8_calls.fetch_add(1, std::memory_order_relaxed);
    const std::int64_t packed = layout_of(m.type).group_bytes(m.cols);
    const Kernels& kernels = kernels_of(m.type);
    auto* weights = reinterpret_cast<Expanded*>(scratch);
    for (std::int64_t g = 0; g < groups; ++g)
        kernels.expand(m.data + (first + g) * packed, x.blocks, weights + g * x.blocks);
    kernels.expanded(weights, groups, x, tokens, out);
}

}  // namespace greenroom::amx

#endif
