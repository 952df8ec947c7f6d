// The tile instructions the AMX path needs, one function each, or the same in plain C++ where
// the tier has no AMX: the path around them can then be tested on any AVX-512 machine.
// Intel SDM volume 1 chapter 18, volume 2 (TDPBF16PS, TDPBSSD).
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/half.h"

namespace greenroom::amx {

// Tiles 0-3 are sums of 16 x 16 words, 4-5 first operands (16 tokens x `depth` bytes), 6-7 second
// ones (depth / 4 lines of 16 words). As LDTILECFG reads it.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};

    explicit TileConfig(int depth = 64) {
        row_bytes[4] = row_bytes[5] = static_cast<std::uint16_t>(depth);
        rows[6] = rows[7] = static_cast<std::uint8_t>(depth / 4);
    }
};

#if defined(__AMX_BF16__)

// The calling thread's tile registers, from construction to destruction.
struct Tiles {
    explicit Tiles(const TileConfig& config = TileConfig()) {
        __asm__ volatile("ldtilecfg %0" ::"m"(config));
    }
    ~Tiles() { __asm__ volatile("tilerelease"); }

    template <int T>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
    }
    template <int T>
    void load(const void* p, std::int64_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    template <int T>
    void store(void* p, std::int64_t stride) {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(T) : "memory");
    }
    // C += A B: A holds 16 tokens x 32 bfloat16, B 16 pairs of columns x 16 rows.
    template <int C, int A, int B>
    void multiply() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
    // C += A B exactly, of signed bytes: A holds 16 tokens x depth, B depth / 4 quads x 16 rows.
    template <int C, int A, int B>
    void multiply_int8() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

#else

struct Tiles {
    TileConfig config;
    std::uint8_t data[8][16][64];

    explicit Tiles(const TileConfig& shapes = TileConfig()) : config(shapes) {}

    template <int T>
    void zero() {
        std::memset(data[T], 0, sizeof data[T]);
    }
    template <int T>
    void load(const void* p, std::int64_t stride) {
        zero<T>();
        for (int row = 0; row < config.rows[T]; ++row)
            std::memcpy(data[T][row], static_cast<const std::uint8_t*>(p) + row * stride,
                        config.row_bytes[T]);
    }
    template <int T>
    void store(void* p, std::int64_t stride) {
        for (int row = 0; row < config.rows[T]; ++row)
            std::memcpy(static_cast<std::uint8_t*>(p) + row * stride, data[T][row],
                        config.row_bytes[T]);
    }
    template <int C, int A, int B>
    void multiply() {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 16; ++n) {
                float sum;
                std::memcpy(&sum, &data[C][m][4 * n], 4);
                for (int k = 0; k < 16; ++k)
                    for (int half = 0; half < 2; ++half)
                        sum += bf16_at(&data[A][m][4 * k + 2 * half]) *
                               bf16_at(&data[B][k][4 * n + 2 * half]);
                std::memcpy(&data[C][m][4 * n], &sum, 4);
            }
    }
    template <int C, int A, int B>
    void multiply_int8() {
        for (int m = 0; m < 16; ++m)
            for (int n = 0; n < 16; ++n) {
                std::int32_t sum;
                std::memcpy(&sum, &data[C][m][4 * n], 4);
                for (int k = 0; k < config.row_bytes[A]; ++k)
                    sum += static_cast<std::int8_t>(data[A][m][k]) *
                           static_cast<std::int8_t>(data[B][k / 4][4 * n + k % 4]);
                std::memcpy(&data[C][m][4 * n], &sum, 4);
            }
    }
};

#endif

}  // namespace greenroom::amx
