// Replay decode on a tile of a head's state that one warp holds in registers (kda_tile.cuh): what its two
// kernels have in common.
//
// Every record's key goes under the decay since its own token. Its products with the token's key and query,
// two numbers a record, turn the records' share of u and y into L multiplications a value channel, which the
// eight lanes of a value group take by turns. The state itself is needed for the two products only, unless it
// is written anew.
#pragma once

#include "ops/kda/kda_replay.h"
#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {

constexpr int kRecords = static_cast<int>(kMostRecords);

struct ReplayParams {
  float *keys, *decays, *deltas;  // [slots, Hv, L, K], [slots, Hv, L, V]
  const int32_t* fill;
  int L;
};
inline ReplayParams replay_params(const KdaReplayArgs& a) {
  return {a.keys.ptr<float>(), a.decays.ptr<float>(), a.deltas.ptr<float>(), a.fill.ptr<int32_t>(),
          static_cast<int>(a.keys.size(2))};
}

// The first record of a head's ring, counted in records.
KL_DEVICE int64_t first_record(const StepParams& p, const ReplayParams& r, int slot, int head) {
  return (static_cast<int64_t>(slot) * p.Hv + head) * r.L;
}

// G of a channel: what `written` is for the last record (0: there is none) and this token's log2-decay.
KL_DEVICE float summed_decay(const GateParams& gate, float factor, float z, float written) {
  constexpr float kLog2e = 1.44269504f, kLeastDecay = -150.f;
  const float log2_decay = log_decay(gate, factor, z) * kLog2e;
  return (log2_decay < kLeastDecay ? kLeastDecay : log2_decay) + written;  // NaN stays NaN
}

// x[i] of all lanes summed, in lane i: 31 exchanges instead of 160.
template <int kCount>
KL_DEVICE float transposed_sum(const float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    constexpr int kHalf = kCount / 2;
    const bool upper = (threadIdx.x & kHalf) != 0;
    float y[kHalf];
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = x[i], high = x[i + kHalf];
      y[i] = (upper ? high : low) + __shfl_xor_sync(0xffffffffu, upper ? low : high, kHalf);
    }
    return transposed_sum(y);
  }
}

// A record's share of the lane's u and y; with_k, with_q: its key's products.
KL_DEVICE void add_record(float (&u)[4], float (&y)[4], float with_k, float with_q, float4 delta) {
  const float d[4] = {delta.x, delta.y, delta.z, delta.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) u[e] = fmaf(with_k, d[e], u[e]), y[e] = fmaf(with_q, d[e], y[e]);
}

// One step: u and y begin with the lane's records, the channels' k and q are under the decay since the state
// was written. o and delta are the same in the eight lanes of a vg.
template <int K, bool kVFirst>
KL_DEVICE void replay_step(float (&o)[4], float (&delta)[4], float (&u)[4], float (&y)[4],
                           const LaneState<K, 4>& S, const Channels<K>& channels, const Scales& scales,
                           const float (&values)[4], float beta) {
  const Place<kVFirst> at;
#pragma unroll
  for (int m = 0; m < K / 32; ++m) {
    float k[4], q[4];
    load_channels(k, channels.k, 32 * m + 4 * at.kg);
    load_channels(q, channels.q, 32 * m + 4 * at.kg);
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        u[e] = fmaf(S[4 * m + j][e], k[j], u[e]);
        y[e] = fmaf(S[4 * m + j][e], q[j], y[e]);
      }
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    delta[e] = beta * (values[e] - scales.k * lanes_sum<Place<kVFirst>::kSameVg>(u[e]));
    o[e] = fmaf(scales.kq, delta[e], scales.q * lanes_sum<Place<kVFirst>::kSameVg>(y[e]));
  }
}

// A full ring goes into the state: `fill` records, whose deltas at the lane's value channels stand at
// deltas[j * stride], and this step, whose key is keys[fill].
template <int K, bool kVFirst>
KL_DEVICE void fold(LaneState<K, 4>& S, const float* decay, const float (*keys)[K], const float* deltas,
                    int stride, int fill, const float (&delta)[4]) {
  const Place<kVFirst> at;
#pragma unroll
  for (int m = 0; m < K / 32; ++m) {
    float a[4];
    load_channels(a, decay, 32 * m + 4 * at.kg);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int e = 0; e < 4; ++e) S[4 * m + i][e] *= a[i];
  }
  for (int j = 0; j <= fill; ++j) {
    float d[4] = {delta[0], delta[1], delta[2], delta[3]};
    if (j < fill) load_channels(d, deltas, j * stride);
#pragma unroll
    for (int m = 0; m < K / 32; ++m) {
      float key[4];
      load_channels(key, keys[j], 32 * m + 4 * at.kg);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int e = 0; e < 4; ++e) S[4 * m + i][e] = fmaf(key[i], d[e], S[4 * m + i][e]);
    }
  }
}

}  // namespace kl::cuda
