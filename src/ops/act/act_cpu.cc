// silu_mul for f32 operands, a vector at a time.
#include "ops/act/act_cpu.h"

#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

// -inf · sigmoid(-inf) is read as its limit 0, which the largest negative number gives; NaN stays NaN.
inline Vec silu_times(Vec gate, Vec up) { return silu(max(broadcast(-__FLT_MAX__), gate)) * up; }

}  // namespace

void silu_mul_rows(const SiluMulRows& r) {
  for (int64_t row = 0; row < r.rows; ++row) {
    const float *gate = r.gate + row * r.gate_stride, *up = r.up + row * r.up_stride;
    float* out = r.out + row * r.out_stride;
    int64_t i = 0;
    for (; i + kLanes <= r.columns; i += kLanes) store(out + i, silu_times(load(gate + i), load(up + i)));
    const int64_t rest = r.columns - i;
    if (rest > 0) store_part(out + i, silu_times(load_part(gate + i, rest), load_part(up + i, rest)), rest);
  }
}

}  // namespace kl::KL_ISA
