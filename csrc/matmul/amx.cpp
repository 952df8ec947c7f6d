#include "matmul/amx.h"

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

#include <algorithm>

#include "matmul/amx_tiles.h"
#include "matmul/kernels.h"

namespace greenroom::amx {

#if defined(GREENROOM_TIER_amx)
bool enabled = true;
#else
bool enabled = false;
#endif

namespace {

// Fewer tokens leave most of a tile empty.
constexpr std::int64_t fewest_tokens = 12;
// Blocks of 32 columns that are expanded and used together: they stay in L1.
constexpr std::int64_t blocks_at_once = 8;
constexpr std::int64_t most_groups = 4;

// Weights to ask for while others are multiplied, an equal share of their lines with every step.
class Ahead {
  public:
    void add(const std::uint8_t* p, std::int64_t bytes) {
        ranges_[count_++] = {p, p + bytes};
        lines_ += bytes / 64 + 1;
    }
    void begin(std::int64_t steps) { share_ = (lines_ + steps - 1) / steps; }
    void step() {
        for (std::int64_t i = 0; i < share_ && next_ < count_; ++i) {
            Range& range = ranges_[next_];
            simd::prefetch(range.at);
            range.at += 64;
            next_ += range.at >= range.end;
        }
    }

  private:
    struct Range {
        const std::uint8_t *at, *end;
    };
    Range ranges_[2 * most_groups];
    int count_ = 0, next_ = 0;
    std::int64_t lines_ = 0, share_ = 0;
};

// One product of 16 or 32 tokens with 16 or 32 rows over some columns.
struct Operands {
    const std::uint8_t* tokens;      // first tile of tokens: high part, low part, next 32 columns
    const std::uint8_t* weights;     // first group's tiles, one or two parts per 32 columns
    std::int64_t token_tile, group;  // bytes from a tile of tokens or a group to the next
    std::int64_t blocks;
    Ahead* ahead;
};

// Tiles 0-3 are sums (token tile x group), 4-5 tokens, 6-7 weights.
template <int TokenTiles>
void load_tokens(Tiles& tiles, const std::uint8_t* p, std::int64_t token_tile) {
    tiles.template load<4>(p, 64);
    if constexpr (TokenTiles == 2) tiles.template load<5>(p + token_tile, 64);
}

template <int Groups>
void load_weights(Tiles& tiles, const std::uint8_t* p, std::int64_t group) {
    tiles.template load<6>(p, 64);
    if constexpr (Groups == 2) tiles.template load<7>(p + group, 64);
}

template <int TokenTiles, int Groups>
void multiply_loaded(Tiles& tiles) {
    tiles.template multiply<0, 4, 6>();
    if constexpr (Groups == 2) tiles.template multiply<1, 4, 7>();
    if constexpr (TokenTiles == 2) tiles.template multiply<2, 5, 6>();
    if constexpr (TokenTiles == 2 && Groups == 2) tiles.template multiply<3, 5, 7>();
}

// Calls body(number of a sum's tile, where it begins in out).
template <int TokenTiles, int Groups, class Body>
void for_sums(float* out, std::int64_t ld, Body body) {
    unrolled<TokenTiles>([&](auto t) {
        unrolled<Groups>([&](auto g) {
            body(std::integral_constant<int, 2 * t + g>{}, out + 16 * t * ld + 16 * g);
        });
    });
}

// out: (16 * TokenTiles, ld), the columns of this product first, gains the product, or becomes it.
// The product of both low parts, 2^-16 of the whole, is left out.
template <int TokenTiles, int Groups, int Parts>
void product(Tiles& tiles, const Operands& o, bool gains, float* out, std::int64_t ld) {
    for_sums<TokenTiles, Groups>(out, ld, [&](auto sum, const float* at) {
        if (gains)
            tiles.template load<sum>(at, ld * 4);
        else
            tiles.template zero<sum>();
    });
    const std::uint8_t *a = o.tokens, *b = o.weights;
    for (std::int64_t i = 0; i < o.blocks; ++i, a += 2 * tile_bytes, b += Parts * tile_bytes) {
        load_weights<Groups>(tiles, b, o.group);
        load_tokens<TokenTiles>(tiles, a + tile_bytes, o.token_tile);
        o.ahead->step();
        multiply_loaded<TokenTiles, Groups>(tiles);
        load_tokens<TokenTiles>(tiles, a, o.token_tile);
        multiply_loaded<TokenTiles, Groups>(tiles);
        if constexpr (Parts == 2) {
            load_weights<Groups>(tiles, b + tile_bytes, o.group);
            multiply_loaded<TokenTiles, Groups>(tiles);
        }
    }
    for_sums<TokenTiles, Groups>(
        out, ld, [&](auto sum, float* at) { tiles.template store<sum>(at, ld * 4); });
}

using Product = void (*)(Tiles&, const Operands&, bool, float*, std::int64_t);
template <int Parts>
constexpr Product products[2][2] = {{product<1, 1, Parts>, product<1, 2, Parts>},
                                    {product<2, 1, Parts>, product<2, 2, Parts>}};

// One call of multiply().
struct Call {
    const Matrix& m;
    std::int64_t first, groups;
    const Activations& x;
    const std::uint8_t* next;
    float* out;
    std::uint8_t* scratch;

    // The columns of some blocks.
    void add_blocks(Tiles& tiles, std::int64_t begin, std::int64_t count) const {
        const Kernels& kernels = kernels_of(m.type);
        const std::int64_t group = kernels.expanded_parts * count * tile_bytes;
        for (std::int64_t g = 0; g < groups; ++g)
            kernels.expand(m.group(first + g), x.blocks, begin, count, scratch + g * group);
        const std::int64_t rows = padded_rows(x.tokens), ld = groups * 16;
        Ahead ahead = what_comes_after(begin + count);
        ahead.begin((rows + 31) / 32 * ((groups + 1) / 2) * count);
        const auto& table = kernels.expanded_parts == 1 ? products<1> : products<2>;
        Operands o{nullptr, nullptr, 2 * tile_bytes * x.blocks, group, count, &ahead};
        for (std::int64_t t = 0; t < rows; t += 32)
            for (std::int64_t g = 0; g < groups; g += 2) {
                o.tokens = x.bf16_tile(t) + 2 * tile_bytes * begin;
                o.weights = scratch + g * group;
                table[t + 16 < rows][g + 1 < groups](tiles, o, begin > 0, out + t * ld + 16 * g,
                                                     ld);
            }
    }

  private:
    // More columns of these groups, or the first ones of the next groups and all their scales;
    // those are supposed to be laid out as these.
    Ahead what_comes_after(std::int64_t block) const {
        const Layout& layout = layout_of(m.type);
        const std::int64_t bytes = layout.group_bytes(m.cols),
                           payload = layout.payload_bytes(m.cols);
        const std::int64_t left = x.blocks - block;
        const std::uint8_t* from = left ? m.group(first) + block * layout.block_bytes : next;
        Ahead ahead;
        for (std::int64_t g = 0; from && g < groups; ++g, from += bytes) {
            ahead.add(from, std::min(left ? left : x.blocks, blocks_at_once) * layout.block_bytes);
            if (!left) ahead.add(from + payload, bytes - payload);
        }
        return ahead;
    }
};

}  // namespace

bool in_tiles(int type, std::int64_t tokens) {
    return enabled && tokens >= fewest_tokens && kernels_of(type).expand;
}

void split(const float* x, std::uint8_t* high, std::uint8_t* low) {
    using namespace simd;
    for (int i = 0; i < 2; ++i, x += 16, high += 32, low += 32) {
        const Floats all = load(x), rounded = nearest_bf16(all);
        store_bf16(high, rounded);
        store_bf16(low, nearest_bf16(all - rounded));
    }
}

std::int64_t scratch_bytes(std::int64_t groups) { return groups * blocks_at_once * 2 * tile_bytes; }

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch) {
    const Call call{m, first, groups, x, next, out, scratch};
    Tiles tiles;
    for (std::int64_t b = 0; b < x.blocks; b += blocks_at_once)
        call.add_blocks(tiles, b, std::min(blocks_at_once, x.blocks - b));
}

}  // namespace greenroom::amx

#endif
