#include "matmul/activations.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "matmul/amx.h"

namespace greenroom {
namespace {

// 16 values times `inverse` as bytes; returns the sum of their codes. A low part of 128, exactly
// between two high ones, becomes 127: bytes of -128 would overflow in the AVX2 dot product.
[[gnu::always_inline]] inline int split(simd::Floats x, float inverse, std::int8_t* high,
                                        std::int8_t* low) {
    using namespace simd;
    const Floats code = x * splat(inverse);
    const Ints upper = round(code * splat(1.0f / 256));
    const Floats rest = fnma(to_floats(upper), splat(256.0f), code);
    const Ints lower = round(min(splat(127.0f), max(splat(-127.0f), rest)));
    store_i8(high, upper);
    store_i8(low, lower);
    return sum(shift_left<8>(upper) + lower);
}

// The scale is the largest magnitude / 32512; blocks below 1e-30 count as zeros. What is not
// finite must not vanish in the rounding: 0 * x is then not a number and spoils the scale, and
// with it every result it takes part in.
void quantise(const float* x, XBlock& out) {
    using namespace simd;
    const Floats a = load(x), b = load(x + 16);
    const float peak = largest(max(simd::abs(a), simd::abs(b)));
    const float poison = sum((a + b) * splat(0.0f));
    const bool usable = peak > 1e-30f && peak <= std::numeric_limits<float>::max();
    const float inverse = usable ? largest_code / peak : 0.0f;
    const int first = split(a, inverse, out.high, out.low);
    const int second = split(b, inverse, out.high + 16, out.low + 16);
    out.scale = peak / largest_code + poison;
    out.neg_part_sum[0] = -first;
    out.neg_part_sum[1] = -second;
    out.neg_sum = -(first + second);
    out.part_sum[0] = out.scale * static_cast<float>(first);
    out.part_sum[1] = out.scale * static_cast<float>(second);
    out.sum = out.scale * static_cast<float>(first + second);
}

// Calls body(number of the block, its 32 values) for all of a token, filled up with zeros; x: cols
// floats, or null for zeros.
template <class Body>
void for_blocks(const float* x, std::int64_t cols, Body body) {
    float last[32] = {};
    const std::int64_t whole = x ? cols / 32 : 0, blocks = (cols + 31) / 32;
    for (std::int64_t b = 0; b < whole; ++b) body(b, x + 32 * b);
    if (x && cols % 32) std::memcpy(last, x + 32 * whole, (cols % 32) * sizeof(float));
    for (std::int64_t b = whole; b < blocks; ++b) body(b, last);
}

// 32 columns of a token in a tile of floats.
void put_floats(const float* x, float* to, int width) {
    for (int k = 0; k < 32; ++k) to[k * width] = x[k];
}

struct Free {
    void operator()(std::uint8_t* p) const { std::free(p); }
};

struct Buffer {
    std::unique_ptr<std::uint8_t, Free> memory;
    std::int64_t bytes = 0;
};

}  // namespace

std::uint8_t* scratch(int slot, std::int64_t bytes) {
    thread_local Buffer buffers[4];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        buffer.memory.reset();
        buffer.bytes = 0;
        const std::int64_t size = (bytes + 4095) / 4096 * 4096;
        buffer.memory.reset(static_cast<std::uint8_t*>(std::aligned_alloc(4096, size)));
        if (!buffer.memory) throw std::bad_alloc();
        buffer.bytes = size;
    }
    return buffer.memory.get();
}

Activations Activations::take(Arena& arena, Forms forms, std::int64_t tokens, std::int64_t cols) {
    Activations a;
    a.tokens = tokens;
    a.cols = cols;
    a.blocks = (cols + 31) / 32;
    const std::int64_t padded = padded_tokens(tokens), rows = padded_rows(tokens);
    if (forms.quantised) a.quantised = arena.take<XBlock>(padded * a.blocks);
    if (forms.floats) a.floats = arena.take<float>(padded * a.blocks * 32);
    if (forms.bf16) a.bf16 = arena.take<std::uint8_t>(rows / 16 * a.blocks * 2 * tile_bytes);
    if (forms.bytes) {
        a.bytes = arena.take<std::uint8_t>(rows / 16 * byte_tiles_of(a.blocks) * 2 * tile_bytes);
        a.scales = arena.take<float>(rows * ranges_of(a.blocks));
    }
    return a;
}

void Activations::put(const Place& place, std::int64_t block, const float* x) const {
    const auto [first, width, i] = place;
    if (quantised) {
        XBlock& to = quantised[first * blocks + block * width + i];
        quantise(x, to);
        if (width > 1) simd::planes_to_words(to.high);
    }
    if (floats) put_floats(x, floats + (first * blocks + block * width) * 32 + i, width);
    if (bf16 && first + i < tokens) {
        std::uint8_t* high = bf16_row(first + i, block);
        amx::split(x, high, high + tile_bytes);
    }
}

void Activations::put_range(std::int64_t token, std::int64_t range, const float* x) const {
    const std::int64_t begin = range * range_cols, count = std::min(range_cols, cols - begin);
    range_scales(token, range)[token % 16] =
        amx::quantise(x + begin, count, {byte_row(token, begin), tile_bytes, 2 * tile_bytes});
}

void Activations::put_token(std::int64_t token, const float* x) const {
    const Place place = place_of(token, tokens);
    for_blocks(x, cols, [&](std::int64_t b, const float* values) { put(place, b, values); });
    for (std::int64_t r = 0; bytes && token < tokens && r < ranges_of(blocks); ++r)
        put_range(token, r, x);
}

void Activations::gather(const Rows& from, const std::int64_t* numbers) const {
    for (std::int64_t first = 0; first < tokens;) {
        const int width = tile_width(tokens - first);
        gather_tile(from, numbers, first, width);
        first += width;
    }
    for (std::int64_t t = 0; t < tokens; ++t) gather_rows(from, numbers[t], t);
}

// AMX's forms.
void Activations::gather_rows(const Rows& from, std::int64_t number, std::int64_t token) const {
    const auto copy = [](std::uint8_t* high, const std::uint8_t* row) {
        std::memcpy(high, row, 64);
        std::memcpy(high + tile_bytes, row + 64, 64);
    };
    for (std::int64_t b = 0; bf16 && b < blocks; ++b)
        copy(bf16_row(token, b), from.bf16 + (number * blocks + b) * Rows::bf16_bytes);
    if (!bytes) return;
    const std::int64_t tiles = byte_tiles_of(blocks), ranges = ranges_of(blocks);
    for (std::int64_t i = 0; i < tiles; ++i)
        copy(byte_row(token, 64 * i), from.bytes + (number * tiles + i) * Rows::byte_bytes);
    for (std::int64_t r = 0; r < ranges; ++r)
        range_scales(token, r)[token % 16] = from.scales[number * ranges + r];
}

// Block by block, as the tile lies.
void Activations::gather_tile(const Rows& from, const std::int64_t* numbers, std::int64_t first,
                              int width) const {
    std::int64_t at[simd::wide_tile];
    for (int i = 0; i < width; ++i)
        at[i] = blocks * (first + i < tokens ? numbers[first + i] : from.tokens);
    for (std::int64_t b = 0; quantised && b < blocks; ++b)
        for (int i = 0; i < width; ++i) {
            XBlock& to = quantised[first * blocks + b * width + i];
            to = from.quantised[at[i] + b];
            if (width > 1) simd::planes_to_words(to.high);
        }
    for (std::int64_t b = 0; floats && b < blocks; ++b)
        for (int i = 0; i < width; ++i)
            put_floats(from.floats + (at[i] + b) * 32,
                       floats + (first * blocks + b * width) * 32 + i, width);
}

Rows Rows::take(Arena& arena, Forms forms, std::int64_t tokens, std::int64_t cols) {
    Rows r;
    r.tokens = tokens;
    r.cols = cols;
    r.blocks = (cols + 31) / 32;
    const std::int64_t all = (tokens + 1) * r.blocks;
    if (forms.quantised) r.quantised = arena.take<XBlock>(all);
    if (forms.floats) r.floats = arena.take<float>(all * 32);
    if (forms.bf16) r.bf16 = arena.take<std::uint8_t>(all * bf16_bytes);
    if (forms.bytes) {
        r.bytes = arena.take<std::uint8_t>((tokens + 1) * byte_tiles_of(r.blocks) * byte_bytes);
        r.scales = arena.take<float>((tokens + 1) * ranges_of(r.blocks));
    }
    return r;
}

void Rows::put(std::int64_t token, const float* x) const {
    for_blocks(x, cols, [&](std::int64_t b, const float* values) {
        const std::int64_t at = token * blocks + b;
        if (quantised) quantise(values, quantised[at]);
        if (floats) std::memcpy(floats + at * 32, values, 32 * sizeof(float));
        if (bf16) amx::split(values, bf16 + at * bf16_bytes, bf16 + at * bf16_bytes + 64);
    });
    if (!bytes || !x) return;
    const std::int64_t ranges = ranges_of(blocks);
    std::uint8_t* to = bytes + token * byte_tiles_of(blocks) * byte_bytes;
    for (std::int64_t r = 0; r < ranges; ++r) {
        const std::int64_t begin = r * range_cols, count = std::min(range_cols, cols - begin);
        scales[token * ranges + r] =
            amx::quantise(x + begin, count, {to + begin / 64 * byte_bytes, 64, byte_bytes});
    }
}

Activations Rows::tile_of_one(std::int64_t token) const {
    Activations a;
    a.tokens = 1;
    a.cols = cols;
    a.blocks = blocks;
    if (quantised) a.quantised = quantised + token * blocks;
    if (floats) a.floats = floats + token * blocks * 32;
    return a;
}

}  // namespace greenroom
