#include "ops/router.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "ops/dot.h"

namespace greenroom {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Places of the `count` largest scores, largest first; of equal ones the first comes first.
// Not a number counts as the smallest.
void top(const float* scores, std::int64_t size, std::int64_t count, std::int32_t* places) {
    const auto better = [&](std::int64_t a, std::int64_t b) {
        const float x = std::isnan(scores[a]) ? kNever : scores[a];
        const float y = std::isnan(scores[b]) ? kNever : scores[b];
        return x > y || (x == y && a < b);
    };
    std::int64_t filled = 0;
    for (std::int64_t i = 0; i < size; ++i) {
        std::int64_t at = filled;
        while (at > 0 && better(i, places[at - 1])) --at;
        if (at == count) continue;
        filled = std::min(filled + 1, count);
        for (std::int64_t j = filled - 1; j > at; --j) places[j] = places[j - 1];
        places[at] = static_cast<std::int32_t>(i);
    }
}

void softmax(float* x, std::int64_t size) {
    const float most = *std::max_element(x, x + size);
    float total = 0;
    for (std::int64_t i = 0; i < size; ++i) total += x[i] = std::exp(x[i] - most);
    for (std::int64_t i = 0; i < size; ++i) x[i] /= total;
}

// Scores outside the best groups become -infinity.
void keep_best_groups(float* scores, std::int64_t experts, const RouterRule& rule) {
    const std::int64_t size = experts / rule.groups;
    std::vector<float> group(static_cast<std::size_t>(rule.groups));
    std::vector<std::int32_t> best(static_cast<std::size_t>(rule.groups_used));
    for (std::int64_t g = 0; g < rule.groups; ++g) {
        std::int32_t two[2];
        const std::int64_t count = std::min<std::int64_t>(2, size);
        top(scores + g * size, size, count, two);
        for (std::int64_t i = 0; i < count; ++i)
            group[static_cast<std::size_t>(g)] += scores[g * size + two[i]];
    }
    top(group.data(), rule.groups, rule.groups_used, best.data());
    for (std::int64_t g = 0; g < rule.groups; ++g)
        if (std::find(best.begin(), best.end(), static_cast<std::int32_t>(g)) == best.end())
            std::fill_n(scores + g * size, size, kNever);
}

// One pick of SparseMixer: the largest of the logits that are left, and its probability among
// those of them that lie within 2 * jitter of it, relative to the larger of |logit| and it.
void mix_one(const float* logits, std::int64_t experts, std::int32_t taken, float jitter,
             std::int32_t& id, float& weight) {
    id = taken == 0 ? 1 : 0;
    for (std::int32_t e = 0; e < experts; ++e)
        if (e != taken && logits[e] > logits[id]) id = e;
    const float most = logits[id];
    float total = 0;
    for (std::int32_t e = 0; e < experts; ++e) {
        if (e == taken) continue;
        const float gap = (most - logits[e]) / std::max(std::fabs(logits[e]), most);
        if (!(gap > 2 * jitter)) total += std::exp(logits[e] - most);  // 0 / 0 counts as tied
    }
    weight = 1.0f / total;
}

void sparse_mixer(const float* logits, std::int64_t experts, const RouterRule& rule,
                  std::int32_t* ids, float* weights) {
    mix_one(logits, experts, -1, rule.jitter, ids[0], weights[0]);
    mix_one(logits, experts, ids[0], rule.jitter, ids[1], weights[1]);
    for (int i = 0; i < 2; ++i) weights[i] *= rule.scale;
}

void finish_weights(const RouterRule& rule, float* weights) {
    float total = 0;
    for (std::int64_t i = 0; i < rule.selected; ++i) total += weights[i];
    // 1e-20 keeps sigmoids that all underflow from dividing 0 by 0 (DeepSeek-V3's constant).
    const float factor = rule.renormalize ? rule.scale / (total + 1e-20f) : rule.scale;
    for (std::int64_t i = 0; i < rule.selected; ++i) weights[i] *= factor;
}

}  // namespace

void select_experts(const float* logits, const float* selection_bias, std::int64_t experts,
                    const RouterRule& rule, std::int32_t* ids, float* weights) {
    if (rule.gating == Gating::sparse_mixer)
        return sparse_mixer(logits, experts, rule, ids, weights);
    std::vector<float> probabilities(logits, logits + experts);
    if (rule.gating == Gating::softmax) softmax(probabilities.data(), experts);
    if (rule.gating == Gating::sigmoid)
        for (float& p : probabilities) p = 1.0f / (1.0f + std::exp(-p));
    // Softmax keeps the order of the logits except where it rounds different ones together.
    const bool by_logit = rule.gating == Gating::softmax && !selection_bias && rule.groups == 1;
    std::vector<float> scores = probabilities;
    if (by_logit) scores.assign(logits, logits + experts);
    if (selection_bias)
        for (std::int64_t e = 0; e < experts; ++e)
            scores[static_cast<std::size_t>(e)] += selection_bias[e];
    if (rule.groups > 1) keep_best_groups(scores.data(), experts, rule);
    top(scores.data(), experts, rule.selected, ids);
    for (std::int64_t i = 0; i < rule.selected; ++i)
        weights[i] = probabilities[static_cast<std::size_t>(ids[i])];
    if (rule.gating == Gating::softmax_selected) softmax(weights, rule.selected);
    finish_weights(rule, weights);
}

namespace {

// Logits of tokens [begin, end) for experts [first, last): the dot products, then what is left
// of the width beyond whole vectors, then the bias.
void linear(const Rows<const float>& x, const RouterWeights& w, std::int64_t begin,
            std::int64_t end, std::int64_t first, std::int64_t last, float* logits) {
    const std::int64_t whole = x.width / kLanes * kLanes;
    const float* columns[kLanes];
    float products[4 * kLanes];
    for (std::int64_t t = begin; t < end; t += 4)
        for (std::int64_t e = first; e < last; e += kLanes) {
            const std::int64_t tokens = std::min<std::int64_t>(4, end - t);
            const std::int64_t experts = std::min<std::int64_t>(kLanes, last - e);
            for (int c = 0; c < kLanes; ++c)  // beyond the last expert: any that can be read
                columns[c] = w.weight + std::min(e + c, last - 1) * x.width;
            dot_rows(x.at(t, 0), tokens, x.token_stride, columns, 0, experts, whole, products,
                     kLanes);
            for (std::int64_t r = 0; r < tokens; ++r)
                for (std::int64_t c = 0; c < experts; ++c) {
                    float value = products[r * kLanes + c];
                    for (std::int64_t i = whole; i < x.width; ++i)
                        value += x.at(t + r, 0)[i] * columns[c][i];
                    logits[(t + r) * w.experts + e + c] = value + (w.bias ? w.bias[e + c] : 0.0f);
                }
        }
}

}  // namespace

void router(Pool& pool, const Rows<const float>& x, const RouterWeights& weights,
            const RouterRule& rule, float* logits, std::int32_t* ids, float* out) {
    // Few tokens: share out the experts, whose weights are what has to be read.
    constexpr std::int64_t tokens_per_task = 32, experts_per_task = 16;
    constexpr std::int64_t worth_a_region = 1 << 17;  // multiplications
    const bool tiny = x.tokens * weights.experts * x.width < worth_a_region;
    const std::int64_t expert_step = tiny || x.tokens > 64 ? weights.experts : experts_per_task;
    const std::int64_t token_step = tiny ? x.tokens : tokens_per_task;
    if (x.tokens == 0) return;
    const std::int64_t parts = (weights.experts + expert_step - 1) / expert_step;
    const std::int64_t chunks = (x.tokens + token_step - 1) / token_step;
    pool.run(chunks * parts, [&](std::int64_t task, int) {
        const std::int64_t t = task / parts * token_step, e = task % parts * expert_step;
        linear(x, weights, t, std::min(x.tokens, t + token_step), e,
               std::min(weights.experts, e + expert_step), logits);
    });
    pool.ranges(x.tokens, 16, [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t)
            select_experts(logits + t * weights.experts, weights.selection_bias, weights.experts,
                           rule, ids + t * rule.selected, out + t * rule.selected);
    });
}

}  // namespace greenroom
