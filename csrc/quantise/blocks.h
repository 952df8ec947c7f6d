// One struct per format: `encode` writes one block from floats and weights. The layouts are
// ggml's; the searches are in fit.h.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "formats/half.h"
#include "quantise/fit.h"

namespace greenroom::blocks {

// Nearest IEEE half, ties to even; too large becomes the largest finite one.
inline std::uint16_t to_half(float value) {
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t sign = (bits >> 16) & 0x8000u;
    const float size = std::fabs(value);
    if (size >= 65504.0f) return static_cast<std::uint16_t>(sign | 0x7bffu);
    if (size < 0x1p-14f)
        return static_cast<std::uint16_t>(sign |
                                          static_cast<std::uint32_t>(std::lrint(size * 0x1p24f)));
    const std::uint32_t magnitude = bits & 0x7fffffffu;
    const std::uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<std::uint16_t>(sign | ((rounded - (112u << 23)) >> 13));
}

// Stores a half; returns what it decodes to.
inline float put_half(std::uint8_t* out, float value) {
    const std::uint16_t h = to_half(value);
    std::memcpy(out, &h, 2);
    return f16_to_float(h);
}

inline void put_nibbles(const std::uint8_t* codes, int half, std::uint8_t* out) {
    for (int i = 0; i < half; ++i)
        out[i] = static_cast<std::uint8_t>((codes[i] & 15) | (codes[i + half] & 15) << 4);
}

inline void put_32(const std::uint8_t* codes, int bits, std::uint8_t* out) {
    if (bits == 5) {
        std::uint32_t high = 0;
        for (int i = 0; i < 32; ++i) high |= static_cast<std::uint32_t>(codes[i] >> 4) << i;
        std::memcpy(out, &high, 4);
        out += 4;
    }
    put_nibbles(codes, 16, out);
}

template <int Type, int Bits>
struct Centred32 {  // Q4_0, Q5_0: x = d (code - middle)
    static constexpr int type = Type, cols = 32, bytes = Bits == 4 ? 18 : 22;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        constexpr int middle = 1 << (Bits - 1);
        const float d = put_half(out, fit_symmetric({x, w, 32}, middle, middle - 1));
        const float inv = inverse(d);
        std::uint8_t codes[32];
        for (int i = 0; i < 32; ++i)
            codes[i] = static_cast<std::uint8_t>(nearest(x[i] * inv, -middle, middle - 1) + middle);
        put_32(codes, Bits, out + 2);
    }
};

template <int Type, int Bits>
struct Ranged32 {  // Q4_1, Q5_1: x = d code + m
    static constexpr int type = Type, cols = 32, bytes = Bits == 4 ? 20 : 24;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        constexpr int top = (1 << Bits) - 1;
        const Affine fit = fit_affine({x, w, 32}, top, false);
        const float d = put_half(out, fit.scale), low = put_half(out + 2, fit.low);
        const float inv = inverse(d);
        std::uint8_t codes[32];
        for (int i = 0; i < 32; ++i)
            codes[i] = static_cast<std::uint8_t>(nearest((x[i] - low) * inv, 0, top));
        put_32(codes, Bits, out + 4);
    }
};

struct Q8_0 {
    static constexpr int type = 8, cols = 32, bytes = 34;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        const float d = put_half(out, std::fabs(extreme({x, w, 32})) / 127.0f);
        const float inv = inverse(d);
        for (int i = 0; i < 32; ++i)
            out[2 + i] = static_cast<std::uint8_t>(nearest(x[i] * inv, -127, 127));
    }
};

// 256 numbers in runs with a scale and a minimum each, themselves integers below 2^ScaleBits.
template <int Runs, int Top, int ScaleTop>
struct AffineSuper {
    float d = 0, dmin = 0;
    std::uint8_t scales[Runs] = {}, mins[Runs] = {}, codes[256] = {};
    static constexpr int count = 256 / Runs;

    AffineSuper(const float* x, const float* w, std::uint8_t* d_at, std::uint8_t* dmin_at) {
        float scale[Runs], low[Runs], most = 0, deepest = 0;
        for (int r = 0; r < Runs; ++r) {
            const Affine fit = fit_affine({x + r * count, w + r * count, count}, Top, true);
            scale[r] = fit.scale, low[r] = -fit.low;
            most = std::max(most, scale[r]), deepest = std::max(deepest, low[r]);
        }
        d = put_half(d_at, most / ScaleTop), dmin = put_half(dmin_at, deepest / ScaleTop);
        for (int r = 0; r < Runs; ++r) choose(r, x + r * count, w + r * count, scale[r], low[r]);
        refine(x, w, d_at, dmin_at);
        for (int r = 0; r < Runs; ++r) encode(r, x + r * count);
    }

    float step(int r) const { return d * scales[r]; }
    float depth(int r) const { return dmin * mins[r]; }

    void encode(int r, const float* x) {
        const float inv = inverse(step(r));
        for (int i = 0; i < count; ++i)
            codes[r * count + i] =
                static_cast<std::uint8_t>(nearest((x[i] + depth(r)) * inv, 0, Top));
    }

    // Of sixteen pairs of integers around the fitted numbers the one that errs least.
    void choose(int r, const float* x, const float* w, float scale, float low) {
        const int s0 = below(scale * inverse(d)), m0 = below(low * inverse(dmin));
        int s[lanes], m[lanes];
        float step[lanes], from[lanes], error[lanes];
        for (int i = 0; i < lanes; ++i) {
            s[i] = std::clamp(s0 - 1 + i / 4, 0, ScaleTop);
            m[i] = std::clamp(m0 - 1 + i % 4, 0, ScaleTop);
            step[i] = d * s[i], from[i] = -dmin * m[i];
        }
        affine_errors({x, w, count}, step, from, Top, error);
        const auto best = std::min_element(error, error + lanes) - error;
        scales[r] = static_cast<std::uint8_t>(s[best]);
        mins[r] = static_cast<std::uint8_t>(m[best]);
    }

    static int below(float value) { return static_cast<int>(std::min(value, 2.0f * ScaleTop)); }

    float error(const float* x, const float* w) const {
        Floats sum = simd::zero();
        for (int i = 0; i < 256; i += lanes) {
            const int r = i / count;
            const Floats at = simd::load(x + i), from = simd::splat(-depth(r));
            const Floats code = nearest((at - from) * simd::splat(inverse(step(r))), 0, Top);
            const Floats off = simd::splat(step(r)) * code + from - at;
            sum = sum + simd::load(w + i) * off * off;
        }
        return total(sum);
    }

    // Least squares for d and dmin over the whole block, kept if they err less.
    void refine(const float* x, const float* w, std::uint8_t* d_at, std::uint8_t* dmin_at) {
        const float before = error(x, w), old_d = d, old_dmin = dmin;
        Floats aa = simd::zero(), ab = aa, bb = aa, ax = aa, bx = aa;
        for (int i = 0; i < 256; i += lanes) {
            const int r = i / count;
            const Floats at = simd::load(x + i), weight = simd::load(w + i);
            const Floats code =
                nearest((at + simd::splat(depth(r))) * simd::splat(inverse(step(r))), 0, Top);
            const Floats a = simd::splat(scales[r]) * code,
                         b = simd::splat(-static_cast<float>(mins[r]));
            aa = aa + weight * a * a, ab = ab + weight * a * b, bb = bb + weight * b * b;
            ax = ax + weight * a * at, bx = bx + weight * b * at;
        }
        const double saa = total(aa), sab = total(ab), sbb = total(bb);
        const double sax = total(ax), sbx = total(bx);
        const double det = saa * sbb - sab * sab;
        if (det <= 1e-12 * saa * sbb) return;
        d = put_half(d_at, static_cast<float>((sax * sbb - sbx * sab) / det));
        dmin = put_half(dmin_at, static_cast<float>((sbx * saa - sax * sab) / det));
        if (d > 0 && dmin >= 0 && error(x, w) <= before) return;
        d = put_half(d_at, old_d), dmin = put_half(dmin_at, old_dmin);
    }
};

// 256 numbers in 16 runs with one signed integer scale each.
template <int Middle, int ScaleMiddle>
struct SymmetricSuper {
    float d = 0;
    int scales[16] = {};
    std::uint8_t codes[256] = {};

    SymmetricSuper(const float* x, const float* w, std::uint8_t* d_at) {
        float scale[16], peak = 0;
        for (int r = 0; r < 16; ++r) {
            scale[r] = fit_symmetric({x + 16 * r, w + 16 * r, 16}, Middle, Middle - 1);
            if (std::fabs(scale[r]) > std::fabs(peak)) peak = scale[r];
        }
        d = put_half(d_at, -peak / ScaleMiddle);
        for (int r = 0; r < 16; ++r) choose(r, x + 16 * r, w + 16 * r, scale[r]);
        refine(x, w, d_at);
        for (int i = 0; i < 256; ++i)
            codes[i] = static_cast<std::uint8_t>(code(x[i], d * scales[i / 16]) + Middle);
    }

    static int code(float x, float step) { return nearest(x * inverse(step), -Middle, Middle - 1); }

    // Of sixteen integers around the fitted number the one that errs least.
    void choose(int r, const float* x, const float* w, float scale) {
        const int near = nearest(scale * inverse(d), -ScaleMiddle, ScaleMiddle - 1);
        int s[lanes];
        float step[lanes], error[lanes];
        for (int i = 0; i < lanes; ++i) {
            s[i] = std::clamp(near - 8 + i, -ScaleMiddle, ScaleMiddle - 1);
            step[i] = d * s[i];
        }
        symmetric_errors({x, w, 16}, step, Middle, error);
        scales[r] = s[std::min_element(error, error + lanes) - error];
    }

    static Floats codes_of(Floats x, float step) {
        return nearest(x * simd::splat(inverse(step)), -Middle, Middle - 1);
    }

    float error(const float* x, const float* w) const {
        Floats sum = simd::zero();
        for (int r = 0; r < 16; ++r) {
            const float step = d * scales[r];
            const Floats at = simd::load(x + 16 * r);
            const Floats off = simd::splat(step) * codes_of(at, step) - at;
            sum = sum + simd::load(w + 16 * r) * off * off;
        }
        return total(sum);
    }

    void refine(const float* x, const float* w, std::uint8_t* d_at) {
        const float before = error(x, w), old = d;
        Floats vv = simd::zero(), xv = vv;
        for (int r = 0; r < 16; ++r) {
            const Floats at = simd::load(x + 16 * r), weight = simd::load(w + 16 * r);
            const Floats value = simd::splat(static_cast<float>(scales[r])) *
                                 codes_of(at, d * static_cast<float>(scales[r]));
            vv = vv + weight * value * value;
            xv = xv + weight * value * at;
        }
        const float size = total(vv);
        if (size <= 0) return;
        d = put_half(d_at, total(xv) / size);
        if (error(x, w) > before) d = put_half(d_at, old);
    }
};

}  // namespace greenroom::blocks
