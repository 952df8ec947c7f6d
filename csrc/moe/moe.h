// The fused expert MLP of one MoE layer for a batch of routed tokens. Knows where each expert's
// packed matrices lie, not who keeps them there.
#pragma once

#include <cstdint>
#include <vector>

#include "matmul/product.h"
#include "moe/activation.h"
#include "threads/pool.h"

namespace greenroom {

struct Expert {
    Matrix gate, up, down;  // (f, d), (f, d), (d, f)
    const float* gate_bias = nullptr;
    const float* up_bias = nullptr;
    const float* down_bias = nullptr;
    bool present() const { return gate.data != nullptr; }
};

struct MoeLayer {
    std::int64_t d, f;
    Activation activation;
    std::vector<Expert> experts;
};

// Routed tokens: ids (tokens, k), -1 = not for this processor; weights (tokens, k).
struct Routes {
    const float* hidden;  // (tokens, d)
    const std::int32_t* ids;
    const float* weights;
    std::int64_t tokens, k;
};

// out (tokens, d) = sum over k of weight * expert(hidden). Every id is -1 or a present expert.
// The sums of a token are formed in the order of its routes: the result does not depend on the
// number of threads, on their timing, or (AMX aside) on the other tokens.
void run_moe(Pool& pool, const MoeLayer& layer, const Routes& routes, float* out);

}  // namespace greenroom
