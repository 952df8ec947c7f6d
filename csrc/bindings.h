// What each room of csrc adds to the Python module.
#pragma once

#include <nanobind/nanobind.h>

namespace greenroom {

void bind_ops(nanobind::module_& m);
void bind_threads(nanobind::module_& m);
void bind_matmul(nanobind::module_& m);
void bind_moe(nanobind::module_& m);
void bind_rendezvous(nanobind::module_& m);
void bind_quantise(nanobind::module_& m);
void bind_ceilings(nanobind::module_& m);

}  // namespace greenroom
