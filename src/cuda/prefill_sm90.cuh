// A Hopper prefill of an operator (prefill_pipeline_sm90.cuh says what that is): one persistent kernel in
// which tensor cores carry the state in registers while other warps prepare the coming chunks, and what the
// host decides for it.
#pragma once

#include <algorithm>
#include <climits>

#include "cuda/launch.h"
#include "cuda/prefill_items_sm90.cuh"

namespace kl::cuda {

// Registers of a thread: 256 consumers and 256 others share 65536.
constexpr int kConsumerRegisters = 144;
constexpr int kOtherRegisters = 112;

// kProbes: PrefillParams::probes. Where there are none their code would cost the consumers' loop registers,
// and 8 % of its time (T8192 H96, no cuts).
template <class Op, bool kProbes>
__global__ void __launch_bounds__(kBlockThreads, 1)
    prefill_kernel(const __grid_constant__ typename Op::Params p,
                   const __grid_constant__ typename Op::Maps maps) {
  extern __shared__ __align__(1024) char memory[];
  using Slot = typename Op::Slot;
  using R = Ring<Slot>;
  const R ring{{}, memory};
  // The same in all lanes, and the compiler knows.
  const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kSlots; ++s) {
      mbarrier_init(ring.raw(s), 1 + kWarpArrivals);  // copies, and what the loader stores
      mbarrier_init(ring.ready(s), kWarpArrivals);
      mbarrier_init(ring.free(s), R::D / 16 * kWarpArrivals);
    }
    *ring.stopped() = -1;
    fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  release_next_kernel();
  if (warp < kConsumerWarps) {
    registers_increase<kConsumerRegisters>();
    if (warp < R::D / 16 && Consumer<Slot, kProbes>(p, ring, warp).run())
      Joiner<Slot, kProbes>(p, memory).run();
  } else {
    registers_decrease<kOtherRegisters>();
    const int producer = warp - kConsumerWarps;
    if (producer < kProducers)
      Op::produce(p, ring, producer);
    else
      Loader<Op>(p, maps, ring).run();
  }
}

// ---- The host's part --------------------------------------------------------------------------------------

// Before prefill_kernel: what blocks tell each other is cleared. prefill_kernel's blocks may come in at once;
// what they wait for is the end of this kernel, which waits for its predecessors' in turn.
KL_DEVICE void clear(int* words, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < count) words[i] = 0;
}
static __global__ void clear_kernel(int* words, int64_t count) {
  release_next_kernel();
  wait_for_previous_kernel();
  clear(words, count);
}

// The same, and PrefillParams::by_slowness, by one block more.
constexpr int kOrderThreads = 1024;
template <class Op>
__global__ void __launch_bounds__(kOrderThreads)
    clear_and_order_kernel(const __grid_constant__ typename Op::Params p, int* words, int64_t count) {
  __shared__ float forgetting[kOrderThreads];
  release_next_kernel();
  wait_for_previous_kernel();
  if (blockIdx.x + 1 < gridDim.x) return clear(words, count);
  for (int h = static_cast<int>(threadIdx.x / 32); h < p.heads; h += kOrderThreads / 32) {
    const float x = Op::expected_forgetting(p, h);
    if (threadIdx.x % 32 == 0) forgetting[h] = x > 0 ? x : 0;  // nor a NaN, which has no place
  }
  __syncthreads();  // all heads' are there
  const int h = static_cast<int>(threadIdx.x);
  if (h >= p.heads) return;
  const float own = forgetting[h];
  int before = 0;
#pragma unroll 8
  for (int other = 0; other < p.heads; ++other)
    before += forgetting[other] < own || (forgetting[other] == own && other < h);
  p.by_slowness[before] = h;
}

// How sequences are cut. A wrong guess of the gate costs time and nothing else.
struct PrefillCut {
  int64_t segment_chunks = INT_MAX / 2;
  int64_t first_shares = 1;
  bool probes = false;
};

// With a strong gate a cut costs next to nothing: as many as make the blocks' turns come out even. `items`:
// (sequence, head) pairs, of `chunks` chunks each.
inline PrefillCut cut_strong(int64_t items, int64_t chunks) {
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
// has no transition, and may be made longer, so that its blocks end with the others. `closed`: chunks after
// which a head's transition is expected to be closed; a few take three times as many.
inline PrefillCut cut_weak(int64_t items, int64_t chunks, int64_t closed) {
  const int64_t blocks = current_device().multiprocessors, others = blocks - items;
  // Chunks' worth of time: of any cut, of a state's way through a segment. Chunks that are applied in one's.
  constexpr double kSplit = 12, kChain = 1.2, kApplied = 150;
  // Less would be within the model's error, and a cut takes a workspace.
  constexpr double kGain = 0.02;
  constexpr int64_t kMostShares = 64;
  double least = (1 - kGain) * static_cast<double>(chunks);
  PrefillCut best;
  for (int64_t n = 2; others > 0 && n <= 1 + blocks / 4; ++n) {
    const int64_t later = items * (n - 1), idle = blocks - items * n;  // blocks that begin with transitions
    const int64_t most = std::min(kMostShares, (2 * later + others - 1) / others);
    for (int64_t shares = 1; shares <= most; ++shares) {
      const int64_t own = (chunks + shares + n - 2) / (shares + n - 1);
      if (own < kMinSegmentChunks) break;
      const int64_t followed = std::min(own, closed), slowest = std::min(own, 3 * closed);
      double longest = static_cast<double>(shares * own);
      if (idle < 0) {
        longest = std::max(longest, static_cast<double>(later * (own + followed)) / others + followed / 2.);
      } else if (later > idle && later * followed + idle * followed / 2. > idle * longest) {
        const auto work = static_cast<double>(items * shares * own + later * (own + followed));
        longest = std::max(longest, work / blocks + slowest / 4.);
      }
      // States are not multiplied by transitions that are closed. Four chains a head, as with D = 128.
      const double chain = kChain * static_cast<double>((4 * items + blocks - 1) / blocks * (n - 1)) *
                           (followed == own ? 1 : 0.3);
      const double cost = longest + chain + static_cast<double>(later * followed) / kApplied + kSplit;
      if (cost < least) best = {.segment_chunks = own, .first_shares = shares}, least = cost;
    }
  }
  return best;
}

// Where the cuts of a sequence must not depend on the others: by the gate and the heads. With a strong gate
// 1024 tokens: B1 T8192 H32 gets as many segments as blocks can take at a time. With a weak one the
// transitions double the work, which pays for few heads and long sequences only.
inline PrefillCut cut_invariant(int64_t heads, bool strong) {
  if (strong) return {.segment_chunks = 64, .probes = true};
  if (heads <= 16) return {.segment_chunks = 256};
  return {};
}

// Chunks after which a transition is expected to be negligible where nothing is known of the gate: one of
// softplus with the usual start, whose heads take 36 to 171.
constexpr int64_t kClosedAfter = 60;
constexpr int64_t kShortSegment = 32;  // chunks

// What cuts are chosen by.
struct PrefillShape {
  int64_t T, N, heads, D;
  bool whole;            // states inside a sequence are asked for: no cuts
  bool strong;           // the gate is known to forget soon
  bool known;            // something is known of when a head forgets (Op::expected_forgetting)
  int64_t closed;        // elsewhere: chunks after which a transition is expected to be negligible
  bool batch_invariant;  // cuts must not depend on the other sequences
};

// Sequences are taken to be of one length; longer ones get more segments.
inline PrefillCut cut_sequences(const PrefillShape& s) {
  if (s.whole) return {};
  if (s.batch_invariant) return cut_invariant(s.heads, s.strong);
  const int64_t items = s.N * s.heads, chunks = (s.T + kChunkTokens * s.N - 1) / (kChunkTokens * s.N);
  // Several sequences that fill the device are of several lengths: taking the longest first evens them out.
  const bool strong = s.strong && (s.N == 1 || items < current_device().multiprocessors);
  return strong ? cut_strong(items, chunks) : cut_weak(items, chunks, s.closed);
}

struct PrefillPlan {
  int64_t T, N, heads, D, segments = 0;  // segments: at most; 0: every sequence is one
  PrefillCut cut{};
  bool by_slowness = false;  // PrefillParams::by_slowness is there
  PrefillWorkspace workspace{};
};
inline PrefillPlan prefill_plan(const PrefillShape& shape) {
  PrefillPlan plan{.T = shape.T, .N = shape.N, .heads = shape.heads, .D = shape.D};
  if (plan.N == 0) return plan;
  plan.cut = cut_sequences(shape);
  const int64_t most = max_segments(plan.T, plan.N, plan.cut.segment_chunks, plan.cut.first_shares);
  if (most > plan.N) plan.segments = most;
  // Where segments are short hardly any transition is over before them.
  plan.by_slowness = shape.known && plan.segments > 0 && !plan.cut.probes && plan.heads <= kOrderThreads &&
                     plan.cut.segment_chunks >= kShortSegment;
  plan.workspace = prefill_workspace(plan.T, plan.N, plan.heads, plan.D, plan.segments);
  return plan;
}

inline void check_workspace(const char* operation, const Tensor& workspace, const PrefillPlan& plan) {
  KL_CHECK(workspace && workspace.bytes() >= plan.workspace.total, operation, ": expected a workspace of ",
           plan.workspace.total, " bytes, found ", workspace ? workspace.bytes() : 0);
}

// What every prefill has among its arguments; absent tensors are absent there too.
struct PrefillTensors {
  Tensor out, cu_seqlens, state, slot, slot_out, workspace;
  Tensor checkpoint_row = {}, checkpoint_slot = {};
  bool state_v_first = false;
  int64_t qk_heads = 0;
};
// Can states be read and written four elements at a time, if there are any?
inline bool states_in_fours(const Tensor& t) {
  bool aligned = reinterpret_cast<uintptr_t>(t.data) % (4 * size_of(t.dtype)) == 0;
  for (int i = 0; i + 1 < t.rank; ++i) aligned = aligned && t.stride[i] % 4 == 0;
  return aligned;
}
inline PrefillParams prefill_params(const PrefillTensors& a, const PrefillPlan& plan) {
  char* const memory = static_cast<char*>(a.workspace.data);
  const auto part = [&](int64_t offset) { return plan.segments > 0 ? memory + offset : nullptr; };
  Operand state{};
  if (a.state) state = operand(a.state);
  return {
      .out = operand(a.out),
      .cu_seqlens = row_numbers(a.cu_seqlens),
      .sequences = static_cast<int>(plan.N),
      .heads = static_cast<int>(plan.heads),
      .group = static_cast<int>(plan.heads / a.qk_heads),
      .state = state,
      .state_row_stride = a.state ? a.state.stride[2] : 0,
      .state_v_first = a.state_v_first,
      .slot = static_cast<const int32_t*>(a.slot.data),
      .slot_out = static_cast<const int32_t*>(a.slot_out.data),
      .checkpoint_row = static_cast<const int32_t*>(a.checkpoint_row.data),
      .checkpoint_slot = static_cast<const int32_t*>(a.checkpoint_slot.data),
      .checkpoints = a.checkpoint_row ? static_cast<int>(a.checkpoint_row.size(0)) : 0,
      .segment_chunks = static_cast<int>(plan.cut.segment_chunks),
      .first_shares = static_cast<int>(plan.cut.first_shares),
      .probes = plan.segments > 0 && plan.cut.probes,
      .counters = reinterpret_cast<PrefillCounters*>(memory),
      .progress = reinterpret_cast<int*>(part(plan.workspace.progress)),
      .ready = reinterpret_cast<int*>(part(plan.workspace.ready)),
      .met = reinterpret_cast<int*>(part(plan.workspace.met)),
      .chained = reinterpret_cast<int*>(part(plan.workspace.chained)),
      .by_slowness = plan.by_slowness ? reinterpret_cast<int*>(part(plan.workspace.by_slowness)) : nullptr,
      .carried = reinterpret_cast<float*>(part(plan.workspace.carried)),
      .transition = reinterpret_cast<float*>(part(plan.workspace.transition)),
      .queries = part(plan.workspace.queries)};
}

template <class Op>
void run_prefill(const typename Op::Params& p, const typename Op::Maps& maps, const PrefillPlan& plan,
                 cudaStream_t stream) {
  const int64_t words = plan.workspace.by_slowness / 4;
  LaunchConfig first{.grid = 1, .block = 256, .stream = stream, .overlap_previous = true};
  const auto blocks_of = [&](unsigned threads) {
    return static_cast<unsigned>((words + threads - 1) / threads);
  };
  if constexpr (Op::kKnowsGates) {
    if (p.by_slowness != nullptr) {
      first.block = kOrderThreads, first.grid = blocks_of(kOrderThreads) + 1;
      launch(clear_and_order_kernel<Op>, first, p, reinterpret_cast<int*>(p.counters), words);
    }
  }
  if (p.by_slowness == nullptr) {
    first.grid = blocks_of(first.block.x);
    launch(clear_kernel, first, reinterpret_cast<int*>(p.counters), words);
  }
  // Of a cut sequence's segments all but the first may take two items.
  const int64_t items = (plan.segments > 0 ? 2 * plan.segments - plan.N : plan.N) * plan.heads;
  const unsigned blocks = static_cast<unsigned>(std::min<int64_t>(items, current_device().multiprocessors));
  const LaunchConfig config{.grid = blocks,
                            .block = kBlockThreads,
                            .smem = Ring<typename Op::Slot>::kBytes,
                            .stream = stream,
                            .overlap_previous = true};
  if constexpr (Op::kMayProbe) {
    if (p.probes) return launch(prefill_kernel<Op, true>, config, p, maps);
  }
  launch(prefill_kernel<Op, false>, config, p, maps);
}

// Can the copy engine fetch this tensor's rows?
inline bool rows_of_16_bytes(const Tensor& t) {
  const int64_t step = 16 / size_of(t.dtype);
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && t.stride[0] % step == 0 && t.stride[1] % step == 0;
}

}  // namespace kl::cuda
