// The recurrence on a tile of a head's state that one warp holds in registers: [K, 4 P] values, all key
// channels of 4 P value channels. Every kernel that steps token by token is made of these.
//
// Lane (kg, vg), kg < 8 and vg < 4, holds key channels 32 c + 4 kg + j (c < K / 32, j < 4) times value
// channels P vg + p (p < P). With both products taken from the decayed state before the update, one pass is
// enough:
//
//   S~ = Diag(a) S        u = S~ᵀ k             y = S~ᵀ q
//   delta = beta (v - u)  o = y + (kᵀ q) delta  S = S~ + k deltaᵀ
#pragma once

#include "cuda/reduce.cuh"
#include "ops/kda/kda_operand.cuh"

namespace kl::cuda {

// Where a lane stands in its warp's tile. Along the state's contiguous dimension lanes are neighbours.
template <bool kVFirst>
struct Place {
  int kg = kVFirst ? threadIdx.x % 8 : threadIdx.x % 32 / 4;
  int vg = kVFirst ? threadIdx.x % 32 / 8 : threadIdx.x % 4;
  static constexpr int kSameVg = kVFirst ? 7 : 28;  // bits in which the lanes of one vg differ
};

// A lane's part of the tile: S[m][p] for key channel 32 (m / 4) + 4 kg + m % 4, value channel P vg + p.
template <int KP, int P>
using LaneState = float[KP / 8][P];

// Where the lane's first element stands in the tile.
template <int P, bool kVFirst>
KL_DEVICE int first_element(int row_stride) {
  const Place<kVFirst> at;
  return kVFirst ? P * at.vg * row_stride + 4 * at.kg : 4 * at.kg * row_stride + P * at.vg;
}
// Loads or stores the lane's part of a state in memory, global or shared; `first` is its first element.
template <int KP, int P, bool kVFirst, class State>
KL_DEVICE void load_tile(LaneState<KP, P>& S, const State* first, int row_stride) {
  if constexpr (kVFirst) {
#pragma unroll
    for (int c = 0; c < KP / 32; ++c)
#pragma unroll
      for (int p = 0; p < P; ++p) {
        const float4 x = load4(first + p * row_stride + 32 * c);
        S[4 * c][p] = x.x, S[4 * c + 1][p] = x.y, S[4 * c + 2][p] = x.z, S[4 * c + 3][p] = x.w;
      }
  } else {
#pragma unroll
    for (int m = 0; m < KP / 8; ++m) {
      const State* from = first + (32 * (m / 4) + m % 4) * row_stride;
      if constexpr (P == 4) {
        const float4 x = load4(from);
        S[m][0] = x.x, S[m][1] = x.y, S[m][2] = x.z, S[m][3] = x.w;
      } else {
        const float2 x = load2(from);
        S[m][0] = x.x, S[m][1] = x.y;
      }
    }
  }
}
template <int KP, int P, bool kVFirst, class State>
KL_DEVICE void store_tile(const LaneState<KP, P>& S, State* first, int row_stride) {
  if constexpr (kVFirst) {
#pragma unroll
    for (int c = 0; c < KP / 32; ++c)
#pragma unroll
      for (int p = 0; p < P; ++p)
        store4(first + p * row_stride + 32 * c,
               {S[4 * c][p], S[4 * c + 1][p], S[4 * c + 2][p], S[4 * c + 3][p]});
  } else {
#pragma unroll
    for (int m = 0; m < KP / 8; ++m) {
      State* to = first + (32 * (m / 4) + m % 4) * row_stride;
      if constexpr (P == 4)
        store4(to, {S[m][0], S[m][1], S[m][2], S[m][3]});
      else
        store2(to, {S[m][0], S[m][1]});
    }
  }
}

// The same one element at a time, for states of any size and alignment: calls f(element, x) for each of the
// lane's values that lies inside K x V_left.
template <int KP, int P, bool kVFirst, class State, class F>
KL_DEVICE void for_each_inside(LaneState<KP, P>& S, State* tile, int64_t row_stride, int K, int V_left,
                               F&& f) {
  const Place<kVFirst> at;
#pragma unroll
  for (int m = 0; m < KP / 8; ++m)
#pragma unroll
    for (int p = 0; p < P; ++p) {
      const int k = 32 * (m / 4) + 4 * at.kg + m % 4, v = P * at.vg + p;
      if (k < K && v < V_left) f(tile + (kVFirst ? v * row_stride + k : k * row_stride + v), S[m][p]);
    }
}

// One token's operands of a head, in shared memory: raw keys and queries, and decays. What normalisation
// multiplies k and q with is applied to the products.
template <int KP>
struct alignas(16) Channels {
  float k[KP], q[KP], a[KP];
};
struct Scales {
  float k, q;  // factors of the raw k and q; that of q holds `scale`
  float kq;    // kᵀ q of the scaled vectors
};
KL_DEVICE Scales scales_of(float kk, float qq, float kq, bool l2norm, float l2_eps, float scale) {
  Scales s{1.f, scale, kq * scale};
  if (l2norm) {
    s.k = rsqrtf(kk + l2_eps);
    s.q = scale * rsqrtf(qq + l2_eps);
    s.kq = kq * s.k * s.q;
  }
  return s;
}

// The same, prepared by a block of four warps, a channel a thread.
constexpr int kTileWarps = 4, kTileThreads = 32 * kTileWarps;
template <int KP>
struct Prepared {
  Channels<KP> channels;
  alignas(16) float kk[kTileWarps], qq[kTileWarps], kq[kTileWarps];  // the warps' parts of kᵀk, qᵀq, kᵀq
};
struct Squares {
  float kk = 0, qq = 0, kq = 0;  // of the thread's channels
  KL_DEVICE void add(float k, float q) { kk = fmaf(k, k, kk), qq = fmaf(q, q, qq), kq = fmaf(k, q, kq); }
};
template <int KP>
KL_DEVICE void leave_sums(Prepared<KP>& to, const Squares& squares) {
  const float kk = warp_sum(squares.kk), qq = warp_sum(squares.qq), kq = warp_sum(squares.kq);
  if (threadIdx.x % 32 == 0) {
    const int warp = threadIdx.x / 32;
    to.kk[warp] = kk, to.qq[warp] = qq, to.kq[warp] = kq;
  }
}
KL_DEVICE float sum_of_four(const float* x) {
  const float4 four = load4(x);
  return four.x + four.y + four.z + four.w;
}
template <int KP>
KL_DEVICE Scales scales_of(const Prepared<KP>& x, bool l2norm, float l2_eps, float scale) {
  return scales_of(sum_of_four(x.kk), sum_of_four(x.qq), sum_of_four(x.kq), l2norm, l2_eps, scale);
}

// One step of the recurrence on the lane's part of the state; o are the outputs of its P value channels, the
// same in the eight lanes of a vg.
template <int KP, int P, bool kVFirst>
KL_DEVICE void step(float (&o)[P], LaneState<KP, P>& S, const Channels<KP>& channels, const Scales& scales,
                    const float (&v)[P], float beta) {
  const Place<kVFirst> at;
  float u[P] = {}, y[P] = {};
#pragma unroll
  for (int c = 0; c < KP / 32; ++c) {
    float k[4], q[4], a[4];
    load_channels(k, channels.k, 32 * c + 4 * at.kg);
    load_channels(q, channels.q, 32 * c + 4 * at.kg);
    load_channels(a, channels.a, 32 * c + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int p = 0; p < P; ++p) {
        float& s = S[4 * c + j][p];
        s *= a[j];
        u[p] = fmaf(s, k[j], u[p]);
        y[p] = fmaf(s, q[j], y[p]);
      }
  }
  float delta[P];
#pragma unroll
  for (int p = 0; p < P; ++p) {
    delta[p] = beta * (v[p] - scales.k * lanes_sum<Place<kVFirst>::kSameVg>(u[p]));
    o[p] = fmaf(scales.kq, delta[p], scales.q * lanes_sum<Place<kVFirst>::kSameVg>(y[p]));
    delta[p] *= scales.k;  // the update below is made with the raw k
  }
#pragma unroll
  for (int c = 0; c < KP / 32; ++c) {
    float k[4];
    load_channels(k, channels.k, 32 * c + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int p = 0; p < P; ++p) S[4 * c + j][p] = fmaf(k[j], delta[p], S[4 * c + j][p]);
  }
}

// A KdaArgs as the kernels that step token by token read it.
struct StepParams : PackedStates {
  Operand q, k, v, g, beta, out;
  const int32_t *checkpoint_row, *checkpoint_slot;
  int checkpoints;
  GateParams gate;
  KdaBeta beta_kind;
  bool l2norm;
  float l2_eps, scale;
  int K, V, N, Hv, group;  // group: value heads per query/key head
  int length;              // of each sequence, if all have the same
};
inline StepParams step_params(const KdaArgs& a) {
  StepParams p{};
  static_cast<PackedStates&>(p) = packed_states(a.cu_seqlens, a.state, a.slot, a.slot_out);
  p.q = operand(a.q), p.k = operand(a.k), p.v = operand(a.v), p.g = operand(a.g), p.beta = operand(a.beta);
  p.out = operand(a.out);
  p.N = static_cast<int>(a.cu_seqlens ? a.cu_seqlens.size(0) - 1 : a.q.size(0));
  if (a.state && a.checkpoint_row) {
    p.checkpoint_row = a.checkpoint_row.ptr<int32_t>();
    p.checkpoint_slot = a.checkpoint_slot.ptr<int32_t>();
    p.checkpoints = static_cast<int>(a.checkpoint_row.size(0));
  }
  p.gate = gate_params(a.gate);
  p.beta_kind = a.beta_kind;
  p.l2norm = a.l2norm, p.l2_eps = a.l2_eps;
  p.K = static_cast<int>(a.q.size(2)), p.V = static_cast<int>(a.v.size(2));
  p.length = p.N > 0 ? static_cast<int>(a.q.size(0) / p.N) : 0;
  p.Hv = static_cast<int>(a.v.size(1));
  p.group = p.Hv / static_cast<int>(a.q.size(1));
  p.scale = a.scale != 0.f ? a.scale : 1.f / sqrtf(static_cast<float>(p.K));
  return p;
}

KL_DEVICE int qk_head(const StepParams& p, int head) { return p.group == 1 ? head : head / p.group; }

}  // namespace kl::cuda
