// The vector language on AVX-512 with VNNI: one register per vector.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace greenroom::simd {

constexpr int wide_tile = 16;  // tokens whose sums fit the register file with 8 code lines
constexpr int tile_widths[] = {1, 2, 4, 8, wide_tile}, tile_least[] = {1, 2, 3, 7, 13};
constexpr bool any_width = false;
constexpr int float_tile = 16;  // of float weights

struct Floats {
    __m512 v;
};
struct Ints {
    __m512i v;
};
struct Codes {
    __m512i v;
};

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats splat(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
// a * b + c and c - a * b, rounded once.
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats fnma(Floats a, Floats b, Floats c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline float sum(Floats a) { return _mm512_reduce_add_ps(a.v); }
inline float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }

inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Ints round(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline int sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
// a * 2^n for |n| <= 126, n an integer held as a float.
inline Floats scale_by_power(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
inline void store_i8(std::int8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(a.v));
}

inline Ints bytes_u8(const std::uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Floats load_u8(const std::uint8_t* p) { return to_floats(bytes_u8(p)); }
inline Floats load_i8(const std::uint8_t* p) {
    return {_mm512_cvtepi32_ps(
        _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline Floats load_f16(const std::uint8_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints operator&(Ints a, int b) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(b))}; }
template <int N>
Ints shift_left(Ints a) {
    return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
Ints shift_right(Ints a) {
    return {_mm512_srli_epi32(a.v, N)};
}
// max(a - b, 0)
inline Ints subtract_to_zero(Ints a, int b) {
    return {_mm512_max_epi32(_mm512_sub_epi32(a.v, _mm512_set1_epi32(b)), _mm512_setzero_si512())};
}
inline Floats as_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }

inline Codes load_line(const std::uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Codes splat_byte(int b) { return {_mm512_set1_epi8(static_cast<char>(b))}; }
inline Codes operator&(Codes a, Codes b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Codes operator|(Codes a, Codes b) { return {_mm512_or_si512(a.v, b.v)}; }
// Shifts the 32-bit words: left by N, or right by -N.
template <int N>
Codes shift(Codes a) {
    if constexpr (N > 0) return {_mm512_slli_epi32(a.v, N)};
    if constexpr (N < 0) return {_mm512_srli_epi32(a.v, -N)};
    return a;
}
inline Codes load_table(const std::uint8_t* sixteen) {
    return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen)))};
}
inline Codes lookup(Codes table, Codes index) { return {_mm512_shuffle_epi8(table.v, index.v)}; }

inline int word(const std::int8_t* p) {
    int w;
    std::memcpy(&w, p, 4);
    return w;
}

using Words = Codes;  // dots() takes bytes for any number of tokens
template <int>
inline Words widen(Codes c) {
    return c;
}
inline void planes_to_words(std::int8_t*) {}

constexpr int interleave = 16;

// sums[t] += 4N columns of one plane, for each token. The tokens' chains of dependent
// instructions are woven into each other: in the scheduler there is not room for enough of them
// one after the other. All 16 at once gave a third more than four at a time, though the tile's
// float sums then wait in L1.
template <int N, int Tokens>
[[gnu::always_inline]] inline void add_plane(const Codes* codes, const std::int8_t* x, Ints* sums) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
#pragma GCC unroll 16
        for (int t = 0; t < Tokens; ++t)
            sums[t].v = _mm512_dpbusd_epi32(sums[t].v, codes[i].v,
                                            _mm512_set1_epi32(word(x + token_bytes * t + 4 * i)));
    }
}

// minus the token's sum times the zero point.
template <int Zero>
inline __m512i zero_point(const std::int32_t* neg_sum) {
    if constexpr (Zero >= 0) return _mm512_slli_epi32(_mm512_set1_epi32(*neg_sum), Zero);
    return _mm512_setzero_si512();
}

template <int MaxCode, int Zero, int N, int Tokens>
[[gnu::always_inline]] inline void dots(const Codes* codes, const std::int8_t* x, int first,
                                        const std::int32_t* neg_sum, Ints* out) {
    constexpr bool apart = Tokens <= 4;  // room for two chains per token, half as long
    Ints high[Tokens];
    x += 4 * first;
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) high[t].v = _mm512_setzero_si512();
    add_plane<N, Tokens>(codes, x, high);
#pragma GCC unroll 16
    for (int t = 0; t < Tokens; ++t) {
        out[t].v = zero_point<Zero>(neg_sum + token_bytes / 4 * t);
        if (!apart) out[t].v = _mm512_add_epi32(out[t].v, _mm512_slli_epi32(high[t].v, 8));
    }
    add_plane<N, Tokens>(codes, x + plane_bytes, out);
#pragma GCC unroll 16
    for (int t = 0; t < Tokens && apart; ++t)
        out[t].v = _mm512_add_epi32(out[t].v, _mm512_slli_epi32(high[t].v, 8));
}

// Only for measuring what the dot product's instructions can do: acc + 4 products per lane, and
// a barrier that keeps a value from being folded away.
inline Ints accumulate(Ints acc, Codes codes, Codes x) {
    return {_mm512_dpbusd_epi32(acc.v, codes.v, x.v)};
}
inline void opaque(Codes& c) { __asm__ volatile("" : "+v"(c.v)); }

// A line of 16-bit floats: row r's word holds columns k (low half) and k + 1.
inline void split_bf16(const std::uint8_t* line, Floats& even, Floats& odd) {
    const __m512i w = _mm512_loadu_si512(line);
    even.v = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
    odd.v =
        _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void split_f16(const std::uint8_t* line, Floats& even, Floats& odd) {
    const __m512i w = _mm512_loadu_si512(line);
    even.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(w));
    odd.v = _mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(w, 16)));
}

// For AMX tiles.
inline void store_line(std::uint8_t* p, Codes a) { _mm512_storeu_si512(p, a.v); }
// 256 + byte B of each word.
template <int B>
Floats floats_256(Codes a) {
    const __m512i bits = shift<15 - 8 * B>(a).v, byte = _mm512_set1_epi32(255 << 15);
    const __m512i both = _mm512_ternarylogic_epi32(bits, byte, _mm512_set1_epi32(0x43800000), 0xea);
    return {_mm512_castsi512_ps(both)};
}
// The nearest bfloat16, ties away from zero; not-a-number stays so in itself or in what remains.
inline Floats nearest_bf16(Floats a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i up = _mm512_add_epi32(bits, _mm512_set1_epi32(0x8000));
    const __mmask16 number = _mm512_cmp_ps_mask(a.v, a.v, _CMP_ORD_Q);
    return {
        _mm512_castsi512_ps(_mm512_mask_and_epi32(bits, number, up, _mm512_set1_epi32(-0x10000)))};
}
inline void store_bf16(std::uint8_t* p, Floats a) {
    const __m512i upper = _mm512_srli_epi32(_mm512_castps_si512(a.v), 16);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(upper));
}
// The sign, exponent and first 7 bits of the mantissa.
inline Floats upper_half(Floats a) {
    const __m512i bits = _mm512_castps_si512(a.v);
    return {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(-0x10000)))};
}
// A line of bfloat16: row r's word holds the upper half of even[r], then of odd[r].
inline Codes upper_halves(Floats even, Floats odd) {
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even.v), 16);
    const __m512i high = _mm512_castps_si512(odd.v), mask = _mm512_set1_epi32(-0x10000);
    return {_mm512_ternarylogic_epi32(high, mask, low, 0xea)};
}

inline Ints load_ints(const std::int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline Ints operator+(Ints a, int b) { return {_mm512_add_epi32(a.v, _mm512_set1_epi32(b))}; }
inline void store_low_bytes(std::uint8_t* p, Ints a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

// MXFP4's exponents, [block][16 rows] bytes: the largest of each row or, if above is given (it may
// be out), the largest of those more than 3 below it; 0 if there are none. Returns whether any is
// more than 1: 0 and 1 stand for zeros.
inline bool largest_exponents(const std::uint8_t* e, std::int64_t blocks, const std::uint8_t* above,
                              std::uint8_t* out) {
    const __m128i* of_rows = reinterpret_cast<const __m128i*>(above);
    const __m128i most =
        of_rows ? _mm_subs_epu8(_mm_loadu_si128(of_rows), _mm_set1_epi8(4)) : _mm_set1_epi8(-1);
    const __m512i limit = _mm512_broadcast_i32x4(most);
    __m512i found = _mm512_setzero_si512();
    for (; blocks > 0; blocks -= 4, e += 64) {
        const __mmask64 there = blocks >= 4 ? ~0ull : ~(~0ull << 16 * blocks);
        const __m512i some = _mm512_maskz_loadu_epi8(there, e);
        found = _mm512_mask_max_epu8(found, _mm512_cmple_epu8_mask(some, limit), found, some);
    }
    const __m256i two =
        _mm256_max_epu8(_mm512_castsi512_si256(found), _mm512_extracti64x4_epi64(found, 1));
    const __m128i one = _mm_max_epu8(_mm256_castsi256_si128(two), _mm256_extracti128_si256(two, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), one);
    return _mm_cmpgt_epu8_mask(one, _mm_set1_epi8(1)) != 0;
}
// Where a block's exponents lie below the largest of their rows: those at most 3 below take part.
struct Window {
    __m512i below, middle;
    __mmask16 rows;
};
inline Window window_below(Ints largest, Ints exponent) {
    const __m512i below = _mm512_sub_epi32(largest.v, exponent.v);
    const __mmask16 some = _mm512_cmpgt_epi32_mask(exponent.v, _mm512_set1_epi32(1));
    const __mmask16 rows = _mm512_mask_cmple_epu32_mask(some, below, _mm512_set1_epi32(3));
    const __m512i middle = _mm512_set1_epi32(static_cast<int>(0x80808080u));
    return {below, _mm512_maskz_srlv_epi32(rows, middle, below), rows};
}
// Bytes of 128 more than a multiple of 8 without the 128 and shifted, 0 in other rows.
inline Codes shifted(Codes a, const Window& w) {
    return {_mm512_sub_epi8(_mm512_maskz_srlv_epi32(w.rows, a.v, w.below), w.middle)};
}

// Into L1 and L2; into L2 alone.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void prefetch_far(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T1); }
inline void pause() { _mm_pause(); }

}  // namespace greenroom::simd
