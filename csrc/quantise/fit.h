// Fits a run of numbers to codes: the scale (and the minimum) of least weighted squared error.
// Sixteen scales around the plain one are tried at once, one in each lane of a vector; for the
// codes each gives, the best scale is a least-squares solution. Sums go number by number in every
// lane and nothing is fused, so that all tiers write the same bytes. Knows nothing of how blocks
// are stored.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

#include "simd/simd.h"

namespace greenroom::blocks {

using simd::Floats;
inline constexpr int lanes = 16;

struct Run {
    const float* x;
    const float* w;  // weight of each number's squared error
    int count;
};

// The nearest integer of the range, ties to even. Adding 1.5 * 2^23 leaves it in the low bits,
// which vectorises where a call of lrint does not.
inline int nearest(float value, int low, int high) {
    const float inside =
        std::min(std::max(value, static_cast<float>(low)), static_cast<float>(high));
    return std::bit_cast<int>(inside + 0x1.8p23f) - 0x4b400000;
}

inline Floats nearest(Floats value, int low, int high) {
    const Floats shift = simd::splat(0x1.8p23f);
    const Floats from = simd::splat(static_cast<float>(low));
    const Floats to = simd::splat(static_cast<float>(high));
    return simd::min(simd::max(value, from), to) + shift - shift;
}

inline float inverse(float value) { return std::fabs(value) > 1e-30f ? 1.0f / value : 0.0f; }

// The inverse of every lane.
inline Floats inverses(const float* values) {
    float out[lanes];
    for (int i = 0; i < lanes; ++i) out[i] = inverse(values[i]);
    return simd::load(out);
}

// The sum of all lanes, in the same order everywhere.
inline float total(Floats values) {
    float at[lanes];
    simd::store(at, values);
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) at[i] += at[i + half];
    return at[0];
}

inline float extreme(const Run& run) {
    float best = 0.0f;
    for (int i = 0; i < run.count; ++i)
        if (std::fabs(run.x[i]) > std::fabs(best)) best = run.x[i];
    return best;
}

// Scales of least squares from sum(w x c) and sum(w c^2), and the energy they keep. The best keeps
// the most: the error is sum(w x^2) - (sum w x c)^2 / sum(w c^2).
inline void best_scales(Floats xc, Floats cc, float* scale, float* kept) {
    float xcs[lanes], ccs[lanes];
    simd::store(xcs, xc);
    simd::store(ccs, cc);
    for (int i = 0; i < lanes; ++i) {
        scale[i] = ccs[i] > 0.0f ? xcs[i] / ccs[i] : 0.0f;
        kept[i] = scale[i] * xcs[i];
    }
}

// Sixteen scales whose inverses are `inv` become the best for the codes they give.
inline void solve_symmetric(const Run& run, int middle, int top, const float* inv, float* scale,
                            float* kept) {
    const Floats by = simd::load(inv);
    Floats xc = simd::zero(), cc = simd::zero();
    for (int i = 0; i < run.count; ++i) {
        const Floats x = simd::splat(run.x[i]);
        const Floats code = nearest(x * by, -middle, top);
        const Floats weighed = simd::splat(run.w[i]) * code;
        xc = xc + x * weighed;
        cc = cc + code * weighed;
    }
    best_scales(xc, cc, scale, kept);
}

// Scale s of x ~ s * code, code in [-middle, top].
inline float fit_symmetric(const Run& run, int middle, int top) {
    const float peak = extreme(run);
    if (std::fabs(peak) <= 1e-30f) return 0.0f;
    float best = 0.0f, most = -1.0f;
    for (int side = 0; side < 2; ++side) {
        // The peak may take the lowest code or the highest.
        const auto edge = static_cast<float>(side ? top : -middle);
        float inv[lanes], scale[lanes], kept[lanes];
        for (int i = 0; i < lanes; ++i)
            inv[i] = (edge + (side ? 0.12f : -0.12f) * (static_cast<float>(i) - 7.0f)) / peak;
        for (int again = 0; again < 2; ++again) {
            solve_symmetric(run, middle, top, inv, scale, kept);
            for (int i = 0; i < lanes; ++i) inv[i] = inverse(scale[i]);
        }
        for (int i = 0; i < lanes; ++i)
            if (kept[i] > most) best = scale[i], most = kept[i];
    }
    return best;
}

// Squared errors of sixteen scales of codes in [-middle, middle).
inline void symmetric_errors(const Run& run, const float* scale, int middle, float* error) {
    const Floats step = simd::load(scale), by = inverses(scale);
    Floats sum = simd::zero();
    for (int i = 0; i < run.count; ++i) {
        const Floats x = simd::splat(run.x[i]);
        const Floats off = step * nearest(x * by, -middle, middle - 1) - x;
        sum = sum + simd::splat(run.w[i]) * off * off;
    }
    simd::store(error, sum);
}

struct Affine {
    float scale = 0.0f, low = 0.0f;  // x ~ scale * code + low
};

// Squared errors of sixteen scales and minima.
inline void affine_errors(const Run& run, const float* scale, const float* low, int top,
                          float* error) {
    const Floats step = simd::load(scale), from = simd::load(low), by = inverses(scale);
    Floats sum = simd::zero();
    for (int i = 0; i < run.count; ++i) {
        const Floats x = simd::splat(run.x[i]);
        const Floats off = step * nearest((x - from) * by, 0, top) + from - x;
        sum = sum + simd::splat(run.w[i]) * off * off;
    }
    simd::store(error, sum);
}

// What a fit of a run to codes needs of the run, for numbers above `low`.
struct Moments {
    float w = 0.0f, x = 0.0f;
    Moments(const Run& run, float low) {
        Floats sw = simd::zero(), sx = simd::zero();
        for (int i = 0; i < run.count; i += lanes) {
            const Floats weight = simd::load(run.w + i);
            sw = sw + weight;
            sx = sx + weight * (simd::load(run.x + i) - simd::splat(low));
        }
        w = total(sw), x = total(sx);
    }
};

// Sixteen lines; `error` leaves out what does not depend on the line. Numbers count from `low`.
struct Lines {
    float inv[lanes], from[lanes], scale[lanes], error[lanes];

    // The lines of least squares through the codes that inv and from give; from is at most `most`.
    void solve(const Run& run, float low, const Moments& all, int top, float most) {
        const Floats by = simd::load(inv), start = simd::load(from);
        Floats c = simd::zero(), cc = simd::zero(), xc = simd::zero();
        for (int i = 0; i < run.count; ++i) {
            const Floats x = simd::splat(run.x[i] - low);
            const Floats code = nearest((x - start) * by, 0, top);
            const Floats weighed = simd::splat(run.w[i]) * code;
            c = c + weighed;
            cc = cc + code * weighed;
            xc = xc + x * weighed;
        }
        float sc[lanes], scc[lanes], sxc[lanes];
        simd::store(sc, c);
        simd::store(scc, cc);
        simd::store(sxc, xc);
        for (int i = 0; i < lanes; ++i) {
            const float det = all.w * scc[i] - sc[i] * sc[i];
            const bool flat = !(det > 0.0f);
            const float free = (scc[i] * all.x - sc[i] * sxc[i]) / (flat ? 1.0f : det);
            const float at = flat ? 0.0f : std::min(free, most);
            const float s = flat ? 0.0f : (sxc[i] - at * sc[i]) / scc[i];
            error[i] =
                s * (s * scc[i] + 2.0f * (at * sc[i] - sxc[i])) + at * (at * all.w - 2.0f * all.x);
            scale[i] = s, from[i] = at, inv[i] = inverse(s);
        }
    }
};

inline Affine fit_affine(const Run& run, int top, bool low_at_most_0) {
    float low = run.x[0], high = run.x[0];
    for (int i = 1; i < run.count; ++i)
        low = std::min(low, run.x[i]), high = std::max(high, run.x[i]);
    if (low_at_most_0) low = std::min(low, 0.0f);
    if (!(high - low > 1e-30f)) return {0.0f, low};
    Lines lines;
    for (int i = 0; i < lanes; ++i) {
        const float step = 0.14f * (static_cast<float>(i) - 7.5f);
        lines.inv[i] = (static_cast<float>(top) + step) / (high - low);
        lines.from[i] = 0.0f;
    }
    const Moments all(run, low);
    const float most = low_at_most_0 ? -low : INFINITY;
    for (int again = 0; again < 2; ++again) lines.solve(run, low, all, top, most);
    Affine best{(high - low) / static_cast<float>(top), low};
    float least = INFINITY;
    for (int i = 0; i < lanes; ++i)
        if (lines.scale[i] > 0.0f && lines.error[i] < least)
            best = {lines.scale[i], low + lines.from[i]}, least = lines.error[i];
    return best;
}

// Which of 16 ascending levels in [-128, 127] is nearest, by cells half a unit wide: where two
// levels meet is a cell's edge.
struct Levels {
    std::uint8_t code[512] = {};
    float value[512] = {};

    explicit constexpr Levels(const signed char* levels) {
        for (int i = 0, at = 0; i < 512; ++i) {
            while (at < 15 && i - 256 >= levels[at] + levels[at + 1]) ++at;
            code[i] = static_cast<std::uint8_t>(at), value[i] = levels[at];
        }
    }

    static int cell(float value) { return nearest(2.0f * value - 0.5f, -256, 255) + 256; }
};

// Sixteen scales whose inverses are `inv` become the best for the levels they give.
inline void solve_levels(const Run& run, const Levels& levels, const float* inv, float* scale,
                         float* kept) {
    Floats xv = simd::zero(), vv = simd::zero();
    for (int i = 0; i < run.count; ++i) {
        int cells[lanes];
        float values[lanes];
        for (int l = 0; l < lanes; ++l) cells[l] = Levels::cell(run.x[i] * inv[l]);
        for (int l = 0; l < lanes; ++l) values[l] = levels.value[cells[l]];
        const Floats value = simd::load(values), weighed = simd::splat(run.w[i]) * value;
        xv = xv + simd::splat(run.x[i]) * weighed;
        vv = vv + value * weighed;
    }
    best_scales(xv, vv, scale, kept);
}

// Scale of x ~ scale * level.
inline float fit_levels(const Run& run, const Levels& levels) {
    const float peak = extreme(run);
    if (std::fabs(peak) <= 1e-30f) return 0.0f;
    float best = 0.0f, most = -1.0f;
    for (const float edge : {levels.value[0], levels.value[511]}) {
        float inv[lanes], scale[lanes], kept[lanes];
        for (int i = 0; i < lanes; ++i)
            inv[i] = edge * (1.0f + 0.02f * (static_cast<float>(i) - 7.0f)) / peak;
        for (int again = 0; again < 2; ++again) {
            solve_levels(run, levels, inv, scale, kept);
            for (int i = 0; i < lanes; ++i) inv[i] = inverse(scale[i]);
        }
        for (int i = 0; i < lanes; ++i)
            if (kept[i] > most) best = scale[i], most = kept[i];
    }
    return best;
}

}  // namespace greenroom::blocks
