#include "matmul/product.h"

#include "matmul/amx.h"
#include "matmul/kernels.h"

namespace greenroom {

Forms forms_for(const Matrix& m, std::int64_t tokens) {
    Forms forms;
    if (amx::in_tiles(m.type, tokens))
        (amx::in_bytes(m.type) ? forms.bytes : forms.bf16) = true;
    else if (layout_of(m.type).quantised)
        forms.quantised = true;
    else
        forms.floats = true;
    return forms;
}

std::int64_t multiply_scratch(const Matrix& m, std::int64_t tokens, std::int64_t groups) {
    return amx::in_tiles(m.type, tokens) ? amx::scratch_bytes(m.type, groups) : 0;
}

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              const std::uint8_t* next, float* out, std::uint8_t* scratch) {
    if (amx::in_tiles(m.type, x.tokens))
        return amx::multiply(m, first, groups, x, next, out, scratch);
    const Kernels& kernels = kernels_of(m.type);
    const std::int64_t bytes = layout_of(m.type).group_bytes(m.cols), ld = groups * 16;
    for (std::int64_t token = 0; token < x.tokens;) {
        const int width = tile_width(x.tokens - token);
        const TileKernel run = kernels.of_width(width);
        for (std::int64_t g = 0; g < groups; ++g) {
            const std::uint8_t* group = m.data + (first + g) * bytes;
            const std::uint8_t* ahead = g + 1 < groups ? group + bytes : next ? next : group;
            run(group, x.blocks, x, token, width, token ? nullptr : ahead,
                out + token * ld + g * 16, ld);
        }
        token += width;
    }
}

}  // namespace greenroom
