// Replay decode on CUDA: the tiles of kda_decode.cu, with states that are only read until a ring is full.
// What kda_replay() runs where the pipelined kernel does not fit (kda_replay_pipeline.cu), and for few
// sequences.
//
// A block of four warps owns 64 value channels of one (sequence, value head). Its threads prepare a channel
// each: the token's key and query under the decay since the state was written, and every record's key under
// the decay since its own token.
#include <algorithm>

#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_replay_tile.cuh"

namespace kl::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kWidth = 16 * kWarps;

template <int K>
struct Shared {
  Channels<K> channels;                  // k and q under the decay since the state was written; a: that decay
  float replayed[kRecords][K];           // keys of the records under the decay since their own tokens
  float products[kWarps][2 * kRecords];  // the warps' parts of the products with k, then with q
  float kk[kWarps], qq[kWarps], kq[kWarps];
};

KL_DEVICE float sum_of_warps(const float* x) { return x[0] + x[1] + x[2] + x[3]; }

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
  const int64_t record = first_record(p, r, slot, head);
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
  const float written = mine && fill > 0 ? r.decays[(record + fill - 1) * K + c] : 0.f;
  float* const tile = static_cast<float*>(p.state) + slot * p.slot_stride + head * p.head_stride +
                      v0 * (kVFirst ? p.row_stride : 1) +
                      first_element<4, kVFirst>(static_cast<int>(p.row_stride));
  LaneState<K, 4> S = {};
  if (slot >= 0) load_tile<K, 4, kVFirst>(S, tile, static_cast<int>(p.row_stride));
  float4 delta_of[2] = {};  // records kg and kg + 8
#pragma unroll
  for (int i = 0; i < 2; ++i)
    if (at.kg + 8 * i < fill) delta_of[i] = load4(r.deltas + (record + at.kg + 8 * i) * p.V + v);

  // A channel of the token and of every record.
  const float k = mine ? value_of(p.k, raw_k) : 0.f, q = mine ? value_of(p.q, raw_q) : 0.f;
  const float G = summed_decay(p.gate, expf(A_log), (mine ? value_of(p.g, raw_g) : 0.f) + bias, written);
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

  float u[4] = {}, y[4] = {}, values[4], delta[4], o[4];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = at.kg + 8 * i, with_q = kRecords + j;
    add_record(u, y, s.products[0][j] + s.products[1][j] + s.products[2][j] + s.products[3][j],
               s.products[0][with_q] + s.products[1][with_q] + s.products[2][with_q] + s.products[3][with_q],
               delta_of[i]);
  }
  values_of(values, p.v, raw_v);
  replay_step<K, kVFirst>(o, delta, u, y, S, s.channels, scales, values,
                          write_strength(p.beta_kind, value_of(p.beta, raw_beta)));
  if (at.kg == 0) store_run<true>(p.out, offset_of(p.out, n, head) + v, o, 4);
  if (slot < 0) return;

  // The step's own record; the keys by the first of the head's blocks.
  if (at.kg == 0) store4(r.deltas + (record + fill) * p.V + v, {delta[0], delta[1], delta[2], delta[3]});
  if (blockIdx.x == 0 && mine) {
    r.keys[(record + fill) * K + c] = k * scales.k;
    r.decays[(record + fill) * K + c] = G;
  }
  if (fill + 1 < r.L) return;

  if (mine) s.replayed[fill][c] = k * scales.k;
  __syncthreads();  // the key becomes visible
  fold<K, kVFirst>(S, s.channels.a, s.replayed, r.deltas + record * p.V + v, p.V, fill, delta);
  store_tile<K, 4, kVFirst>(S, tile, static_cast<int>(p.row_stride));
}

template <int K>
void launch_replay(const Ctx& ctx, const KdaReplayArgs& a, const StepParams& p) {
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  for (int first = 0; first < p.N; first += kMostSequences) {
    const LaunchConfig config{.grid = dim3(static_cast<unsigned>(p.V / kWidth), static_cast<unsigned>(p.Hv),
                                           static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
                              .block = dim3(kThreads),
                              .stream = static_cast<cudaStream_t>(ctx.stream),
                              .overlap_previous = true};
    launch(a.kda.state_v_first ? kda_replay_kernel<K, true> : kda_replay_kernel<K, false>, config, p,
           replay_params(a), first);
  }
}

}  // namespace

void kda_replay_tiles(const Ctx& ctx, const KdaReplayArgs& a) {
  const StepParams p = step_params(a.kda);
  bool fours = in_fours(a.kda.state) && a.kda.state.stride[2] < (1 << 20);
  for (const Tensor* t : {&a.kda.v, &a.kda.out, &a.deltas}) fours = fours && in_fours(*t);
  KL_CHECK((p.K == 64 || p.K == 128) && p.V % kWidth == 0 && p.Hv <= 65535 && fours,
           "kda_replay: expected K of 64 or 128, V a multiple of ", kWidth,
           ", rows aligned to four elements; found K = ", p.K, ", V = ", p.V);
  p.K == 64 ? launch_replay<64>(ctx, a, p) : launch_replay<128>(ctx, a, p);
}

void kda_replay(const Ctx& ctx, const KdaReplayArgs& a) {
  // The two add up in different orders, so a choice by the batch would show in the bits.
  !a.kda.batch_invariant&& kda_replay_pipeline_pays(a) ? kda_replay_pipeline(ctx, a)
                                                       : kda_replay_tiles(ctx, a);
}

}  // namespace kl::cuda
