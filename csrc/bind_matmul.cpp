// Packing and linear layers, as Python sees them. Everything is checked here: sizes, contiguity,
// types; what gets past computes inside its arrays.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <utility>

#include "arrays.h"
#include "bindings.h"
#include "matmul/amx.h"
#include "matmul/linear.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

using Input = Array<const float, 2>;
using Output = Array<float, 2>;
using Bias = std::optional<Array<const float, 1>>;
// One matrix of linears(): (type, rows, packed, out, bias, scale).
using LinearArgs = std::tuple<int, std::int64_t, Bytes, Output, Bias, float>;
// One matrix of pack_all(): (type, rows, cols, src, dst).
using PackingArgs = std::tuple<int, std::int64_t, std::int64_t, Bytes, MutableBytes>;

std::int64_t raw_bytes(int type, std::int64_t rows, std::int64_t cols) {
    packed_bytes(type, rows, cols);  // refuses impossible shapes
    return layout_of(type).raw_row_bytes(cols) * rows;
}

Packing checked(const PackingArgs& args) {
    const auto& [type, rows, cols, src, dst] = args;
    expect_size("src", static_cast<std::int64_t>(src.size()), raw_bytes(type, rows, cols));
    expect_at_least("dst", static_cast<std::int64_t>(dst.size()), packed_bytes(type, rows, cols));
    return {type, rows, cols, src.data(), dst.data()};
}

void pack_all(Pool& pool, const std::vector<PackingArgs>& matrices) {
    std::vector<Packing> found;
    for (const PackingArgs& args : matrices) found.push_back(checked(args));
    nb::gil_scoped_release release;
    pack(pool, found);
}

void pack_one(Pool& pool, int type, std::int64_t rows, std::int64_t cols, Bytes src,
              MutableBytes dst) {
    pack_all(pool, {{type, rows, cols, src, dst}});
}

void copy(Pool& pool, Bytes src, MutableBytes dst) {
    const auto count = static_cast<std::int64_t>(src.size());
    expect_size("dst", static_cast<std::int64_t>(dst.size()), count);
    const std::uint8_t* from = src.data();
    std::uint8_t* to = dst.data();
    nb::gil_scoped_release release;
    pool.ranges(count, 1 << 21, [&](std::int64_t begin, std::int64_t end, int) {
        std::memcpy(to + begin, from + begin, static_cast<std::size_t>(end - begin));
    });
}

void unpack_floats(int type, std::int64_t rows, std::int64_t cols, Bytes packed, Output out) {
    expect_at_least("packed", static_cast<std::int64_t>(packed.size()),
                    packed_bytes(type, rows, cols));
    expect_size("out's first dimension", static_cast<std::int64_t>(out.shape(0)), rows);
    expect_size("out's second dimension", static_cast<std::int64_t>(out.shape(1)), cols);
    nb::gil_scoped_release release;
    unpack(type, rows, cols, packed.data(), out.data());
}

Linear checked(const LinearArgs& args, std::int64_t tokens, std::int64_t cols) {
    const auto& [type, rows, packed, out, bias, scale] = args;
    expect_at_least("packed", static_cast<std::int64_t>(packed.size()),
                    packed_bytes(type, rows, cols));
    expect_size("out's first dimension", static_cast<std::int64_t>(out.shape(0)), tokens);
    expect_size("out's second dimension", static_cast<std::int64_t>(out.shape(1)), rows);
    if (bias) expect_size("bias", static_cast<std::int64_t>(bias->size()), rows);
    Linear layer;
    layer.weight = {type, rows, cols, packed.data(), scale};
    layer.bias = bias ? bias->data() : nullptr;
    layer.out = out.data();
    return layer;
}

void run_linears(Pool& pool, const std::vector<LinearArgs>& matrices, Input x) {
    const auto tokens = static_cast<std::int64_t>(x.shape(0));
    const auto cols = static_cast<std::int64_t>(x.shape(1));
    std::vector<Linear> layers;
    for (const LinearArgs& args : matrices) layers.push_back(checked(args, tokens, cols));
    const float* data = x.data();
    nb::gil_scoped_release release;
    linears(pool, layers, data, tokens);
}

void run_linear(Pool& pool, int type, std::int64_t rows, std::int64_t cols, Bytes packed, Input x,
                Output out, Bias bias, float scale) {
    expect_size("x's second dimension", static_cast<std::int64_t>(x.shape(1)), cols);
    run_linears(pool, {{type, rows, packed, out, bias, scale}}, x);
}

}  // namespace

void bind_matmul(nb::module_& m) {
    m.def("native_types", &native_types, "Type numbers of the formats that have kernels.");
    m.def("packed_bytes", &packed_bytes, nb::arg("type"), nb::arg("rows"), nb::arg("cols"),
          "Bytes of a packed (rows, cols) matrix; a multiple of 64.");
    m.def("pack", &pack_one, nb::arg("pool"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"),
          nb::arg("src").noconvert(), nb::arg("dst").noconvert(),
          "Packs the raw blocks of a file (uint8) into dst (uint8, packed_bytes).");
    m.def(
        "pack_all", &pack_all, nb::arg("pool"), nb::arg("matrices").noconvert(),
        "Packs several matrices in one parallel region; matrices: list of (type, rows, cols, src, "
        "dst).");
    m.def("copy", &copy, nb::arg("pool"), nb::arg("src").noconvert(), nb::arg("dst").noconvert(),
          "Copies bytes (uint8) with all threads.");
    m.def("unpack", &unpack_floats, nb::arg("type"), nb::arg("rows"), nb::arg("cols"),
          nb::arg("packed").noconvert(), nb::arg("out").noconvert(),
          "Dequantises a packed matrix into out (rows, cols) float32, as ggml would.");
    m.def("linear", &run_linear, nb::arg("pool"), nb::arg("type"), nb::arg("rows"), nb::arg("cols"),
          nb::arg("packed").noconvert(), nb::arg("x").noconvert(), nb::arg("out").noconvert(),
          nb::arg("bias").noconvert() = nb::none(), nb::arg("scale") = 1.0f,
          "out (tokens, rows) = scale * x (tokens, cols) W^T + bias (rows); float32.");
#if defined(GREENROOM_TIER_avx512) || defined(GREENROOM_TIER_amx)
    m.def(
        "_use_tiles", [](bool on) { return std::exchange(amx::enabled, on); }, nb::arg("on"),
        "For tests: whether many tokens take the AMX path, and whether they did before; avx512 has "
        "its tiles in plain C++.");
#endif
    m.def("linears", &run_linears, nb::arg("pool"), nb::arg("matrices").noconvert(),
          nb::arg("x").noconvert(),
          "Several linear layers on the same x in one parallel region; matrices: list of "
          "(type, rows, packed, out, bias or None, scale).");
}

}  // namespace greenroom
