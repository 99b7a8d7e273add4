// KDA on the CPU: one value head of one sequence is a task, so that results do not depend on the number of
// threads. The state of a head waits in scratch while its kernel runs, but for a decode step on a pool that
// holds states as the kernel wants them.
#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_head.h"
#include "simd/scratch.h"

namespace kl {
namespace {

using kda::Head;
using kda::HeadGate;

KdaHeadRows rows_of(const Tensor& t, int64_t head) {
  const int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data) + head * t.stride[1] * size, t.dtype, t.stride[0] * size};
}

KdaCpuHead cpu_head(const Head& h, const HeadGate<float>& gate) {
  const KdaArgs& args = h.args;
  return {.q = rows_of(args.q, h.qk_head),
          .k = rows_of(args.k, h.qk_head),
          .v = rows_of(args.v, h.head),
          .g = rows_of(args.g, h.head),
          .beta = rows_of(args.beta, h.head),
          .out = rows_of(args.out, h.head),
          .K = h.K,
          .V = h.V,
          .scale = static_cast<float>(h.scale),
          .l2norm = args.l2norm,
          .l2_eps = args.l2_eps,
          .gate = args.gate.kind,
          .rate = gate.rate(),
          .bias = gate.bias(),
          .lower_bound = args.gate.lower_bound};
}

int64_t state_size(const KdaArgs& args) {
  return kda_padded(args.q.size(2)) * kda_state_stride(args.v.size(2));
}

// The state at `slot` -> [kda_padded(K), kda_state_stride(V)].
void load_padded(const Head& h, int64_t slot, float* S) {
  const int64_t stride = kda_state_stride(h.V);
  load_state(h, slot, S, stride);
  std::fill(S + h.K * stride, S + kda_padded(h.K) * stride, 0.f);
}

// The state at `slot` <-> panels as the chunk kernel has them.
int64_t panel_index(const Head& h, int64_t d, int64_t i) {
  return i / kKdaPanel * kda_panel_stride(h.K) + d * kKdaPanel + i % kKdaPanel;
}
void load_panels(const Head& h, int64_t slot, float* S) {
  std::fill(S, S + kda_panels_size(h.K, h.V), 0.f);
  if (slot < 0) return;
  for_each_of_state(h, slot,
                    [&](auto x, int64_t d, int64_t i) { S[panel_index(h, d, i)] = static_cast<float>(x); });
}
void store_panels(const Head& h, const float* S, int64_t slot) {
  if (slot < 0) return;
  for_each_of_state(
      h, slot, [&]<class T>(T& x, int64_t d, int64_t i) { x = static_cast<T>(S[panel_index(h, d, i)]); });
}

// Checkpoints lie between chunks: their rows are multiples of 16 tokens.
void prefill_head(const Head& h, float* memory) {
  static_assert(16 % kKdaChunk == 0);
  float *const S = memory, *const rest = memory + kda_panels_size(h.K, h.V);
  const HeadGate<float> gate(h.args.gate, h.head, h.K);
  const KdaCpuHead head = cpu_head(h, gate);
  int64_t begin = h.begin;
  const auto keep_at = [&](int64_t end, int64_t slot) {
    KL_ACTIVE_ISA(kda_chunks)({head, begin, end, S, rest});
    begin = end;
    store_panels(h, S, slot);
  };
  load_panels(h, h.read_slot, S);
  kda::for_each_checkpoint(h.args, h.begin, h.end, keep_at);
  keep_at(h.end, h.write_slot);
}

// Can the kernel read and write the states where they are?
bool decodes_in_pool(const Head& h) {
  return h.read_slot >= 0 && h.write_slot >= 0 && !h.args.checkpoint_row && !h.args.state_v_first &&
         h.args.state.dtype == DType::f32;
}

void decode_head(const Head& h, float* memory) {
  float *const S = memory, *const rest = memory + state_size(h.args);
  const int64_t stride = kda_state_stride(h.V);
  const HeadGate<float> gate(h.args.gate, h.head, h.K);
  const KdaCpuHead head = cpu_head(h, gate);
  const auto step = [&](int64_t t, const float* from, float* to, int64_t row) {
    KL_ACTIVE_ISA(kda_decode_head)({head, t, kda::load_beta<float>(h, t), from, row, to, row, rest});
  };
  if (decodes_in_pool(h)) {
    const float* from = h.args.state.at<float>(h.read_slot, h.head);
    float* const to = h.args.state.at<float>(h.write_slot, h.head);
    for (int64_t t = h.begin; t < h.end; ++t, from = to) step(t, from, to, h.args.state.stride[2]);
    return;
  }
  load_padded(h, h.read_slot, S);
  for (int64_t t = h.begin; t < h.end; ++t) {
    step(t, S, S, stride);
    kda::for_each_checkpoint(h.args, t, t + 1,
                             [&](int64_t, int64_t slot) { store_state(h, S, slot, stride); });
  }
  store_state(h, S, h.write_slot, stride);
}

// Nothing happened in a sequence without tokens: its state keeps its bits.
void copy_state(const Head& h, float* S) {
  if (h.read_slot == h.write_slot) return;
  load_padded(h, h.read_slot, S);
  store_state(h, S, h.write_slot, kda_state_stride(h.V));
}

void run_heads(Ctx& ctx, const KdaArgs& args, int64_t kernel_memory, void (*work)(const Head&, float*)) {
  const int64_t N = args.cu_seqlens.size(0) - 1, Hv = args.v.size(1);
  Scratch scratch(ctx);
  for_each_with_scratch(
      ctx.pool, N * Hv, scratch,
      std::max(state_size(args), kda_panels_size(args.q.size(2), args.v.size(2))) + kernel_memory,
      [&](int64_t task, float* memory) {
        const Head h = kda::head_of(args, task / Hv, task % Hv);
        h.begin == h.end ? copy_state(h, memory) : work(h, memory);
      });
}

}  // namespace

// Where beta may pass 1, rounding errors of f32 add up from chunk to chunk (kda_chunk_ref.cc says how): f64.
void kda_prefill_cpu(Ctx& ctx, const KdaArgs& args) {
  if (args.beta_kind != KdaBeta::sigmoid) return kda::for_each_head(ctx.pool, args, kda::chunk_head);
  run_heads(ctx, args, kda_chunks_memory(args.q.size(2), args.v.size(2)), prefill_head);
}

void kda_decode_cpu(Ctx& ctx, const KdaArgs& args) {
  run_heads(ctx, args, kda_decode_memory(args.q.size(2), args.v.size(2)), decode_head);
}

}  // namespace kl
