// The rendezvous, as Python sees it. Sizes are checked here, once; contents in every step.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>

#include "bindings.h"
#include "bound_layer.h"
#include "rendezvous.h"

namespace nb = nanobind;

namespace greenroom {
namespace {

using Floats3 = Array<float, 3>;
using Ints3 = Array<std::int32_t, 3>;
using Bells = Array<std::int32_t, 2>;
// hidden, ids, weights, result
using Boxes = std::tuple<Floats3, Ints3, Floats3, Floats3>;

void expect_shape(const char* name, const Floats3& found, std::int64_t a, std::int64_t b,
                  std::int64_t c) {
    if (found.shape(0) != static_cast<std::size_t>(a) ||
        found.shape(1) != static_cast<std::size_t>(b) ||
        found.shape(2) != static_cast<std::size_t>(c))
        throw std::invalid_argument(std::string(name) + " does not have the shape of the others");
}

std::vector<Mailbox> mailboxes(const std::vector<const BoundLayer*>& layers, const Boxes& boxes,
                               const Bells& ring, const Bells& done) {
    const auto& [hidden, ids, weights, result] = boxes;
    const bool shared = hidden.shape(0) == 1;  // one box for all layers
    const auto count = shared ? 1 : static_cast<std::int64_t>(layers.size());
    const auto tokens = static_cast<std::int64_t>(hidden.shape(1));
    const auto d = static_cast<std::int64_t>(hidden.shape(2));
    const auto k = static_cast<std::int64_t>(ids.shape(2));
    expect_size("ids' first dimension", static_cast<std::int64_t>(ids.shape(0)), count);
    expect_size("ids' second dimension", static_cast<std::int64_t>(ids.shape(1)), tokens);
    expect_shape("hidden", hidden, count, tokens, d);
    expect_shape("weights", weights, count, tokens, k);
    expect_shape("result", result, count, tokens, d);
    expect_size("ring", static_cast<std::int64_t>(ring.size()), count * 16);
    expect_size("done", static_cast<std::int64_t>(done.size()), count * 16);
    if (k < 1 || layers.empty()) throw std::invalid_argument("there are no routes or no layers");
    std::vector<Mailbox> out;
    for (std::size_t at = 0; at < layers.size(); ++at) {
        const MoeLayer& layer = layers[at]->layer;
        const auto i = shared ? 0 : static_cast<std::int64_t>(at);
        expect_size("hidden's last dimension", d, layer.d);
        out.push_back({&layer, hidden.data() + i * tokens * d, ids.data() + i * tokens * k,
                       weights.data() + i * tokens * k, result.data() + i * tokens * d,
                       reinterpret_cast<std::uint32_t*>(ring.data() + i * 16),
                       reinterpret_cast<std::uint32_t*>(done.data() + i * 16)});
    }
    return out;
}

// Keeps arrays and layers; the pool is kept alive by the binding.
struct BoundRendezvous {
    Boxes boxes;
    Bells ring, done;
    std::vector<nb::object> owners;  // of the layers
    Rendezvous impl;

    BoundRendezvous(Pool& pool, const std::vector<const BoundLayer*>& layers, Boxes arrays,
                    Bells ringing, Bells answered, double patience)
        : boxes(std::move(arrays)),
          ring(std::move(ringing)),
          done(std::move(answered)),
          impl(pool, mailboxes(layers, boxes, ring, done),
               static_cast<std::int64_t>(std::get<1>(boxes).shape(2)), patience) {
        for (const BoundLayer* layer : layers) owners.push_back(nb::find(layer));
    }

    std::size_t layers() const { return owners.size(); }

    void begin(std::uint32_t number, std::int64_t tokens, std::optional<std::size_t> layer) {
        const auto most = static_cast<std::int64_t>(std::get<0>(boxes).shape(1));
        if (tokens < 1 || tokens > most)
            throw std::invalid_argument("tokens must lie between 1 and " + std::to_string(most));
        const bool alone = std::get<0>(boxes).shape(0) == 1;
        if (layer ? *layer >= layers() : alone && layers() > 1)
            throw std::invalid_argument("layer must be below " + std::to_string(layers()) +
                                        ", and told where layers share a box");
        impl.begin(number, tokens, layer.value_or(0), layer ? *layer + 1 : layers());
    }

    nb::list stats() const {
        nb::list out;
        for (std::size_t i = 0; i < layers(); ++i) {
            const RendezvousStats& s = impl.stats(i);
            nb::dict entry;
            entry["wait_ns"] = s.wait_ns.load();
            entry["compute_ns"] = s.compute_ns.load();
            entry["calls"] = s.calls.load();
            out.append(entry);
        }
        return out;
    }
};

}  // namespace

void bind_rendezvous(nb::module_& m) {
    nb::class_<BoundRendezvous>(m, "Rendezvous")
        .def(nb::init<Pool&, const std::vector<const BoundLayer*>&, Boxes, Bells, Bells, double>(),
             nb::arg("pool"), nb::arg("layers"), nb::arg("boxes").noconvert(),
             nb::arg("ring").noconvert(), nb::arg("done").noconvert(), nb::arg("patience") = 10.0,
             nb::keep_alive<1, 2>(),
             "Answers the MoE layers of a step in order. boxes: hidden (layers, tokens, d), ids "
             "(layers, tokens, k) int32, weights (layers, tokens, k), result (layers, tokens, d); "
             "ring and done (layers, 16) int32, of which word 0 counts. Or one box for all layers.")
        .def("begin", &BoundRendezvous::begin, nb::arg("number"), nb::arg("tokens"),
             nb::arg("layer") = nb::none(),
             "Starts step `number`, in [1, 2^31), of all layers or of one. A layer's rows lie at "
             "the start of its boxes.")
        .def(
            "wait", [](BoundRendezvous& self, double s) { return self.impl.wait(s); },
            nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
            "Whether the step is over; RuntimeError, once, if it failed.")
        .def("cancel", [](BoundRendezvous& self) { self.impl.cancel(); })
        .def("stats", &BoundRendezvous::stats,
             "Of each layer: wait_ns, compute_ns, calls (steps with something to compute).");
}

}  // namespace greenroom
