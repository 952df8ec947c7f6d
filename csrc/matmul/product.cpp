#include "matmul/product.h"

#include "matmul/amx.h"
#include "matmul/kernels.h"

namespace greenroom {

Forms forms_for(const Matrix& m, std::int64_t tokens) {
    Forms forms;
    if (amx::in_bf16_tiles(m.type, tokens))
        forms.high = forms.low = true;
    else if (layout_of(m.type).quantised)
        forms.quantised = true;
    else
        forms.floats = true;
    return forms;
}

std::int64_t multiply_scratch(const Matrix& m, std::int64_t tokens, std::int64_t groups) {
    return amx::in_int8_tiles(m.type, tokens) ? amx::int8_scratch(m, groups) : 0;
}

void multiply(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
              float* out, std::uint8_t* scratch) {
    if (amx::in_bf16_tiles(m.type, x.tokens)) return amx::multiply_bf16(m, first, groups, x, out);
    const Kernels& kernels = kernels_of(m.type);
    const std::int64_t bytes = layout_of(m.type).group_bytes(m.cols), ld = groups * 16;
    std::int64_t token = amx::in_int8_tiles(m.type, x.tokens);
    if (token) amx::multiply_int8(m, first, groups, x, token, out, scratch);
    while (token < x.tokens) {
        const int width = tile_width(x.tokens - token);
        const TileKernel run = width == 1 ? kernels.one : width == 4 ? kernels.four : kernels.wide;
        for (std::int64_t g = 0; g < groups; ++g)
            run(m.data + (first + g) * bytes, x.blocks, x, token, out + token * ld + g * 16, ld);
        token += width;
    }
}

}  // namespace greenroom
