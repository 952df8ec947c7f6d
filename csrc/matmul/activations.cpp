#include "matmul/activations.h"

#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#include "matmul/amx.h"

namespace greenroom {
namespace {

constexpr float largest_code = 127 * 256;

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
    return a;
}

void Activations::put(const Place& place, std::int64_t block, const float* x) const {
    const auto [first, width, i] = place;
    if (quantised) {
        XBlock& to = quantised[first * blocks + block * width + i];
        quantise(x, to);
        if (width > 1) simd::planes_to_words(to.high);
    }
    if (floats) {
        float* to = floats + (first * blocks + block * width) * 32 + i;
        for (int k = 0; k < 32; ++k) to[k * width] = x[k];
    }
    if (bf16 && first + i < tokens) amx::put(*this, first + i, block, x);
}

void Activations::put_token(std::int64_t token, const float* x) const {
    const Place place = place_of(token, tokens);
    float last[32] = {};
    const std::int64_t whole = x ? cols / 32 : 0;
    for (std::int64_t b = 0; b < whole; ++b) put(place, b, x + 32 * b);
    if (x && cols % 32) std::memcpy(last, x + 32 * whole, (cols % 32) * sizeof(float));
    for (std::int64_t b = whole; b < blocks; ++b) put(place, b, last);
}

}  // namespace greenroom
