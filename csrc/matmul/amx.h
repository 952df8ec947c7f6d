// The AMX path: weights expanded to bfloat16 tiles, many tokens at once. On other tiers usable()
// is constant false and nothing of it is compiled.
#pragma once

#include "matmul/product.h"

namespace greenroom::amx {

inline bool usable(int, std::int64_t) { return false; }
inline bool wants_low(int) { return false; }
inline std::int64_t scratch_bytes(const Matrix&, std::int64_t) { return 0; }
inline void multiply(const Matrix&, std::int64_t, std::int64_t, const Activations&, float*,
                     std::uint8_t*) {}

}  // namespace greenroom::amx
