// The doors of the delta rule: check, then the one switch over devices.
#include "ops/delta_net/delta_net.h"

#include "ops/delta_net/delta_net_head.h"
#include "recurrence/decay.h"
#ifdef KL_CUDA
#include "ops/delta_net/delta_net_cuda.h"
#endif

namespace kl {
namespace delta_net {

recurrence::Problem problem_of(const DeltaNetArgs& args) {
  return {.op = "delta_net",
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

}  // namespace delta_net

namespace {

using recurrence::Head, recurrence::Problem;

double heads_and_tokens(const DeltaNetArgs& args) {
  return static_cast<double>(args.v.size(0) * args.v.size(1));
}
// The recurrence: decay (1), predict, write and read (2 each) on every element of the state.
double decode_flops(const DeltaNetArgs& args) {
  return heads_and_tokens(args) * 7. * static_cast<double>(args.q.size(2) * args.v.size(2));
}
// Chunks: three products with the state, and two triangles of C/2 tokens over K and over V.
double prefill_flops(const DeltaNetArgs& args) {
  const double K = static_cast<double>(args.q.size(2)), V = static_cast<double>(args.v.size(2));
  return heads_and_tokens(args) * (6 * K * V + 2 * recurrence::kChunk * (K + V));
}

using Work = void (*)(const DeltaNetArgs&, const Head&);

void run(Ctx& ctx, const DeltaNetArgs& args, std::string_view name, double flops, Work work) {
  const Problem problem = delta_net::problem_of(args);
  recurrence::check_device(problem, ctx.device);
  delta_net_check(args);
  switch (ctx.device) {
    case Device::cpu: {
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.g, args.beta}), flops);
      return recurrence::for_each_head(ctx.pool, problem, [&](const Head& h) { work(args, h); });
    }
    case Device::cuda: {
#ifdef KL_CUDA
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.g, args.beta}), flops);
      return cuda::delta_net_chunks(ctx, args);  // decode too: a token is a short chunk
#else
      recurrence::fail_without_cuda(problem.op);
#endif
    }
  }
}

}  // namespace

void delta_net_check(const DeltaNetArgs& args) {
  const Problem problem = delta_net::problem_of(args);
  recurrence::check_problem(problem);
  const int64_t T = args.q.size(0), Hv = args.v.size(1);
  if (args.g) recurrence::check_input(problem, "g", args.g, {T, Hv});
  recurrence::check_input(problem, "beta", args.beta, {T, Hv});
  recurrence::check_parameter(problem, "gate.A_log", args.gate.A_log, {Hv});
  recurrence::check_parameter(problem, "gate.dt_bias", args.gate.dt_bias, {Hv});
  KL_CHECK(!args.l2norm || (args.l2_eps >= 0 && std::isfinite(args.l2_eps)),
           "delta_net l2_eps: expected a number of at least 0, found ", args.l2_eps);
}

void delta_net_prefill(Ctx& ctx, const DeltaNetArgs& args) {
  run(ctx, args, "delta_net_prefill", prefill_flops(args), delta_net::chunk_head);
}

void delta_net_decode(Ctx& ctx, const DeltaNetArgs& args) {
  run(ctx, args, "delta_net_decode", decode_flops(args), delta_net::recurrent_head<float>);
}

}  // namespace kl
