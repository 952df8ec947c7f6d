// The quantisers as Python sees them; sizes are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "quantise/quantise.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

void run_quantise(Pool& pool, int type, std::int64_t rows, std::int64_t cols,
                  Array<const float, 1> src, MutableBytes dst,
                  std::optional<Array<const float, 1>> importance) {
    const std::int64_t row_bytes = quantised_row_bytes(type, cols);
    expect_size("src", static_cast<std::int64_t>(src.size()), rows * cols);
    expect_size("dst", static_cast<std::int64_t>(dst.size()), rows * row_bytes);
    if (importance) expect_size("importance", static_cast<std::int64_t>(importance->size()), cols);
    const float* weights = importance ? importance->data() : nullptr;
    nb::gil_scoped_release release;
    quantise(pool, type, rows, cols, src.data(), dst.data(), weights);
}

}  // namespace

void bind_quantise(nb::module_& m) {
    m.def("quantisable_types", &quantisable_types, "Type numbers that quantise() writes.");
    m.def("quantise", &run_quantise, nb::arg("pool"), nb::arg("type"), nb::arg("rows"),
          nb::arg("cols"), nb::arg("src").noconvert(), nb::arg("dst").noconvert(),
          nb::arg("importance").noconvert() = nb::none(),
          "Encodes src (rows * cols float32, finite) as blocks into dst (uint8); importance "
          "(cols float32) weighs the squared error of each column.");
}

}  // namespace greenroom
