// A packed matrix times activations, for some of its row groups: what linear layers and experts
// share. Chooses the kernel by tokens: tiles of some width, or AMX. Knows nothing of threads.
#pragma once

#include <cstdint>

#include "matmul/activations.h"

namespace greenroom {

// A packed matrix (formats/layout.h); the memory belongs to someone else. Results are multiplied
// by `scale` (NVFP4 has one per tensor).
struct Matrix {
    int type = 0;
    std::int64_t rows = 0, cols = 0;
    const std::uint8_t* data = nullptr;
    float scale = 1.0f;

    std::int64_t groups() const { return groups_of(rows); }
    const std::uint8_t* group(std::int64_t i) const {
        return data + i * layout_of(type).group_bytes(cols);
    }
};

// The forms multiply() will read for this many tokens.
Forms forms_for(const Matrix& m, std::int64_t tokens);

// Bytes of scratch memory one thread needs for multiply() on `groups` groups.
std::int64_t multiply_scratch(const Matrix& m, std::int64_t tokens, std::int64_t groups);

// out[t * 16 * groups + row] for all tokens of x and the rows of groups [first, first + groups);
// padding tokens may be written too: out has room for padded_tokens or padded_rows, whichever is
// larger. Not scaled by m.scale. next: the group the thread will read after these, of this matrix
// or another, or null: a start from cold memory costs a few percent of a chunk.
void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch);

// Floats `out` of multiply() must have room for.
inline std::int64_t product_floats(std::int64_t tokens, std::int64_t groups) {
    const std::int64_t padded = padded_tokens(tokens), rows = padded_rows(tokens);
    return (padded > rows ? padded : rows) * groups * 16;
}

}  // namespace greenroom
