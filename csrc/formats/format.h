// What every integer block format tells the kernels: a struct of constants and static functions.
//
//   type                 ggml type number
//   raw_cols, raw_bytes  one block as it is in the file
//   Payload              the planes of its codes (planes.h)
//   record_bytes         bytes of the scale plane for 16 rows x raw_cols columns
//   max_code, zero       largest code after the table; x = scale * (code - 2^zero) - min, zero < 0:
//   none parts                scales per 32 columns, 1 or 2 has_min              whether min is not
//   always 0 codes(raw, b, out)   load time: the stored codes of columns 32b .. 32b + 31 of a raw
//   block scales(raw, record, row)           load time: writes row's share of the record
//   affine(record, row, part)          scalar twin: scale and min of 32/parts columns; part counts
//                                      through the whole record
//   factors(record, b, scale, min)     run time: the same for 16 rows, parts entries each
//   table()              (formats of 4-bit indices) 16 bytes: index -> code
//
// Products are rounded in the order ggml rounds them, so unpacking is bit-exact.
#pragma once

#include "formats/half.h"
#include "formats/planes.h"
#include "simd/simd.h"

namespace greenroom::formats {

struct Affine {
    float scale, min;
};

template <class F>
concept HasTable = requires { F::table(); };

// Bytes to 4-bit codes as most ggml blocks store them: byte i holds element i in its low half
// and element i + n in its high half.
inline void split_nibbles(const std::uint8_t* bytes, int n, std::uint32_t* out) {
    for (int i = 0; i < n / 4; ++i) {
        const std::uint32_t word = word_at(bytes + 4 * i);
        out[i] = word & 0x0f0f0f0fu;
        out[n / 4 + i] = (word >> 4) & 0x0f0f0f0fu;
    }
}

inline void put_u16(std::uint8_t* plane, int row, const std::uint8_t* raw) {
    std::memcpy(plane + 2 * row, raw, 2);
}

template <class F>
void decode(const std::uint8_t* lines, simd::Codes* out) {
    F::Payload::decode(lines, out);
    if constexpr (HasTable<F>) {
        const auto table = simd::load_table(F::table());
        for (int j = 0; j < 8; ++j) out[j] = simd::lookup(table, out[j]);
    }
}

}  // namespace greenroom::formats
