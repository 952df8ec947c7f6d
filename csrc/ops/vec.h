// One vector of floats, as wide as the tier's registers, and the few things the operations
// need beyond + and *. Built on the compilers' vector extension, so that one source serves
// every tier and every processor family.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__F16C__) || defined(__FMA__)
#include <immintrin.h>
#endif

namespace greenroom {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

using Vec = float __attribute__((vector_size(kLanes * 4)));
using IntVec = std::int32_t __attribute__((vector_size(kLanes * 4)));

struct Half {
    std::uint16_t bits;
};

template <class To, class From>
inline To as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Vec load(const float* from) {
    Vec v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof v); }

inline Vec splat(float x) { return x - Vec{}; }  // x + 0 would be an addition: -0 + 0 is 0

// a * b + c: rounded once where the tier has the instruction, twice where it has not. Everything
// else is rounded as it is written (-ffp-contract=off).
inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return as<Vec>(_mm512_fmadd_ps(as<__m512>(a), as<__m512>(b), as<__m512>(c)));
#elif defined(__FMA__)
    return as<Vec>(_mm256_fmadd_ps(as<__m256>(a), as<__m256>(b), as<__m256>(c)));
#else
    return a * b + c;
#endif
}

inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

// Binary16 to binary32 without a conversion instruction: shift the exponent into place and
// correct its bias by a multiplication, which also makes subnormals right.
inline Vec widen(IntVec halves) {
    const IntVec magnitude = halves & 0x7fff, sign = halves & 0x8000;
    const IntVec bits = as<IntVec>(as<Vec>(magnitude << 13) * 0x1p112f);
    const IntVec special = (magnitude >= 0x7c00) & 0x7f800000;  // infinity or NaN
    return as<Vec>(bits | sign << 16 | special);
}

inline float to_float(Half half) { return widen(IntVec{} + half.bits)[0]; }

// Binary32 to binary16, to nearest, ties to even.
inline Half to_half(float x) {
    const std::uint32_t bits = as<std::uint32_t>(x), sign = bits >> 16 & 0x8000u;
    const std::uint32_t size = bits & 0x7fffffffu;
    std::uint32_t half;
    if (size > 0x7f800000u) {
        half = 0x7e00u;  // NaN
    } else if (size >= 0x477ff000u) {
        half = 0x7c00u;  // 65520 and above round to infinity
    } else if (size < 0x38800000u) {
        // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
        half = as<std::uint32_t>(as<float>(size) + 0.5f) - 0x3f000000u;
    } else {
        half = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    }
    return {static_cast<std::uint16_t>(half | sign)};
}

#if defined(__AVX512F__)
// The forms without a mask make GCC 12 warn of an uninitialised value in its own header.
constexpr __mmask16 kAll = 0xffff;
#endif

inline Vec load(const Half* from) {
#if defined(__AVX512F__)
    return as<Vec>(
        _mm512_maskz_cvtph_ps(kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__F16C__)
    return as<Vec>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
    std::uint16_t __attribute__((vector_size(kLanes * 2))) halves;
    std::memcpy(&halves, from, sizeof halves);
    return widen(__builtin_convertvector(halves, IntVec));
#endif
}

inline void store(Half* to, Vec v) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtps_ph(kAll, as<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph(as<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = to_half(v[i]);
#endif
}

inline float sum(Vec v) {
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}

inline float largest(Vec v) {
    float most = v[0];
    for (int i = 1; i < kLanes; ++i) most = v[i] > most ? v[i] : most;
    return most;
}

// e^x for x <= 88, relative error below 3e-7; 0 below -87, where e^x leaves the normal range.
// e^x = 2^n e^r, n = round(x / ln 2), |r| <= ln 2 / 2; e^r by its Taylor series to r^7 / 7!.
inline Vec exp(Vec x) {
    constexpr float kShift = 0x1.8p23f;         // adding it rounds to an integer
    constexpr float kLn2High = 0x1.62e4p-1f;    // n * kLn2High is exact
    constexpr float kLn2Low = 0x1.7f7d1cp-20f;  // ln 2 - kLn2High
    const IntVec dead = x < splat(-87.0f);      // not so for NaN, which stays NaN
    const Vec bounded = dead ? splat(-87.0f) : x;
    const Vec shifted = fma(bounded, splat(1.44269504f), splat(kShift));
    const Vec n = shifted - kShift;
    const Vec r = fma(n, splat(-kLn2Low), bounded - n * kLn2High);
    Vec p = splat(1.0f / 5040);
    for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
        p = fma(p, r, splat(c));
    const IntVec scale = (as<IntVec>(shifted) << 23) + (127 << 23);
    return as<Vec>(as<IntVec>(p * as<Vec>(scale)) & ~dead);
}

inline float exp_one(float x) { return exp(splat(x))[0]; }

namespace detail {

// Lane i of one step of the tree in fold(): segments of `width` lanes, whose halves are kept
// apart (`upper` picks which) and interleaved from a and b.
constexpr int fold_lane(int i, int width, bool upper) {
    const int segment = i / width * width, offset = i % width, half = width / 2;
    const int source = segment + (upper ? half : 0) + offset % half;
    return offset < half ? source : source + kLanes;
}

template <int Width, int... I>
inline Vec fold_pair(Vec a, Vec b, std::integer_sequence<int, I...>) {
    return __builtin_shufflevector(a, b, fold_lane(I, Width, false)...) +
           __builtin_shufflevector(a, b, fold_lane(I, Width, true)...);
}

template <int Width>
inline void fold_step(Vec* v) {
    if constexpr (Width > 1) {
        for (int i = 0; i < Width / 2; ++i)
            v[i] =
                fold_pair<Width>(v[i], v[i + Width / 2], std::make_integer_sequence<int, kLanes>{});
        fold_step<Width / 2>(v);
    }
}

}  // namespace detail

// Adds up each of kLanes vectors: lane i of the result is the sum of v[i]. Every sum is formed
// in the same order, whatever its place. Overwrites v.
inline Vec fold(Vec* v) {
    detail::fold_step<kLanes>(v);
    return v[0];
}

}  // namespace greenroom
