// Float rows to the block formats of GGUF files, on all threads of a pool.
#pragma once

#include <cstdint>
#include <vector>

#include "threads/pool.h"

namespace greenroom {

// Type numbers that can be written here.
std::vector<int> quantisable_types();

// Bytes of a row of `cols`; std::invalid_argument if the type is not one of them or rows are not
// whole blocks.
std::int64_t quantised_row_bytes(int type, std::int64_t cols);

// src: rows x cols floats, finite; dst: rows x quantised_row_bytes; importance: weight of each
// column's squared error, at least 0, or null.
void quantise(Pool& pool, int type, std::int64_t rows, std::int64_t cols, const float* src,
              std::uint8_t* dst, const float* importance);

}  // namespace greenroom
