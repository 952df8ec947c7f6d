// MXFP4 weights in AMX tiles of int8. A range of 512 columns has one scale per token and one per
// row: tokens are 16-bit integers in two planes of bytes, and a weight is an exact byte, as its
// block's power of two only shifts a code. Where a row's powers differ by more than bytes have room
// for, a pass over a range takes the largest and the three below it, and another one over what is
// left follows.
#pragma once

#include "matmul/activations.h"
#include "matmul/product.h"

namespace greenroom::amx {

std::int64_t int8_scratch_bytes(std::int64_t groups);
// As greenroom::multiply(), of activations as bytes.
void multiply_int8(const Matrix& m, std::int64_t first, std::int64_t groups, const Activations& x,
                   const std::uint8_t* next, float* out, std::uint8_t* scratch);

}  // namespace greenroom::amx
