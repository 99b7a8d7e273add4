// KDA, one step of the recurrence after another: the state is read from memory once and written once, and
// stays in registers between the tokens of a sequence. Any sizes, any lengths, every GPU; what kda_decode()
// runs where the pipelined kernel does not fit (kda_decode_pipeline.cu), and for few sequences.
//
// A block of four warps owns 16 P value channels of one (sequence, value head), each warp a tile of 4 P. The
// block's threads prepare the token's operands together, a channel each.
#include <algorithm>

#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {
namespace {

// Where a thread finds its part of a token, in bytes: its first channel of q, k and g, its tile's part of v.
struct TokenPlace {
  int64_t q, k, g, v, beta;
};
KL_DEVICE TokenPlace token_place(const StepParams& p, int64_t row, int head, int v) {
  const int64_t qk = qk_head(p, head), c = threadIdx.x;
  return {byte_of(p.q, offset_of(p.q, row, qk) + c), byte_of(p.k, offset_of(p.k, row, qk) + c),
          byte_of(p.g, offset_of(p.g, row, head) + c), byte_of(p.v, offset_of(p.v, row, head) + v),
          byte_of(p.beta, offset_of(p.beta, row, head))};
}

template <int KP, int P, bool kFull>
struct Token {
  static constexpr int kChannels = (KP + kTileThreads - 1) / kTileThreads;
  RawElement q[kChannels], k[kChannels], g[kChannels], beta;
  RawRun<P, kFull> v;
};
template <int KP, int P, bool kFull>
KL_DEVICE Token<KP, P, kFull> load_token(const StepParams& p, const TokenPlace& at, int v) {
  Token<KP, P, kFull> t;
#pragma unroll
  for (int i = 0; i < t.kChannels; ++i) {
    if (static_cast<int>(threadIdx.x) + i * kTileThreads >= p.K) break;
    const auto load = [&](const Operand& x, int64_t first) {
      return load_raw_at(x, first + byte_of(x, i * kTileThreads));
    };
    t.q[i] = load(p.q, at.q), t.k[i] = load(p.k, at.k), t.g[i] = load(p.g, at.g);
  }
  t.v = load_raw_run_at<P, kFull>(p.v, at.v, p.V - v);
  t.beta = load_raw_at(p.beta, at.beta);
  return t;
}

// Leaves the block's channels of a token, and the warps' sums, in shared memory.
template <int KP, int P, bool kFull>
KL_DEVICE void prepare(Prepared<KP>& to, const Token<KP, P, kFull>& t, const StepParams& p, float A_log,
                       const float* dt_bias) {
  Squares squares;
#pragma unroll
  for (int i = 0; i < t.kChannels; ++i) {
    const int c = threadIdx.x + i * kTileThreads;
    if (KP % kTileThreads != 0 && c >= KP) break;
    const float k = value_of(p.k, t.k[i]), q = value_of(p.q, t.q[i]);
    to.channels.k[c] = k;
    to.channels.q[c] = q;
    to.channels.a[c] = expf(log_decay(p.gate, expf(A_log), value_of(p.g, t.g[i]) + dt_bias[i]));
    squares.add(k, q);
  }
  leave_sums(to, squares);
}

// kFull: K = KP, V a multiple of 16 P, everything aligned for vectors. Narrow tiles (P = 2) also know the
// rows of a state to be KP apart.
template <int KP, int P, bool kFull, bool kVFirst, class State>
__global__ void __launch_bounds__(kTileThreads, KP == 256 ? 2 : 4)
    kda_decode_kernel(const __grid_constant__ StepParams p, int first_sequence) {
  __shared__ Prepared<KP> shared[2];  // taken in turns, so that one barrier a token is enough
  const int v0 = (blockIdx.x * kTileWarps + threadIdx.x / 32) * 4 * P, head = blockIdx.y;
  const Place<kVFirst> at;
  const int v = v0 + P * at.vg, n = first_sequence + blockIdx.z;
  // Where few blocks run, a step is one latency after the other. Rows are known before the table of sequences
  // is read if all have one length (a guess that fails is made good below); with addresses ready before they
  // are needed, all loads but the state's go out at once. Wide tiles have no registers for that.
  constexpr bool kNarrow = P == 2;
  const auto early = [](int64_t x) { return kNarrow ? opaque(x) : x; };
  const bool guessed = kNarrow && p.length > 0;
  const int64_t guess = static_cast<int64_t>(n) * p.length;
  TokenPlace place = token_place(p, guess, head, v);
  for (int64_t* byte : {&place.q, &place.k, &place.g, &place.v, &place.beta}) *byte = early(*byte);
  follow_previous_kernel();

  // All loads are issued before the first value is used.
  SequenceWork work;
  read_slots(work, p, n);  // first: the state waits for them
  Token<KP, P, kFull> token;
  if (guessed) token = load_token<KP, P, kFull>(p, place, v);
  read_rows(work, p, n);
  if (!kNarrow && work.begin < work.end)
    token = load_token<KP, P, kFull>(p, token_place(p, work.begin, head, v), v);
  const float A_log = A_log_of(p.gate, head);
  float dt_bias[token.kChannels];
#pragma unroll
  for (int i = 0; i < token.kChannels; ++i) {
    const int c = threadIdx.x + i * kTileThreads;
    dt_bias[i] = c < p.K ? dt_bias_of(p.gate, head, c) : 0.f;
  }
  if (work.idle()) return;

  const int row_stride = kNarrow ? KP : static_cast<int>(p.row_stride);
  State* const pool = static_cast<State*>(p.state);
  const auto tile_at = [&](int slot) {
    return slot * p.slot_stride + head * p.head_stride + v0 * (kVFirst ? p.row_stride : 1);
  };
  // The lane's first element; where opaque, the others are reached by constant distances.
  const auto first_at = [&](int slot) {
    return early(tile_at(slot) + first_element<P, kVFirst>(row_stride));
  };
  LaneState<KP, P> S = {};
  if (work.slot >= 0) {
    if constexpr (kFull)
      load_tile<KP, P, kVFirst>(S, pool + first_at(work.slot), row_stride);
    else
      for_each_inside<KP, P, kVFirst>(S, pool + tile_at(work.slot), p.row_stride, p.K, p.V - v0,
                                      [](State* from, float& x) { x = to_float(*from); });
  }
  const auto leave_state = [&](int64_t tile) {
    if constexpr (kFull)
      store_tile<KP, P, kVFirst>(S, pool + tile, row_stride);
    else
      for_each_inside<KP, P, kVFirst>(S, pool + tile, p.row_stride, p.K, p.V - v0,
                                      [](State* to, float x) { *to = from_float<State>(x); });
  };
  const auto leave_at = [&](int slot) { return kFull ? first_at(slot) : tile_at(slot); };
  const int64_t last_tile = leave_at(work.slot_out);

  if (kNarrow && work.begin < work.end && !(guessed && work.begin == guess))
    token = load_token<KP, P, kFull>(p, token_place(p, work.begin, head, v), v);
  int checkpoint = first_checkpoint(p, work.begin);

  for (int64_t row = work.begin; row < work.end; ++row) {
    Prepared<KP>& prepared = shared[row % 2];
    prepare<KP, P, kFull>(prepared, token, p, A_log, dt_bias);
    float values[P];
    values_of(values, p.v, token.v);
    const float beta = write_strength(p.beta_kind, value_of(p.beta, token.beta));
    const int64_t out = early(byte_of(p.out, offset_of(p.out, row, head) + v));
    if (row + 1 < work.end) token = load_token<KP, P, kFull>(p, token_place(p, row + 1, head, v), v);
    __syncthreads();  // `prepared` becomes visible; and all have done with the other one
    const Scales scales = scales_of(prepared, p.l2norm, p.l2_eps, p.scale);
    float o[P];
    step<KP, P, kVFirst>(o, S, prepared.channels, scales, values, beta);
    if (at.kg == 0) store_run_at<kFull>(p.out, out, o, p.V - v);
    for (; checkpoint < p.checkpoints && p.checkpoint_row[checkpoint] == row + 1; ++checkpoint)
      if (const int slot = p.checkpoint_slot[checkpoint]; slot >= 0) leave_state(leave_at(slot));
  }
  if (work.slot_out >= 0) leave_state(last_tile);
}

template <int KP, int P, bool kFull, bool kVFirst>
void launch_decode(const Ctx& ctx, const KdaArgs& a, const StepParams& p) {
  constexpr int kBlockWidth = 4 * P * kTileWarps,
                kMostSequences = 65535;  // of a launch, by the limit on grid.z
  KL_CHECK(p.Hv <= 65535, "kda: expected at most 65535 value heads, found ", p.Hv);
  for (int first = 0; first < p.N; first += kMostSequences) {
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>((p.V + kBlockWidth - 1) / kBlockWidth),
                                           static_cast<unsigned>(p.Hv),
                                           static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
                              .block = dim3(kTileThreads),
                              .stream = static_cast<cudaStream_t>(ctx.stream),
                              .overlap_previous = true};
    if (a.state && a.state.dtype == DType::bf16)
      launch(kda_decode_kernel<KP, P, kFull, kVFirst, bf16>, config, p, first);
    else
      launch(kda_decode_kernel<KP, P, kFull, kVFirst, float>, config, p, first);
  }
}

template <bool kFull, bool kVFirst>
void launch_width(const Ctx& ctx, const KdaArgs& a, const StepParams& p) {
  // With few heads, narrower tiles: twice as many blocks with half the work each.
  const bool few = int64_t(p.N) * p.Hv * ((p.V + 63) / 64) <= current_device().multiprocessors &&
                   (!a.state || p.row_stride == p.K);
  if (p.K > 128) return launch_decode<256, 4, kFull, kVFirst>(ctx, a, p);
  if constexpr (kFull) {
    if (few)
      return p.K <= 64 ? launch_decode<64, 2, kFull, kVFirst>(ctx, a, p)
                       : launch_decode<128, 2, kFull, kVFirst>(ctx, a, p);
  }
  p.K <= 64 ? launch_decode<64, 4, kFull, kVFirst>(ctx, a, p)
            : launch_decode<128, 4, kFull, kVFirst>(ctx, a, p);
}

}  // namespace

void kda_decode_tiles(const Ctx& ctx, const KdaArgs& a) {
  const StepParams p = step_params(a);
  bool full = (p.K == 64 || p.K == 128 || p.K == 256) && p.V % 64 == 0;
  for (const Tensor* t : {&a.v, &a.out}) full = full && in_fours(*t);
  if (a.state)
    full = full && in_fours(a.state) && a.state.stride[2] < (1 << 20);  // offsets in a tile are ints
  if (full)
    a.state_v_first ? launch_width<true, true>(ctx, a, p) : launch_width<true, false>(ctx, a, p);
  else
    a.state_v_first ? launch_width<false, true>(ctx, a, p) : launch_width<false, false>(ctx, a, p);
}

void kda_decode(const Ctx& ctx, const KdaArgs& a) {
  // The two add up the squares of q and k in different orders, so a choice by the batch would show in the
  // bits.
  !a.batch_invariant&& kda_decode_pipeline_pays(a) ? kda_decode_pipeline(ctx, a) : kda_decode_tiles(ctx, a);
}

}  // namespace kl::cuda
