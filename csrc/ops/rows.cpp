#include "ops/rows.h"

#include <algorithm>
#include <cmath>

namespace greenroom {
namespace {

// Elements below which handing work to another thread costs more than it saves (a region takes
// one to three microseconds, in which one thread goes through about this many).
constexpr std::int64_t kWorthARegion = 16384;

std::int64_t rows_per_range(std::int64_t elements_per_row) {
    return std::max<std::int64_t>(1, kWorthARegion / std::max<std::int64_t>(1, elements_per_row));
}

// f(i, Vec-sized step) over whole vectors, then g(i) over the rest.
template <class F, class G>
inline void sweep(std::int64_t width, F whole, G rest) {
    std::int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes) whole(i);
    for (; i < width; ++i) rest(i);
}

float mean(const float* x, std::int64_t width) {
    Vec total{};
    float tail = 0;
    sweep(
        width, [&](std::int64_t i) { total += load(x + i); },
        [&](std::int64_t i) { tail += x[i]; });
    return (sum(total) + tail) / static_cast<float>(width);
}

// The mean of (x - center)^2.
float mean_square(const float* x, std::int64_t width, float center) {
    Vec total{};
    float tail = 0;
    sweep(
        width,
        [&](std::int64_t i) {
            const Vec d = load(x + i) - center;
            total = fma(d, d, total);
        },
        [&](std::int64_t i) { tail += (x[i] - center) * (x[i] - center); });
    return (sum(total) + tail) / static_cast<float>(width);
}

void norm_row(const float* x, std::int64_t width, const NormWeights& w, float* out) {
    const float center = w.center ? mean(x, width) : 0.0f;
    const float scale = 1.0f / std::sqrt(mean_square(x, width, center) + w.epsilon);
    if (w.bias)
        sweep(
            width,
            [&](std::int64_t i) {
                store(out + i,
                      fma((load(x + i) - center) * scale, load(w.weight + i), load(w.bias + i)));
            },
            [&](std::int64_t i) { out[i] = (x[i] - center) * scale * w.weight[i] + w.bias[i]; });
    else
        sweep(
            width,
            [&](std::int64_t i) {
                store(out + i, (load(x + i) - center) * scale * load(w.weight + i));
            },
            [&](std::int64_t i) { out[i] = (x[i] - center) * scale * w.weight[i]; });
}

void add_row(float* x, const float* other, std::int64_t width) {
    sweep(
        width, [&](std::int64_t i) { store(x + i, load(x + i) + load(other + i)); },
        [&](std::int64_t i) { x[i] += other[i]; });
}

void rotate_halves(float* x, const float* cosines, const float* sines, std::int64_t pairs) {
    float* y = x + pairs;
    sweep(
        pairs,
        [&](std::int64_t i) {
            const Vec a = load(x + i), b = load(y + i), c = load(cosines + i), s = load(sines + i);
            store(x + i, fma(a, c, -(b * s)));
            store(y + i, fma(a, s, b * c));
        },
        [&](std::int64_t i) {
            const float a = x[i], b = y[i];
            x[i] = a * cosines[i] - b * sines[i];
            y[i] = a * sines[i] + b * cosines[i];
        });
}

void rotate_neighbours(float* x, const float* cosines, const float* sines, std::int64_t pairs) {
    for (std::int64_t i = 0; i < pairs; ++i) {
        const float a = x[2 * i], b = x[2 * i + 1];
        x[2 * i] = a * cosines[i] - b * sines[i];
        x[2 * i + 1] = a * sines[i] + b * cosines[i];
    }
}

template <class T>
void write_rows(Pool& pool, const Rows<const float>& rows, const std::int64_t* slots,
                const CacheView& cache) {
    T* const base = static_cast<T*>(cache.data);
    const std::int64_t size = cache.block_size, width = cache.width;
    pool.ranges(rows.tokens, rows_per_range(rows.heads * width),
                [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t)
                        for (std::int64_t h = 0; h < rows.heads; ++h) {
                            const std::int64_t block = slots[t] / size, offset = slots[t] % size;
                            T* to = base + ((block * cache.heads + h) * size + offset) * width;
                            const float* from = rows.at(t, h);
                            sweep(
                                width, [&](std::int64_t i) { store(to + i, load(from + i)); },
                                [&](std::int64_t i) {
                                    if constexpr (std::is_same_v<T, Half>)
                                        to[i] = to_half(from[i]);
                                    else
                                        to[i] = from[i];
                                });
                        }
                });
}

}  // namespace

void norm(Pool& pool, const Rows<float>& x, const Rows<const float>* residual,
          const NormWeights& weights, const Rows<float>& out) {
    pool.ranges(x.tokens, rows_per_range(x.heads * x.width),
                [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t)
                        for (std::int64_t h = 0; h < x.heads; ++h) {
                            if (residual) add_row(x.at(t, h), residual->at(t, h), x.width);
                            norm_row(x.at(t, h), x.width, weights, out.at(t, h));
                        }
                });
}

void rope_table(Pool& pool, const std::int64_t* positions, std::int64_t tokens,
                const float* frequencies, std::int64_t pairs, float magnitude, float* table) {
    // A cosine and a sine take about 50 times as long as an element of a norm.
    pool.ranges(tokens, rows_per_range(50 * pairs), [&](std::int64_t begin, std::int64_t end, int) {
        for (std::int64_t t = begin; t < end; ++t) {
            float* cosines = table + t * 2 * pairs;
            float* sines = cosines + pairs;
            for (std::int64_t i = 0; i < pairs; ++i) {
                // In double: at position 100,000 float would lose three digits of the phase.
                const double angle =
                    static_cast<double>(positions[t]) * static_cast<double>(frequencies[i]);
                cosines[i] = static_cast<float>(std::cos(angle)) * magnitude;
                sines[i] = static_cast<float>(std::sin(angle)) * magnitude;
            }
        }
    });
}

void rope(Pool& pool, const Rows<float>& x, const float* table, std::int64_t pairs, bool halves) {
    pool.ranges(x.tokens, rows_per_range(2 * x.heads * pairs),
                [&](std::int64_t begin, std::int64_t end, int) {
                    for (std::int64_t t = begin; t < end; ++t) {
                        const float* cosines = table + t * 2 * pairs;
                        const auto rotate = halves ? rotate_halves : rotate_neighbours;
                        for (std::int64_t h = 0; h < x.heads; ++h)
                            rotate(x.at(t, h), cosines, cosines + pairs, pairs);
                    }
                });
}

void write_cache(Pool& pool, const Rows<const float>& rows, const std::int64_t* slots,
                 const CacheView& cache) {
    if (cache.half)
        write_rows<Half>(pool, rows, slots, cache);
    else
        write_rows<float>(pool, rows, slots, cache);
}

}  // namespace greenroom
