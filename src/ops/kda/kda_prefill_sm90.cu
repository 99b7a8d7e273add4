// KDA prefill on Hopper (cuda/prefill_sm90.cuh with the producers of kda_factors_sm90.cuh), for K = V = 64 or
// 128 and bf16 rows. docs/2026-11-23-kda-prefill-hopper.md has the reasons and the measurements.
#include "cuda/prefill_sm90.cuh"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_factors_sm90.cuh"

namespace kl::cuda {
namespace {

// A bounded gate's channels have about a third of the bound.
int64_t expected_to_close(const KdaGate& gate) {
  if (gate.kind == KdaGateKind::bounded && gate.lower_bound < 0)
    return static_cast<int64_t>(std::clamp(-4 / gate.lower_bound, 4.f, 4096.f));
  return kClosedAfter;
}

PrefillPlan make_plan(const KdaArgs& a) {
  return prefill_plan({.T = a.v.size(0),
                       .N = a.cu_seqlens.size(0) - 1,
                       .heads = a.v.size(1),
                       .D = a.q.size(2),
                       .whole = static_cast<bool>(a.checkpoint_row),
                       .strong = a.gate.kind == KdaGateKind::bounded && a.gate.lower_bound <= -1,
                       .known = a.gate.kind != KdaGateKind::log_decay,
                       .closed = expected_to_close(a.gate),
                       .batch_invariant = a.batch_invariant});
}

KdaPrefillParams make_params(const KdaArgs& a, const PrefillPlan& plan) {
  const PrefillTensors tensors{.out = a.out,
                               .cu_seqlens = a.cu_seqlens,
                               .state = a.state,
                               .slot = a.slot,
                               .slot_out = a.slot_out,
                               .workspace = a.workspace,
                               .checkpoint_row = a.checkpoint_row,
                               .checkpoint_slot = a.checkpoint_slot,
                               .state_v_first = a.state_v_first,
                               .qk_heads = a.q.size(1)};
  return {prefill_params(tensors, plan),
          operand(a.beta),
          gate_params(a.gate),
          a.beta_kind,
          a.l2norm,
          a.l2_eps,
          a.scale != 0 ? a.scale : static_cast<float>(1 / std::sqrt(static_cast<double>(plan.D)))};
}

}  // namespace

bool kda_prefill_sm90_takes(const KdaArgs& a) {
  const int64_t D = a.q.size(2);
  bool takes = D == a.v.size(2) && (D == 64 || D == 128) && rows_of_16_bytes(a.g) && states_in_fours(a.state);
  for (const Tensor& t : {a.q, a.k, a.v, a.out})
    takes = takes && t.dtype == DType::bf16 && rows_of_16_bytes(t);
  return takes;
}

int64_t kda_prefill_sm90_workspace(const KdaArgs& a) { return make_plan(a).workspace.total; }

void kda_prefill_sm90(const Ctx& ctx, const KdaArgs& a) {
  const PrefillPlan plan = make_plan(a);
  if (plan.N == 0) return;
  check_workspace("kda prefill", a.workspace, plan);
  const KdaPrefillParams p = make_params(a, plan);
  KdaPrefillMaps maps{};  // not looked at where there is no token
  if (plan.T > 0)
    maps = {.q = row_boxes(a.q, kChunkTokens),
            .k = row_boxes(a.k, kChunkTokens),
            .v = row_boxes(a.v, kChunkTokens),
            .g = row_boxes(a.g, kChunkTokens)};
  const cudaStream_t stream = static_cast<cudaStream_t>(ctx.stream);
  const bool gate_f32 = a.g.dtype == DType::f32;
  if (plan.D == 128)
    gate_f32 ? run_prefill<KdaPrefill<128, true>>(p, maps, plan, stream)
             : run_prefill<KdaPrefill<128, false>>(p, maps, plan, stream);
  else
    gate_f32 ? run_prefill<KdaPrefill<64, true>>(p, maps, plan, stream)
             : run_prefill<KdaPrefill<64, false>>(p, maps, plan, stream);
}

}  // namespace kl::cuda
