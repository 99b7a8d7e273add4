// The arithmetic of the experts that is not a plain matrix product.
#include "ops/moe/moe_cpu.h"

#include "simd/gemm.h"
#include "simd/gemm_bf16.h"
#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t kUnits = 96;  // hidden units at once: gate and up of a block stay in the cache

// gate[i] = silu(gate[i]) · up[i]
void silu_mul(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(gate + i, silu(load(gate + i)) * load(up + i));
  if (i < n) store_part(gate + i, silu(load_part(gate + i, n - i)) * load_part(up + i, n - i), n - i);
}

}  // namespace

void expert_hidden(const ExpertHidden& e) {
  float up[kExpertRows * kUnits];
  for (int64_t j = 0; j < e.units; j += kUnits) {
    const int64_t n = e.units - j < kUnits ? e.units - j : kUnits;
    const auto project = [&](const void* w, DType dtype, float* c, int64_t ldc) {
      const void* const b = static_cast<const char*>(w) + j * e.D * size_of(dtype);
      if (e.x)
        gemm_nt({.a = e.x,
                 .lda = e.D,
                 .b = b,
                 .b_dtype = dtype,
                 .ldb = e.D,
                 .c = c,
                 .ldc = ldc,
                 .m = e.rows,
                 .n = n,
                 .k = e.D});
      else
        gemm_nt_bf16({.a = e.packed,
                      .b = static_cast<const bf16*>(b),
                      .ldb = e.D,
                      .c = c,
                      .ldc = ldc,
                      .m = e.rows,
                      .n = n,
                      .k = e.D});
    };
    project(e.w1, e.w1_dtype, e.h + j, e.ldh);
    project(e.w3, e.w3_dtype, up, kUnits);
    for (int64_t i = 0; i < e.rows; ++i) silu_mul(e.h + i * e.ldh + j, up + i * kUnits, n);
  }
}

void expert_sum(const ExpertSum& s) {
  const auto total = [&](int64_t d, const auto& load_at) {
    Vec sum{};
    for (int64_t j = 0; j < s.top_k; ++j) sum += s.weights[j] * load_at(s.y + s.rows[j] * s.D + d);
    return load_at(s.out + d) + sum;
  };
  int64_t d = 0;
  for (; d + kLanes <= s.D; d += kLanes) store(s.out + d, total(d, [](const float* p) { return load(p); }));
  if (d < s.D)
    store_part(s.out + d, total(d, [&](const float* p) { return load_part(p, s.D - d); }), s.D - d);
}

}  // namespace kl::KL_ISA
