// The Python module of one tier. Each room of csrc binds its own functions (bind_*.cpp).
#include "bindings.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "cpu_features.h"

namespace nb = nanobind;

#define GREENROOM_JOIN(a, b) a##b
#define GREENROOM_MODULE(tier, m) NB_MODULE(GREENROOM_JOIN(_native_, tier), m)
#define GREENROOM_STRING(x) #x
#define GREENROOM_NAME(x) GREENROOM_STRING(x)

GREENROOM_MODULE(GREENROOM_TIER, m) {
    nb::set_leak_warnings(false);  // engines may outlive the interpreter
    m.attr("tier") = GREENROOM_NAME(GREENROOM_TIER);
    m.def("runnable_tiers", &greenroom::runnable_tiers);
    greenroom::bind_threads(m);
    greenroom::bind_ops(m);
    greenroom::bind_matmul(m);
    greenroom::bind_moe(m);
    greenroom::bind_rendezvous(m);
    greenroom::bind_quantise(m);
    greenroom::bind_ceilings(m);
}
