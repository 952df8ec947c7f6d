// The AMX paths for many tokens. Quantised weights are expanded to int8 tiles (expand.h) and give
// the bits of the other path. Weights that are bfloat16 are used as they lie, with activations in
// two bfloat16 parts, 16 bits of each: the one case where a token's last bits depend on whether
// its batch is large.
#pragma once

#include <atomic>

#include "matmul/product.h"

namespace greenroom::amx {

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// On without condition in the amx tier; in the avx512 tier tests switch the emulation on.
extern bool enabled;
extern std::atomic<std::int64_t> int8_calls;  // of multiply_int8, counted for tests

// Whether so many tokens meet bfloat16 weights in tiles.
bool in_bf16_tiles(int type, std::int64_t tokens);
void multiply_bf16(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   float* out);

// The first tokens, in whole tiles of 16, that quantised weights take in int8 tiles.
std::int64_t in_int8_tiles(int type, std::int64_t tokens);
std::int64_t int8_scratch(const Matrix& m, std::int64_t groups);
void multiply_int8(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   std::int64_t tokens, float* out, std::uint8_t* scratch);

#else

inline bool in_bf16_tiles(int, std::int64_t) { return false; }
inline void multiply_bf16(const Matrix&, std::int64_t, std::int64_t, const Activations&, float*) {}
inline std::int64_t in_int8_tiles(int, std::int64_t) { return 0; }
inline std::int64_t int8_scratch(const Matrix&, std::int64_t) { return 0; }
inline void multiply_int8(const Matrix&, std::int64_t, std::int64_t, const Activations&,
                          std::int64_t, float*, std::uint8_t*) {}

#endif

}  // namespace greenroom::amx
