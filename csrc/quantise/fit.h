// Fits a run of numbers to codes: the scale (and the minimum) of least weighted squared error.
// Several scales around the plain one are tried; for the codes each gives, the best scale is a
// least-squares solution. Knows nothing of how blocks are stored.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>

namespace greenroom::blocks {

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

inline float inverse(float value) { return std::fabs(value) > 1e-30f ? 1.0f / value : 0.0f; }

inline float extreme(const Run& run) {
    float best = 0.0f;
    for (int i = 0; i < run.count; ++i)
        if (std::fabs(run.x[i]) > std::fabs(best)) best = run.x[i];
    return best;
}

// Scale s of x ~ s * code, code in [-middle, top]. The best keeps the most of the energy:
// the error is sum(w x^2) - (sum w x c)^2 / sum(w c^2).
inline float fit_symmetric(const Run& run, int middle, int top) {
    const float peak = extreme(run);
    if (peak == 0.0f) return 0.0f;
    float best = 0.0f, kept = -1.0f;
    for (int side = 0; side < 2; ++side)
        for (int step = -9; step <= 9; ++step) {
            // The peak may take the lowest code or the highest.
            const float edge = static_cast<float>(side ? top : -middle);
            const float inv = (edge + (side ? 0.1f : -0.1f) * static_cast<float>(step)) / peak;
            float xc = 0.0f, cc = 0.0f;
            for (int i = 0; i < run.count; ++i) {
                const auto code = static_cast<float>(nearest(run.x[i] * inv, -middle, top));
                xc += run.w[i] * run.x[i] * code;
                cc += run.w[i] * code * code;
            }
            if (cc > 0.0f && xc * xc > kept * cc) best = xc / cc, kept = xc * xc / cc;
        }
    return best;
}

struct Affine {
    float scale = 0.0f, low = 0.0f;  // x ~ scale * code + low
};

inline float affine_error(const Run& run, Affine fit, int top) {
    const float inv = inverse(fit.scale);
    float error = 0.0f;
    for (int i = 0; i < run.count; ++i) {
        const auto code = static_cast<float>(nearest((run.x[i] - fit.low) * inv, 0, top));
        const float off = fit.scale * code + fit.low - run.x[i];
        error += run.w[i] * off * off;
    }
    return error;
}

// The line through the codes that `inv` and `low` give; low stays at most 0 if it must.
inline Affine solve(const Run& run, float inv, float low, int top, bool low_at_most_0) {
    float sw = 0, sx = 0, sc = 0, scc = 0, sxc = 0;
    for (int i = 0; i < run.count; ++i) {
        const auto code = static_cast<float>(nearest((run.x[i] - low) * inv, 0, top));
        const float w = run.w[i];
        sw += w, sx += w * run.x[i], sc += w * code;
        scc += w * code * code, sxc += w * run.x[i] * code;
    }
    const float det = sw * scc - sc * sc;
    if (det <= 0.0f) return {};
    Affine fit{(sw * sxc - sx * sc) / det, (scc * sx - sc * sxc) / det};
    if (low_at_most_0 && fit.low > 0.0f) fit = {scc > 0.0f ? sxc / scc : 0.0f, 0.0f};
    return fit;
}

inline Affine fit_affine(const Run& run, int top, bool low_at_most_0) {
    float low = run.x[0], high = run.x[0];
    for (int i = 1; i < run.count; ++i)
        low = std::min(low, run.x[i]), high = std::max(high, run.x[i]);
    if (low_at_most_0) low = std::min(low, 0.0f);
    if (high <= low) return {0.0f, low};
    Affine best{(high - low) / static_cast<float>(top), low};
    float least = affine_error(run, best, top);
    for (int step = -10; step <= 10; ++step) {
        const float inv =
            (static_cast<float>(top) + 0.1f * static_cast<float>(step)) / (high - low);
        Affine fit = solve(run, inv, low, top, low_at_most_0);
        for (int again = 0; again < 2; ++again) {
            if (fit.scale <= 0.0f) break;
            const float error = affine_error(run, fit, top);
            if (error < least) best = fit, least = error;
            fit = solve(run, inverse(fit.scale), fit.low, top, low_at_most_0);
        }
    }
    return best;
}

inline int nearest_level(const signed char* levels, float value) {
    int code = 0;
    while (code < 15 && value > 0.5f * static_cast<float>(levels[code] + levels[code + 1])) ++code;
    return code;
}

// Scale of x ~ scale * levels[code], 16 ascending levels of uneven distance.
inline float fit_levels(const Run& run, const signed char* levels) {
    const float peak = extreme(run);
    if (peak == 0.0f) return 0.0f;
    float best = 0.0f, kept = -1.0f;
    for (int side = 0; side < 2; ++side)
        for (int step = -9; step <= 9; ++step) {
            const auto edge = static_cast<float>(levels[side ? 15 : 0]);
            const float inv = edge * (1.0f + 0.015f * static_cast<float>(step)) / peak;
            float xv = 0.0f, vv = 0.0f;
            for (int i = 0; i < run.count; ++i) {
                const auto value =
                    static_cast<float>(levels[nearest_level(levels, run.x[i] * inv)]);
                xv += run.w[i] * run.x[i] * value;
                vv += run.w[i] * value * value;
            }
            if (vv > 0.0f && xv * xv > kept * vv) best = xv / vv, kept = xv * xv / vv;
        }
    return best;
}

}  // namespace greenroom::blocks
