#include "matmul/amx.h"

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

#include "formats/fp4.h"
#include "matmul/amx_ahead.h"
#include "matmul/amx_int8.h"
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
// Blocks of 32 columns that are expanded and used together, of weights in one part; half as many of
// those in two. With 64 rows of them, the tokens' and those of the next columns all stay in L2.
constexpr std::int64_t tiles_at_once = 8;

// A call with weights in one or two parts.
struct Bf16Call : Call {
    const Kernels& kernels;

    // [group][block][part]; two places in turn, so that columns are expanded beside the product of
    // those before.
    std::int64_t group_bytes() const { return tiles_at_once * tile_bytes; }
    std::uint8_t* expanded(Columns c) const { return scratch + c.turn * groups * group_bytes(); }
    void expand(Columns c, std::int64_t group, std::int64_t block) const {
        const std::int64_t at = block * kernels.expanded_parts * tile_bytes;
        kernels.expand(this->group(group), x.blocks, c.begin + block, 1,
                       expanded(c) + group * group_bytes() + at);
    }
};

// 16 tokens times up to 64 rows over some columns.
struct Operands {
    const std::uint8_t* tokens;   // high part, low part, next 32 columns
    const std::uint8_t* weights;  // first group's tiles, one or two parts per 32 columns
    std::int64_t group, blocks;   // bytes from a group to the next
    Ahead<Bf16Call>* ahead;
};

// out: (16, ld), the columns of this product first, gains the product, or becomes it. The product
// of both low parts, 2^-16 of the whole, is left out. Tiles 0-3 are sums, 4 and 5 the tokens' low
// and high parts, 6 and 7 weights.
template <int Groups, int Parts>
void product(Tiles& tiles, const Operands& o, bool gains, float* out, std::int64_t ld) {
    unrolled<Groups>([&](auto g) {
        if (gains)
            tiles.template load<g>(out + 16 * g, ld * 4);
        else
            tiles.template zero<g>();
    });
    const std::uint8_t *a = o.tokens, *b = o.weights;
    for (std::int64_t i = 0; i < o.blocks; ++i, a += 2 * tile_bytes, b += Parts * tile_bytes) {
        tiles.template load<4>(a + tile_bytes, 64);
        tiles.template load<5>(a, 64);
        unrolled<Groups>([&](auto g) {
            tiles.template load<6 + g % 2>(b + g * o.group, 64);
            tiles.template multiply<g, 4, 6 + g % 2>();
            tiles.template multiply<g, 5, 6 + g % 2>();
        });
        o.ahead->step();
        if constexpr (Parts == 2)
            unrolled<Groups>([&](auto g) {
                tiles.template load<6 + g % 2>(b + g * o.group + tile_bytes, 64);
                tiles.template multiply<g, 5, 6 + g % 2>();
            });
    }
    unrolled<Groups>([&](auto g) { tiles.template store<g>(out + 16 * g, ld * 4); });
}

using Product = void (*)(Tiles&, const Operands&, bool, float*, std::int64_t);
template <int Parts>
constexpr Product products[most_groups] = {product<1, Parts>, product<2, Parts>, product<3, Parts>,
                                           product<4, Parts>};

void add_columns(const Bf16Call& call, Tiles& tiles, Columns c, Columns after) {
    const std::int64_t rows = padded_rows(call.x.tokens), ld = call.groups * 16;
    Ahead ahead(call, after, rows / 16 * c.count);
    const bool one = call.kernels.expanded_parts == 1;
    const Product run = (one ? products<1> : products<2>)[call.groups - 1];
    Operands o{nullptr, call.expanded(c), call.group_bytes(), c.count, &ahead};
    for (std::int64_t t = 0; t < rows; t += 16) {
        o.tokens = call.x.bf16_tile(t) + 2 * tile_bytes * c.begin;
        run(tiles, o, c.begin > 0, call.out + t * ld, ld);
    }
}

void multiply_bf16(const Bf16Call& call) {
    Tiles tiles;
    Columns now = call.columns(0, 0);
    expand_all(call, now);
    while (now.count > 0) {
        const Columns after = call.columns(now.begin + call.at_once, 1 - now.turn);
        add_columns(call, tiles, now, after);
        now = after;
    }
}

}  // namespace

bool in_bytes(int type) { return type == formats::MXFP4::type; }

bool in_tiles(int type, std::int64_t tokens) {
    return enabled && tokens >= fewest_tokens && (in_bytes(type) || kernels_of(type).expand);
}

void split(const float* x, std::uint8_t* high, std::uint8_t* low) {
    using namespace simd;
    for (int i = 0; i < 2; ++i, x += 16, high += 32, low += 32) {
        const Floats all = load(x), rounded = nearest_bf16(all);
        store_bf16(high, rounded);
        store_bf16(low, nearest_bf16(all - rounded));
    }
}

std::int64_t scratch_bytes(int type, std::int64_t groups) {
    return in_bytes(type) ? int8_scratch_bytes(groups) : 2 * groups * tiles_at_once * tile_bytes;
}

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch) {
    if (in_bytes(m.type)) return multiply_int8(m, first, groups, x, next, out, scratch);
    const Kernels& kernels = kernels_of(m.type);
    const std::int64_t at_once = tiles_at_once / kernels.expanded_parts;
    multiply_bf16({{m, first, groups, x, next, out, scratch, at_once}, kernels});
}

}  // namespace greenroom::amx

#endif
