// Causal attention over a paged cache for a batch of sequences, some of them prefilling, some
// decoding. Knows where keys and values lie; not where they came from.
//
// The result for a token is a function of its query and of the keys and values it may see, bit
// for bit: not of the other tokens of the step, of the threads, or of how the prompt was cut
// into chunks. Keys are visited in tiles at fixed positions; tiles make up spans at fixed
// positions, each with a softmax of its own; spans are merged in order.
#pragma once

#include <cstdint>

#include "ops/rows.h"
#include "threads/pool.h"

namespace greenroom {

// Query i of sequence s is row query_starts[s] + i and has position
// contexts[s] - (queries of s) + i. Block tables may hold anything where no query looks.
struct AttentionBatch {
    std::int64_t sequences = 0;
    const std::int32_t* block_tables = nullptr;  // (sequences, table_width)
    std::int64_t table_width = 0;
    const std::int32_t* query_starts = nullptr;  // (sequences + 1)
    const std::int32_t* contexts = nullptr;      // (sequences) positions in the cache
};

struct AttentionRule {
    float scale = 1.0f;
    std::int64_t window = 0;       // key j is visible to query i if i - j < window; 0: no limit
    const float* sinks = nullptr;  // (heads) logits that join each head's softmax, or null
};

// q (tokens, heads, key width); out (tokens, heads, value width) without gaps.
// Throws std::invalid_argument if a block that a query needs is not in the cache.
void attention(Pool& pool, const Rows<const float>& q, const CacheView& keys,
               const CacheView& values, const AttentionBatch& batch, const AttentionRule& rule,
               float* out);

}  // namespace greenroom
