// The definition of KDA in f64 on the GPU, token by token, for lengths that the CPU definition is too slow
// for. Reads the same arguments as the kernels under test; nothing of theirs is shared but the operands.
#pragma once

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "ops/kda/kda_operand.cuh"

namespace kl::bench {

struct ReferenceParams {
  cuda::Operand q, k, v, g, beta;
  const int64_t* cu_seqlens;
  cuda::GateParams gate;
  KdaBeta beta_kind;
  bool l2norm;
  double l2_eps, scale;
  int heads, group, D, T;
  double *keys, *queries, *decays;  // [T, heads, D]
  const double* state_in;           // [N, heads, D (k), D (v)]
  double *state_out, *out;          // the same; [T, heads, D]
};

// Normalised keys and queries, decays; a warp for a (token, head).
__global__ void reference_operands(ReferenceParams p) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (item >= static_cast<int64_t>(p.T) * p.heads) return;
  const int64_t token = item / p.heads, head = item % p.heads, qk_head = head / p.group;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const auto element = [](const cuda::Operand& t, int64_t row, int64_t h, int i) {
    return static_cast<double>(cuda::load_element(t, cuda::offset_of(t, row, h) + i));
  };
  double kk = 0, qq = 0;
  for (int i = lane; i < p.D; i += 32) {
    const double k = element(p.k, token, qk_head, i), q = element(p.q, token, qk_head, i);
    kk += k * k, qq += q * q;
  }
  for (int bit = 16; bit > 0; bit /= 2) {
    kk += __shfl_xor_sync(0xffffffffu, kk, bit);
    qq += __shfl_xor_sync(0xffffffffu, qq, bit);
  }
  const double k_scale = p.l2norm ? 1 / sqrt(kk + p.l2_eps) : 1,
               q_scale = p.l2norm ? 1 / sqrt(qq + p.l2_eps) : 1;
  const double rate = p.gate.A_log != nullptr ? exp(static_cast<double>(p.gate.A_log[head])) : 1;
  for (int i = lane; i < p.D; i += 32) {
    double z = element(p.g, token, head, i);
    if (p.gate.kind != KdaGateKind::log_decay && p.gate.dt_bias != nullptr)
      z += static_cast<double>(p.gate.dt_bias[head * p.gate.dt_stride + i]);
    double log_decay = z;
    if (p.gate.kind == KdaGateKind::softplus) log_decay = -rate * (fmax(z, 0.) + log1p(exp(-fabs(z))));
    if (p.gate.kind == KdaGateKind::bounded) log_decay = p.gate.lower_bound / (1 + exp(-rate * z));
    p.keys[item * p.D + i] = k_scale * element(p.k, token, qk_head, i);
    p.queries[item * p.D + i] = p.scale * q_scale * element(p.q, token, qk_head, i);
    p.decays[item * p.D + i] = exp(log_decay);
  }
}

// 8 threads carry one value channel; a block 32 of them of one (sequence, head).
template <int D>
__global__ void __launch_bounds__(256) reference_recurrence(ReferenceParams p) {
  constexpr int kOwn = D / 8;
  const int head = static_cast<int>(blockIdx.y), n = static_cast<int>(blockIdx.z);
  const int part = static_cast<int>(threadIdx.x % 8), v = static_cast<int>(blockIdx.x * 32 + threadIdx.x / 8);
  const int64_t matrix = (static_cast<int64_t>(n) * p.heads + head) * D * D;
  double S[kOwn];
  for (int i = 0; i < kOwn; ++i) S[i] = p.state_in[matrix + (part + 8 * i) * D + v];
  const auto sum = [](double x) {
    for (int bit = 4; bit > 0; bit /= 2) x += __shfl_xor_sync(0xffffffffu, x, bit);
    return x;
  };
  // A token's operands are on their way while the one before is worked on: a million tokens take a while.
  double k[kOwn], q[kOwn], decay[kOwn], x = 0, value = 0;
  const auto load = [&](int64_t token) {
    const int64_t row = (token * p.heads + head) * D;
    for (int i = 0; i < kOwn; ++i) {
      k[i] = __ldg(p.keys + row + part + 8 * i), q[i] = __ldg(p.queries + row + part + 8 * i);
      decay[i] = __ldg(p.decays + row + part + 8 * i);
    }
    x = static_cast<double>(cuda::load_element(p.beta, cuda::offset_of(p.beta, token, head)));
    value = static_cast<double>(cuda::load_element(p.v, cuda::offset_of(p.v, token, head) + v));
  };
  const int64_t begin = p.cu_seqlens[n], end = p.cu_seqlens[n + 1];
  if (begin < end) load(begin);
  for (int64_t token = begin; token < end; ++token) {
    const double beta =
        p.beta_kind == KdaBeta::value ? x : (p.beta_kind == KdaBeta::sigmoid ? 1 : 2) / (1 + exp(-x));
    const double wanted = value;
    double key[kOwn], query[kOwn], predicted[2] = {}, read[2] = {};
    for (int i = 0; i < kOwn; ++i) {
      key[i] = k[i], query[i] = q[i];
      S[i] *= decay[i];
      predicted[i % 2] += S[i] * key[i];
    }
    if (token + 1 < end) load(token + 1);
    const double delta = beta * (wanted - sum(predicted[0] + predicted[1]));
    for (int i = 0; i < kOwn; ++i) {
      S[i] += key[i] * delta;
      read[i % 2] += S[i] * query[i];
    }
    const double o = sum(read[0] + read[1]);
    if (part == 0) p.out[(token * p.heads + head) * D + v] = o;
  }
  for (int i = 0; i < kOwn; ++i) p.state_out[matrix + (part + 8 * i) * D + v] = S[i];
}

}  // namespace kl::bench
