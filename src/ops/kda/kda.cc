// The doors of Kimi Delta Attention: check, then the one switch over devices.
#include "ops/kda/kda.h"

#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_head.h"
#ifdef KL_CUDA
#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#endif

namespace kl {
namespace kda {

Head head_of(const KdaArgs& args, int64_t sequence, int64_t head) {
  const int64_t K = args.q.size(2), slot = index_at(args.slot, sequence);
  return {.args = args,
          .head = head,
          .qk_head = head / (args.v.size(1) / args.q.size(1)),
          .begin = index_at(args.cu_seqlens, sequence),
          .end = index_at(args.cu_seqlens, sequence + 1),
          .read_slot = slot,
          .write_slot = args.slot_out ? index_at(args.slot_out, sequence) : slot,
          .K = K,
          .V = args.v.size(2),
          .scale = args.scale != 0 ? args.scale : 1 / std::sqrt(static_cast<double>(K))};
}

void for_each_head(ThreadPool* pool, const KdaArgs& args, void (*work)(const Head&)) {
  const int64_t N = args.cu_seqlens.size(0) - 1, Hv = args.v.size(1);
  parallel_for(pool, N * Hv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(head_of(args, task / Hv, task % Hv));
  });
}

}  // namespace kda

namespace {

void check_call(const Ctx& ctx, const KdaArgs& args) {
  KL_CHECK(ctx.device == args.q.device, "kda q: expected a tensor on the ", name_of(ctx.device),
           " like the context, found one on the ", name_of(args.q.device));
  kda_check(args);
}

#ifdef KL_CUDA
// Code for sm_90a runs on no other part, so equality.
bool takes_sm90(const KdaArgs& args) {
  return cuda::current_device().arch == 90 && cuda::kda_prefill_sm90_takes(args);
}

void prefill_cuda(const Ctx& ctx, const KdaArgs& args) {
  takes_sm90(args) ? cuda::kda_prefill_sm90(ctx, args) : cuda::kda_prefill(ctx, args);
}
#else
[[noreturn]] void fail_without_cuda() {
  detail::fail(
      "kda: the tensors are on a GPU, but this build has no CUDA kernels (configure with KL_CUDA=ON)");
}
#endif

// Every input read and every output written once, and each state both.
double bytes_moved(const KdaArgs& args) {
  double bytes = 0;
  for (const Tensor& t : {args.q, args.k, args.v, args.g, args.beta, args.out})
    bytes += static_cast<double>(t.bytes());
  const double heads = static_cast<double>(args.slot.size(0) * args.v.size(1));
  return bytes + 2 * heads * static_cast<double>(args.q.size(2) * args.v.size(2) * size_of(args.state.dtype));
}

// Of all tokens and value heads, for `per_token` of one.
double flops(const KdaArgs& args, double per_token) {
  return static_cast<double>(args.v.size(0) * args.v.size(1)) * per_token;
}

// The recurrence: decay (1), predict, write and read (2 each) on every element of the state.
double decode_flops(const KdaArgs& args) {
  return flops(args, 7. * static_cast<double>(args.q.size(2) * args.v.size(2)));
}

// Chunks of C tokens, which are 16 on every device: three products with the state, and two triangles of C/2
// tokens over K and over V.
double prefill_flops(const KdaArgs& args) {
  const double K = static_cast<double>(args.q.size(2)), V = static_cast<double>(args.v.size(2));
  return flops(args, 6 * K * V + 2 * kKdaChunk * (K + V));
}

}  // namespace

void kda_prefill(Ctx& ctx, const KdaArgs& args) {
  check_call(ctx, args);
  switch (ctx.device) {
    case Device::cpu: {
      const TraceScope trace(ctx.trace, "kda_prefill", bytes_moved(args), prefill_flops(args));
      return kda_prefill_cpu(ctx, args);
    }
    case Device::cuda: {
#ifdef KL_CUDA
      const TraceScope trace(ctx.trace, "kda_prefill", bytes_moved(args), prefill_flops(args));
      return prefill_cuda(ctx, args);
#else
      fail_without_cuda();
#endif
    }
  }
}

int64_t kda_workspace_bytes(const KdaArgs& args) {
#ifdef KL_CUDA
  if (args.q.device == Device::cuda && takes_sm90(args)) return cuda::kda_prefill_sm90_workspace(args);
#endif
  (void)args;
  return 0;
}

void kda_decode(Ctx& ctx, const KdaArgs& args) {
  check_call(ctx, args);
  switch (ctx.device) {
    case Device::cpu: {
      const TraceScope trace(ctx.trace, "kda_decode", bytes_moved(args), decode_flops(args));
      return kda_decode_cpu(ctx, args);
    }
    case Device::cuda: {
#ifdef KL_CUDA
      const TraceScope trace(ctx.trace, "kda_decode", bytes_moved(args), decode_flops(args));
      return cuda::kda_decode(ctx, args);
#else
      fail_without_cuda();
#endif
    }
  }
}

}  // namespace kl
