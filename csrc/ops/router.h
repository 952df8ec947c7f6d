// Which experts a token goes to and with what weight. Knows nothing of the experts.
#pragma once

#include <cstdint>

#include "ops/rows.h"
#include "threads/pool.h"

namespace greenroom {

enum class Gating {
    softmax,           // probabilities over all experts
    softmax_selected,  // probabilities over the selected experts only
    sigmoid,           // each expert's score by itself
    sparse_mixer,      // SparseMixer at inference: always the two best, weights not normalised
};

struct RouterRule {
    Gating gating = Gating::softmax;
    std::int64_t selected = 1;     // experts per token
    bool renormalize = false;      // weights of a token add up to 1 (before the scale)
    float scale = 1.0f;            // multiplies the weights
    std::int64_t groups = 1;       // experts in equal groups ...
    std::int64_t groups_used = 1;  // ... of which the best take part, by their two best scores
    float jitter = 0.01f;          // sparse_mixer: logits within 2 * jitter count as tied
};

// x (tokens, width), weight (experts, width), bias (experts) or null are those of the router's
// linear layer; selection_bias (experts) or null is added to the scores for the choice only.
struct RouterWeights {
    const float* weight;
    const float* bias;
    const float* selection_bias;
    std::int64_t experts;
};

// ids and weights (tokens, rule.selected), best first; of equal scores the lower id wins.
// logits (tokens, experts) is written too.
void router(Pool& pool, const Rows<const float>& x, const RouterWeights& weights,
            const RouterRule& rule, float* logits, std::int32_t* ids, float* out);

// The choice alone, for logits that are already there.
void select_experts(const float* logits, const float* selection_bias, std::int64_t experts,
                    const RouterRule& rule, std::int32_t* ids, float* weights);

}  // namespace greenroom
