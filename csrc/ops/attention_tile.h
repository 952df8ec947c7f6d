// The inner part of attention: a tile of query rows against one tile of keys and values.
// A row is one head of one query; all rows of a tile share the key-value head.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <new>

#include "ops/dot.h"
#include "ops/vec.h"

namespace greenroom {

constexpr std::int64_t kTileKeys = 64;  // keys scored at a time
constexpr float kMasked = -std::numeric_limits<float>::infinity();

inline std::int64_t padded(std::int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// Memory that grows and is reused from call to call; contents are lost when it grows.
class Scratch {
  public:
    float* take(std::int64_t floats) {
        if (floats > size_) {
            memory_.reset(static_cast<float*>(
                ::operator new(static_cast<std::size_t>(floats) * sizeof(float), kAlignment)));
            size_ = floats;
        }
        return memory_.get();
    }

  private:
    static constexpr std::align_val_t kAlignment{64};
    struct Free {
        void operator()(float* p) const { ::operator delete(p, kAlignment); }
    };
    std::unique_ptr<float, Free> memory_;
    std::int64_t size_ = 0;
};

// The softmax of some rows over the keys seen so far: weighted values not yet divided.
struct Softmax {
    float* most;    // (rows) largest score
    float* total;   // (rows) sum of exp(score - most)
    float* values;  // (rows, value_width) sum of exp(score - most) * value; padded width

    static std::int64_t floats(std::int64_t rows, std::int64_t width) { return rows * (width + 2); }

    static Softmax in(float* memory, std::int64_t rows, std::int64_t width) {
        return {memory + rows * width, memory + rows * (width + 1), memory};
    }

    void clear(std::int64_t rows, std::int64_t width) const {
        std::fill_n(most, rows, kMasked);
        std::fill_n(total, rows, 0.0f);
        std::fill_n(values, rows * width, 0.0f);
    }
};

// Adds the softmax of further keys to that of earlier ones.
inline void merge(const Softmax& into, const Softmax& more, std::int64_t rows, std::int64_t width) {
    for (std::int64_t r = 0; r < rows; ++r) {
        if (more.most[r] == kMasked) continue;  // this row saw none of these keys
        const float most = std::max(into.most[r], more.most[r]);
        const float a = exp_one(into.most[r] - most), b = exp_one(more.most[r] - most);
        into.most[r] = most;
        into.total[r] = into.total[r] * a + more.total[r] * b;
        float* x = into.values + r * width;
        const float* y = more.values + r * width;
        for (std::int64_t i = 0; i < width; i += kLanes)
            store(x + i, fma(load(y + i), splat(b), load(x + i) * a));
    }
}

// One row's scores become weights exp(score * scale - most); keys outside [first, last) of the
// tile weigh nothing. Returns the factor that what was summed before has to be multiplied by.
inline float weigh(float* scores, std::int64_t first, std::int64_t last, float scale, float& most,
                   float& total) {
    constexpr int kVectors = kTileKeys / kLanes;
    if (first > 0) std::fill(scores, scores + std::min(first, kTileKeys), kMasked);
    if (last < kTileKeys)
        std::fill(scores + std::max<std::int64_t>(last, 0), scores + kTileKeys, kMasked);
    Vec peak = splat(kMasked);
    for (int i = 0; i < kVectors; ++i) {
        const Vec scaled = load(scores + i * kLanes) * scale;
        store(scores + i * kLanes, scaled);
        peak = vmax(scaled, peak);
    }
    const float before = most, now = std::max(before, largest(peak));
    if (now == kMasked) {  // nothing visible yet
        std::fill_n(scores, kTileKeys, 0.0f);
        return 1.0f;
    }
    Vec added{};
    for (int i = 0; i < kVectors; ++i) {
        const Vec weight = exp(load(scores + i * kLanes) - now);
        store(scores + i * kLanes, weight);
        added += weight;
    }
    const float correction = exp_one(before - now);
    most = now;
    total = total * correction + sum(added);
    return correction;
}

// out[r] = out[r] * correction[r] + sum over keys [first, last) of weights[r][key] * values[key],
// for R rows and C vectors of columns.
template <int R, int C, class T>
inline void blend_block(const float* weights, const float* corrections, const T* const* values,
                        std::int64_t column, std::int64_t first, std::int64_t last, float* out,
                        std::int64_t width) {
    Vec sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c)
            sums[r][c] = load(out + r * width + column + c * kLanes) * corrections[r];
    for (std::int64_t key = first; key < last; ++key) {
        for (int c = 0; c < C; ++c) {
            const Vec value = load(values[key] + column + c * kLanes);
            for (int r = 0; r < R; ++r)
                sums[r][c] = fma(splat(weights[r * kTileKeys + key]), value, sums[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) store(out + r * width + column + c * kLanes, sums[r][c]);
}

template <class T>
inline void blend_rows(const float* weights, const float* corrections, std::int64_t rows,
                       const T* const* values, std::int64_t first, std::int64_t last, float* out,
                       std::int64_t width) {
    constexpr int kWide = kLanes == 16 ? 4 : 2;  // R * C sums must fit the registers
    std::int64_t r = 0;
    const auto some = [&]<int R, int C>() {
        for (; r + R <= rows; r += R) {
            std::int64_t column = 0;
            for (; column + C * kLanes <= width; column += C * kLanes)
                blend_block<R, C>(weights + r * kTileKeys, corrections + r, values, column, first,
                                  last, out + r * width, width);
            for (; column < width; column += kLanes)
                blend_block<R, 1>(weights + r * kTileKeys, corrections + r, values, column, first,
                                  last, out + r * width, width);
        }
    };
    some.template operator()<4, kWide>();
    some.template operator()<2, kWide>();
    some.template operator()<1, 2 * kWide>();
}

}  // namespace greenroom
