// What the doors of the norms call on the CPU, once compiled per instruction set (norm_cpu.cc).
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace kl {

// f32 rows of D elements; strides are elements from row to row.
struct NormRows {
  const float *x, *weight;
  const float* gate = nullptr;  // before the sigmoid; null: no gate
  float* out;                   // may be x or gate
  int64_t x_stride, gate_stride = 0, out_stride;
  int64_t rows, D;
  float eps;
};

KL_DECLARE_PER_ISA(void norm_rows(const NormRows&);)

}  // namespace kl
