// The list of formats that can be written, and the loop over rows.
#include "quantise/quantise.h"

#include <stdexcept>
#include <string>

#include "quantise/supers.h"

namespace greenroom {
namespace {

using namespace blocks;

template <class... F>
struct List {};
using All = List<Centred32<2, 4>, Ranged32<3, 4>, Centred32<6, 5>, Ranged32<7, 5>, Q8_0, Q2_K, Q3_K,
                 Q45_K<4>, Q45_K<5>, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4>;

template <class Body, class... F>
void with(List<F...>, int type, Body body) {
    if (!((F::type == type && (body(F{}), true)) || ...))
        throw std::invalid_argument("type " + std::to_string(type) + " cannot be written here");
}

template <class... F>
std::vector<int> types(List<F...>) {
    return {F::type...};
}

}  // namespace

std::vector<int> quantisable_types() { return types(All{}); }

std::int64_t quantised_row_bytes(int type, std::int64_t cols) {
    std::int64_t bytes = 0;
    with(All{}, type, [&](auto format) {
        if (cols <= 0 || cols % format.cols)
            throw std::invalid_argument(std::to_string(cols) + " columns are no whole blocks of " +
                                        std::to_string(format.cols));
        bytes = cols / format.cols * format.bytes;
    });
    return bytes;
}

void quantise(Pool& pool, int type, std::int64_t rows, std::int64_t cols, const float* src,
              std::uint8_t* dst, const float* importance) {
    const std::int64_t row_bytes = quantised_row_bytes(type, cols);
    const std::vector<float> even(importance ? 0 : static_cast<std::size_t>(cols), 1.0f);
    const float* weights = importance ? importance : even.data();
    with(All{}, type, [&](auto format) {
        using Format = decltype(format);
        const auto body = [&](std::int64_t row, int) {
            for (std::int64_t at = 0; at < cols; at += Format::cols)
                Format::encode(src + row * cols + at, weights + at,
                               dst + row * row_bytes + at / Format::cols * Format::bytes);
        };
        pool.run(rows, body);
    });
}

}  // namespace greenroom
