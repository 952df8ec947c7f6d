// The nonlinearity between the up and down projections, 16 values at a time.
#pragma once

#include "simd/simd.h"

namespace greenroom {

enum class Activation { silu, gpt_oss };

// e^x to within 2 units in the last place for |x| < 87, saturating beyond; not-a-number stays so
// (the second operand of min and max wins then).
inline simd::Floats exp(simd::Floats x) {
    using namespace simd;
    x = min(splat(87.0f), max(splat(-87.0f), x));
    const Floats n = to_floats(round(x * splat(1.44269504f)));
    // x - n ln 2 in two steps: the first constant has few bits, so its product is exact.
    const Floats r = fnma(n, splat(-2.12194440e-4f), fnma(n, splat(0.693359375f), x));
    Floats p = splat(1.0f / 720);
    for (float c : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = fma(p, r, splat(c));
    return scale_by_power(p, n);
}

// silu:    g * sigmoid(g) * u
// gpt-oss: g' * sigmoid(1.702 g') * (u' + 1), g' = min(g, 7), u' = clamp(u, -7, 7); the
//          constants are part of the architecture (openai/gpt-oss, swiglu).
inline simd::Floats activate(Activation kind, simd::Floats gate, simd::Floats up) {
    using namespace simd;
    float slope = 1.0f;
    if (kind == Activation::gpt_oss) {
        slope = 1.702f;
        gate = min(splat(7.0f), gate);
        up = min(splat(7.0f), max(splat(-7.0f), up)) + splat(1.0f);
    }
    const Floats denominator = splat(1.0f) + exp(gate * splat(-slope));
    return gate / denominator * up;
}

}  // namespace greenroom
