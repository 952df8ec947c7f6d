// Sizes of packed matrices and the conversion from and to the blocks of a GGUF file.
// docs/slab-layout.md has the picture. Does not compute with weights.
#pragma once

#include <cstdint>
#include <vector>

#include "threads/pool.h"

namespace greenroom {

// One format's sizes. A group is 16 rows x all columns.
struct Layout {
    int type;          // ggml type number
    int raw_cols;      // columns per block of the file
    int raw_bytes;     // bytes of such a block
    int block_bytes;   // payload of 16 rows x 32 columns
    int record_bytes;  // scales of 16 rows x raw_cols columns
    bool quantised;    // false: 16- or 32-bit floats

    std::int64_t blocks(std::int64_t cols) const { return (cols + 31) / 32; }
    std::int64_t payload_bytes(std::int64_t cols) const { return blocks(cols) * block_bytes; }
    std::int64_t group_bytes(std::int64_t cols) const {
        const std::int64_t bytes = payload_bytes(cols) + cols / raw_cols * record_bytes;
        return (bytes + 63) / 64 * 64;
    }
    std::int64_t raw_row_bytes(std::int64_t cols) const { return cols / raw_cols * raw_bytes; }
};

inline std::int64_t groups_of(std::int64_t rows) { return (rows + 15) / 16; }

// Throws std::invalid_argument for a type without native kernels.
const Layout& layout_of(int type);
std::vector<int> native_types();

// Bytes of a packed matrix. Throws std::invalid_argument if the shape is not positive, cols is
// not whole blocks, or the size leaves 63 bits.
std::int64_t packed_bytes(int type, std::int64_t rows, std::int64_t cols);

// One matrix to pack. src: rows x raw_row_bytes as in the file; dst: packed_bytes.
struct Packing {
    int type;
    std::int64_t rows, cols;
    const std::uint8_t* src;
    std::uint8_t* dst;
};

// Packs matrices side by side.
void pack(Pool& pool, const std::vector<Packing>& matrices);

// out: (rows, cols) float32, equal to ggml's dequantisation bit by bit.
void unpack(int type, std::int64_t rows, std::int64_t cols, const std::uint8_t* packed, float* out);

}  // namespace greenroom
