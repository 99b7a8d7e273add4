// Plain loops; what a compiler makes of them for an instruction set is what the yardstick measures.
#include "ops/kda/kda_sweeps.h"

namespace kl::KL_ISA {

void kda_three_sweeps(const KdaSweeps& s) {
  constexpr int64_t kMaxDim = 256;
  float error[kMaxDim];
  float* const __restrict S = s.state;
  for (int64_t t = 0; t < s.T; ++t) {
    const float* const __restrict q = s.q.data + t * s.q.stride;
    const float* const __restrict k = s.k.data + t * s.k.stride;
    const float* const __restrict v = s.v.data + t * s.v.stride;
    const float* const g = s.g.data + t * s.g.stride;
    const float beta = s.beta.data[t * s.beta.stride];
    float* const __restrict out = s.out.data + t * s.out.stride;

    for (int64_t d = 0; d < s.K; ++d) {
      const float decay = __builtin_expf(g[d]);
      for (int64_t i = 0; i < s.V; ++i) S[d * s.V + i] *= decay;
    }

    for (int64_t i = 0; i < s.V; ++i) error[i] = 0;
    for (int64_t d = 0; d < s.K; ++d)
      for (int64_t i = 0; i < s.V; ++i) error[i] += k[d] * S[d * s.V + i];
    for (int64_t i = 0; i < s.V; ++i) error[i] = beta * (v[i] - error[i]), out[i] = 0;

    for (int64_t d = 0; d < s.K; ++d)
      for (int64_t i = 0; i < s.V; ++i) {
        const float updated = S[d * s.V + i] + k[d] * error[i];
        S[d * s.V + i] = updated;
        out[i] += q[d] * updated;
      }
  }
}

}  // namespace kl::KL_ISA
