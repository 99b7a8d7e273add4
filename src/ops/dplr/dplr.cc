// The doors of DPLR: check, then the one switch over devices.
#include "ops/dplr/dplr.h"

#include "ops/dplr/dplr_head.h"
#include "recurrence/decay.h"
#ifdef KL_CUDA
#include "cuda/launch.h"
#include "ops/dplr/dplr_cuda.h"
#endif

namespace kl {
namespace dplr {

recurrence::Problem problem_of(const DplrArgs& args) {
  return {.op = "dplr",
          .q = args.q,
          .k = args.k,
          .v = args.v,
          .out = args.out,
          .cu_seqlens = args.cu_seqlens,
          .state = args.state,
          .slot = args.slot,
          .slot_out = args.slot_out,
          .scale = args.scale};
}

}  // namespace dplr

namespace {

using recurrence::Head, recurrence::Problem;

double heads_and_tokens(const DplrArgs& args) { return static_cast<double>(args.v.size(0) * args.v.size(1)); }
// The recurrence: decay (1), predict, erase, write and read (2 each) on every element of the state.
double decode_flops(const DplrArgs& args) {
  return heads_and_tokens(args) * 9. * static_cast<double>(args.q.size(2) * args.v.size(2));
}
// Chunks: four products with the state, and four triangles of C/2 tokens over K and over V.
double prefill_flops(const DplrArgs& args) {
  const double K = static_cast<double>(args.q.size(2)), V = static_cast<double>(args.v.size(2));
  return heads_and_tokens(args) * (8 * K * V + 4 * recurrence::kChunk * (K + V));
}

#ifdef KL_CUDA
// Code for sm_90a runs on no other part, so equality.
bool takes_sm90(const DplrArgs& args) {
  return cuda::current_device().arch == 90 && cuda::dplr_prefill_sm90_takes(args);
}
#endif

using Work = void (*)(const DplrArgs&, const Head&);

void run(Ctx& ctx, const DplrArgs& args, std::string_view name, [[maybe_unused]] bool prefill, double flops,
         Work work) {
  const Problem problem = dplr::problem_of(args);
  recurrence::check_device(problem, ctx.device);
  dplr_check(args);
  switch (ctx.device) {
    case Device::cpu: {
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.a, args.b, args.g}),
                             flops);
      return recurrence::for_each_head(ctx.pool, problem, [&](const Head& h) { work(args, h); });
    }
    case Device::cuda: {
#ifdef KL_CUDA
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.a, args.b, args.g}),
                             flops);
      if (prefill && args.workspace && takes_sm90(args)) return cuda::dplr_prefill_sm90(ctx, args);
      return cuda::dplr_chunks(ctx, args);  // decode too: a token is a short chunk
#else
      recurrence::fail_without_cuda(problem.op);
#endif
    }
  }
}

}  // namespace

void dplr_check(const DplrArgs& args) {
  const Problem problem = dplr::problem_of(args);
  recurrence::check_problem(problem);
  const int64_t T = args.q.size(0), H = args.q.size(1), K = args.q.size(2);
  KL_CHECK(args.v.size(1) == H, "dplr v: expected the ", H, " heads of q, found ", args.v.size(1));
  recurrence::check_input(problem, "a", args.a, {T, H, K});
  recurrence::check_input(problem, "b", args.b, {T, H, K});
  recurrence::check_input(problem, "g", args.g, {T, H, K});
}

void dplr_prefill(Ctx& ctx, const DplrArgs& args) {
  run(ctx, args, "dplr_prefill", true, prefill_flops(args), dplr::chunk_head);
}

int64_t dplr_workspace_bytes([[maybe_unused]] const DplrArgs& args) {
#ifdef KL_CUDA
  if (args.q.device == Device::cuda && takes_sm90(args)) return cuda::dplr_prefill_sm90_workspace(args);
#endif
  return 0;
}

void dplr_decode(Ctx& ctx, const DplrArgs& args) {
  run(ctx, args, "dplr_decode", false, decode_flops(args), dplr::recurrent_head<float>);
}

}  // namespace kl
