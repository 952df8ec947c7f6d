// The AMX path: for many tokens, weights are expanded once to bfloat16 B tiles and multiplied
// with bfloat16 activations. Weights that are bfloat16 themselves are used as they lie, with
// activations in two parts so that little of float32 is lost. Results differ from the other
// path's by bfloat16 rounding, so a token's result depends on whether its batch is large.
#pragma once

#include "matmul/product.h"

namespace greenroom::amx {

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// On without condition in the amx tier; in the avx512 tier tests switch the emulation on.
extern bool enabled;

bool usable(int type, std::int64_t tokens);
bool wants_low(int type);
std::int64_t scratch_bytes(const Matrix& m, std::int64_t groups);
void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              float* out, std::uint8_t* scratch);

#else

inline bool usable(int, std::int64_t) { return false; }
inline bool wants_low(int) { return false; }
inline std::int64_t scratch_bytes(const Matrix&, std::int64_t) { return 0; }
inline void multiply(const Matrix&, std::int64_t, std::int64_t, const Activations&, float*,
                     std::uint8_t*) {}

#endif

}  // namespace greenroom::amx
