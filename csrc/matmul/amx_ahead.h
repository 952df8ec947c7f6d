// What both AMX paths share: a call cut into stretches of columns, the weights of which are
// expanded while those before are multiplied.
#pragma once

#include <algorithm>

#include "matmul/product.h"

namespace greenroom::amx {

// Blocks of 32 columns, and which of two places their weights are expanded to.
struct Columns {
    std::int64_t begin, count;
    int turn;
};

// Groups multiplied at once.
constexpr std::int64_t most_groups = 4;

// One call of multiply(): what it multiplies, and where weights lie expanded.
struct Call {
    const Matrix& m;
    std::int64_t first, groups;
    const Activations& x;
    const std::uint8_t* next;
    float* out;
    std::uint8_t* scratch;
    std::int64_t at_once;  // blocks
    const Layout& layout = layout_of(m.type);
    std::int64_t bytes = layout.group_bytes(m.cols), payload = layout.payload_bytes(m.cols);

    const std::uint8_t* group(std::int64_t i) const { return m.data + (first + i) * bytes; }
    Columns columns(std::int64_t begin, int turn) const {
        return {begin, std::clamp<std::int64_t>(x.blocks - begin, 0, at_once), turn};
    }
};

// What a thread does beside products for those to come: it expands the next columns and asks for
// the weights of the ones after, an equal share with every step. Multiplying and expanding keep
// different parts of a core busy. C: a Call with expand(columns, group, block); step() must be
// called as often as said.
template <class C>
class Ahead {
  public:
    Ahead(const C& call, Columns columns, std::int64_t steps)
        : call_(call), columns_(columns), units_(call.groups * columns.count) {
        ask_for_those_after();
        line_share_ = (lines_ + steps - 1) / steps;
        unit_share_ = (units_ + steps - 1) / steps;
    }
    void step() {
        for (std::int64_t i = 0; i < line_share_ && next_ < count_; ++i) {
            Range& range = ranges_[next_];
            simd::prefetch_far(range.at);
            range.at += 64;
            next_ += range.at >= range.end;
        }
        expand(unit_share_);
    }

  private:
    struct Range {
        const std::uint8_t *at, *end;
    };

    void expand(std::int64_t units) {
        for (; units > 0 && units_ > 0; --units, --units_) {
            call_.expand(columns_, group_, block_);
            if (++block_ == columns_.count) block_ = 0, ++group_;
        }
    }

    // Columns of these groups, or the first ones of the next groups and all their scales; those are
    // supposed to be laid out as these.
    void ask_for_those_after() {
        const std::int64_t bytes = call_.bytes, payload = call_.payload,
                           block_bytes = call_.layout.block_bytes;
        const bool last = columns_.count == 0;
        const Columns c = last ? Columns{0, std::min(call_.x.blocks, 2 * call_.at_once), 0}
                               : call_.columns(columns_.begin + call_.at_once, 0);
        const std::uint8_t* from = last ? call_.next : call_.group(0);
        for (std::int64_t g = 0; from && g < call_.groups; ++g, from += bytes) {
            ask_for(from + c.begin * block_bytes, c.count * block_bytes);
            if (last) ask_for(from + payload, bytes - payload);
        }
    }
    void ask_for(const std::uint8_t* p, std::int64_t bytes) {
        if (bytes > 0) ranges_[count_++] = {p, p + bytes};
        lines_ += (bytes + 63) / 64;
    }

    const C& call_;
    Columns columns_;
    std::int64_t units_, group_ = 0, block_ = 0;
    Range ranges_[2 * most_groups];
    int count_ = 0, next_ = 0;
    std::int64_t lines_ = 0, line_share_ = 0, unit_share_ = 0;
};

// A call's first columns, with nothing to hide it behind.
template <class C>
void expand_all(const C& call, Columns columns) {
    for (std::int64_t g = 0; g < call.groups; ++g)
        for (std::int64_t i = 0; i < columns.count; ++i) call.expand(columns, g, i);
}

}  // namespace greenroom::amx
