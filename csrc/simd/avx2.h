// The vector language on AVX2, two registers per vector; with AVX-VNNI (-mavxvnni) a dot product
// and its sum are one instruction. Tiles of one token: byte products of both planes of its codes,
// without VNNI summed in 16-bit lanes first. Wider ones: products of 16 bits, codes widened once.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace greenroom::simd {

constexpr int wide_tile = 48;  // tokens that share the decoding and widening of a block
constexpr int tile_widths[] = {1, wide_tile}, tile_least[] = {1, 2};
constexpr bool any_width = true;
constexpr int float_tile = 4;  // of float weights: their sums stay in registers

struct Floats {
    __m256 a, b;
};
struct Ints {
    __m256i a, b;
};
struct Codes {
    __m256i a, b;
};

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
inline __m256i load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
inline Floats operator+(Floats x, Floats y) {
    return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline Floats operator-(Floats x, Floats y) {
    return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline Floats operator*(Floats x, Floats y) {
    return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline Floats operator/(Floats x, Floats y) {
    return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats abs(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
// x * y + z and z - x * y, rounded once.
inline Floats fma(Floats x, Floats y, Floats z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline Floats fnma(Floats x, Floats y, Floats z) {
    return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline float sum(Floats x) {
    const __m256 s = _mm256_add_ps(x.a, x.b);
    __m128 q = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline float largest(Floats x) {
    const __m256 s = _mm256_max_ps(x.a, x.b);
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}

inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Ints round(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline int sum(Ints x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i q = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    q = _mm_add_epi32(q, _mm_shuffle_epi32(q, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 0xb1)));
}
// x * 2^n for |n| <= 126, n an integer held as a float.
inline Floats scale_by_power(Floats x, Floats n) {
    const __m256i bias = _mm256_set1_epi32(127);
    const auto power = [&](__m256 v) {
        return _mm256_castsi256_ps(
            _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(v), bias), 23));
    };
    return {_mm256_mul_ps(x.a, power(n.a)), _mm256_mul_ps(x.b, power(n.b))};
}
inline void store_i8(std::int8_t* p, Ints x) {
    const __m256i h = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i q = _mm_packs_epi16(_mm256_castsi256_si128(h), _mm256_extracti128_si256(h, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), q);
}

inline Ints bytes_u8(const std::uint8_t* p) {
    return {_mm256_cvtepu8_epi32(load8(p)), _mm256_cvtepu8_epi32(load8(p + 8))};
}
inline Floats load_u8(const std::uint8_t* p) { return to_floats(bytes_u8(p)); }
inline Floats load_i8(const std::uint8_t* p) {
    return to_floats({_mm256_cvtepi8_epi32(load8(p)), _mm256_cvtepi8_epi32(load8(p + 8))});
}
inline Floats load_f16(const std::uint8_t* p) {
    return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 16))};
}
inline Ints operator+(Ints x, Ints y) {
    return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline Ints operator&(Ints x, int y) {
    const __m256i m = _mm256_set1_epi32(y);
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
template <int N>
Ints shift_left(Ints x) {
    return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
}
template <int N>
Ints shift_right(Ints x) {
    return {_mm256_srli_epi32(x.a, N), _mm256_srli_epi32(x.b, N)};
}
// max(x - y, 0)
inline Ints subtract_to_zero(Ints x, int y) {
    const __m256i s = _mm256_set1_epi32(y), zero = _mm256_setzero_si256();
    return {_mm256_max_epi32(_mm256_sub_epi32(x.a, s), zero),
            _mm256_max_epi32(_mm256_sub_epi32(x.b, s), zero)};
}
inline Floats as_floats(Ints x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }

inline Codes load_line(const std::uint8_t* p) { return {load32(p), load32(p + 32)}; }
inline Codes splat_byte(int b) {
    const __m256i v = _mm256_set1_epi8(static_cast<char>(b));
    return {v, v};
}
inline Codes operator&(Codes x, Codes y) {
    return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline Codes operator|(Codes x, Codes y) {
    return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)};
}
// Shifts the 32-bit words: left by N, or right by -N.
template <int N>
Codes shift(Codes x) {
    if constexpr (N > 0) return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)};
    if constexpr (N < 0) return {_mm256_srli_epi32(x.a, -N), _mm256_srli_epi32(x.b, -N)};
    return x;
}
inline Codes load_table(const std::uint8_t* sixteen) {
    const __m256i v = _mm256_broadcastsi128_si256(load16(sixteen));
    return {v, v};
}
inline Codes lookup(Codes table, Codes index) {
    return {_mm256_shuffle_epi8(table.a, index.a), _mm256_shuffle_epi8(table.b, index.b)};
}

inline __m256i splat_word(const void* p) {
    int w;
    std::memcpy(&w, p, 4);
    return _mm256_set1_epi32(w);
}

// add_planes<MaxCode, N>: adds the sums over 4N columns of code * x, for both planes of x: each
// quad of codes meets both while it is in registers, of which there are only 16.
#if defined(__AVXVNNI__)
constexpr bool narrow_sums = false;

template <int MaxCode, int N>
[[gnu::always_inline]] inline void add_planes(Ints& high, Ints& low, const Codes* codes,
                                              const std::int8_t* x) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const __m256i w = splat_word(x + 4 * i), v = splat_word(x + plane_bytes + 4 * i);
        high.a = _mm256_dpbusd_avx_epi32(high.a, codes[i].a, w);
        high.b = _mm256_dpbusd_avx_epi32(high.b, codes[i].b, w);
        low.a = _mm256_dpbusd_avx_epi32(low.a, codes[i].a, v);
        low.b = _mm256_dpbusd_avx_epi32(low.b, codes[i].b, v);
    }
}
#else
constexpr bool narrow_sums = true;

// Sums of 16 bits, of as many quads as cannot overflow them.
template <int MaxCode, int N>
[[gnu::always_inline]] inline void add_planes(Ints& high, Ints& low, const Codes* codes,
                                              const std::int8_t* x) {
    constexpr int fit = 32767 / (2 * 127 * MaxCode), run = fit < N ? fit : N;
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i h[2], l[2];
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const __m256i w = splat_word(x + 4 * i), v = splat_word(x + plane_bytes + 4 * i);
        const __m256i products[4] = {
            _mm256_maddubs_epi16(codes[i].a, w), _mm256_maddubs_epi16(codes[i].b, w),
            _mm256_maddubs_epi16(codes[i].a, v), _mm256_maddubs_epi16(codes[i].b, v)};
        const bool begins = i % run == 0, ends = i % run == run - 1 || i == N - 1;
        h[0] = begins ? products[0] : _mm256_add_epi16(h[0], products[0]);
        h[1] = begins ? products[1] : _mm256_add_epi16(h[1], products[1]);
        l[0] = begins ? products[2] : _mm256_add_epi16(l[0], products[2]);
        l[1] = begins ? products[3] : _mm256_add_epi16(l[1], products[3]);
        if (!ends) continue;
        high.a = _mm256_add_epi32(high.a, _mm256_madd_epi16(h[0], ones));
        high.b = _mm256_add_epi32(high.b, _mm256_madd_epi16(h[1], ones));
        low.a = _mm256_add_epi32(low.a, _mm256_madd_epi16(l[0], ones));
        low.b = _mm256_add_epi32(low.b, _mm256_madd_epi16(l[1], ones));
    }
}
#endif

// Codes above 127 times a byte could overflow vpmaddubsw's 16 bits. Such formats have their zero
// at 128: as signed 16-bit values, even columns and odd ones apart, they are multiplied with both
// planes put together.
template <int N>
[[gnu::always_inline]] inline Ints dot_signed(const Codes* codes, const std::int8_t* x) {
    const __m256i zeros = _mm256_set1_epi16(128), low_byte = _mm256_set1_epi16(255);
    Ints acc{_mm256_setzero_si256(), _mm256_setzero_si256()};
    const auto add = [&](__m256i sum, __m256i code, __m256i even, __m256i odd) {
        const __m256i c = _mm256_sub_epi16(_mm256_and_si256(code, low_byte), zeros);
        const __m256i d = _mm256_sub_epi16(_mm256_srli_epi16(code, 8), zeros);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(c, even));
        return _mm256_add_epi32(sum, _mm256_madd_epi16(d, odd));
    };
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
        const __m256i high = splat_word(x + 4 * i), low = splat_word(x + plane_bytes + 4 * i);
        const __m256i low_even = _mm256_srai_epi16(_mm256_slli_epi16(low, 8), 8);
        const __m256i even = _mm256_add_epi16(_mm256_slli_epi16(high, 8), low_even);
        const __m256i odd =
            _mm256_add_epi16(_mm256_andnot_si256(low_byte, high), _mm256_srai_epi16(low, 8));
        acc.a = add(acc.a, codes[i].a, even, odd);
        acc.b = add(acc.b, codes[i].b, even, odd);
    }
    return acc;
}

template <int MaxCode, int Zero, int N>
[[gnu::always_inline]] inline Ints dot(const Codes* codes, const std::int8_t* x,
                                       const std::int32_t* neg_sum) {
    if constexpr (narrow_sums && MaxCode > 127) {
        static_assert(Zero == 7);
        return dot_signed<N>(codes, x);
    } else {
        const __m256i none = _mm256_setzero_si256();
        Ints high{none, none}, low{none, none};
        if constexpr (Zero >= 0) low.a = low.b = _mm256_slli_epi32(splat_word(neg_sum), Zero);
        add_planes<MaxCode, N>(high, low, codes, x);
        return {_mm256_add_epi32(_mm256_slli_epi32(high.a, 8), low.a),
                _mm256_add_epi32(_mm256_slli_epi32(high.b, 8), low.b)};
    }
}

template <int MaxCode, int Zero, int N, int Tokens>
[[gnu::always_inline]] inline void dots(const Codes* codes, const std::int8_t* x, int first,
                                        const std::int32_t* neg_sum, Ints* out) {
    static_assert(Tokens == 1);
    out[0] = dot<MaxCode, Zero, N>(codes, x + 4 * first, neg_sum);
}

// A quad of codes as 16-bit words, zero points taken off: columns 0 and 2 of each row, then 1
// and 3.
struct Words {
    Codes even, odd;
};

constexpr int interleave = 4;  // 8 registers of sums, 2 of codes

template <int Zero>
inline Words widen(Codes c) {
    const Codes low = {_mm256_set1_epi16(255), _mm256_set1_epi16(255)};
    const Words w = {c & low, {_mm256_srli_epi16(c.a, 8), _mm256_srli_epi16(c.b, 8)}};
    if constexpr (Zero < 0) return w;
    const __m256i zero = _mm256_set1_epi16(1 << (Zero < 0 ? 0 : Zero));
    const auto less = [&](Codes x) -> Codes {
        return {_mm256_sub_epi16(x.a, zero), _mm256_sub_epi16(x.b, zero)};
    };
    return {less(w.even), less(w.odd)};
}

// 32 columns in two planes of bytes to 16-bit values, each quad as widen() orders it.
inline void planes_to_words(std::int8_t* planes) {
    const auto words = [&](int i) {
        const __m256i high = _mm256_cvtepi8_epi16(load16(planes + i));
        const __m256i low = _mm256_cvtepi8_epi16(load16(planes + plane_bytes + i));
        const __m256i x = _mm256_add_epi16(_mm256_slli_epi16(high, 8), low);
        return _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(x, 0xd8), 0xd8);
    };
    const __m256i first = words(0), second = words(16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(planes), first);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(planes + 32), second);
}

// sum + two products per lane
inline __m256i add_pairs(__m256i sum, __m256i codes, __m256i x) {
#if defined(__AVXVNNI__)
    return _mm256_dpwssd_avx_epi32(sum, codes, x);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(codes, x));
#endif
}

template <int Tokens>
[[gnu::always_inline]] inline void add_columns(Codes pair, const std::int8_t* x, Ints* out) {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
        const __m256i v = splat_word(x + token_bytes * t);
        out[t] = {add_pairs(out[t].a, pair.a, v), add_pairs(out[t].b, pair.b, v)};
        __asm__("" : "+x"(out[t].a), "+x"(out[t].b));
    }
}

// Codes of up to 8 bits times values of up to 16: 32 products stay below 2^29.
template <int MaxCode, int Zero, int N, int Tokens>
[[gnu::always_inline]] inline void dots(const Words* codes, const std::int8_t* x, int first,
                                        const std::int32_t*, Ints* out) {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) out[t] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    x += 8 * first;
    const auto add_quad = [&](int i) __attribute__((always_inline)) {
        const Words quad = codes[i];
        add_columns<Tokens>(quad.even, x + 8 * i, out);
        add_columns<Tokens>(quad.odd, x + 8 * i + 4, out);
    };
    add_quad(0);      // apart: its first products need no additions
#pragma GCC unroll 1  // unrolled, GCC forms all products first and puts them on the stack
    for (int i = 1; i < N; ++i) add_quad(i);
}

// Only for measuring what the dot product's instructions can do: acc + 4 products per lane, and
// a barrier that keeps a value from being folded away.
inline Ints accumulate(Ints acc, Codes codes, Codes x) {
#if defined(__AVXVNNI__)
    return {_mm256_dpbusd_avx_epi32(acc.a, codes.a, x.a),
            _mm256_dpbusd_avx_epi32(acc.b, codes.b, x.b)};
#else
    const __m256i ones = _mm256_set1_epi16(1);
    const auto add = [&](__m256i sum, __m256i c, __m256i y) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(c, y), ones));
    };
    return {add(acc.a, codes.a, x.a), add(acc.b, codes.b, x.b)};
#endif
}
inline void opaque(Codes& c) { __asm__ volatile("" : "+x"(c.a), "+x"(c.b)); }

// A line of 16-bit floats: row r's word holds columns k (low half) and k + 1.
inline void split_bf16(const std::uint8_t* line, Floats& even, Floats& odd) {
    const __m256i u = load32(line), v = load32(line + 32);
    const __m256i high = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    even = as_floats({_mm256_slli_epi32(u, 16), _mm256_slli_epi32(v, 16)});
    odd = as_floats({_mm256_and_si256(u, high), _mm256_and_si256(v, high)});
}
inline void split_f16(const std::uint8_t* line, Floats& even, Floats& odd) {
    const __m256i u = load32(line), v = load32(line + 32), low = _mm256_set1_epi32(0xffff);
    const __m256i e = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_and_si256(u, low), _mm256_and_si256(v, low)), 0xd8);
    const __m256i o = _mm256_permute4x64_epi64(
        _mm256_packus_epi32(_mm256_srli_epi32(u, 16), _mm256_srli_epi32(v, 16)), 0xd8);
    even = {_mm256_cvtph_ps(_mm256_castsi256_si128(e)),
            _mm256_cvtph_ps(_mm256_extracti128_si256(e, 1))};
    odd = {_mm256_cvtph_ps(_mm256_castsi256_si128(o)),
           _mm256_cvtph_ps(_mm256_extracti128_si256(o, 1))};
}

// Into L1 and L2; into L2 alone.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void pause() { _mm_pause(); }

}  // namespace greenroom::simd
