// Linear layers: out = x W^T * scale + bias, one or several matrices with the same x in one
// parallel region. Checks nothing; bind_matmul.cpp does.
#pragma once

#include <span>

#include "matmul/product.h"
#include "threads/pool.h"

namespace greenroom {

struct Linear {
    Matrix weight;
    const float* bias = nullptr;  // (rows) or null
    float* out = nullptr;         // (tokens, rows)
};

// x: (tokens, cols) float32. All weights have the same cols.
void linears(Pool& pool, std::span<const Linear> layers, const float* x, std::int64_t tokens);

// Stores float32 rows (tokens, cols) in the given forms; rows[t] points to token t.
void fill(Pool& pool, const Activations& to, const float* x);

}  // namespace greenroom
