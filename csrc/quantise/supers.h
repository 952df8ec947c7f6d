// The formats with blocks of 256, and those of 4-bit levels: how their parts are stored.
#pragma once

#include "quantise/blocks.h"

namespace greenroom::blocks {

// Fields of two bits: byte l of a half of 128 numbers holds numbers l, l + 32, l + 64, l + 96.
inline void put_crumbs(const std::uint8_t* codes, int shift, std::uint8_t* out) {
    for (int half = 0; half < 2; ++half)
        for (int l = 0; l < 32; ++l) {
            int byte = 0;
            for (int j = 0; j < 4; ++j)
                byte |= ((codes[128 * half + 32 * j + l] >> shift) & 3) << (2 * j);
            out[32 * half + l] = static_cast<std::uint8_t>(byte);
        }
}

struct Q2_K {
    static constexpr int type = 10, cols = 256, bytes = 84;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        const AffineSuper<16, 3, 15> found(x, w, out + 80, out + 82);
        for (int r = 0; r < 16; ++r)
            out[r] = static_cast<std::uint8_t>(found.scales[r] | found.mins[r] << 4);
        put_crumbs(found.codes, 0, out + 16);
    }
};

struct Q3_K {
    static constexpr int type = 11, cols = 256, bytes = 110;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        std::memset(out, 0, bytes);
        const SymmetricSuper<4, 32> found(x, w, out + 108);
        for (int i = 0; i < 256; ++i)
            out[i % 32] |= static_cast<std::uint8_t>((found.codes[i] >> 2) << (i / 32));
        put_crumbs(found.codes, 0, out + 32);
        for (int r = 0; r < 16; ++r) {
            const int stored = found.scales[r] + 32;
            out[96 + r % 8] |= static_cast<std::uint8_t>((stored & 15) << (r < 8 ? 0 : 4));
            out[104 + r % 4] |= static_cast<std::uint8_t>((stored >> 4) << (2 * (r / 4)));
        }
    }
};

template <int Bits>
struct Q45_K {
    static constexpr int type = Bits == 4 ? 12 : 13, cols = 256, bytes = Bits == 4 ? 144 : 176;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        const AffineSuper<8, (1 << Bits) - 1, 63> found(x, w, out, out + 2);
        std::uint8_t* packed = out + 4;
        for (int b = 0; b < 4; ++b) {
            const int s = found.scales[b + 4], m = found.mins[b + 4];
            packed[b] = static_cast<std::uint8_t>(found.scales[b] | (s >> 4) << 6);
            packed[b + 4] = static_cast<std::uint8_t>(found.mins[b] | (m >> 4) << 6);
            packed[b + 8] = static_cast<std::uint8_t>((s & 15) | (m & 15) << 4);
        }
        std::uint8_t* nibbles = out + 16;
        if constexpr (Bits == 5) {
            std::memset(nibbles, 0, 32);
            for (int i = 0; i < 256; ++i)
                nibbles[i % 32] |= static_cast<std::uint8_t>((found.codes[i] >> 4) << (i / 32));
            nibbles += 32;
        }
        for (int pair = 0; pair < 4; ++pair)
            put_nibbles(found.codes + 64 * pair, 32, nibbles + 32 * pair);
    }
};

struct Q6_K {
    static constexpr int type = 14, cols = 256, bytes = 210;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        const SymmetricSuper<32, 128> found(x, w, out + 208);
        for (int half = 0; half < 2; ++half)
            put_nibbles(found.codes + 128 * half, 64, out + 64 * half);
        put_crumbs(found.codes, 4, out + 128);
        for (int r = 0; r < 16; ++r) out[192 + r] = static_cast<std::uint8_t>(found.scales[r]);
    }
};

inline constexpr signed char iq4_levels[16] = {-127, -104, -83, -65, -49, -35, -22, -10,
                                               1,    13,   25,  38,  53,  69,  89,  113};

inline constexpr Levels iq4_table{iq4_levels};

inline void put_levels(const float* x, float step, std::uint8_t* out) {
    const float inv = inverse(step);
    std::uint8_t codes[32];
    for (int i = 0; i < 32; ++i) codes[i] = iq4_table.code[Levels::cell(x[i] * inv)];
    put_nibbles(codes, 16, out);
}

struct IQ4_NL {
    static constexpr int type = 20, cols = 32, bytes = 18;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        put_levels(x, put_half(out, fit_levels({x, w, 32}, iq4_table)), out + 2);
    }
};

struct IQ4_XS {
    static constexpr int type = 23, cols = 256, bytes = 136;
    static float error(const float* x, const float* w, float step) {
        const float inv = inverse(step);
        float sum = 0;
        for (int i = 0; i < 32; ++i) {
            const float off = step * iq4_table.value[Levels::cell(x[i] * inv)] - x[i];
            sum += w[i] * off * off;
        }
        return sum;
    }
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        float scale[8], peak = 0;
        for (int b = 0; b < 8; ++b) {
            scale[b] = fit_levels({x + 32 * b, w + 32 * b, 32}, iq4_table);
            if (std::fabs(scale[b]) > std::fabs(peak)) peak = scale[b];
        }
        const float d = put_half(out, -peak / 32);
        std::memset(out + 2, 0, 6);
        for (int b = 0; b < 8; ++b) {
            const float *at = x + 32 * b, *weight = w + 32 * b;
            const int near = nearest(scale[b] * inverse(d), -32, 31);
            int best = near;
            for (int s = std::max(near - 1, -32); s <= std::min(near + 1, 31); ++s)
                if (error(at, weight, d * s) < error(at, weight, d * best)) best = s;
            out[4 + b / 2] |= static_cast<std::uint8_t>(((best + 32) & 15) << (4 * (b % 2)));
            out[2 + b / 4] |= static_cast<std::uint8_t>(((best + 32) >> 4) << (2 * (b % 4)));
            put_levels(at, d * best, out + 8 + 16 * b);
        }
    }
};

// E2M1: the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6 with a sign in bit 3.
inline int fp4_code(float value) {
    const float edges[7] = {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f};
    const float size = std::fabs(value);
    int code = 0;
    for (const float edge : edges) code += size > edge;
    return code ? code | (value < 0 ? 8 : 0) : 0;
}
// Squared errors of sixteen scales. Up to 2 values lie half apart, up to 4 one, up to 6 two.
inline void fp4_errors(const Run& run, const float* scale, float* error) {
    const Floats step = simd::load(scale), by = inverses(scale);
    const Floats two = simd::splat(2.0f), half = simd::splat(0.5f), four = simd::splat(4.0f);
    Floats sum = simd::zero();
    for (int i = 0; i < run.count; ++i) {
        const Floats size = simd::abs(simd::splat(run.x[i]));
        const Floats code = size * by;
        const Floats value = half * nearest(code * two, 0, 4) + nearest(code - two, 0, 2) +
                             two * nearest((code - four) * half, 0, 1);
        const Floats off = step * value - size;
        sum = sum + simd::splat(run.w[i]) * off * off;
    }
    simd::store(error, sum);
}

struct MXFP4 {
    static constexpr int type = 39, cols = 32, bytes = 17;
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        const Run run{x, w, 32};
        const float peak = std::fabs(extreme(run));
        int exponent = -127;
        if (peak > 0) {
            const int around[3] = {std::clamp(std::ilogb(peak) - 2, -126, 127),
                                   std::clamp(std::ilogb(peak) - 1, -126, 127),
                                   std::clamp(std::ilogb(peak) - 3, -126, 127)};
            float step[lanes] = {}, error[lanes];
            for (int i = 0; i < 3; ++i) step[i] = std::ldexp(1.0f, around[i]);
            fp4_errors(run, step, error);
            exponent = around[std::min_element(error, error + 3) - error];
        }
        out[0] = static_cast<std::uint8_t>(exponent + 127);
        const float inv = std::ldexp(1.0f, -exponent);
        std::uint8_t codes[32];
        for (int i = 0; i < 32; ++i) codes[i] = static_cast<std::uint8_t>(fp4_code(x[i] * inv));
        put_nibbles(codes, 16, out + 1);
    }
};

struct NVFP4 {
    static constexpr int type = 40, cols = 64, bytes = 36;
    static float scale_of(int byte) {  // unsigned E4M3
        const int exponent = byte >> 3, mantissa = byte & 7;
        if (exponent == 0) return static_cast<float>(mantissa) * 0x1p-9f;
        return std::ldexp(1.0f + static_cast<float>(mantissa) / 8.0f, exponent - 7);
    }
    static void encode(const float* x, const float* w, std::uint8_t* out) {
        for (int part = 0; part < 4; ++part) {
            const Run run{x + 16 * part, w + 16 * part, 16};
            const float wanted = std::fabs(extreme(run)) / 6.0f;
            int base = 0;
            while (base < 0x7e && scale_of(base) < wanted) ++base;
            float step[lanes], error[lanes];
            for (int i = 0; i < lanes; ++i) step[i] = scale_of(std::clamp(base - 8 + i, 0, 0x7e));
            fp4_errors(run, step, error);
            const int pick = static_cast<int>(std::min_element(error, error + lanes) - error);
            const int best = std::clamp(base - 8 + pick, 0, 0x7e);
            out[part] = static_cast<std::uint8_t>(best);
            const float inv = inverse(scale_of(best));
            std::uint8_t codes[16];
            for (int i = 0; i < 16; ++i)
                codes[i] = static_cast<std::uint8_t>(fp4_code(run.x[i] * inv));
            put_nibbles(codes, 8, out + 4 + 8 * part);
        }
    }
};

}  // namespace greenroom::blocks
