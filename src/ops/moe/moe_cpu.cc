// The arithmetic of the experts that is not a plain matrix product.
#include "ops/moe/moe_cpu.h"

#include "simd/gemm.h"
#include "simd/gemm_bf16.h"
#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

// Hidden units at once: gate and up of a block stay in the cache; more where each time costs a copy of x.
constexpr int64_t kUnits = 96, kManyUnits = 256;

// gate[i] = silu(gate[i]) · up[i]
void silu_mul(float* gate, const float* up, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(gate + i, silu(load(gate + i)) * load(up + i));
  if (i < n) store_part(gate + i, silu(load_part(gate + i, n - i)) * load_part(up + i, n - i), n - i);
}

}  // namespace

void expert_hidden(const ExpertHidden& e) {
  float up[kExpertRows * kManyUnits];
  const int64_t units = e.x && e.rows >= kGemmPanelRows ? kManyUnits : kUnits;
  for (int64_t j = 0; j < e.units; j += units) {
    const int64_t n = e.units - j < units ? e.units - j : units;
    const auto row = [&](const void* w, DType dtype) -> const void* {
      return static_cast<const char*>(w) + j * e.D * size_of(dtype);
    };
    float* const gate = e.h + j;
    if (e.x) {
      const Gemm g = {.a = e.x,
                      .lda = e.D,
                      .b = row(e.w1, e.w1_dtype),
                      .b_dtype = e.w1_dtype,
                      .ldb = e.D,
                      .c = gate,
                      .ldc = e.ldh,
                      .m = e.rows,
                      .n = n,
                      .k = e.D};
      Gemm h = g;
      h.b = row(e.w3, e.w3_dtype), h.b_dtype = e.w3_dtype;
      h.c = up, h.ldc = units;
      gemm_nt_pair(g, h);
    } else {
      GemmBf16 g = {.a = e.packed,
                    .b = static_cast<const bf16*>(row(e.w1, DType::bf16)),
                    .ldb = e.D,
                    .c = gate,
                    .ldc = e.ldh,
                    .m = e.rows,
                    .n = n,
                    .k = e.D};
      gemm_nt_bf16(g);
      g.b = static_cast<const bf16*>(row(e.w3, DType::bf16));
      g.c = up, g.ldc = units;
      gemm_nt_bf16(g);
    }
    for (int64_t i = 0; i < e.rows; ++i) silu_mul(gate + i * e.ldh, up + i * units, n);
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
