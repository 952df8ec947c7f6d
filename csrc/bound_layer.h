// A layer of experts as Python holds it: the native layer and the arrays it points into.
#pragma once

#include <nanobind/nanobind.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arrays.h"
#include "moe/moe.h"

namespace greenroom {

using Bias = std::optional<Array<const float, 1>>;
// One matrix of an expert: (type, packed, bias, scale).
using MatrixArgs = std::tuple<int, Bytes, Bias, float>;

// A layer that keeps its experts' arrays alive.
struct BoundLayer {
    MoeLayer layer;
    std::vector<std::vector<MatrixArgs>> arrays;

    BoundLayer(std::int64_t experts, std::int64_t d, std::int64_t f,
               const std::string& activation) {
        constexpr std::int64_t limit = std::int64_t{1} << 20;
        if (experts < 1 || experts > limit || d < 1 || d > limit || f < 1 || f > limit)
            throw std::invalid_argument("experts, d and f must lie between 1 and 2^20");
        if (activation != "silu" && activation != "gpt-oss")
            throw std::invalid_argument("activation is '" + activation + "'; known: silu, gpt-oss");
        layer.d = d;
        layer.f = f;
        layer.activation = activation == "silu" ? Activation::silu : Activation::gpt_oss;
        layer.experts.resize(static_cast<std::size_t>(experts));
        arrays.resize(layer.experts.size());
    }

    std::size_t index(std::int64_t expert) const {
        if (expert < 0 || expert >= static_cast<std::int64_t>(arrays.size()))
            throw std::invalid_argument("there is no expert " + std::to_string(expert));
        return static_cast<std::size_t>(expert);
    }
};

}  // namespace greenroom
