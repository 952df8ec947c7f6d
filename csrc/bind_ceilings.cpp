// What the machine can do at most, measured with this tier's own instructions: the yardsticks of
// the kernel benchmark.
#include <nanobind/nanobind.h>

#include <chrono>

#include "arrays.h"
#include "bindings.h"
#include "matmul/amx_tiles.h"
#include "simd/simd.h"
#include "threads/pool.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

// Reads every line once and combines them, so that no load can be left out.
std::uint8_t read_lines(const std::uint8_t* p, std::int64_t lines) {
    using namespace simd;
    Codes sum[4] = {splat_byte(0), splat_byte(0), splat_byte(0), splat_byte(0)};
    for (std::int64_t i = 0; i + 4 <= lines; i += 4)
        for (int j = 0; j < 4; ++j) {
            prefetch(p + (i + j) * 64 + 4096);
            sum[j] = sum[j] | load_line(p + (i + j) * 64);
        }
    Codes all = (sum[0] | sum[1]) | (sum[2] | sum[3]);
    opaque(all);
    std::uint8_t first;
    std::memcpy(&first, &all, 1);
    return first;
}

// Seconds to read all of `memory` once with every thread of the pool.
double read_seconds(Pool& pool, Bytes memory) {
    constexpr std::int64_t part = 256 << 10;
    const auto bytes = static_cast<std::int64_t>(memory.size());
    const std::uint8_t* data = memory.data();
    std::vector<std::uint8_t> seen(static_cast<std::size_t>(pool.size()) * 64);
    nb::gil_scoped_release release;
    const auto start = Clock::now();
    pool.run(bytes / part, [&](std::int64_t i, int thread) {
        seen[static_cast<std::size_t>(thread) * 64] |= read_lines(data + i * part, part / 64);
    });
    return seconds_since(start);
}

// Independent sums, enough to hide the latency and few enough for the registers.
constexpr int chains = simd::float_tile == 16 ? 12 : 6;

int int8_loop(std::int64_t rounds) {
    using namespace simd;
    Codes codes = splat_byte(3), x = splat_byte(5);
    Ints acc[chains];
    unrolled<chains>([&](auto j) { acc[j] = round(zero()); });
    for (std::int64_t i = 0; i < rounds; ++i) {
        unrolled<chains>([&](auto j) __attribute__((always_inline)) {
            opaque(codes);
            acc[j] = accumulate(acc[j], codes, x);
        });
    }
    int total = 0;
    unrolled<chains>([&](auto j) { total ^= sum(acc[j]); });
    return total;
}

float float_loop(std::int64_t rounds) {
    using namespace simd;
    Codes barrier = splat_byte(0);
    Floats acc[chains];
    const Floats x = load_u8(reinterpret_cast<const std::uint8_t*>("0123456789abcdef"));
    unrolled<chains>([&](auto j) { acc[j] = zero(); });
    for (std::int64_t i = 0; i < rounds; ++i) {
        opaque(barrier);
        unrolled<chains>([&](auto j)
                             __attribute__((always_inline)) { acc[j] = fma(x, x, acc[j]); });
    }
    float total = 0;
    unrolled<chains>([&](auto j) { total += sum(acc[j]); });
    return total;
}

#if defined(GREENROOM_TIER_amx)
// Four independent sums, as the kernel has them; operands stay in the tile registers.
int tile_loop(std::int64_t rounds) {
    amx::Tiles tiles;
    alignas(64) std::uint8_t zeros[1024] = {};
    tiles.load<4>(zeros, 64);
    tiles.load<5>(zeros, 64);
    tiles.zero<0>(), tiles.zero<1>(), tiles.zero<2>(), tiles.zero<3>();
    for (std::int64_t i = 0; i < rounds; ++i) {
        tiles.multiply<0, 4, 5>();
        tiles.multiply<1, 4, 5>();
        tiles.multiply<2, 4, 5>();
        tiles.multiply<3, 4, 5>();
    }
    return 0;
}
#endif

// Operations (2 per product) per second of all threads together in a loop without memory.
template <class Loop>
double rate(Pool& pool, std::int64_t rounds, int products, Loop loop) {
    nb::gil_scoped_release release;
    std::vector<double> sink(static_cast<std::size_t>(pool.size()) * 8);
    const auto start = Clock::now();
    pool.each([&](int thread) {
        sink[static_cast<std::size_t>(thread) * 8] = static_cast<double>(loop(rounds));
    });
    return 2.0 * products * static_cast<double>(rounds) * pool.size() / seconds_since(start);
}

}  // namespace

void bind_ceilings(nb::module_& m) {
    m.def("read_seconds", &read_seconds, nb::arg("pool"), nb::arg("memory").noconvert(),
          "Seconds to read memory (uint8) once with all threads; what is left of the last 256 KiB "
          "is not read.");
    m.def(
        "int8_rate",
        [](Pool& pool, std::int64_t rounds) { return rate(pool, rounds, 64 * chains, int8_loop); },
        nb::arg("pool"), nb::arg("rounds"),
        "Operations per second of this tier's int8 dot-product instructions on registers alone.");
    m.def(
        "float_rate",
        [](Pool& pool, std::int64_t rounds) { return rate(pool, rounds, 16 * chains, float_loop); },
        nb::arg("pool"), nb::arg("rounds"),
        "Operations per second of this tier's float32 multiply-add on registers alone.");
#if defined(GREENROOM_TIER_amx)
    constexpr int bf16_products = 4 * 16 * 16 * 32;
    m.def(
        "bf16_tile_rate",
        [](Pool& pool, std::int64_t rounds) {
            return rate(pool, rounds, bf16_products, tile_loop);
        },
        nb::arg("pool"), nb::arg("rounds"), "The same for TDPBF16PS on tile registers.");
#endif
}

}  // namespace greenroom
