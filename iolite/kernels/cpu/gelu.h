// The tanh form of gelu.
#pragma once

#include "simd.h"

namespace {

// gelu(g) = g (1 + tanh u) / 2 with u = sqrt(2/pi) (g + 0.044715 g³), which is g / (1 + e^-2u).
IOL_INLINE vf gelu(vf g) {
    const vf u = 0.7978845608028654f * (g + 0.044715f * (g * g * g));
    return g / (1.0f + exp(-2.0f * u));
}

}  // namespace
