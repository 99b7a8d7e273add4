// The doors of linear attention: check, then the one switch over devices.
#include "ops/linear_attention/linear_attention.h"

#include "ops/linear_attention/linear_attention_head.h"
#include "recurrence/decay.h"
#ifdef KL_CUDA
#include "ops/linear_attention/linear_attention_cuda.h"
#endif

namespace kl {
namespace linear_attention {

recurrence::Problem problem_of(const LinearAttentionArgs& args) {
  return {.op = "linear_attention",
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

}  // namespace linear_attention

namespace {

using recurrence::Head, recurrence::Problem;

double heads_and_tokens(const LinearAttentionArgs& args) {
  return static_cast<double>(args.v.size(0) * args.v.size(1));
}
// The recurrence: decay (1), write and read (2 each) on every element of the state.
double decode_flops(const LinearAttentionArgs& args) {
  return heads_and_tokens(args) * 5. * static_cast<double>(args.q.size(2) * args.v.size(2));
}
// Chunks: two products with the state, and a triangle of C/2 tokens over K and over V.
double prefill_flops(const LinearAttentionArgs& args) {
  const double K = static_cast<double>(args.q.size(2)), V = static_cast<double>(args.v.size(2));
  return heads_and_tokens(args) * (4 * K * V + recurrence::kChunk * (K + V));
}

using Work = void (*)(const LinearAttentionArgs&, const Head&);

void run(Ctx& ctx, const LinearAttentionArgs& args, std::string_view name, double flops, Work work) {
  const Problem problem = linear_attention::problem_of(args);
  recurrence::check_device(problem, ctx.device);
  linear_attention_check(args);
  switch (ctx.device) {
    case Device::cpu: {
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.g}), flops);
      return recurrence::for_each_head(ctx.pool, problem, [&](const Head& h) { work(args, h); });
    }
    case Device::cuda: {
#ifdef KL_CUDA
      const TraceScope trace(ctx.trace, name, recurrence::bytes_moved(problem, {args.g}), flops);
      return cuda::linear_attention_chunks(ctx, args);  // decode too: a token is a short chunk
#else
      recurrence::fail_without_cuda(problem.op);
#endif
    }
  }
}

}  // namespace

void linear_attention_check(const LinearAttentionArgs& args) {
  const Problem problem = linear_attention::problem_of(args);
  recurrence::check_problem(problem);
  const int64_t T = args.q.size(0), K = args.q.size(2), Hv = args.v.size(1);
  if (!args.g) return;
  args.g.rank == 2 ? recurrence::check_input(problem, "g", args.g, {T, Hv})
                   : recurrence::check_input(problem, "g", args.g, {T, Hv, K});
}

void linear_attention_prefill(Ctx& ctx, const LinearAttentionArgs& args) {
  run(ctx, args, "linear_attention_prefill", prefill_flops(args), linear_attention::chunk_head);
}

void linear_attention_decode(Ctx& ctx, const LinearAttentionArgs& args) {
  run(ctx, args, "linear_attention_decode", decode_flops(args), linear_attention::recurrent_head<float>);
}

}  // namespace kl
