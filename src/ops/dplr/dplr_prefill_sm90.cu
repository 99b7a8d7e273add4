// DPLR prefill on Hopper (cuda/prefill_sm90.cuh with the producers of dplr_factors_sm90.cuh), for K = V = 64
// or 128 and bf16 rows.
#include "cuda/prefill_sm90.cuh"
#include "ops/dplr/dplr_cuda.h"
#include "ops/dplr/dplr_factors_sm90.cuh"

namespace kl::cuda {
namespace {

PrefillPlan make_plan(const DplrArgs& a) {
  return prefill_plan({.T = a.v.size(0),
                       .N = a.cu_seqlens.size(0) - 1,
                       .heads = a.v.size(1),
                       .D = a.q.size(2),
                       .whole = false,
                       .strong = false,
                       .known = false,
                       .closed = kClosedAfter,
                       .batch_invariant = false});
}

}  // namespace

bool dplr_prefill_sm90_takes(const DplrArgs& a) {
  const int64_t D = a.q.size(2);
  bool takes = D == a.v.size(2) && (D == 64 || D == 128) && states_in_fours(a.state);
  for (const Tensor& t : {a.q, a.k, a.a, a.b, a.v, a.g, a.out})
    takes = takes && t.dtype == DType::bf16 && rows_of_16_bytes(t);
  return takes;
}

int64_t dplr_prefill_sm90_workspace(const DplrArgs& a) { return make_plan(a).workspace.total; }

void dplr_prefill_sm90(const Ctx& ctx, const DplrArgs& a) {
  const PrefillPlan plan = make_plan(a);
  if (plan.N == 0) return;
  check_workspace("dplr prefill", a.workspace, plan);
  const PrefillTensors tensors{.out = a.out,
                               .cu_seqlens = a.cu_seqlens,
                               .state = a.state,
                               .slot = a.slot,
                               .slot_out = a.slot_out,
                               .workspace = a.workspace,
                               .qk_heads = plan.heads};
  const DplrPrefillParams p{
      prefill_params(tensors, plan),
      a.scale != 0 ? a.scale : static_cast<float>(1 / std::sqrt(static_cast<double>(plan.D)))};
  DplrPrefillMaps maps{};  // not looked at where there is no token
  if (plan.T > 0)
    maps = {.q = row_boxes(a.q, kChunkTokens),
            .k = row_boxes(a.k, kChunkTokens),
            .a = row_boxes(a.a, kChunkTokens),
            .b = row_boxes(a.b, kChunkTokens),
            .v = row_boxes(a.v, kChunkTokens),
            .g = row_boxes(a.g, kChunkTokens)};
  const cudaStream_t stream = static_cast<cudaStream_t>(ctx.stream);
  if (plan.D == 128)
    run_prefill<DplrPrefill<128>>(p, maps, plan, stream);
  else
    run_prefill<DplrPrefill<64>>(p, maps, plan, stream);
}

}  // namespace kl::cuda
