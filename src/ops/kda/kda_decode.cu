// KDA, one step of the recurrence after another: the state is read from memory once and written once, and
// stays in registers between the tokens of a sequence.
//
// A warp owns 16 value channels of one (sequence, value head): a [K, 16] tile of the state. Warps never wait
// for each other, so the many of them on a multiprocessor cover each other's latency; each prepares its
// head's keys, queries and decays anew (an L2 read and some thirty instructions against the tile's four
// hundred). Lane (kg, vg), kg < 8 and vg < 4, holds key channels 32 c + 4 kg + j (c < K / 32, j < 4) times
// value channels 4 vg + p (p < 4). With both products taken from the decayed state before the update, one
// pass is enough:
//
//   S~ = Diag(a) S     u = S~ᵀ k     y = S~ᵀ q     delta = beta (v - u)     o = y + (kᵀ q) delta     S = S~ +
//   k deltaᵀ
#include <climits>

#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_operand.cuh"

namespace kl::cuda {
namespace {

constexpr int kTile = 16;     // value channels of a warp
constexpr int kMaxWarps = 4;  // of a block

struct DecodeParams {
  Operand q, k, v, g, beta, out;
  RowNumbers cu_seqlens;
  void* state;  // null: sequences start at zero and leave nothing
  int64_t slot_stride, head_stride, row_stride;
  const int32_t *slot, *slot_out;
  const int32_t *checkpoint_row, *checkpoint_slot;
  int checkpoints;
  GateParams gate;
  KdaBeta beta_kind;
  bool l2norm;
  float l2_eps, scale;
  int K, V, Hv, group;  // group: value heads per query/key head
  int64_t items;        // warps' worth of work: sequences x value heads x tiles
  int tiles;            // of a value head
};

// Where a lane stands in its warp's tile. Along the state's contiguous dimension lanes are neighbours.
template <bool kVFirst>
struct Place {
  int kg = kVFirst ? threadIdx.x % 8 : threadIdx.x % 32 / 4;
  int vg = kVFirst ? threadIdx.x % 32 / 8 : threadIdx.x % 4;
  static constexpr int kSameVg = kVFirst ? 7 : 28;  // bits in which the lanes of one vg differ
};

// A lane's part of the tile: S[m][p] for key channel 32 (m / 4) + 4 kg + m % 4, value channel 4 vg + p.
template <int KP>
using LaneState = float[KP / 8][4];

// Calls f(element, x, y, z, w) for every four of the lane's values that are neighbours in memory: value
// channels of one key channel, or (V first) key channels of one value channel.
template <int KP, bool kVFirst, class State, class F>
KL_DEVICE void for_each_four(LaneState<KP>& S, State* tile, int64_t row_stride, F&& f) {
  const Place<kVFirst> at;
#pragma unroll
  for (int c = 0; c < KP / 32; ++c)
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int k = 32 * c + 4 * at.kg, v = 4 * at.vg;
      if constexpr (kVFirst)
        f(tile + (v + r) * row_stride + k, S[4 * c][r], S[4 * c + 1][r], S[4 * c + 2][r], S[4 * c + 3][r]);
      else
        f(tile + (k + r) * row_stride + v, S[4 * c + r][0], S[4 * c + r][1], S[4 * c + r][2],
          S[4 * c + r][3]);
    }
}

// Calls f(element, x) for each of the lane's values that lies inside K x V_left.
template <int KP, bool kVFirst, class State, class F>
KL_DEVICE void for_each_inside(LaneState<KP>& S, State* tile, int64_t row_stride, int K, int V_left, F&& f) {
  const Place<kVFirst> at;
#pragma unroll
  for (int m = 0; m < KP / 8; ++m)
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const int k = 32 * (m / 4) + 4 * at.kg + m % 4, v = 4 * at.vg + p;
      if (k < K && v < V_left) f(tile + (kVFirst ? v * row_stride + k : k * row_stride + v), S[m][p]);
    }
}

// The lane's part of the state whose tile starts at `tile`. kFull: aligned, and all of it inside.
template <int KP, bool kFull, bool kVFirst, class State>
KL_DEVICE void load_state(LaneState<KP>& S, State* tile, int64_t row_stride, int K, int V_left) {
  if constexpr (kFull)
    for_each_four<KP, kVFirst>(S, tile, row_stride, [](State* from, float& x, float& y, float& z, float& w) {
      const float4 four = load4_stream(from);
      x = four.x, y = four.y, z = four.z, w = four.w;
    });
  else
    for_each_inside<KP, kVFirst>(S, tile, row_stride, K, V_left,
                                 [](State* from, float& x) { x = to_float(*from); });
}
template <int KP, bool kFull, bool kVFirst, class State>
KL_DEVICE void store_state(LaneState<KP>& S, State* tile, int64_t row_stride, int K, int V_left) {
  if constexpr (kFull)
    for_each_four<KP, kVFirst>(S, tile, row_stride, [](State* to, float x, float y, float z, float w) {
      store4_stream(to, {x, y, z, w});
    });
  else
    for_each_inside<KP, kVFirst>(S, tile, row_stride, K, V_left,
                                 [](State* to, float x) { *to = from_float<State>(x); });
}

// One token's operands as they stand in memory: each lane has KP / 32 neighbouring key channels and the four
// value channels of its vg.
template <int KP>
struct Token {
  float q[KP / 32], k[KP / 32], g[KP / 32], v[4], beta;
};
template <int KP, bool kFull>
KL_DEVICE Token<KP> load_token(const DecodeParams& p, int64_t token, int head, int v, int lane) {
  constexpr int kRun = KP / 32;
  const int k = lane * kRun;
  Token<KP> t;
  load_run<kRun, kFull>(t.q, p.q, offset_of(p.q, token, head / p.group) + k, p.K - k);
  load_run<kRun, kFull>(t.k, p.k, offset_of(p.k, token, head / p.group) + k, p.K - k);
  load_run<kRun, kFull>(t.g, p.g, offset_of(p.g, token, head) + k, p.K - k);
  load_run<4, kFull>(t.v, p.v, offset_of(p.v, token, head) + v, p.V - v);
  t.beta = load_element(p.beta, offset_of(p.beta, token, head));
  return t;
}

// Keys, queries and decays of one token, in the order of channels, shared by the lanes of one warp.
template <int KP>
struct alignas(16) Channels {
  float k[KP], q[KP], a[KP];
};

// Normalises, applies the gate, and leaves the result in `channels`. Returns kᵀ q of what was written.
template <int KP>
KL_DEVICE float prepare(Channels<KP>& channels, const Token<KP>& t, const DecodeParams& p, float factor,
                        const float (&dt_bias)[KP / 32], int lane) {
  constexpr int kRun = KP / 32;
  float kk = 0, qq = 0, kq = 0;
#pragma unroll
  for (int e = 0; e < kRun; ++e) {
    kk = fmaf(t.k[e], t.k[e], kk);
    qq = fmaf(t.q[e], t.q[e], qq);
    kq = fmaf(t.k[e], t.q[e], kq);
  }
  float k_scale = 1.f, q_scale = p.scale;
  if (p.l2norm) {
    k_scale = 1.f / sqrtf(warp_sum(kk) + p.l2_eps);
    q_scale = p.scale / sqrtf(warp_sum(qq) + p.l2_eps);
  }
  __syncwarp();  // the lanes have read the previous token's channels
#pragma unroll
  for (int e = 0; e < kRun; ++e) {
    const int c = lane * kRun + e;
    channels.k[c] = t.k[e] * k_scale;
    channels.q[c] = t.q[e] * q_scale;
    channels.a[c] = expf(log_decay(p.gate, factor, t.g[e] + dt_bias[e]));
  }
  __syncwarp();  // this token's channels become visible to the whole warp
  return warp_sum(kq) * k_scale * q_scale;
}

KL_DEVICE void load_channels(float (&x)[4], const float* channels, int first) {
  const float4 four = load4(channels + first);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// One step of the recurrence on the lane's part of the state; returns the outputs of its four value channels.
template <int KP, bool kVFirst>
KL_DEVICE void step(float (&o)[4], LaneState<KP>& S, const Channels<KP>& channels, const Token<KP>& t,
                    float beta, float kq) {
  const Place<kVFirst> at;
  float u[4] = {}, y[4] = {};
#pragma unroll
  for (int c = 0; c < KP / 32; ++c) {
    float k[4], q[4], a[4];
    load_channels(k, channels.k, 32 * c + 4 * at.kg);
    load_channels(q, channels.q, 32 * c + 4 * at.kg);
    load_channels(a, channels.a, 32 * c + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int p = 0; p < 4; ++p) {
        float& s = S[4 * c + j][p];
        s *= a[j];
        u[p] = fmaf(s, k[j], u[p]);
        y[p] = fmaf(s, q[j], y[p]);
      }
  }
  float delta[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    delta[p] = beta * (t.v[p] - lanes_sum<Place<kVFirst>::kSameVg>(u[p]));
    o[p] = fmaf(kq, delta[p], lanes_sum<Place<kVFirst>::kSameVg>(y[p]));
  }
#pragma unroll
  for (int c = 0; c < KP / 32; ++c) {
    float k[4];
    load_channels(k, channels.k, 32 * c + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int p = 0; p < 4; ++p) S[4 * c + j][p] = fmaf(k[j], delta[p], S[4 * c + j][p]);
  }
}

// The first checkpoint whose row lies behind `row`; p.checkpoints if none does.
KL_DEVICE int first_checkpoint(const DecodeParams& p, int64_t row) {
  int low = 0, high = p.checkpoints;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.checkpoint_row[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// kSeveral: sequences of several tokens are expected. The operands of the next token are then loaded one
// token ahead and checkpoints are looked for; without, those registers serve a fourth block on the
// multiprocessor.
template <int KP, bool kFull, bool kVFirst, bool kSeveral, class State>
__global__ void __launch_bounds__(32 * kMaxWarps, KP == 256  ? 2
                                                  : kSeveral ? 3
                                                             : 4)
    kda_decode_kernel(const __grid_constant__ DecodeParams p) {
  __shared__ Channels<KP> shared[kMaxWarps];
  Channels<KP>& channels = shared[threadIdx.x / 32];
  const int lane = threadIdx.x % 32;
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= p.items) return;
  const int tile = static_cast<int>(item % p.tiles), head = static_cast<int>(item / p.tiles % p.Hv);
  const int64_t n = item / p.tiles / p.Hv;
  const Place<kVFirst> at;
  const int v0 = tile * kTile, v = v0 + 4 * at.vg;

  const int64_t begin = row_number(p.cu_seqlens, n), end = row_number(p.cu_seqlens, n + 1);
  const int slot = p.state == nullptr ? -1 : p.slot[n];
  const int slot_out = p.slot_out == nullptr || p.state == nullptr ? slot : p.slot_out[n];
  if (begin == end && slot == slot_out) return;

  const auto state_tile = [&](int which) {
    return static_cast<State*>(p.state) + which * p.slot_stride + head * p.head_stride +
           v0 * (kVFirst ? p.row_stride : 1);
  };
  Token<KP> next;
  if (begin < end) next = load_token<KP, kFull>(p, begin, head, v, lane);
  LaneState<KP> S = {};
  if (slot >= 0) load_state<KP, kFull, kVFirst>(S, state_tile(slot), p.row_stride, p.K, p.V - v0);

  const float factor = gate_factor(p.gate, head);
  float dt_bias[KP / 32] = {};
  if (p.gate.dt_bias != nullptr && p.gate.kind != KdaGateKind::log_decay)
#pragma unroll
    for (int e = 0; e < KP / 32; ++e) {
      const int c = lane * (KP / 32) + e;
      if (kFull || c < p.K) dt_bias[e] = p.gate.dt_bias[head * p.gate.dt_stride + c];
    }
  int checkpoint = kSeveral ? first_checkpoint(p, begin) : 0;

  for (int64_t token = begin; token < end; ++token) {
    const Token<KP> now = next;
    if (kSeveral && token + 1 < end) next = load_token<KP, kFull>(p, token + 1, head, v, lane);
    const float kq = prepare<KP>(channels, now, p, factor, dt_bias, lane);
    float o[4];
    step<KP, kVFirst>(o, S, channels, now, write_strength(p.beta_kind, now.beta), kq);
    if (at.kg == 0) store_run<kFull>(p.out, offset_of(p.out, token, head) + v, o, p.V - v);
    if constexpr (kSeveral) {
      while (checkpoint < p.checkpoints && p.checkpoint_row[checkpoint] == token + 1) {
        const int target = p.checkpoint_slot[checkpoint++];
        if (target >= 0) store_state<KP, kFull, kVFirst>(S, state_tile(target), p.row_stride, p.K, p.V - v0);
      }
    } else if (token + 1 < end) {
      next = load_token<KP, kFull>(p, token + 1, head, v, lane);
    }
  }
  if (slot_out >= 0) store_state<KP, kFull, kVFirst>(S, state_tile(slot_out), p.row_stride, p.K, p.V - v0);
}

DecodeParams decode_params(const KdaArgs& a) {
  DecodeParams p{};
  p.q = operand(a.q), p.k = operand(a.k), p.v = operand(a.v), p.g = operand(a.g), p.beta = operand(a.beta);
  p.out = operand(a.out);
  p.cu_seqlens = row_numbers(a.cu_seqlens);
  if (a.state) {
    p.state = a.state.data;
    p.slot_stride = a.state.stride[0], p.head_stride = a.state.stride[1], p.row_stride = a.state.stride[2];
    p.slot = a.slot.ptr<int32_t>();
    p.slot_out = a.slot_out ? a.slot_out.ptr<int32_t>() : nullptr;
  }
  if (a.state && a.checkpoint_row) {
    p.checkpoint_row = a.checkpoint_row.ptr<int32_t>();
    p.checkpoint_slot = a.checkpoint_slot.ptr<int32_t>();
    p.checkpoints = static_cast<int>(a.checkpoint_row.size(0));
  }
  p.gate = gate_params(a.gate);
  p.beta_kind = a.beta_kind;
  p.l2norm = a.l2norm, p.l2_eps = a.l2_eps;
  p.K = static_cast<int>(a.q.size(2)), p.V = static_cast<int>(a.v.size(2)),
  p.Hv = static_cast<int>(a.v.size(1));
  p.group = p.Hv / static_cast<int>(a.q.size(1));
  p.scale = a.scale != 0.f ? a.scale : 1.f / sqrtf(static_cast<float>(p.K));
  p.tiles = (p.V + kTile - 1) / kTile;
  p.items = (a.cu_seqlens.size(0) - 1) * p.Hv * p.tiles;
  return p;
}

template <int KP, bool kFull, bool kVFirst, bool kSeveral>
void launch_decode(const Ctx& ctx, const KdaArgs& a, const DecodeParams& p) {
  // Few warps: one a block, so that they spread over all multiprocessors.
  const int warps = p.items <= 8 * current_device().multiprocessors ? 1 : kMaxWarps;
  const int64_t blocks = (p.items + warps - 1) / warps;
  KL_CHECK(blocks <= INT_MAX, "kda_decode: ", p.items, " tiles of states are more than one launch takes");
  const LaunchConfig config{dim3(static_cast<unsigned>(blocks)), dim3(32 * warps), 0,
                            static_cast<cudaStream_t>(ctx.stream)};
  if (a.state && a.state.dtype == DType::bf16)
    launch(kda_decode_kernel<KP, kFull, kVFirst, kSeveral, bf16>, config, p);
  else
    launch(kda_decode_kernel<KP, kFull, kVFirst, kSeveral, float>, config, p);
}

// f.operator()<true>() or f.operator()<false>()
template <class F>
void with(bool condition, F&& f) {
  condition ? f.template operator()<true>() : f.template operator()<false>();
}

}  // namespace

void kda_decode(const Ctx& ctx, const KdaArgs& a) {
  const DecodeParams p = decode_params(a);
  bool full = (p.K == 64 || p.K == 128 || p.K == 256) && p.V % kTile == 0;
  for (const Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.out}) full = full && in_fours(*t);
  if (a.state) full = full && in_fours(a.state);
  const bool several = a.q.size(0) > a.cu_seqlens.size(0) - 1 || p.checkpoints > 0;
  with(full, [&]<bool kFull>() {
    with(a.state_v_first, [&]<bool kVFirst>() {
      with(several, [&]<bool kSeveral>() {
        if (p.K <= 64)
          launch_decode<64, kFull, kVFirst, kSeveral>(ctx, a, p);
        else if (p.K <= 128)
          launch_decode<128, kFull, kVFirst, kSeveral>(ctx, a, p);
        else
          launch_decode<256, kFull, kVFirst, kSeveral>(ctx, a, p);
      });
    });
  });
}

}  // namespace kl::cuda
