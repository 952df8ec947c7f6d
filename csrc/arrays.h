// Checked array arguments: C-contiguous CPU arrays of one element type, with errors that name
// the argument. Knows nothing of what is computed.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace greenroom {

template <class T, int Dims>
using Array = nanobind::ndarray<T, nanobind::ndim<Dims>, nanobind::c_contig, nanobind::device::cpu>;
using Bytes = Array<const std::uint8_t, 1>;
using MutableBytes = Array<std::uint8_t, 1>;

inline void expect_size(const char* name, std::int64_t found, std::int64_t wanted) {
    if (found != wanted)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(found) +
                                    " elements where " + std::to_string(wanted) + " are needed");
}

inline void expect_at_least(const char* name, std::int64_t found, std::int64_t wanted) {
    if (found < wanted)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(found) +
                                    " bytes where " + std::to_string(wanted) + " are needed");
}

}  // namespace greenroom
