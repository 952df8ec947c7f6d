// Dot products of R rows with C columns of equal length, R * C = kLanes of them at a time.
// Every product is summed in the same order whatever R and C are, so that a result does not
// depend on how the work was cut.
#pragma once

#include <cstdint>

#include "ops/vec.h"

namespace greenroom {

// out[r * out_stride + c] = rows[r] . columns[c]; rows are `row_stride` floats apart; length is
// a multiple of kLanes.
template <int R, class T>
inline void dot_block(const float* rows, std::int64_t row_stride, const T* const* columns,
                      std::int64_t length, float* out, std::int64_t out_stride) {
    constexpr int C = kLanes / R;
    Vec sums[R * C] = {};
    for (std::int64_t i = 0; i < length; i += kLanes) {
        Vec row[R];
        for (int r = 0; r < R; ++r) row[r] = load(rows + r * row_stride + i);
        for (int c = 0; c < C; ++c) {
            const Vec column = load(columns[c] + i);
            for (int r = 0; r < R; ++r) sums[r * C + c] = fma(row[r], column, sums[r * C + c]);
        }
    }
    const Vec folded = fold(sums);
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) out[r * out_stride + c] = folded[r * C + c];
}

// out[r * out_stride + c] for all rows and for columns [first, last) rounded outwards to
// multiples of kLanes; columns has that many entries, all of them readable.
template <class T>
inline void dot_rows(const float* rows, std::int64_t row_count, std::int64_t row_stride,
                     const T* const* columns, std::int64_t first, std::int64_t last,
                     std::int64_t length, float* out, std::int64_t out_stride) {
    std::int64_t r = 0;
    const auto some = [&]<int R>() {
        constexpr int C = kLanes / R;
        for (; r + R <= row_count; r += R)
            for (std::int64_t c = first / C * C; c < last; c += C)
                dot_block<R>(rows + r * row_stride, row_stride, columns + c, length,
                             out + r * out_stride + c, out_stride);
    };
    some.template operator()<4>();
    some.template operator()<2>();
    some.template operator()<1>();
}

}  // namespace greenroom
