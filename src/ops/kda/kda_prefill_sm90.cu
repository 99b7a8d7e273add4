// KDA prefill on Hopper: one persistent kernel in which tensor cores carry the state in registers while other
// warps prepare the coming chunks (kda_pipeline_sm90.cuh says how), for K = V = 64 or 128 and bf16 rows.
// docs/2026-11-23-kda-prefill-hopper.md has the reasons and the measurements.
#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_factors_sm90.cuh"
#include "ops/kda/kda_items_sm90.cuh"

namespace kl::cuda {
namespace {

// Registers of a thread: 256 consumers and 256 others share 65536.
constexpr int kConsumerRegisters = 144;
constexpr int kOtherRegisters = 112;

template <int D, bool kGateF32>
__global__ void __launch_bounds__(kBlockThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams p, const __grid_constant__ PrefillMaps maps) {
  extern __shared__ __align__(1024) char memory[];
  using R = Ring<D, kGateF32>;
  const R ring{memory};
  // The same in all lanes, and the compiler knows.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kSlots; ++s) {
      mbarrier_init(ring.raw(s), 1);
      mbarrier_init(ring.ready(s), 1);
      mbarrier_init(ring.free(s), D / 16);
    }
    ring.stopped() = -1;
    fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  release_next_kernel();
  if (warp < kConsumerWarps) {
    registers_increase<kConsumerRegisters>();
    if (warp < D / 16 && Consumer<D, kGateF32>(p, ring, warp).run()) Joiner<D, kGateF32>(p, memory).run();
  } else {
    registers_decrease<kOtherRegisters>();
    const int producer = warp - kConsumerWarps;
    if (producer < kProducers) {
      switch (p.gate.kind) {
        case KdaGateKind::log_decay:
          Producer<D, kGateF32, KdaGateKind::log_decay>(p, ring, producer).run(producer);
          break;
        case KdaGateKind::softplus:
          Producer<D, kGateF32, KdaGateKind::softplus>(p, ring, producer).run(producer);
          break;
        case KdaGateKind::bounded:
          Producer<D, kGateF32, KdaGateKind::bounded>(p, ring, producer).run(producer);
          break;
      }
    } else {
      Loader<D, kGateF32>(p, maps, ring).run();
    }
  }
}

// Before prefill_kernel: what blocks tell each other is cleared. Nobody has to wait for it before the first
// item is taken; and since it begins after its predecessors' end, prefill_kernel does so too.
__global__ void clear_kernel(int* words, int64_t count) {
  follow_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}

// How sequences are cut. A wrong guess of the gate costs time and nothing else.
struct Cut {
  int64_t segment_chunks = INT_MAX / 2;
  int64_t first_shares = 1;
  bool probes = false;
};

// With a strong gate a cut costs next to nothing: as many as make the blocks' turns come out even. `items`:
// (sequence, head) pairs, of `chunks` chunks each.
Cut cut_strong(int64_t items, int64_t chunks) {
  const int64_t blocks = current_device().multiprocessors;
  constexpr int64_t kTurn = 11, kSplit = 8;  // chunks' worth of time: of a turn, of any split at all
  int64_t best = 1, least = INT64_MAX;
  for (int64_t n = 1; n <= 1 + blocks / 4 && (n == 1 || chunks / n >= kMinSegmentChunks); ++n) {
    const int64_t turns = (items * n + blocks - 1) / blocks;
    const int64_t cost = turns * ((chunks + n - 1) / n + kTurn) + (n > 1 ? kSplit : 0);
    if (cost < least) best = n, least = cost;
  }
  if (best == 1) return {};
  return {.segment_chunks = std::max<int64_t>(kMinSegmentChunks, (chunks + best - 1) / best), .probes = true};
}

// With a weak one a segment takes two items, values and transition, and joining takes time. The first one
// has no transition; where transitions are expected to be long it is made longer, so that its blocks end with
// the others. `closed`: chunks after which a transition is expected to be closed.
Cut cut_weak(int64_t items, int64_t chunks, int64_t closed) {
  const int64_t blocks = current_device().multiprocessors, others = blocks - items;
  // Chunks' worth of time: of any cut, of a state's way through a segment. Chunks that are applied in one's.
  constexpr int64_t kSplit = 16, kChain = 3, kApplied = 150;
  int64_t least = chunks;
  Cut best;
  for (int64_t n = 2; others > 0 && n <= 1 + blocks / 4; ++n) {
    const int64_t later = items * (n - 1);
    for (int64_t shares = 1; shares <= (2 * later + others - 1) / others; ++shares) {
      const int64_t own = (chunks + shares + n - 2) / (shares + n - 1), followed = std::min(own, closed);
      if (own < kMinSegmentChunks) break;
      int64_t longest = std::max(shares * own, later * (own + followed) / others);
      if (2 * later > others) longest = std::max(longest, 2 * followed);
      if (10 * later > 9 * others) longest = std::max(longest, own + followed);
      const int64_t join =
          kChain * ((4 * items + blocks - 1) / blocks) * (n - 1) + later * followed / kApplied;
      if (longest + join + kSplit < least)
        best = {.segment_chunks = own, .first_shares = shares}, least = longest + join + kSplit;
    }
  }
  return best;
}
// A bounded gate's channels have about a third of the bound; one of softplus with the usual start is slower.
int64_t expected_to_close(const KdaGate& gate) {
  if (gate.kind == KdaGateKind::bounded && gate.lower_bound < 0)
    return static_cast<int64_t>(std::clamp(-6 / gate.lower_bound, 4.f, 4096.f));
  return 110;
}

// Where the cuts of a sequence must not depend on the others: by the gate and the heads. With a strong gate
// 1024 tokens: B1 T8192 H32 gets as many segments as blocks can take at a time. With a weak one the
// transitions double the work, which pays for few heads and long sequences only.
Cut cut_invariant(int64_t heads, bool strong) {
  if (strong) return {.segment_chunks = 64, .probes = true};
  if (heads <= 16) return {.segment_chunks = 256};
  return {};
}

// Sequences are taken to be of one length; longer ones get more segments.
Cut cut_sequences(const KdaArgs& a, int64_t T, int64_t N, int64_t heads) {
  if (a.checkpoint_row) return {};  // the states inside a segment are known only where there is no cut
  const bool bounded = a.gate.kind == KdaGateKind::bounded && a.gate.lower_bound <= -1;
  if (a.batch_invariant) return cut_invariant(heads, bounded);
  const int64_t chunks = (T + kChunkTokens * N - 1) / (kChunkTokens * N);
  // Several sequences that fill the device are of several lengths: taking the longest first evens them out.
  const bool strong = bounded && (N == 1 || N * heads < current_device().multiprocessors);
  return strong ? cut_strong(N * heads, chunks) : cut_weak(N * heads, chunks, expected_to_close(a.gate));
}

struct Plan {
  int64_t T, N, heads, D, segments = 0;  // segments: at most; 0: every sequence is one
  Cut cut{};
  PrefillWorkspace workspace{};
};
Plan make_plan(const KdaArgs& a) {
  Plan plan{.T = a.v.size(0), .N = a.cu_seqlens.size(0) - 1, .heads = a.v.size(1), .D = a.q.size(2)};
  if (plan.N == 0) return plan;
  plan.cut = cut_sequences(a, plan.T, plan.N, plan.heads);
  const int64_t most = max_segments(plan.T, plan.N, plan.cut.segment_chunks);
  if (most > plan.N) plan.segments = most;
  plan.workspace = prefill_workspace(plan.T, plan.N, plan.heads, plan.D, plan.segments);
  return plan;
}

PrefillParams make_params(const KdaArgs& a, const Plan& plan) {
  char* const memory = static_cast<char*>(a.workspace.data);
  const auto part = [&](int64_t offset) { return plan.segments > 0 ? memory + offset : nullptr; };
  Operand state{};
  if (a.state) state = operand(a.state);
  return {.q = operand(a.q),
          .k = operand(a.k),
          .v = operand(a.v),
          .g = operand(a.g),
          .beta = operand(a.beta),
          .out = operand(a.out),
          .cu_seqlens = row_numbers(a.cu_seqlens),
          .sequences = static_cast<int>(plan.N),
          .heads = static_cast<int>(plan.heads),
          .group = static_cast<int>(plan.heads / a.q.size(1)),
          .state = state,
          .state_row_stride = a.state ? a.state.stride[2] : 0,
          .state_v_first = a.state_v_first,
          .slot = static_cast<const int32_t*>(a.slot.data),
          .slot_out = static_cast<const int32_t*>(a.slot_out.data),
          .checkpoint_row = static_cast<const int32_t*>(a.checkpoint_row.data),
          .checkpoint_slot = static_cast<const int32_t*>(a.checkpoint_slot.data),
          .checkpoints = a.checkpoint_row ? static_cast<int>(a.checkpoint_row.size(0)) : 0,
          .gate = gate_params(a.gate),
          .beta_kind = a.beta_kind,
          .l2norm = a.l2norm,
          .l2_eps = a.l2_eps,
          .scale = a.scale != 0 ? a.scale : static_cast<float>(1 / std::sqrt(static_cast<double>(plan.D))),
          .segment_chunks = static_cast<int>(plan.cut.segment_chunks),
          .first_shares = static_cast<int>(plan.cut.first_shares),
          .bias_in_ring = a.gate.dt_bias && a.gate.kind != KdaGateKind::log_decay &&
                          reinterpret_cast<uintptr_t>(a.gate.dt_bias.data) % 16 == 0 &&
                          a.gate.dt_bias.stride[0] % 4 == 0,
          .probes = plan.segments > 0 && plan.cut.probes,
          .counters = reinterpret_cast<PrefillCounters*>(memory),
          .progress = reinterpret_cast<int*>(part(plan.workspace.progress)),
          .ready = reinterpret_cast<int*>(part(plan.workspace.ready)),
          .chained = reinterpret_cast<int*>(part(plan.workspace.chained)),
          .carried = reinterpret_cast<float*>(part(plan.workspace.carried)),
          .transition = reinterpret_cast<float*>(part(plan.workspace.transition)),
          .queries = part(plan.workspace.queries)};
}

template <int D, bool kGateF32>
void run(const PrefillParams& p, const PrefillMaps& maps, const Plan& plan, cudaStream_t stream) {
  constexpr unsigned kClearThreads = 256;
  const int64_t words = plan.workspace.carried / 4;
  const unsigned clearing = static_cast<unsigned>((words + kClearThreads - 1) / kClearThreads);
  launch(clear_kernel, {.grid = clearing, .block = kClearThreads, .stream = stream, .overlap_previous = true},
         reinterpret_cast<int*>(p.counters), words);
  // Of a cut sequence's segments all but the first may take two items.
  const int64_t items = (plan.segments > 0 ? 2 * plan.segments - plan.N : plan.N) * plan.heads;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(items, current_device().multiprocessors));
  launch(prefill_kernel<D, kGateF32>,
         {.grid = blocks,
          .block = kBlockThreads,
          .smem = Ring<D, kGateF32>::kBytes,
          .stream = stream,
          .overlap_previous = true},
         p, maps);
}

bool rows_of_16_bytes(const Tensor& t) {
  const int64_t step = 16 / size_of(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] % step == 0 && t.stride[1] % step == 0;
}

}  // namespace

bool kda_prefill_sm90_takes(const KdaArgs& a) {
  const int64_t D = a.q.size(2);
  bool takes = D == a.v.size(2) && (D == 64 || D == 128) && rows_of_16_bytes(a.g);
  for (const Tensor& t : {a.q, a.k, a.v, a.out})
    takes = takes && t.dtype == DType::bf16 && rows_of_16_bytes(t);
  return takes;
}

int64_t kda_prefill_sm90_workspace(const KdaArgs& a) { return make_plan(a).workspace.total; }

void kda_prefill_sm90(const Ctx& ctx, const KdaArgs& a) {
  const Plan plan = make_plan(a);
  if (plan.N == 0) return;
  KL_CHECK(a.workspace && a.workspace.bytes() >= plan.workspace.total,
           "kda prefill: expected a workspace of ", plan.workspace.total, " bytes, found ",
           a.workspace ? a.workspace.bytes() : 0);
  const PrefillParams p = make_params(a, plan);
  PrefillMaps maps{};  // not looked at where there is no token
  if (plan.T > 0)
    maps = {.q = row_boxes(a.q, kChunkTokens),
            .k = row_boxes(a.k, kChunkTokens),
            .v = row_boxes(a.v, kChunkTokens),
            .g = row_boxes(a.g, kChunkTokens)};
  const cudaStream_t stream = static_cast<cudaStream_t>(ctx.stream);
  const bool gate_f32 = a.g.dtype == DType::f32;
  if (plan.D == 128)
    gate_f32 ? run<128, true>(p, maps, plan, stream) : run<128, false>(p, maps, plan, stream);
  else
    gate_f32 ? run<64, true>(p, maps, plan, stream) : run<64, false>(p, maps, plan, stream);
}

}  // namespace kl::cuda
