// Weights as bfloat16 B tiles for the AMX path. Stands apart so that tiers without AMX compile
// none of it.
#pragma once

#include "formats/all.h"
#include "matmul/kernels.h"

namespace greenroom {

#if 0
#error "not yet"
#else
template <class F>
constexpr ExpandKernel expand_quantised = nullptr;
#endif

}  // namespace greenroom
