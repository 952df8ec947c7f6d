#include "formats/layout.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>

#include "formats/all.h"

namespace greenroom {
namespace {

using namespace formats;

template <class... Q, class... F>
constexpr auto make_layouts(List<Q...>, List<F...>) {
    return std::array{
        Layout{Q::type, Q::raw_cols, Q::raw_bytes, Q::Payload::lines * line_bytes, Q::record_bytes,
               true}...,
        Layout{F::type, 1, F::bytes, block_cols / F::cols_per_line * line_bytes, 0, false}...};
}

constexpr auto layouts = make_layouts(Quantised{}, Floating{});

// One matrix being packed or unpacked.
struct Shape {
    const Layout& layout;
    std::int64_t rows, cols;
    std::int64_t group_bytes = layout.group_bytes(cols);
    std::int64_t rows_in(std::int64_t group) const {
        return std::min<std::int64_t>(group_rows, rows - group * group_rows);
    }
};

template <class F>
void pack_quantised(const Shape& s, std::int64_t group, const std::uint8_t* src,
                    std::uint8_t* dst) {
    constexpr int per_raw = F::raw_cols / block_cols;
    const std::int64_t raw_blocks = s.cols / F::raw_cols;
    std::uint8_t* records = dst + s.layout.payload_bytes(s.cols);
    Quads codes;
    for (std::int64_t i = 0; i < raw_blocks; ++i)
        for (int row = 0; row < s.rows_in(group); ++row) {
            const std::int64_t at = (group * group_rows + row) * raw_blocks + i;
            const std::uint8_t* raw = src + at * F::raw_bytes;
            F::scales(raw, records + i * F::record_bytes, row);
            for (int b = 0; b < per_raw; ++b) {
                F::codes(raw, b, codes);
                F::Payload::put(codes, dst + (i * per_raw + b) * s.layout.block_bytes + 4 * row);
            }
        }
}

template <class F>
void unpack_quantised(const Shape& s, std::int64_t group, const std::uint8_t* packed, float* out) {
    constexpr int per_raw = F::raw_cols / block_cols;
    const std::uint8_t* records = packed + s.layout.payload_bytes(s.cols);
    std::uint8_t codes[block_cols];
    for (int row = 0; row < s.rows_in(group); ++row)
        for (std::int64_t block = 0; block < s.layout.blocks(s.cols); ++block) {
            F::Payload::get(packed + block * s.layout.block_bytes + 4 * row, codes);
            const std::uint8_t* record = records + block / per_raw * F::record_bytes;
            float* x = out + (group * group_rows + row) * s.cols + block * block_cols;
            for (int k = 0; k < block_cols; ++k) {
                int code = codes[k];
                if constexpr (HasTable<F>) code = F::table()[code];
                if constexpr (F::zero >= 0) code -= 1 << F::zero;
                const int part =
                    (static_cast<int>(block % per_raw) * block_cols + k) * F::parts / block_cols;
                const Affine a = F::affine(record, row, part);
                x[k] = a.scale * static_cast<float>(code) - a.min;
            }
        }
}

template <class F>
std::uint8_t* float_at(std::uint8_t* group, int row, std::int64_t col) {
    const std::int64_t line = col / F::cols_per_line, within = col % F::cols_per_line;
    return group + line * line_bytes + 4 * row + within * F::bytes;
}

// Sixteen lines at a time, so that a row is read in whole cache lines.
template <class F>
void pack_floats(const Shape& s, std::int64_t group, const std::uint8_t* src, std::uint8_t* dst) {
    const std::int64_t lines = s.cols / F::cols_per_line, row_bytes = s.cols * F::bytes;
    src += group * group_rows * row_bytes;
    for (std::int64_t begin = 0; begin < lines; begin += 16)
        for (int row = 0; row < s.rows_in(group); ++row)
            for (std::int64_t line = begin; line < std::min(lines, begin + 16); ++line)
                std::memcpy(dst + line * line_bytes + 4 * row, src + row * row_bytes + 4 * line, 4);
    if (s.cols % F::cols_per_line != 0)  // the last word is half full
        for (int row = 0; row < s.rows_in(group); ++row)
            std::memcpy(float_at<F>(dst, row, s.cols - 1), src + (row + 1) * row_bytes - F::bytes,
                        F::bytes);
}

template <class F>
void unpack_floats(const Shape& s, std::int64_t group, const std::uint8_t* packed, float* out) {
    for (int row = 0; row < s.rows_in(group); ++row)
        for (std::int64_t col = 0; col < s.cols; ++col)
            out[(group * group_rows + row) * s.cols + col] =
                F::value(float_at<F>(const_cast<std::uint8_t*>(packed), row, col));
}

// Bytes that pack leaves untouched: rows beyond the last, columns up to 32, the tail up to 64.
bool has_padding(const Shape& s, std::int64_t group) {
    return s.rows_in(group) < group_rows || s.cols % block_cols != 0;
}

void pack_group(const Shape& s, std::int64_t group, const std::uint8_t* src, std::uint8_t* dst) {
    std::uint8_t* to = dst + group * s.group_bytes;
    if (has_padding(s, group))
        std::memset(to, 0, s.group_bytes);
    else
        std::memset(to + s.group_bytes - 64, 0, 64);
    with(Quantised{}, s.layout.type,
         [&](auto f) { pack_quantised<decltype(f)>(s, group, src, to); });
    with(Floating{}, s.layout.type, [&](auto f) { pack_floats<decltype(f)>(s, group, src, to); });
}

// Where a task begins.
struct Cut {
    std::size_t matrix;
    std::int64_t group;
};

// Cuts matrices into tasks that write a huge page each: a page touched for the first time is zeroed
// by every thread that comes upon it before that is done. Less where there is little to do.
std::vector<Cut> cut(const std::vector<Packing>& matrices, int threads) {
    std::int64_t total = 0;
    for (const Packing& m : matrices) total += packed_bytes(m.type, m.rows, m.cols);
    const std::int64_t least = 1 << 16, most = 1 << 21;
    const auto bytes = static_cast<std::uintptr_t>(std::clamp(total / (4 * threads), least, most));
    std::vector<Cut> found;
    std::uintptr_t page = 0;
    for (std::size_t i = 0; i < matrices.size(); ++i) {
        const Packing& m = matrices[i];
        const std::int64_t group_bytes = layout_of(m.type).group_bytes(m.cols);
        for (std::int64_t group = 0; group < groups_of(m.rows); ++group) {
            const auto at = reinterpret_cast<std::uintptr_t>(m.dst + group * group_bytes) / bytes;
            if (at != page) found.push_back({i, group});
            page = at;
        }
    }
    found.push_back({matrices.size(), 0});
    return found;
}

}  // namespace

const Layout& layout_of(int type) {
    for (const Layout& layout : layouts)
        if (layout.type == type) return layout;
    throw std::invalid_argument("no native kernel for tensor type " + std::to_string(type));
}

std::vector<int> native_types() {
    std::vector<int> types;
    for (const Layout& layout : layouts) types.push_back(layout.type);
    return types;
}

std::int64_t packed_bytes(int type, std::int64_t rows, std::int64_t cols) {
    constexpr std::int64_t limit = std::int64_t{1} << 31;
    const Layout& layout = layout_of(type);
    if (rows <= 0 || cols <= 0 || rows >= limit || cols >= limit)
        throw std::invalid_argument("rows and cols must lie between 1 and 2^31");
    if (cols % layout.raw_cols != 0)
        throw std::invalid_argument("cols = " + std::to_string(cols) +
                                    " is not a multiple of the block size " +
                                    std::to_string(layout.raw_cols));
    const std::int64_t group = layout.group_bytes(cols);
    if (group > std::numeric_limits<std::int64_t>::max() / groups_of(rows))
        throw std::invalid_argument("matrix is too large");
    return group * groups_of(rows);
}

void pack(Pool& pool, const std::vector<Packing>& matrices) {
    const std::vector<Cut> cuts = cut(matrices, pool.size());
    pool.run(static_cast<std::int64_t>(cuts.size()) - 1, [&](std::int64_t task, int) {
        const auto [first, begin] = cuts[static_cast<std::size_t>(task)];
        const auto [last, end] = cuts[static_cast<std::size_t>(task) + 1];
        for (std::size_t i = first; i <= last && i < matrices.size(); ++i) {
            const auto& [type, rows, cols, src, dst] = matrices[i];
            const Shape shape{layout_of(type), rows, cols};
            const std::int64_t stop = i == last ? end : groups_of(rows);
            for (std::int64_t group = i == first ? begin : 0; group < stop; ++group)
                pack_group(shape, group, src, dst);
        }
    });
}

void unpack(int type, std::int64_t rows, std::int64_t cols, const std::uint8_t* packed,
            float* out) {
    const Shape shape{layout_of(type), rows, cols};
    for (std::int64_t group = 0; group < groups_of(rows); ++group) {
        const std::uint8_t* from = packed + group * shape.group_bytes;
        with(Quantised{}, type,
             [&](auto f) { unpack_quantised<decltype(f)>(shape, group, from, out); });
        with(Floating{}, type,
             [&](auto f) { unpack_floats<decltype(f)>(shape, group, from, out); });
    }
}

}  // namespace greenroom
