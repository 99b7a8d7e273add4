// The definition of silu_mul: plain loops in f32, rounded once at the end. Not checked: the door in act.cc
// is.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/act/act.h"

namespace kl {
namespace {

// x · sigmoid(x). At -inf the product would be -inf · 0; its limit is 0, which the largest negative number
// gives. A NaN stays one.
float silu(float x) {
  x = std::max(x, std::numeric_limits<float>::lowest());
  return x / (1 + std::exp(-x));
}

}  // namespace

void silu_mul_ref(const SiluMulArgs& a) {
  const int64_t T = a.gate.size(0), D = a.gate.size(1);
  dispatch_f32_bf16(a.gate.dtype, [&]<class Gate>() {
    dispatch_f32_bf16(a.up.dtype, [&]<class Up>() {
      dispatch_f32_bf16(a.out.dtype, [&]<class Out>() {
        for (int64_t t = 0; t < T; ++t) {
          const Gate* gate = a.gate.at<Gate>(t);
          const Up* up = a.up.at<Up>(t);
          Out* out = a.out.at<Out>(t);
          for (int64_t i = 0; i < D; ++i)
            out[i] = static_cast<Out>(silu(gate[i]) * static_cast<float>(up[i]));
        }
      });
    });
  });
}

}  // namespace kl
