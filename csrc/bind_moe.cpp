// The fused expert MLP, as Python sees it. All sizes and ids are checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "arrays.h"
#include "bindings.h"
#include "bound_layer.h"
#include "moe/moe.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

Matrix checked(const char* name, const MatrixArgs& args, std::int64_t rows, std::int64_t cols,
               const float*& bias) {
    const auto& [type, packed, bias_array, scale] = args;
    expect_at_least(name, static_cast<std::int64_t>(packed.size()), packed_bytes(type, rows, cols));
    if (bias_array) expect_size("bias", static_cast<std::int64_t>(bias_array->size()), rows);
    bias = bias_array ? bias_array->data() : nullptr;
    return {type, rows, cols, packed.data(), scale};
}

void set_expert(BoundLayer& self, std::int64_t id, const MatrixArgs& gate, const MatrixArgs& up,
                const MatrixArgs& down) {
    const std::size_t i = self.index(id);
    const std::int64_t d = self.layer.d, f = self.layer.f;
    Expert e;
    e.gate = checked("gate", gate, f, d, e.gate_bias);
    e.up = checked("up", up, f, d, e.up_bias);
    e.down = checked("down", down, d, f, e.down_bias);
    self.arrays[i] = {gate, up, down};
    self.layer.experts[i] = e;
}

void clear_expert(BoundLayer& self, std::int64_t id) {
    const std::size_t i = self.index(id);
    self.layer.experts[i] = Expert{};
    self.arrays[i].clear();
}

void check_ids(const MoeLayer& layer, const std::int32_t* ids, std::int64_t count) {
    const auto experts = static_cast<std::int64_t>(layer.experts.size());
    for (std::int64_t i = 0; i < count; ++i) {
        if (ids[i] < -1 || ids[i] >= experts)
            throw std::invalid_argument("expert id " + std::to_string(ids[i]) +
                                        " is outside -1 .. " + std::to_string(experts - 1));
        if (ids[i] >= 0 && !layer.experts[static_cast<std::size_t>(ids[i])].present())
            throw std::invalid_argument("expert " + std::to_string(ids[i]) + " is not in memory");
    }
}

void moe(Pool& pool, const BoundLayer& bound, Array<const float, 2> hidden,
         Array<const std::int32_t, 2> ids, Array<const float, 2> weights, Array<float, 2> out) {
    const auto tokens = static_cast<std::int64_t>(hidden.shape(0));
    const auto k = static_cast<std::int64_t>(ids.shape(1));
    const MoeLayer& layer = bound.layer;
    expect_size("hidden's second dimension", static_cast<std::int64_t>(hidden.shape(1)), layer.d);
    expect_size("ids' first dimension", static_cast<std::int64_t>(ids.shape(0)), tokens);
    expect_size("weights' first dimension", static_cast<std::int64_t>(weights.shape(0)), tokens);
    expect_size("weights' second dimension", static_cast<std::int64_t>(weights.shape(1)), k);
    expect_size("out's first dimension", static_cast<std::int64_t>(out.shape(0)), tokens);
    expect_size("out's second dimension", static_cast<std::int64_t>(out.shape(1)), layer.d);
    if (k < 1) throw std::invalid_argument("ids has no routes");
    check_ids(layer, ids.data(), tokens * k);
    const Routes routes{hidden.data(), ids.data(), weights.data(), tokens, k};
    float* to = out.data();
    nb::gil_scoped_release release;
    run_moe(pool, layer, routes, to);
}

}  // namespace

void bind_moe(nb::module_& m) {
    nb::class_<BoundLayer>(m, "MoeLayer")
        .def(nb::init<std::int64_t, std::int64_t, std::int64_t, std::string>(), nb::arg("experts"),
             nb::arg("d"), nb::arg("f"), nb::arg("activation") = "silu",
             "The experts of one layer: d model width, f hidden width, activation 'silu' or "
             "'gpt-oss'.")
        .def("set_expert", &set_expert, nb::arg("expert"), nb::arg("gate").noconvert(),
             nb::arg("up").noconvert(), nb::arg("down").noconvert(),
             "Says where an expert's matrices are, each (type, packed uint8, bias or None, scale). "
             "The arrays are kept, not copied.")
        .def("clear_expert", &clear_expert, nb::arg("expert"))
        .def(
            "present",
            [](const BoundLayer& self, std::int64_t id) {
                return self.layer.experts[self.index(id)].present();
            },
            nb::arg("expert"));
    m.def("moe", &moe, nb::arg("pool"), nb::arg("layer"), nb::arg("hidden").noconvert(),
          nb::arg("ids").noconvert(), nb::arg("weights").noconvert(), nb::arg("out").noconvert(),
          "out (tokens, d) = sum over routes of weight * expert(hidden (tokens, d)); ids (tokens, "
          "k) int32 with -1 for routes served elsewhere, weights (tokens, k); float32.");
}

}  // namespace greenroom
