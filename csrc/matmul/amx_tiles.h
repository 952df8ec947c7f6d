// The tile instructions the AMX path needs, one function each, or the same in plain C++ where
// the tier has no AMX: the path around them can then be tested on any AVX-512 machine.
// Intel SDM volume 1 chapter 18, volume 2 (TDPBF16PS, TDPBSSD).
#pragma once

#include <cstdint>
#include <cstring>

#include "formats/half.h"

namespace greenroom::amx {

#if defined(__AMX_BF16__)

// All eight tiles with 16 rows of 64 bytes, as LDTILECFG reads it.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The calling thread's tile registers, from construction to destruction.
struct Tiles {
    Tiles() {
        const TileConfig config;
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
    // The same with int32 sums: A holds 16 tokens x 64 int8, B 16 quads of columns x 16 rows.
    template <int C, int A, int B>
    void multiply_int8() {
        __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};

#else

struct Tiles {
    std::uint8_t data[8][16][64];

    template <int T>
    void zero() {
        std::memset(data[T], 0, sizeof data[T]);
    }
    template <int T>
    void load(const void* p, std::int64_t stride) {
        for (int row = 0; row < 16; ++row)
            std::memcpy(data[T][row], static_cast<const std::uint8_t*>(p) + row * stride, 64);
    }
    template <int T>
    void store(void* p, std::int64_t stride) {
        for (int row = 0; row < 16; ++row)
            std::memcpy(static_cast<std::uint8_t*>(p) + row * stride, data[T][row], 64);
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
                for (int k = 0; k < 16; ++k)
                    for (int byte = 0; byte < 4; ++byte)
                        sum += static_cast<std::int8_t>(data[A][m][4 * k + byte]) *
                               static_cast<std::int8_t>(data[B][k][4 * n + byte]);
                std::memcpy(&data[C][m][4 * n], &sum, 4);
            }
    }
};

#endif

}  // namespace greenroom::amx
