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
// Blocks of 32 columns that are expanded and used together, of weights in one part; half as many of
// those in two. With 64 rows of them, the tokens' and those of the next columns all stay in L2.
constexpr std::int64_t tiles_at_once = 8;
constexpr std::int64_t most_groups = 4;

// Blocks of 32 columns.
struct Columns {
    std::int64_t begin, count;
};

// One call of multiply(): what it multiplies, and where weights lie expanded.
struct Call {
    const Matrix& m;
    std::int64_t first, groups;
    const Activations& x;
    const std::uint8_t* next;
    float* out;
    std::uint8_t* scratch;
    const Kernels& kernels = kernels_of(m.type);
    const Layout& layout = layout_of(m.type);
    std::int64_t parts = kernels.expanded_parts, at_once = tiles_at_once / parts;

    Columns columns(std::int64_t begin) const {
        return {begin, std::clamp<std::int64_t>(x.blocks - begin, 0, at_once)};
    }
    // [group][block][part]; two places in turn, so that columns are expanded beside the product of
    // those before.
    std::int64_t group_bytes() const { return tiles_at_once * tile_bytes; }
    std::uint8_t* expanded(Columns c) const {
        return scratch + c.begin / at_once % 2 * groups * group_bytes();
    }
    void expand(Columns c, std::int64_t group, std::int64_t block) const {
        kernels.expand(m.group(first + group), x.blocks, c.begin + block, 1,
                       expanded(c) + group * group_bytes() + block * parts * tile_bytes);
    }
};

// What a thread does beside products for those to come: it expands the next columns and asks for
// the weights of the ones after, an equal share with every step. Multiplying and expanding keep
// different parts of a core busy.
class Ahead {
  public:
    Ahead(const Call& call, Columns columns, std::int64_t steps)
        : call_(call), columns_(columns), units_(call.groups * columns.count) {
        ask_for_those_after();
        line_share_ = (lines_ + steps - 1) / steps;
        unit_share_ = (units_ + steps - 1) / steps;
    }
    void step() {
        for (std::int64_t i = 0; i < line_share_ && next_ < count_; ++i) {
            Range& range = ranges_[next_];
            simd::prefetch_far(range.at);
            range.at += 64;
            next_ += range.at >= range.end;
        }
        expand(unit_share_);
    }
    // What steps left over, as shares are rounded up: nothing, unless there were too few.
    void finish() { expand(units_); }

  private:
    struct Range {
        const std::uint8_t *at, *end;
    };

    void expand(std::int64_t units) {
        for (; units > 0 && units_ > 0; --units, --units_) {
            call_.expand(columns_, group_, block_);
            if (++block_ == columns_.count) block_ = 0, ++group_;
        }
    }

    // Columns of these groups, or the first ones of the next groups and all their scales; those are
    // supposed to be laid out as these.
    void ask_for_those_after() {
        const Layout& layout = call_.layout;
        const std::int64_t bytes = layout.group_bytes(call_.m.cols),
                           payload = layout.payload_bytes(call_.m.cols);
        const bool last = columns_.count == 0;
        const Columns c = last ? Columns{0, std::min(call_.x.blocks, 2 * call_.at_once)}
                               : call_.columns(columns_.begin + call_.at_once);
        const std::uint8_t* from = last ? call_.next : call_.m.group(call_.first);
        for (std::int64_t g = 0; from && g < call_.groups; ++g, from += bytes) {
            ask_for(from + c.begin * layout.block_bytes, c.count * layout.block_bytes);
            if (last) ask_for(from + payload, bytes - payload);
        }
    }
    void ask_for(const std::uint8_t* p, std::int64_t bytes) {
        if (bytes > 0) ranges_[count_++] = {p, p + bytes};
        lines_ += (bytes + 63) / 64;
    }

    const Call& call_;
    Columns columns_;
    std::int64_t units_, group_ = 0, block_ = 0;
    Range ranges_[2 * most_groups];
    int count_ = 0, next_ = 0;
    std::int64_t lines_ = 0, line_share_ = 0, unit_share_ = 0;
};

// 16 tokens times up to 64 rows over some columns.
struct Operands {
    const std::uint8_t* tokens;   // high part, low part, next 32 columns
    const std::uint8_t* weights;  // first group's tiles, one or two parts per 32 columns
    std::int64_t group, blocks;   // bytes from a group to the next
    Ahead* ahead;
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

void add_columns(const Call& call, Tiles& tiles, Columns c) {
    const std::int64_t rows = padded_rows(call.x.tokens), ld = call.groups * 16;
    Ahead ahead(call, call.columns(c.begin + call.at_once), rows / 16 * c.count);
    const Product run = (call.parts == 1 ? products<1> : products<2>)[call.groups - 1];
    Operands o{nullptr, call.expanded(c), call.group_bytes(), c.count, &ahead};
    for (std::int64_t t = 0; t < rows; t += 16) {
        o.tokens = call.x.bf16_tile(t) + 2 * tile_bytes * c.begin;
        run(tiles, o, c.begin > 0, call.out + t * ld, ld);
    }
    ahead.finish();
}

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

std::int64_t scratch_bytes(std::int64_t groups) { return 2 * groups * tiles_at_once * tile_bytes; }

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch) {
    const Call call{m, first, groups, x, next, out, scratch};
    Tiles tiles;
    const Columns begin = call.columns(0);
    for (std::int64_t g = 0; g < groups; ++g)
        for (std::int64_t i = 0; i < begin.count; ++i) call.expand(begin, g, i);
    for (std::int64_t b = 0; b < x.blocks; b += call.at_once)
        add_columns(call, tiles, call.columns(b));
}

}  // namespace greenroom::amx

#endif
