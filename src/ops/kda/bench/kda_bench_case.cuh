// Inputs for the Hopper prefill's checks and times: random numbers made on the device, and the tensors of a
// case.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "cuda/vec.cuh"
#include "ops/kda/kda_cuda.h"

namespace kl::bench {
namespace {

using cuda::DeviceBuffer;
using cuda::DeviceTensor;

// ---- Random inputs, on the device ----

__device__ uint64_t hash(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}
__device__ double uniform(uint64_t seed, uint64_t i) {
  return (static_cast<double>(hash(hash(seed) + i) >> 11) + 0.5) * 0x1p-53;
}
__device__ double normal(uint64_t seed, uint64_t i) {
  return sqrt(-2 * log(uniform(seed, 2 * i))) * cospi(2 * uniform(seed, 2 * i + 1));
}

enum class Fill { normal, equal_rows, alternating, spikes, stretches, log_uniform, inverse_softplus };

// What x[i] becomes; rows of `row` elements, `per_token` rows a token.
__device__ double filled(Fill fill, uint64_t seed, int64_t i, double a, double b, int row, int per_token) {
  const int channel = static_cast<int>(i % row);
  const int64_t token = i / row / per_token;
  switch (fill) {
    case Fill::normal: return a + b * normal(seed, i);
    case Fill::equal_rows: return normal(seed, channel) + b * normal(seed + 1, i);
    // Half of the channels decay in tokens 0-7 of every 16, the other half in 8-15.
    case Fill::alternating: return (token % 16 < 8) == (channel < row / 2) ? a : b;
    case Fill::spikes: return uniform(seed, i) < b ? a : -0.05 * uniform(seed + 1, i);
    // Stretches of 700 tokens, other ones in every head.
    case Fill::stretches: return ((token + 300 * (i / row % per_token)) / 700 % 2 ? a : b) + normal(seed, i);
    case Fill::log_uniform: return log(a + (b - a) * uniform(seed, i));
    case Fill::inverse_softplus: {
      const double dt = exp(log(a) + (log(b) - log(a)) * uniform(seed, i));
      return dt + log(-expm1(-dt));
    }
  }
  return 0;
}
template <class T>
__global__ void fill_kernel(T* x, int64_t n, Fill fill, uint64_t seed, double a, double b, int row,
                            int per_token) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n) x[i] = cuda::from_float<T>(static_cast<float>(filled(fill, seed, i, a, b, row, per_token)));
}
void fill(const Tensor& t, Fill how, uint64_t seed, double a = 0, double b = 1) {
  const int row = static_cast<int>(t.size(-1)), per_token = t.rank > 2 ? static_cast<int>(t.size(1)) : 1;
  const unsigned blocks = static_cast<unsigned>((t.numel() + 255) / 256);
  if (t.dtype == DType::bf16)
    cuda::launch(fill_kernel<bf16>, {.grid = blocks, .block = 256}, t.ptr<bf16>(), t.numel(), how, seed, a, b,
                 row, per_token);
  else
    cuda::launch(fill_kernel<float>, {.grid = blocks, .block = 256}, t.ptr<float>(), t.numel(), how, seed, a,
                 b, row, per_token);
}

// ---- Cases ----

// From `shut` on they are not what the kernel expects of their kind: a bounded gate that never decays, or not
// in stretches, or little; a softplus gate that decays at once, or in stretches.
enum class Gate {
  bounded,
  softplus,
  weak,
  steep,
  spikes,
  infinite,
  alternating,
  none,
  shut,
  stretches,
  mild,
  strong_softplus,
  softplus_stretches
};
struct Case {
  std::string name;
  std::vector<int64_t> lengths;
  int H, Hv, D;
  Gate gate = Gate::bounded;
  bool gate_f32 = false, equal_keys = false, l2norm = true, v_first = false, i32 = false, state_bf16 = false;
  double beta_shift = 0;
  KdaBeta beta_kind = KdaBeta::sigmoid;
};

struct Problem {
  Case c;
  int64_t T = 0, N = 0;
  DeviceTensor q, k, v, g, beta, out, state, A_log, dt_bias, slot, cu, workspace, cu64;
  KdaArgs args;

  explicit Problem(const Case& problem, uint64_t seed, int64_t set = 0) : c(problem) {
    seed = seed * 1000 + static_cast<uint64_t>(set) * 17;
    N = static_cast<int64_t>(c.lengths.size());
    std::vector<int64_t> cu_host{0};
    for (const int64_t n : c.lengths) cu_host.push_back(T += n);
    std::vector<int32_t> cu32(cu_host.begin(), cu_host.end()), slots;
    for (int n = 0; n < N; ++n) slots.push_back(n);
    cu64 = cuda::to_device(Tensor(cu_host.data(), DType::i64, {N + 1}));
    cu = c.i32 ? cuda::to_device(Tensor(cu32.data(), DType::i32, {N + 1}))
               : cuda::to_device(Tensor(cu_host.data(), DType::i64, {N + 1}));
    slot = cuda::to_device(Tensor(slots.data(), DType::i32, {N}));
    q = cuda::device_tensor(DType::bf16, {T, c.H, c.D}), k = cuda::device_tensor(DType::bf16, {T, c.H, c.D});
    v = cuda::device_tensor(DType::bf16, {T, c.Hv, c.D}),
    out = cuda::device_tensor(DType::bf16, {T, c.Hv, c.D});
    g = cuda::device_tensor(c.gate_f32 ? DType::f32 : DType::bf16, {T, c.Hv, c.D});
    beta = cuda::device_tensor(DType::bf16, {T, c.Hv});
    state = cuda::device_tensor(c.state_bf16 ? DType::bf16 : DType::f32, {N, c.Hv, c.D, c.D});
    A_log = cuda::device_tensor(DType::f32, {c.Hv}), dt_bias = cuda::device_tensor(DType::f32, {c.Hv, c.D});
    fill(q.tensor, Fill::normal, seed + 1), fill(v.tensor, Fill::normal, seed + 2);
    if (c.equal_keys)
      fill(k.tensor, Fill::equal_rows, seed + 3, 0, 0);
    else
      fill(k.tensor, Fill::normal, seed + 3, 0, c.l2norm ? 1 : 1.2 / std::sqrt(c.D));
    fill(beta.tensor, Fill::normal, seed + 4, c.beta_shift, 1);
    reset_state();
    fill(A_log.tensor, Fill::log_uniform, seed + 6, 1, 16);
    fill(dt_bias.tensor, Fill::inverse_softplus, seed + 7, 1e-3, 0.1);
    fill(g.tensor, Fill::normal, seed + 8);
    args.q = q.tensor, args.k = k.tensor, args.v = v.tensor, args.g = g.tensor, args.beta = beta.tensor;
    args.cu_seqlens = cu.tensor, args.out = out.tensor, args.state = state.tensor, args.slot = slot.tensor;
    args.beta_kind = c.beta_kind, args.l2norm = c.l2norm, args.state_v_first = c.v_first;
    args.gate = {.kind = KdaGateKind::log_decay, .A_log = {}, .dt_bias = {}};
    switch (c.gate) {
      case Gate::bounded:
      case Gate::weak:
      case Gate::shut:
      case Gate::stretches:
      case Gate::mild:
        fill(A_log.tensor, Fill::log_uniform, seed + 6, 0.5, 2),
            fill(dt_bias.tensor, Fill::normal, seed + 7, 0, 0.5);
        args.gate = {.kind = KdaGateKind::bounded,
                     .A_log = A_log.tensor,
                     .dt_bias = dt_bias.tensor,
                     .lower_bound = c.gate == Gate::weak   ? -0.1f
                                    : c.gate == Gate::mild ? -1.f
                                                           : -5.f};
        if (c.gate == Gate::shut) fill(g.tensor, Fill::normal, seed + 8, -40, 1);
        if (c.gate == Gate::stretches) fill(g.tensor, Fill::stretches, seed + 8, -40, 0);
        break;
      case Gate::softplus:
      case Gate::strong_softplus:
      case Gate::softplus_stretches:
        args.gate = {.kind = KdaGateKind::softplus, .A_log = A_log.tensor, .dt_bias = dt_bias.tensor};
        if (c.gate == Gate::strong_softplus) fill(g.tensor, Fill::normal, seed + 8, 8, 1);
        if (c.gate == Gate::softplus_stretches) fill(g.tensor, Fill::stretches, seed + 8, -8, 8);
        break;
      case Gate::steep: fill(g.tensor, Fill::normal, seed + 8, -160, 10); break;
      case Gate::spikes: fill(g.tensor, Fill::spikes, seed + 8, -160, 0.02); break;
      case Gate::infinite: fill(g.tensor, Fill::spikes, seed + 8, -INFINITY, 0.02); break;
      case Gate::alternating: fill(g.tensor, Fill::alternating, seed + 8, -5, 0); break;
      case Gate::none: fill(g.tensor, Fill::normal, seed + 8, 0, 0); break;
    }
    const int64_t bytes = cuda::kda_prefill_sm90_workspace(args);
    workspace = cuda::device_tensor(DType::u8, {bytes});
    args.workspace = workspace.tensor;
  }
  void reset_state() { fill(state.tensor, Fill::normal, 99, 0, 0.5); }
  double bytes() const {
    return 2. * T * c.D * (2 * c.H + 2 * c.Hv) + (c.gate_f32 ? 4. : 2.) * T * c.D * c.Hv + 2. * T * c.Hv +
           8. * N * c.Hv * c.D * c.D;
  }
};
const char* name_of(Gate gate) {
  constexpr const char* names[] = {"bounded -5",
                                   "softplus",
                                   "weak -0.1",
                                   "-160 a step",
                                   "spikes",
                                   "-inf",
                                   "alternating",
                                   "no decay",
                                   "bounded -5 but shut",
                                   "bounded -5 in stretches",
                                   "bounded -1",
                                   "strong softplus",
                                   "softplus in stretches"};
  return names[static_cast<int>(gate)];
}

}  // namespace
}  // namespace kl::bench
