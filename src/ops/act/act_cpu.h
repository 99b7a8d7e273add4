// What the door of the activations calls on the CPU, once compiled per instruction set (act_cpu.cc).
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace kl {

// out = silu(gate) · up, all f32 and [rows, columns]; strides are elements from row to row.
struct SiluMulRows {
  const float *gate, *up;
  float* out;  // may be gate or up
  int64_t gate_stride, up_stride, out_stride;
  int64_t rows, columns;
};

KL_DECLARE_PER_ISA(void silu_mul_rows(const SiluMulRows&);)

}  // namespace kl
