// The Python module of one tier. Each room of csrc binds its own functions (bind_*.cpp).
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"
#include "threads/pool.h"

namespace nb = nanobind;

#define GREENROOM_JOIN(a, b) a##b
#define GREENROOM_MODULE(tier, m) NB_MODULE(GREENROOM_JOIN(_native_, tier), m)
#define GREENROOM_STRING(x) #x
#define GREENROOM_NAME(x) GREENROOM_STRING(x)

GREENROOM_MODULE(GREENROOM_TIER, m) {
    m.attr("tier") = GREENROOM_NAME(GREENROOM_TIER);
    m.def("runnable_tiers", &greenroom::runnable_tiers);
    nb::class_<greenroom::Pool>(m, "Pool")
        .def(nb::init<int>(), nb::arg("threads"))
        .def_prop_ro("size", &greenroom::Pool::size);
}
