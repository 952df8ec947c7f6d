// How unsigned codes of 2 to 8 bits lie in packed lines: for 32 columns x 16 rows a few 64-byte
// lines, each holding one 32-bit word per row (docs/slab-layout.md). put/get are the scalar
// truth used at load time, decode is what the kernels run. Knows nothing of scales.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <utility>

#include "simd/simd.h"

namespace greenroom::formats {

constexpr int line_bytes = 64, group_rows = 16, block_cols = 32;

inline std::uint32_t word_at(const std::uint8_t* p) {
    std::uint32_t w;
    std::memcpy(&w, p, 4);
    return w;
}

// 32 codes of a row, four to a word. Codes stay words from the file to the lines: written as bytes
// and read again as words packing MXFP4 takes eight times as long.
using Quads = std::array<std::uint32_t, block_cols / 4>;

// One plane of Bits bits per column, taken from bit Low of the code. A word has room for
// 8 / Bits column quads; field j of byte b belongs to column 4j + b of that line's columns.
template <int Bits, int Low>
struct Plane {
    static constexpr int lines = Bits, quads = 8 / Bits;
    static constexpr std::uint32_t mask = ((1u << Bits) - 1u) * 0x01010101u;

    // dst: the row's word in the plane's first line.
    static void put(const Quads& codes, std::uint8_t* dst) {
        for (int line = 0; line < lines; ++line) {
            std::uint32_t w = 0;
            for (int j = 0; j < quads; ++j)
                w |= ((codes[line * quads + j] >> Low) & mask) << (Bits * j);
            std::memcpy(dst + line * line_bytes, &w, 4);
        }
    }
    static void get(const std::uint8_t* src, std::uint8_t* codes) {
        for (int line = 0; line < lines; ++line) {
            const std::uint32_t w = word_at(src + line * line_bytes);
            for (int j = 0; j < quads; ++j) {
                std::uint8_t* quad = codes + 4 * (line * quads + j);
                const std::uint32_t sum = word_at(quad) | (((w >> (Bits * j)) & mask) << Low);
                std::memcpy(quad, &sum, 4);
            }
        }
    }
    template <int J>
    static simd::Codes quad(const std::uint8_t* lines_of_block) {
        const auto line = simd::load_line(lines_of_block + J / quads * line_bytes);
        return simd::shift<Low - Bits*(J % quads)>(line) &
               simd::splat_byte(((1 << Bits) - 1) << Low);
    }
};

// Codes of 8 bits: a word holds 4 columns as they are.
template <>
struct Plane<8, 0> {
    static constexpr int lines = 8;
    static void put(const Quads& codes, std::uint8_t* dst) {
        for (int j = 0; j < 8; ++j) std::memcpy(dst + j * line_bytes, &codes[j], 4);
    }
    static void get(const std::uint8_t* src, std::uint8_t* codes) {
        for (int j = 0; j < 8; ++j) std::memcpy(codes + 4 * j, src + j * line_bytes, 4);
    }
    template <int J>
    static simd::Codes quad(const std::uint8_t* lines_of_block) {
        return simd::load_line(lines_of_block + J * line_bytes);
    }
};

// The planes of one format, low bits first, and the loops over them.
template <class... Planes>
struct Payload {
    static constexpr int lines = (Planes::lines + ...);

    static void put(const Quads& codes, std::uint8_t* dst) {
        ((Planes::put(codes, dst), dst += Planes::lines * line_bytes), ...);
    }
    static void get(const std::uint8_t* src, std::uint8_t* codes) {
        std::memset(codes, 0, block_cols);
        ((Planes::get(src, codes), src += Planes::lines * line_bytes), ...);
    }
    // All 32 columns: out[j] holds columns 4j .. 4j + 3 of the 16 rows.
    static void decode(const std::uint8_t* src, simd::Codes* out) {
        decode_quads(src, out, std::make_integer_sequence<int, 8>{});
    }

  private:
    template <int... J>
    static void decode_quads(const std::uint8_t* src, simd::Codes* out,
                             std::integer_sequence<int, J...>) {
        ((out[J] = quad<J, Planes...>(src)), ...);
    }
    template <int J, class First, class... Rest>
    static simd::Codes quad(const std::uint8_t* src) {
        const auto low = First::template quad<J>(src);
        if constexpr (sizeof...(Rest) == 0)
            return low;
        else
            return low | quad<J, Rest...>(src + First::lines * line_bytes);
    }
};

using Bits2 = Payload<Plane<2, 0>>;
using Bits3 = Payload<Plane<2, 0>, Plane<1, 2>>;
using Bits4 = Payload<Plane<4, 0>>;
using Bits5 = Payload<Plane<4, 0>, Plane<1, 4>>;
using Bits6 = Payload<Plane<4, 0>, Plane<2, 4>>;
using Bits8 = Payload<Plane<8, 0>>;

}  // namespace greenroom::formats
