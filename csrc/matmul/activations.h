// The right-hand side of a product: float32 rows (tokens), stored once in the forms the weights
// ask for and cut into tiles of at most simd::wide_tile tokens that one kernel call handles.
//   quantised  16-bit integers with one scale per 32 columns (XBlock), [tile][block][token]
//   floats     float32, [tile][column][token]
//   bf16       bfloat16 and the bfloat16 of what it leaves over, AMX's tiles of 16 tokens x 32
//              columns: [tile][block][high, low][token][column]
//   bytes      16-bit integers with one scale per 512 columns in two planes of int8, AMX's tiles of
//              16 tokens x 64 columns, the last filled up: [tile][64 columns][high, low][token]
//              [column]; scales: [tile][512 columns][token]
// Knows nothing of weights; does not own its memory (see Arena).
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>

#include "formats/layout.h"
#include "simd/simd.h"

namespace greenroom {

// 32 quantised values of one token and everything a kernel may need of them: two cache lines.
// x ~ scale * q, q = 256 high + low: two planes of bytes, so that byte dot products serve. One
// plane alone (8 bits) moved a model's logits visibly (docs/slab-layout.md). In tiles of several
// tokens simd::planes_to_words has put them together again where words serve better (AVX2).
// The sums serve zero points (exact integers) and minima (already scaled).
struct alignas(64) XBlock {
    std::int8_t high[32], low[32];  // each from -127 to 127
    float scale;
    std::int32_t neg_sum;          // -sum(q)
    std::int32_t neg_part_sum[2];  // the same over columns 0-15 and 16-31
    float sum;                     // scale * sum(q)
    float part_sum[2];
};
static_assert(sizeof(XBlock) == simd::token_bytes && offsetof(XBlock, low) == simd::plane_bytes);

// The largest of a token's 16-bit integers.
constexpr float largest_code = 127 * 256;

// Which forms are wanted.
struct Forms {
    bool quantised = false, floats = false, bf16 = false, bytes = false;
    Forms operator|(Forms o) const {
        return {quantised || o.quantised, floats || o.floats, bf16 || o.bf16, bytes || o.bytes};
    }
};

// Tokens of the next tile when `remaining` are left: any number where the tier has tiles of every
// width, else one of simd::tile_widths. A tile may be wider than what is left; its last tokens are
// then zeros.
inline int tile_width(std::int64_t remaining) {
    if (simd::any_width)
        return static_cast<int>(std::min<std::int64_t>(simd::wide_tile, remaining));
    int width = 1;
    for (std::size_t i = 0; i < std::size(simd::tile_widths); ++i)
        if (remaining >= simd::tile_least[i]) width = simd::tile_widths[i];
    return width;
}

// Tokens rounded up to whole tiles.
inline std::int64_t padded_tokens(std::int64_t tokens) {
    std::int64_t padded = 0;
    while (padded < tokens) padded += tile_width(tokens - padded);
    return padded;
}

// Where a token (a padding one, too) lies: its tile's first token and width, its place in that.
struct Place {
    std::int64_t first;
    int width, i;
};
inline Place place_of(std::int64_t token, std::int64_t tokens) {
    std::int64_t first = token / simd::wide_tile * simd::wide_tile;
    int width = tile_width(tokens - first);
    for (; first + width <= token; width = tile_width(tokens - first)) first += width;
    return {first, width, static_cast<int>(token - first)};
}

// One AMX tile.
constexpr std::int64_t tile_bytes = 1024;
// Columns that share a token's scale where tokens are bytes.
constexpr std::int64_t range_cols = 512, range_blocks = range_cols / 32;
inline std::int64_t ranges_of(std::int64_t blocks) {
    return (blocks + range_blocks - 1) / range_blocks;
}
// And their tiles.
inline std::int64_t byte_tiles_of(std::int64_t blocks) { return (blocks + 1) / 2; }
// Tokens rounded up to whole AMX tiles.
inline std::int64_t padded_rows(std::int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Hands out 64-byte aligned pieces of one growing buffer. The first pass over a set of take()
// calls with no memory only counts.
class Arena {
  public:
    explicit Arena(std::uint8_t* base) : base_(base) {}
    template <class T>
    T* take(std::int64_t count) {
        T* p = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
        used_ += (count * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
        return p;
    }
    std::int64_t used() const { return used_; }

  private:
    std::uint8_t* base_;
    std::int64_t used_ = 0;
};

// At least `bytes` of memory that stays with the calling thread (grown, never shrunk), so that a
// step does not pay for fresh pages. `slot` tells independent users apart.
std::uint8_t* scratch(int slot, std::int64_t bytes);

struct Rows;

struct Activations {
    std::int64_t tokens = 0, cols = 0, blocks = 0;
    XBlock* quantised = nullptr;
    float* floats = nullptr;
    std::uint8_t *bf16 = nullptr, *bytes = nullptr;
    float* scales = nullptr;  // of bytes

    static Activations take(Arena& arena, Forms forms, std::int64_t tokens, std::int64_t cols);

    // Start of the tile whose first token is `first`.
    const XBlock* quantised_tile(std::int64_t first) const { return quantised + first * blocks; }
    const float* float_tile(std::int64_t first) const { return floats + first * blocks * 32; }
    std::uint8_t* bf16_tile(std::int64_t first) const {
        return bf16 + first / 16 * blocks * 2 * tile_bytes;
    }
    // 32 high parts of a token; the low ones are a tile further.
    std::uint8_t* bf16_row(std::int64_t token, std::int64_t block) const {
        return bf16_tile(token) + block * 2 * tile_bytes + token % 16 * 64;
    }

    std::uint8_t* byte_tile(std::int64_t first) const {
        return bytes + first / 16 * byte_tiles_of(blocks) * 2 * tile_bytes;
    }
    // 64 high parts of a token; the low ones are a tile further.
    std::uint8_t* byte_row(std::int64_t token, std::int64_t col) const {
        return byte_tile(token) + col / 64 * 2 * tile_bytes + token % 16 * 64;
    }
    // Of the 16 tokens of a tile.
    float* range_scales(std::int64_t first, std::int64_t range) const {
        return scales + first / 16 * 16 * ranges_of(blocks) + range * 16;
    }

    // Stores 32 columns of a token in every form there is but bytes.
    void put(const Place& place, std::int64_t block, const float* x) const;
    // Stores 512 columns, or what there is of them, of a token as bytes; x: the whole token.
    void put_range(std::int64_t token, std::int64_t range, const float* x) const;
    // Stores a whole token; x: cols floats, or null for zeros.
    void put_token(std::int64_t token, const float* x) const;
    // Stores all tokens, cut before: token t is row numbers[t] of `from`.
    void gather(const Rows& from, const std::int64_t* numbers) const;

  private:
    void gather_rows(const Rows& from, std::int64_t number, std::int64_t token) const;
    void gather_tile(const Rows& from, const std::int64_t* numbers, std::int64_t first,
                     int width) const;
};

// Tokens cut once, each by itself, for all the tiles that want copies of them: a token meets
// several experts. [token][block] in every form; one more row, behind the others, is zeros.
struct Rows {
    std::int64_t tokens = 0, cols = 0, blocks = 0;
    XBlock* quantised = nullptr;
    float* floats = nullptr;
    std::uint8_t *bf16 = nullptr, *bytes = nullptr;
    float* scales = nullptr;                         // [token][512 columns]
    static constexpr std::int64_t bf16_bytes = 128;  // of a block: 32 high parts, 32 low parts
    static constexpr std::int64_t byte_bytes = 128;  // of 64 columns: high parts, low parts

    static Rows take(Arena& arena, Forms forms, std::int64_t tokens, std::int64_t cols);

    // Stores a token; x: cols floats, or null for zeros.
    void put(std::int64_t token, const float* x) const;
    // A token where it lies, which is how a tile of one lies. Not for AMX's forms.
    Activations tile_of_one(std::int64_t token) const;
};

}  // namespace greenroom
