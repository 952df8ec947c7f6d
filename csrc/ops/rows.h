// The operations on rows of activations: norms, rotary embedding, writing keys and values.
// Pointers and sizes are checked by the caller (bind_ops.cpp); strides count elements.
#pragma once

#include <cstdint>

#include "ops/vec.h"
#include "threads/pool.h"

namespace greenroom {

// Rows of `width` contiguous elements, arranged as (tokens, heads).
template <class T>
struct Rows {
    T* data = nullptr;
    std::int64_t tokens = 0, heads = 1, width = 0;
    std::int64_t token_stride = 0, head_stride = 0;

    T* at(std::int64_t token, std::int64_t head) const {
        return data + token * token_stride + head * head_stride;
    }
};

struct NormWeights {
    const float* weight;  // (width)
    const float* bias;    // (width) or null
    float epsilon;
    bool center;  // layer norm: subtract the mean
};

// out = norm(x); with a residual: x += residual first. x and out may be the same rows.
void norm(Pool& pool, const Rows<float>& x, const Rows<const float>* residual,
          const NormWeights& weights, const Rows<float>& out);

// Cosines and sines of positions * frequencies, times the magnitude: table (tokens, 2, pairs).
void rope_table(Pool& pool, const std::int64_t* positions, std::int64_t tokens,
                const float* frequencies, std::int64_t pairs, float magnitude, float* table);

// Rotates the first 2 * pairs elements of each row by the token's angles. `halves`: element i
// pairs with i + pairs (NEOX); otherwise 2i with 2i + 1 (NORM).
void rope(Pool& pool, const Rows<float>& x, const float* table, std::int64_t pairs, bool halves);

// One of a layer's two caches: (blocks, heads, block_size, width), float or Half.
struct CacheView {
    void* data = nullptr;
    bool half = false;
    std::int64_t blocks = 0, heads = 0, block_size = 0, width = 0;
};

// Stores each token's rows at its slot: block slot / block_size, offset slot % block_size.
void write_cache(Pool& pool, const Rows<const float>& rows, const std::int64_t* slots,
                 const CacheView& cache);

}  // namespace greenroom
