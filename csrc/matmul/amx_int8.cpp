#include "matmul/amx_int8.h"

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

#include <limits>

#include "formats/fp4.h"
#include "matmul/amx.h"
#include "matmul/amx_ahead.h"
#include "matmul/amx_tiles.h"

namespace greenroom::amx {
namespace {

using Format = formats::MXFP4;

constexpr std::int64_t block_bytes = Format::Payload::lines * formats::line_bytes;
constexpr std::int64_t tile_cols = 64, range_tiles = range_cols / tile_cols;
// A group's tiles, then the largest exponent of each of its rows.
constexpr std::int64_t group_bytes = range_tiles * tile_bytes + 64;

// Columns are a range or, in a third place, those of it that are passed over again.
constexpr int rest_turn = 2, places = 3;

struct Int8Call : Call {
    // [turn][group]
    std::uint8_t* expanded(Columns c, std::int64_t group) const {
        return scratch + (c.turn * groups + group) * group_bytes;
    }
    std::uint8_t* largest(Columns c, std::int64_t group) const {
        return expanded(c, group) + range_tiles * tile_bytes;
    }
    const std::uint8_t* exponents(Columns c, std::int64_t group) const {
        return this->group(group) + payload + c.begin * Format::record_bytes;
    }
    simd::Window window(Columns c, std::int64_t group, std::int64_t block) const {
        return simd::window_below(
            simd::bytes_u8(largest(c, group)),
            simd::bytes_u8(exponents(c, group) + block * Format::record_bytes));
    }
    Columns range(std::int64_t begin, int turn) const;
    Columns rest(Columns c, std::int64_t group, int count) const;
    void expand(Columns c, std::int64_t group, std::int64_t block) const;
};

Columns Int8Call::range(std::int64_t begin, int turn) const {
    const Columns c = columns(begin, turn);
    for (std::int64_t g = 0; g < groups; ++g)
        simd::largest_exponents(exponents(c, g), c.count, nullptr, largest(c, g));
    return c;
}

// Whole tiles with those blocks of some groups that come next after a pass over c, if there are
// any.
Columns Int8Call::rest(Columns c, std::int64_t group, int count) const {
    Columns next = columns(c.begin / range_blocks * range_blocks, rest_turn);
    bool left = false;
    for (std::int64_t g = group; g < group + count; ++g)
        left |= simd::largest_exponents(exponents(next, g), next.count, largest(c, g),
                                        largest(next, g));
    if (!left) return {0, 0, rest_turn};
    const auto part = [&](std::int64_t block) {
        bool any = false;
        for (std::int64_t g = group; g < group + count; ++g) any |= window(next, g, block).rows;
        return any;
    };
    std::int64_t begin = 0, end = next.count;
    while (!part(begin)) ++begin;
    while (!part(end - 1)) --end;
    begin = begin / 2 * 2;
    end = std::min(next.count, (end + 1) / 2 * 2);
    return {next.begin + begin, end - begin, rest_turn};
}

// Eight times a code's value times 2^(exponent - largest), or 0 where the power is less than 1/8
// (or more than 1: that was an earlier pass's). A value, at most 12, times 8 has three bits to
// spare at its lower end, so that bytes can be shifted in a row's word.
void Int8Call::expand(Columns c, std::int64_t group, std::int64_t block) const {
    using namespace simd;
    const Codes low = splat_byte(15), table = shift<3>(load_table(Format::table()));
    const Window of_rows = window(c, group, block);
    const std::uint8_t* from = this->group(group) + (c.begin + block) * block_bytes;
    std::uint8_t* to = expanded(c, group) + block * tile_bytes / 2;
    for (int i = 0; i < Format::Payload::lines; ++i, from += 64, to += 128) {
        const Codes codes = load_line(from);
        store_line(to, shifted(lookup(table, codes & low), of_rows));
        store_line(to + 64, shifted(lookup(table, shift<-4>(codes) & low), of_rows));
    }
}

// 16 tokens times one or two groups over a range.
struct Operands {
    const std::uint8_t* tokens;   // high parts, low parts, next 64 columns
    const std::uint8_t* weights;  // first group's tiles
    std::int64_t tiles;
    Ahead<Int8Call>* ahead;  // or null
};

// [group][of high parts, of low parts][token][row]
struct alignas(64) Sums {
    std::int32_t of[2][2][16][16];
};

// Tiles 0-3 are sums, 4 and 5 the tokens' high and low parts, 6 and 7 weights.
template <int Groups>
void product(Tiles& tiles, const Operands& o, Sums& sums) {
    unrolled<2 * Groups>([&](auto i) { tiles.template zero<i>(); });
    const std::uint8_t *a = o.tokens, *b = o.weights;
    for (std::int64_t i = 0; i < o.tiles; ++i, a += 2 * tile_bytes, b += tile_bytes) {
        tiles.template load<4>(a, 64);
        tiles.template load<5>(a + tile_bytes, 64);
        unrolled<Groups>([&](auto g) {
            tiles.template load<6 + g>(b + g * group_bytes, 64);
            tiles.template multiply_int8<2 * g, 4, 6 + g>();
            tiles.template multiply_int8<2 * g + 1, 5, 6 + g>();
        });
        if (o.ahead) o.ahead->step();
    }
    unrolled<2 * Groups>(
        [&](auto i) { tiles.template store<i>(sums.of[i / 2][i % 2], 16 * sizeof(std::int32_t)); });
}

// out: (16, ld), the groups' columns first, gains what sums are worth, or becomes it. scales: of 16
// tokens; an eighth of those, as weights are eight times what they should be.
template <int Groups>
void add(const Sums& sums, const float* scales, const Int8Call& call, Columns c, std::int64_t group,
         bool gains, float* out, std::int64_t ld) {
    using namespace simd;
    Floats row[Groups];
    unrolled<Groups>([&](auto g) { Format::factors(call.largest(c, group + g), 0, &row[g], {}); });
    for (int t = 0; t < 16; ++t) {
        const Floats token = splat(scales[t] * 0.125f);
        unrolled<Groups>([&](auto g) {
            const Floats high = to_floats(load_ints(sums.of[g][0][t])),
                         low = to_floats(load_ints(sums.of[g][1][t]));
            const Floats x = fma(high, splat(256.0f), low) * token;
            float* to = out + t * ld + 16 * g;
            store(to, gains ? fma(x, row[g], load(to)) : x * row[g]);
        });
    }
}

template <int Groups>
void add_pass(const Int8Call& call, Tiles& tiles, Columns c, std::int64_t group, bool gains,
              Ahead<Int8Call>* ahead) {
    const std::int64_t ld = call.groups * 16;
    Operands o{nullptr, call.expanded(c, group), (c.count + 1) / 2, ahead};
    Sums sums;
    for (std::int64_t t = 0; t < padded_rows(call.x.tokens); t += 16) {
        o.tokens = call.x.byte_tile(t) + c.begin * tile_bytes;
        product<Groups>(tiles, o, sums);
        add<Groups>(sums, call.x.range_scales(t, c.begin / range_blocks), call, c, group, gains,
                    call.out + t * ld + group * 16, ld);
    }
}

// Two groups at a time, so that their weights stay in L1.
template <int Groups>
void add_groups(const Int8Call& call, Tiles& tiles, Columns c, std::int64_t group,
                Ahead<Int8Call>& ahead) {
    add_pass<Groups>(call, tiles, c, group, c.begin > 0, &ahead);
    for (Columns rest = call.rest(c, group, Groups); rest.count > 0;
         rest = call.rest(rest, group, Groups)) {
        for (std::int64_t i = 0; i < Groups * rest.count; ++i)
            call.expand(rest, group + i / rest.count, i % rest.count);
        add_pass<Groups>(call, tiles, rest, group, true, nullptr);
    }
}

void add_columns(const Int8Call& call, Tiles& tiles, Columns c, Columns after) {
    const std::int64_t steps =
        padded_rows(call.x.tokens) / 16 * ((call.groups + 1) / 2) * ((c.count + 1) / 2);
    Ahead ahead(call, after, steps);
    std::int64_t g = 0;
    for (; g + 2 <= call.groups; g += 2) add_groups<2>(call, tiles, c, g, ahead);
    if (g < call.groups) add_groups<1>(call, tiles, c, g, ahead);
}

}  // namespace

std::int64_t int8_scratch_bytes(std::int64_t groups) { return places * groups * group_bytes; }

void multiply_int8(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   const std::uint8_t* next, float* out, std::uint8_t* scratch) {
    const Int8Call call{{m, first, groups, x, next, out, scratch, range_blocks}};
    Tiles tiles;
    Columns now = call.range(0, 0);
    expand_all(call, now);
    while (now.count > 0) {
        const Columns after = call.range(now.begin + range_blocks, 1 - now.turn);
        add_columns(call, tiles, now, after);
        now = after;
    }
}

// As integers up to 32512 in magnitude, each the nearest; see quantise() in activations.cpp for
// what is tiny or not finite.
float quantise(const float* x, std::int64_t cols, const Planes& to) {
    using namespace simd;
    Floats peaks = zero(), poisons = zero();
    for (std::int64_t i = 0; i < cols; i += 16) {
        peaks = max(peaks, abs(load(x + i)));
        poisons = fma(load(x + i), zero(), poisons);
    }
    const float peak = largest(peaks), poison = sum(poisons);
    const bool usable = peak > 1e-30f && peak <= std::numeric_limits<float>::max();
    const Floats inverse = splat(usable ? largest_code / peak : 0.0f);
    for (std::int64_t i = 0; i < (cols + tile_cols - 1) / tile_cols * tile_cols; i += 16) {
        const Ints code = i < cols ? round(load(x + i) * inverse) : round(zero());
        std::uint8_t* high = to.high + i / tile_cols * to.next + i % tile_cols;
        store_low_bytes(high, shift_right<8>(code + 128));
        store_low_bytes(high + to.low, code);
    }
    return peak / largest_code + poison;
}

}  // namespace greenroom::amx

#endif
