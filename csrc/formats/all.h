// The list of formats, and the way from a type number to its struct.
#pragma once

#include "formats/floats.h"
#include "formats/fp4.h"
#include "formats/iq4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4.h"
#include "formats/q45_k.h"
#include "formats/q5.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"

namespace greenroom::formats {

template <class... F>
struct List {};

using Quantised =
    List<Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4>;
using Floating = List<F32, F16, BF16>;

// Calls body(F{}) for the struct whose type number is given; false if there is none.
template <class Body, class... F>
bool with(List<F...>, int type, Body body) {
    return ((F::type == type && (body(F{}), true)) || ...);
}

}  // namespace greenroom::formats
