// The yardstick of KDA's CPU benchmarks: the recurrence as it is usually written, token by token, in three
// sweeps over the state. Built with the flags of the kernels that it is compared with; no product path uses
// it.
#pragma once

#include "simd/isa.h"

namespace kl {

// One value head of one sequence. Rows are f32, `stride` floats from token to token, and ready: q and k
// normalised, q scaled, g a log-decay (0 to -inf), beta in [0, 2].
struct KdaSweeps {
  struct Rows {
    float* data;
    int64_t stride;
  };
  Rows q, k, g;  // [T, K]
  Rows v, out;   // [T, V]
  Rows beta;     // [T]
  int64_t T, K, V;
  float* state;  // [K, V] read and updated
};

KL_DECLARE_PER_ISA(void kda_three_sweeps(const KdaSweeps&);)

}  // namespace kl
