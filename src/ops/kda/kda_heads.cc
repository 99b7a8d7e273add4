// KDA on the CPU: some columns of V of one value head of one sequence are a task. Heads and columns are
// independent of each other, so that results do not depend on the number of threads. The state of a task
// waits in scratch while its kernel runs, but for a decode step on a pool that holds states as the kernel
// wants them.
#include "ops/kda/kda_heads.h"

#include "simd/scratch.h"

namespace kl {
namespace kda {

namespace {
KdaHeadRows rows_of(const Tensor& t, int64_t head) {
  const int64_t size = size_of(t.dtype);
  return {static_cast<char*>(t.data) + head * t.stride[1] * size, t.dtype, t.stride[0] * size};
}
}  // namespace

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

// f(elements of the pool, elements of the panels, n) for all pieces of rows that lie in order in both; false
// if the pool has other elements or another order.
template <class Panels, class F>
bool for_each_piece(const Head& h, int64_t slot, Panels* S, F&& f) {
  const Tensor pool = h.args.state[slot][h.head];
  if (pool.dtype != DType::f32 || h.args.state_v_first || pool.stride[1] != 1) return false;
  for (int64_t d = 0; d < h.K; ++d)
    for (int64_t i = 0; i < h.V; i += kKdaPanel)
      f(pool.ptr<float>() + d * pool.stride[0] + i, S + panel_index(h.K, d, i), std::min(kKdaPanel, h.V - i));
  return true;
}

void load_panels(const Head& h, int64_t slot, float* S) {
  std::fill(S, S + kda_panels_size(h.K, h.V), 0.f);
  if (slot < 0) return;
  if (for_each_piece(h, slot, S, [](const float* x, float* s, int64_t n) { std::copy_n(x, n, s); })) return;
  for_each_of_state(h, slot,
                    [&](auto x, int64_t d, int64_t i) { S[panel_index(h.K, d, i)] = static_cast<float>(x); });
}

void store_panels(const Head& h, const float* S, int64_t slot) {
  if (slot < 0) return;
  if (for_each_piece(h, slot, S, [](float* x, const float* s, int64_t n) { std::copy_n(s, n, x); })) return;
  for_each_of_state(
      h, slot, [&]<class T>(T& x, int64_t d, int64_t i) { x = static_cast<T>(S[panel_index(h.K, d, i)]); });
}

// Checkpoints lie between chunks: their rows are multiples of 16 tokens.
void prefill_rows(const Head& h, const KdaCpuHead& head, int64_t begin, int64_t end, KdaProducts products,
                  float* S, float* memory) {
  static_assert(16 % kKdaChunk == 0);
  const auto advance_to = [&](int64_t row) {
    const KdaChunks chunks = {head, begin, row, S, memory, products == KdaProducts::pairs};
    products == KdaProducts::tiles ? KL_ACTIVE_ISA(kda_chunks_tiles)(chunks)
                                   : KL_ACTIVE_ISA(kda_chunks)(chunks);
    begin = row;
  };
  for_each_checkpoint(h.args, begin, end, [&](int64_t row, int64_t slot) {
    advance_to(row);
    store_panels(h, S, slot);
  });
  advance_to(end);
}

}  // namespace kda

namespace {

using kda::Head;
using kda::HeadGate;

int64_t state_size(const KdaArgs& args) {
  return kda_padded(args.q.size(2)) * kda_state_stride(args.v.size(2));
}

// The state at `slot` -> [kda_padded(K), kda_state_stride(V)].
void load_padded(const Head& h, int64_t slot, float* S) {
  const int64_t stride = kda_state_stride(h.V);
  load_state(h, slot, S, stride);
  std::fill(S + h.K * stride, S + kda_padded(h.K) * stride, 0.f);
}

template <KdaProducts products>
void prefill_head(const Head& h, float* memory) {
  const HeadGate<float> gate(h.args.gate, h.head, h.K);
  kda::load_panels(h, h.read_slot, memory);
  kda::prefill_rows(h, kda::cpu_head(h, gate), h.begin, h.end, products, memory,
                    memory + kda_panels_size(h.K, h.V));
  kda::store_panels(h, memory, h.write_slot);
}

// f64, with memory of its own.
void prefill_head_f64(const Head& h, float*) { kda::chunk_head(h); }

// Can the kernel read and write the states where they are?
bool decodes_in_pool(const Head& h) {
  return h.read_slot >= 0 && h.write_slot >= 0 && !h.args.checkpoint_row && !h.args.state_v_first &&
         h.args.state.dtype == DType::f32;
}

void decode_head(const Head& h, float* memory) {
  float *const S = memory, *const rest = memory + state_size(h.args);
  const int64_t stride = kda_state_stride(h.V);
  const HeadGate<float> gate(h.args.gate, h.head, h.K);
  const KdaCpuHead head = kda::cpu_head(h, gate);
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

// Into how many parts of whole panels the columns of V are cut, so that every thread has work: each part
// prepares its chunks (norms, gates, pairs) again, which is kPrepared of the time of a whole head.
int64_t parts_of(int64_t heads, int64_t V, int64_t threads) {
  constexpr double kPrepared = 0.3;
  int64_t best = 1;
  double least = 0;
  for (int64_t parts = 1; parts == 1 || V / parts >= 2 * kKdaPanel; parts *= 2) {
    const auto rounds = static_cast<double>((heads * parts + threads - 1) / threads);
    const double time = rounds * (kPrepared + (1 - kPrepared) / static_cast<double>(parts));
    if (parts == 1 || time < 0.95 * least) best = parts, least = time;
  }
  return best;
}

// The problem of columns [begin, end) of V, which is one of its own.
KdaArgs columns_of(const KdaArgs& args, int64_t begin, int64_t end) {
  KdaArgs part = args;
  part.v = args.v.slice(2, begin, end), part.out = args.out.slice(2, begin, end);
  if (args.state) part.state = args.state.slice(args.state_v_first ? 2 : 3, begin, end);
  return part;
}

// work(head, memory) for all heads, in parts.
void run_heads(Ctx& ctx, const KdaArgs& args, int64_t memory, void (*work)(const Head&, float*)) {
  const int64_t N = args.cu_seqlens.size(0) - 1, Hv = args.v.size(1), V = args.v.size(2);
  const int64_t parts = parts_of(N * Hv, V, ctx.pool ? ctx.pool->threads() : 1);
  const int64_t width = kda_padded((V + parts - 1) / parts);
  std::vector<KdaArgs> columns;
  for (int64_t begin = 0; begin < V; begin += width)
    columns.push_back(columns_of(args, begin, std::min(begin + width, V)));
  const auto count = static_cast<int64_t>(columns.size());
  Scratch scratch(ctx);
  for_each_with_scratch(ctx.pool, N * Hv * count, scratch, memory, [&](int64_t task, float* mine) {
    const int64_t head = task / count;
    const Head h = kda::head_of(columns[static_cast<size_t>(task % count)], head / Hv, head % Hv);
    h.begin == h.end ? copy_state(h, mine) : work(h, mine);
  });
}

// Where beta may pass 1, rounding errors of f32 add up from chunk to chunk (kda_chunk_ref.cc says how): f64.
void prefill(Ctx& ctx, const KdaArgs& args, KdaProducts products) {
  const int64_t K = args.q.size(2), V = args.v.size(2);
  if (args.beta_kind != KdaBeta::sigmoid) return run_heads(ctx, args, state_size(args), prefill_head_f64);
  if (args.segment > 0) return kda::prefill_segments(ctx, args, products);
  run_heads(ctx, args, std::max(state_size(args), kda_panels_size(K, V) + kda::prefill_memory(K, V)),
            products == KdaProducts::tiles   ? prefill_head<KdaProducts::tiles>
            : products == KdaProducts::pairs ? prefill_head<KdaProducts::pairs>
                                             : prefill_head<KdaProducts::f32>);
}

// A Sapphire Rapids does a quarter as many dot products of pairs as FMA, so that KDA gains nothing by them
// over f32, which is more exact (docs/2026-11-25-kda-amx.md). By family, not measured: bits must not depend
// on that.
bool dots_are_slow() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

}  // namespace

int64_t kda_scratch_bytes(int64_t K, int64_t V, int threads) {
  const int64_t state = kda_padded(K) * kda_state_stride(V);
  const int64_t prefill = kda_panels_size(K, V) + kda::prefill_memory(K, V),
                decode = state + kda_decode_memory(K, V);
  return threads * std::max({state, prefill, decode}) * int64_t{sizeof(float)};
}

KdaProducts kda_products(Precision precision) {
  if (precision != Precision::bf16) return KdaProducts::f32;
  switch (active_isa()) {
    case Isa::amx: return KdaProducts::tiles;
    case Isa::avx512_bf16: return dots_are_slow() ? KdaProducts::f32 : KdaProducts::pairs;
    default: return KdaProducts::f32;
  }
}

void kda_prefill_cpu(Ctx& ctx, const KdaArgs& args) { prefill(ctx, args, kda_products(ctx.precision)); }
void kda_prefill_cpu_with(KdaProducts products, Ctx& ctx, const KdaArgs& args) {
  prefill(ctx, args, products);
}

void kda_decode_cpu(Ctx& ctx, const KdaArgs& args) {
  run_heads(ctx, args, state_size(args) + kda_decode_memory(args.q.size(2), args.v.size(2)), decode_head);
}

}  // namespace kl
