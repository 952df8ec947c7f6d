// The AMX path for many tokens: weights are expanded to bfloat16 (expand.h), 128 or 256 columns
// at a time, and multiplied with activations in two bfloat16 parts, 16 bits of each, summed in
// float32. MXFP4, whose weights fit bytes, goes through int8 instead (amx_int8.h): half the
// products. From how many tokens on is the one thing a token's result depends on in its batch.
#pragma once

#include "matmul/product.h"

namespace greenroom::amx {

// Where bytes of a token go: 64 high parts, the low ones `low` bytes further, the next 64 columns
// `next` further.
struct Planes {
    std::uint8_t* high;
    std::int64_t low, next;
};

#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)

// On without condition in the amx tier; in the avx512 tier tests switch the emulation on.
extern bool enabled;

// Whether so many tokens meet weights of this type in tiles.
bool in_tiles(int type, std::int64_t tokens);
// Whether they do so as bytes.
bool in_bytes(int type);
// 32 columns of a token as bfloat16 and what that leaves over, also as bfloat16: 64 bytes each.
void split(const float* x, std::uint8_t* high, std::uint8_t* low);
// A range of a token as bytes, filled up with zeros to whole tiles; returns its scale. cols: a
// multiple of 32.
float quantise(const float* x, std::int64_t cols, const Planes& to);
// Bytes of scratch memory.
std::int64_t scratch_bytes(int type, std::int64_t groups);
// As greenroom::multiply().
void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch);

#else

inline bool in_tiles(int, std::int64_t) { return false; }
inline bool in_bytes(int) { return false; }
inline void split(const float*, std::uint8_t*, std::uint8_t*) {}
inline float quantise(const float*, std::int64_t, const Planes&) { return 0.0f; }
inline std::int64_t scratch_bytes(int, std::int64_t) { return 0; }
inline void multiply(const Matrix&, std::int64_t, std::int64_t, const Activations&,
                     const std::uint8_t*, float*, std::uint8_t*) {}

#endif

}  // namespace greenroom::amx
