#include "matmul/linear.h"

#include <algorithm>
#include <vector>

namespace greenroom {
namespace {

// Groups computed together: the tile of tokens in L1 or L2 is used for each of them.
constexpr std::int64_t groups_at_once = 4;
// Tokens per pass over the weights, at most: their activations stay in L2 and the buffers stay
// small.
constexpr std::int64_t tokens_at_once = 128;
// Below this many bytes of weights a task is not worth handing to another thread.
constexpr std::int64_t task_bytes = 64 << 10;

enum Slot { activations_slot, product_slot };

// How the rows of all layers are cut into tasks.
struct Plan {
    struct Part {
        std::int64_t first_task, groups_per_task;
    };
    std::vector<Part> parts;
    std::int64_t tasks = 0;

    Plan(std::span<const Linear> layers, std::int64_t tokens, int threads) {
        for (const Linear& layer : layers) {
            const std::int64_t groups = layer.weight.groups();
            const std::int64_t bytes = layout_of(layer.weight.type).group_bytes(layer.weight.cols);
            const std::int64_t least = std::max<std::int64_t>(1, task_bytes / (bytes * tokens));
            const std::int64_t share = groups / (threads * 8);
            const std::int64_t each = std::clamp<std::int64_t>(std::max(least, share), 1,
                                                               std::max<std::int64_t>(groups, 1));
            parts.push_back({tasks, each});
            tasks += (groups + each - 1) / each;
        }
    }
};

void finish(const Linear& layer, std::int64_t first_group, std::int64_t groups,
            std::int64_t first_token, std::int64_t tokens, const float* product) {
    const std::int64_t row = first_group * 16, ld = groups * 16;
    const std::int64_t count = std::min(ld, layer.weight.rows - row);
    for (std::int64_t t = 0; t < tokens; ++t) {
        const float* from = product + t * ld;
        float* to = layer.out + (first_token + t) * layer.weight.rows + row;
        for (std::int64_t i = 0; i < count; ++i)
            to[i] = from[i] * layer.weight.scale + (layer.bias ? layer.bias[row + i] : 0.0f);
    }
}

// One pass: all layers for one range of tokens.
class Pass {
  public:
    Pass(Pool& pool, std::span<const Linear> layers, std::int64_t first, std::int64_t tokens)
        : pool_(pool), layers_(layers), first_(first), plan_(layers, tokens, pool.size()) {
        Forms forms;
        for (const Linear& layer : layers) {
            forms = forms | forms_for(layer.weight, tokens);
            scratch_ = std::max(scratch_, multiply_scratch(layer.weight, tokens, groups_at_once));
        }
        const std::int64_t cols = layers[0].weight.cols;
        Arena count(nullptr);
        Activations::take(count, forms, tokens, cols);
        Arena arena(greenroom::scratch(activations_slot, count.used()));
        x_ = Activations::take(arena, forms, tokens, cols);
        product_bytes_ = product_floats(tokens, groups_at_once) * 4;
        buffers_ = greenroom::scratch(product_slot, (product_bytes_ + scratch_) * pool.size());
    }

    void run(const float* x) {
        fill(pool_, x_, x);
        pool_.run(plan_.tasks, [&](std::int64_t task, int thread) { work(task, thread); });
    }

  private:
    void work(std::int64_t task, int thread) {
        std::size_t i = layers_.size() - 1;
        while (plan_.parts[i].first_task > task) --i;
        const Linear& layer = layers_[i];
        const std::int64_t each = plan_.parts[i].groups_per_task;
        const std::int64_t begin = (task - plan_.parts[i].first_task) * each;
        const std::int64_t end = std::min(begin + each, layer.weight.groups());
        std::uint8_t* buffer = buffers_ + thread * (product_bytes_ + scratch_);
        auto* product = reinterpret_cast<float*>(buffer);
        for (std::int64_t g = begin; g < end; g += groups_at_once) {
            const std::int64_t groups = std::min(groups_at_once, end - g);
            const std::uint8_t* next = g + groups < end ? layer.weight.group(g + groups) : nullptr;
            multiply(layer.weight, g, groups, x_, next, product, buffer + product_bytes_);
            finish(layer, g, groups, first_, x_.tokens, product);
        }
    }

    Pool& pool_;
    std::span<const Linear> layers_;
    std::int64_t first_;
    Plan plan_;
    Activations x_;
    std::int64_t scratch_ = 0, product_bytes_ = 0;
    std::uint8_t* buffers_ = nullptr;
};

}  // namespace

void fill(Pool& pool, const Activations& to, const float* x) {
    constexpr std::int64_t step = 16;
    const std::int64_t padded = padded_tokens(to.tokens);
    const auto some = [&](std::int64_t i, int) {
        for (std::int64_t t = i * step; t < std::min((i + 1) * step, padded); ++t)
            to.put_token(t, t < to.tokens ? x + t * to.cols : nullptr);
    };
    if (padded <= step)
        some(0, 0);  // one region less; a token takes about a microsecond
    else
        pool.run((padded + step - 1) / step, some);
}

void linears(Pool& pool, std::span<const Linear> layers, const float* x, std::int64_t tokens) {
    if (layers.empty()) return;
    // Equal passes: none is left with so few tokens that it would be computed without AMX.
    const std::int64_t passes = (tokens + tokens_at_once - 1) / tokens_at_once;
    for (std::int64_t i = 0; i < passes; ++i) {
        const std::int64_t begin = tokens * i / passes, end = tokens * (i + 1) / passes;
        Pass pass(pool, layers, begin, end - begin);
        pass.run(x + begin * layers[0].weight.cols);
    }
}

}  // namespace greenroom
