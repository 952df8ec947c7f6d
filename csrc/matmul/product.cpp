#include "matmul/product.h"

#include "matmul/amx.h"
#include "matmul/kernels.h"

namespace greenroom {

Forms forms_for(const Matrix& m, std::int64_t tokens) {
    Forms forms;
    if (amx::usable(m.type, tokens)) {
        forms.high = true;
        forms.low = amx::wants_low(m.type);
    } else if (layout_of(m.type).quantised) {
        forms.quantised = true;
    } else {
        forms.floats = true;
    }
    return forms;
}

std::int64_t multiply_scratch(const Matrix& m, std::int64_t tokens, std::int64_t groups) {
    return amx::usable(m.type, tokens) ? amx::scratch_bytes(m, groups) : 0;
}

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              float* out, std::uint8_t* scratch) {
    if (amx::usable(m.type, x.tokens)) return amx::multiply(m, first, groups, x, out, scratch);
    const Kernels& kernels = kernels_of(m.type);
    const std::int64_t bytes = layout_of(m.type).group_bytes(m.cols), ld = groups * 16;
    for (std::int64_t token = 0; token < x.tokens;) {
        const int width = tile_width(x.tokens - token);
        const TileKernel run = width == 1 ? kernels.one : width == 4 ? kernels.four : kernels.wide;
        for (std::int64_t g = 0; g < groups; ++g)
            run(m.data + (first + g) * bytes, x.blocks, x, token, out + token * ld + g * 16, ld);
        token += width;
    }
}

}  // namespace greenroom
