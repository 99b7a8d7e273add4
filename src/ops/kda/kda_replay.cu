// Replay decode on CUDA: the tiles of kda_decode.cu, with states that are only read until a ring is full.
//
// A block of four warps owns 64 value channels of one (sequence, value head). Its threads prepare a channel
// each: the token's key and query under the decay since the state was written, and every record's key under
// the decay since its own token (`replayed`). Their products c_j with the token's key and d_j with its query
// turn the records' share of u and y into L multiplications a value channel, which the eight lanes of a value
// group take by turns. The state itself is needed for the two products only, unless it is written anew.
#include <algorithm>

#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWidth = 16 * kWarps,
              kRecords = static_cast<int>(kMostRecords);
constexpr float kLog2e = 1.44269504f, kLeastDecay = -150.f;

struct ReplayParams {
  float *keys, *decays, *deltas;  // [slots, Hv, L, K], [slots, Hv, L, V]
  const int32_t* fill;
  int L;
};

template <int K>
struct Shared {
  Channels<K> channels;                  // k and q under the decay since the state was written; a: that decay
  float replayed[kRecords][K];           // keys of the records under the decay since their own tokens
  alignas(16) float key[K];              // the token's normalised key
  float products[kWarps][2 * kRecords];  // the warps' parts of c_j, then of d_j
  float kk[kWarps], qq[kWarps], kq[kWarps];
};

KL_DEVICE float sum_of_warps(const float* x) { return x[0] + x[1] + x[2] + x[3]; }

// x[i] of all lanes summed, in lane i: 31 exchanges instead of 160.
KL_DEVICE float transposed_sum(float (&x)[32]) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    const bool upper = threadIdx.x % 32 & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(0xffffffffu, sent, half);
    }
  }
  return x[0];
}

template <int K, bool kVFirst>
__global__ void __launch_bounds__(kThreads, 3)
    kda_replay_kernel(const __grid_constant__ StepParams p, const __grid_constant__ ReplayParams r,
                      int first_sequence) {
  follow_previous_kernel();
  __shared__ Shared<K> s;
  const Place<kVFirst> at;
  const int n = first_sequence + blockIdx.z, head = blockIdx.y, warp = threadIdx.x / 32;
  const int v0 = blockIdx.x * kWidth + warp * 16, v = v0 + 4 * at.vg, c = threadIdx.x;
  const int slot = p.slot[n], fill = slot >= 0 ? r.fill[n] : 0;
  const int64_t record = (static_cast<int64_t>(slot) * p.Hv + head) * r.L;  // the first of the ring
  const bool mine = c < K;  // a thread past K prepares nothing

  // All loads are issued before the first value is used.
  RawElement raw_q, raw_k, raw_g;
  if (mine) {
    raw_q = load_raw(p.q, offset_of(p.q, n, qk_head(p, head)) + c);
    raw_k = load_raw(p.k, offset_of(p.k, n, qk_head(p, head)) + c);
    raw_g = load_raw(p.g, offset_of(p.g, n, head) + c);
  }
  const auto raw_v = load_raw_run<4, true>(p.v, offset_of(p.v, n, head) + v, 4);
  const RawElement raw_beta = load_raw(p.beta, offset_of(p.beta, n, head));
  const float A_log = A_log_of(p.gate, head), bias = mine ? dt_bias_of(p.gate, head, c) : 0.f;
  float keys[kRecords] = {}, decays[kRecords] = {};
  if (mine)
#pragma unroll
    for (int j = 0; j < kRecords; ++j)
      if (j < fill) keys[j] = r.keys[(record + j) * K + c], decays[j] = r.decays[(record + j) * K + c];
  const float written =
      mine && fill > 0 ? r.decays[(record + fill - 1) * K + c] : 0.f;  // G of the last record
  float* const tile = static_cast<float*>(p.state) + slot * p.slot_stride + head * p.head_stride +
                      v0 * (kVFirst ? p.row_stride : 1);
  LaneState<K, 4> S = {};
  if (slot >= 0) load_tile<K, 4, kVFirst>(S, tile, static_cast<int>(p.row_stride));
  float4 delta_of[2] = {};  // records kg and kg + 8
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (at.kg + 8 * i < fill) delta_of[i] = load4(r.deltas + (record + at.kg + 8 * i) * p.V + v);

  // A channel of the token and of every record.
  const float k = mine ? value_of(p.k, raw_k) : 0.f, q = mine ? value_of(p.q, raw_q) : 0.f;
  const float log2_decay =
      log_decay(p.gate, expf(A_log), (mine ? value_of(p.g, raw_g) : 0.f) + bias) * kLog2e;
  float G = log2_decay < kLeastDecay ? kLeastDecay : log2_decay;  // NaN stays NaN
  G += written;
  float products[2 * kRecords];
#pragma unroll
  for (int j = 0; j < kRecords; ++j) {
    const float replayed = j < fill ? keys[j] * exp2f(G - decays[j]) : 0.f;
    if (mine) s.replayed[j][c] = replayed;
    products[j] = replayed * k, products[kRecords + j] = replayed * q;
  }
  if (mine) {
    const float decay = exp2f(G);
    s.channels.k[c] = k * decay, s.channels.q[c] = q * decay, s.channels.a[c] = decay;
  }
  const float kk = warp_sum(k * k), qq = warp_sum(q * q), kq = warp_sum(k * q);
  s.products[warp][threadIdx.x % 32] = transposed_sum(products);
  if (threadIdx.x % 32 == 0) s.kk[warp] = kk, s.qq[warp] = qq, s.kq[warp] = kq;
  __syncthreads();  // channels, records and sums become visible
  const Scales scales =
      scales_of(sum_of_warps(s.kk), sum_of_warps(s.qq), sum_of_warps(s.kq), p.l2norm, p.l2_eps, p.scale);

  float u[4] = {}, y[4] = {};
#pragma unroll
  for (int m = 0; m < K / 32; ++m) {
    float ck[4], cq[4];
    load_channels(ck, s.channels.k, 32 * m + 4 * at.kg);
    load_channels(cq, s.channels.q, 32 * m + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        u[e] = fmaf(S[4 * m + j][e], ck[j], u[e]);
        y[e] = fmaf(S[4 * m + j][e], cq[j], y[e]);
      }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = at.kg + 8 * i;
    const float with_k = s.products[0][j] + s.products[1][j] + s.products[2][j] + s.products[3][j];
    const float with_q = s.products[0][kRecords + j] + s.products[1][kRecords + j] +
                         s.products[2][kRecords + j] + s.products[3][kRecords + j];
    const float d[4] = {delta_of[i].x, delta_of[i].y, delta_of[i].z, delta_of[i].w};
#pragma unroll
    for (int e = 0; e < 4; ++e) u[e] = fmaf(with_k, d[e], u[e]), y[e] = fmaf(with_q, d[e], y[e]);
  }
  float values[4], delta[4], o[4];
  values_of(values, p.v, raw_v);
  const float beta = write_strength(p.beta_kind, value_of(p.beta, raw_beta));
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    delta[e] = beta * (values[e] - scales.k * lanes_sum<Place<kVFirst>::kSameVg>(u[e]));
    o[e] = fmaf(scales.kq, delta[e], scales.q * lanes_sum<Place<kVFirst>::kSameVg>(y[e]));
  }
  if (at.kg == 0) store_run<true>(p.out, offset_of(p.out, n, head) + v, o, 4);
  if (slot < 0) return;

  // The step's own record; the keys by the first of the head's blocks.
  if (at.kg == 0) store4(r.deltas + (record + fill) * p.V + v, {delta[0], delta[1], delta[2], delta[3]});
  if (blockIdx.x == 0 && mine) {
    r.keys[(record + fill) * K + c] = k * scales.k;
    r.decays[(record + fill) * K + c] = G;
  }
  if (fill + 1 < r.L) return;

  // The ring is full: all records and this step go into the state.
  if (mine) s.key[c] = k * scales.k;
  __syncthreads();  // the key becomes visible
#pragma unroll
  for (int m = 0; m < K / 8; ++m) {
    const float decay = s.channels.a[32 * (m / 4) + 4 * at.kg + m % 4];
#pragma unroll
    for (int e = 0; e < 4; ++e) S[m][e] *= decay;
  }
  for (int j = 0; j <= fill; ++j) {
    float d[4] = {delta[0], delta[1], delta[2], delta[3]};
    if (j < fill) load_channels(d, r.deltas + (record + j) * p.V, v);
#pragma unroll
    for (int m = 0; m < K / 32; ++m) {
      float key[4];
      load_channels(key, j < fill ? s.replayed[j] : s.key, 32 * m + 4 * at.kg);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[4 * m + i][e] = fmaf(key[i], d[e], S[4 * m + i][e]);
    }
  }
  store_tile<K, 4, kVFirst>(S, tile, static_cast<int>(p.row_stride));
}

template <int K>
void launch_replay(const Ctx& ctx, const KdaReplayArgs& a, const StepParams& p, const ReplayParams& r) {
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  for (int first = 0; first < p.N; first += kMostSequences) {
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>(p.V / kWidth), static_cast<unsigned>(p.Hv),
                                           static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
                              .block = dim3(kThreads),
                              .stream = static_cast<cudaStream_t>(ctx.stream),
                              .overlap_previous = true};
    launch(a.kda.state_v_first ? kda_replay_kernel<K, true> : kda_replay_kernel<K, false>, config, p, r,
           first);
  }
}

}  // namespace

void kda_replay(const Ctx& ctx, const KdaReplayArgs& a) {
  const StepParams p = step_params(a.kda);
  bool fours = in_fours(a.kda.state) && a.kda.state.stride[2] < (1 << 20);
  for (const Tensor* t : {&a.kda.v, &a.kda.out, &a.deltas}) fours = fours && in_fours(*t);
  KL_CHECK((p.K == 64 || p.K == 128) && p.V % kWidth == 0 && p.Hv <= 65535 && fours,
           "kda_replay: expected K of 64 or 128, V a multiple of ", kWidth,
           ", rows aligned to four elements; found K = ", p.K, ", V = ", p.V);
  const ReplayParams r{a.keys.ptr<float>(), a.decays.ptr<float>(), a.deltas.ptr<float>(),
                       a.fill.ptr<int32_t>(), static_cast<int>(a.keys.size(2))};
  p.K == 64 ? launch_replay<64>(ctx, a, p, r) : launch_replay<128>(ctx, a, p, r);
}

}  // namespace kl::cuda
