// The vector language in plain C++: the truth for the other tiers, and what runs everywhere.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "formats/half.h"

namespace greenroom::simd {

constexpr int wide_tile = 4;
constexpr int tile_widths[] = {1, wide_tile}, tile_least[] = {1, 2};
constexpr bool any_width = false;
constexpr int float_tile = 4;

struct Floats {
    float v[16];
};
struct Ints {
    std::int32_t v[16];
};
struct Codes {
    std::uint8_t v[64];
};

template <class Body>
Floats each(Body body) {
    Floats r;
    for (int i = 0; i < 16; ++i) r.v[i] = body(i);
    return r;
}
template <class Body>
Ints each_int(Body body) {
    Ints r;
    for (int i = 0; i < 16; ++i) r.v[i] = body(i);
    return r;
}

inline Floats splat(float x) {
    return each([&](int) { return x; });
}
inline Floats zero() { return splat(0.0f); }
inline Floats load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline void store(float* p, Floats a) { std::memcpy(p, a.v, sizeof a.v); }
inline Floats operator+(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Floats operator-(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Floats operator*(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Floats operator/(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
// As the x86 instructions: b where either is not a number.
inline Floats min(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats max(Floats a, Floats b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Floats abs(Floats a) {
    return each([&](int i) { return std::fabs(a.v[i]); });
}
// a * b + c and c - a * b; rounded twice where the machine has no fused instruction.
inline Floats fma(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats fnma(Floats a, Floats b, Floats c) { return c - a * b; }
inline float sum(Floats a) {
    float s = 0.0f;
    for (float x : a.v) s += x;
    return s;
}
inline float largest(Floats a) {
    float m = a.v[0];
    for (float x : a.v) m = x > m ? x : m;
    return m;
}

inline Floats to_floats(Ints a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Ints round(Floats a) {  // what is not a number or out of range becomes 0, never UB
    return each_int([&](int i) {
        return std::fabs(a.v[i]) < 1e9f ? static_cast<std::int32_t>(std::nearbyint(a.v[i])) : 0;
    });
}
inline int sum(Ints a) {
    int s = 0;
    for (int x : a.v) s += x;
    return s;
}
// a * 2^n for |n| <= 126, n an integer held as a float.
inline Floats scale_by_power(Floats a, Floats n) {
    return each([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i])); });
}
inline void store_i8(std::int8_t* p, Ints a) {
    for (int i = 0; i < 16; ++i) {
        const int x = a.v[i];
        p[i] = static_cast<std::int8_t>(x > 127 ? 127 : x < -128 ? -128 : x);
    }
}

inline Ints bytes_u8(const std::uint8_t* p) {
    return each_int([&](int i) { return static_cast<std::int32_t>(p[i]); });
}
inline Floats load_u8(const std::uint8_t* p) { return to_floats(bytes_u8(p)); }
inline Floats load_i8(const std::uint8_t* p) {
    return each([&](int i) { return static_cast<float>(static_cast<std::int8_t>(p[i])); });
}
inline Floats load_f16(const std::uint8_t* p) {
    return each([&](int i) { return f16_at(p + 2 * i); });
}
inline Ints operator+(Ints a, Ints b) {
    return each_int([&](int i) { return a.v[i] + b.v[i]; });
}
inline Ints operator&(Ints a, int b) {
    return each_int([&](int i) { return a.v[i] & b; });
}
template <int N>
Ints shift_left(Ints a) {
    return each_int([&](int i) { return a.v[i] << N; });
}
template <int N>
Ints shift_right(Ints a) {
    return each_int([&](int i) { return static_cast<std::uint32_t>(a.v[i]) >> N; });
}
// max(a - b, 0)
inline Ints subtract_to_zero(Ints a, int b) {
    return each_int([&](int i) { return a.v[i] > b ? a.v[i] - b : 0; });
}
inline Floats as_floats(Ints a) {
    Floats r;
    std::memcpy(r.v, a.v, sizeof r.v);
    return r;
}

inline Codes load_line(const std::uint8_t* p) {
    Codes r;
    std::memcpy(r.v, p, 64);
    return r;
}
inline Codes splat_byte(int b) {
    Codes r;
    std::memset(r.v, b, 64);
    return r;
}
inline Codes operator&(Codes a, Codes b) {
    for (int i = 0; i < 64; ++i) a.v[i] &= b.v[i];
    return a;
}
inline Codes operator|(Codes a, Codes b) {
    for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i];
    return a;
}
// Shifts the 32-bit words: left by N, or right by -N. Callers mask away what crosses a byte, so
// shifting the bytes gives the same.
template <int N>
Codes shift(Codes a) {
    for (auto& x : a.v) {
        if constexpr (N > 0) x = static_cast<std::uint8_t>(x << N);
        if constexpr (N < 0) x = static_cast<std::uint8_t>(x >> -N);
    }
    return a;
}
inline Codes load_table(const std::uint8_t* sixteen) {
    Codes r;
    for (int i = 0; i < 4; ++i) std::memcpy(r.v + 16 * i, sixteen, 16);
    return r;
}
inline Codes lookup(Codes table, Codes index) {
    Codes r;
    for (int i = 0; i < 64; ++i) r.v[i] = table.v[index.v[i] & 15];
    return r;
}

template <int MaxCode, int Zero, int N>
Ints dot(const Codes* codes, const std::int8_t* x, const std::int32_t* neg_sum) {
    Ints acc;
    for (auto& a : acc.v) a = Zero >= 0 ? *neg_sum * (1 << (Zero >= 0 ? Zero : 0)) : 0;
    for (int i = 0; i < 4 * N; ++i) {
        const int value = 256 * x[i] + x[plane_bytes + i];
        for (int r = 0; r < 16; ++r) acc.v[r] += codes[i / 4].v[4 * r + i % 4] * value;
    }
    return acc;
}

using Words = Codes;  // dots() takes bytes for any number of tokens
template <int>
inline Words widen(Codes c) {
    return c;
}
inline void planes_to_words(std::int8_t*) {}

constexpr int interleave = 1;

template <int MaxCode, int Zero, int N, int Tokens>
inline void dots(const Codes* codes, const std::int8_t* x, int first, const std::int32_t* neg_sum,
                 Ints* out) {
    static_assert(Tokens == 1);
    out[0] = dot<MaxCode, Zero, N>(codes, x + 4 * first, neg_sum);
}

// Only for measuring what the dot product's instructions can do: acc + 4 products per lane, and
// a barrier that keeps a value from being folded away.
inline Ints accumulate(Ints acc, Codes codes, Codes x) {
    for (int r = 0; r < 16; ++r)
        for (int b = 0; b < 4; ++b)
            acc.v[r] += codes.v[4 * r + b] * static_cast<std::int8_t>(x.v[4 * r + b]);
    return acc;
}
inline void opaque(Codes& c) { __asm__ volatile("" : "+m"(c.v)); }

// A line of 16-bit floats: row r's word holds columns k (low half) and k + 1.
inline void split_bf16(const std::uint8_t* line, Floats& even, Floats& odd) {
    even = each([&](int i) { return bf16_at(line + 4 * i); });
    odd = each([&](int i) { return bf16_at(line + 4 * i + 2); });
}
inline void split_f16(const std::uint8_t* line, Floats& even, Floats& odd) {
    even = each([&](int i) { return f16_at(line + 4 * i); });
    odd = each([&](int i) { return f16_at(line + 4 * i + 2); });
}

// Into L1 and L2; into L2 alone.
inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void prefetch_far(const void* p) { __builtin_prefetch(p, 0, 2); }
inline void pause() {}

}  // namespace greenroom::simd
