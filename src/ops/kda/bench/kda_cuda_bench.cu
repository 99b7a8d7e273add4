// Checks the Hopper prefill against the definition in f64 and times it, on a machine with nothing but a
// driver:  kda_cuda_bench [check|time|all] [part of a case's name]
// Checks: o and the final state by rel-RMS, NaN-poisoned outputs, a second run bit by bit. Times: medians of
// CUDA-graph replays over rotating inputs that together exceed the L2 cache.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "cuda/launch.h"
#include "cuda/memory.h"
#include "ops/kda/bench/kda_reference.cuh"
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

enum class Fill { normal, equal_rows, alternating, spikes, log_uniform, inverse_softplus };

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

enum class Gate { bounded, softplus, weak, steep, spikes, infinite, alternating, none };
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
    args = {.q = q.tensor,
            .k = k.tensor,
            .v = v.tensor,
            .g = g.tensor,
            .beta = beta.tensor,
            .cu_seqlens = cu.tensor,
            .out = out.tensor,
            .state = state.tensor,
            .slot = slot.tensor};
    args.beta_kind = c.beta_kind, args.l2norm = c.l2norm, args.state_v_first = c.v_first;
    args.gate = {.kind = KdaGateKind::log_decay, .A_log = {}, .dt_bias = {}};
    switch (c.gate) {
      case Gate::bounded:
      case Gate::weak:
        fill(A_log.tensor, Fill::log_uniform, seed + 6, 0.5, 2),
            fill(dt_bias.tensor, Fill::normal, seed + 7, 0, 0.5);
        args.gate = {.kind = KdaGateKind::bounded,
                     .A_log = A_log.tensor,
                     .dt_bias = dt_bias.tensor,
                     .lower_bound = c.gate == Gate::weak ? -0.1f : -5.f};
        break;
      case Gate::softplus:
        args.gate = {.kind = KdaGateKind::softplus, .A_log = A_log.tensor, .dt_bias = dt_bias.tensor};
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

// ---- Checks ----

std::vector<double> floats(const Tensor& t) {
  const OwnedTensor host = cuda::to_host(t);
  std::vector<double> x(static_cast<size_t>(t.numel()));
  dispatch_float(t.dtype, [&]<class E>() {
    for (size_t i = 0; i < x.size(); ++i)
      x[i] = static_cast<double>(static_cast<const E*>(host.tensor.data)[i]);
  });
  return x;
}
double relative_rms(const std::vector<double>& x, const std::vector<double>& y) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) error += (x[i] - y[i]) * (x[i] - y[i]), norm += y[i] * y[i];
  return std::sqrt(error / std::max(norm, 1e-300));
}
// The pool as [N, Hv, K, V].
std::vector<double> states(const Problem& p) {
  std::vector<double> x = floats(p.state.tensor), y = x;
  const size_t D = static_cast<size_t>(p.c.D);
  if (p.c.v_first)
    for (size_t m = 0; m < x.size(); m += D * D)
      for (size_t i = 0; i < D; ++i)
        for (size_t j = 0; j < D; ++j) y[m + i * D + j] = x[m + j * D + i];
  return y;
}

bool check(const Case& c) {
  Problem p(c, 7);
  const std::vector<double> start = states(p);
  const int64_t rows = p.T * c.Hv * c.D, matrices = p.N * c.Hv * c.D * c.D;
  const auto f64 = [](int64_t n) { return cuda::device_tensor(DType::f64, {n}); };
  DeviceTensor keys = f64(rows), queries = f64(rows), decays = f64(rows), out = f64(rows),
               final = f64(matrices);
  DeviceTensor initial = cuda::to_device(Tensor(const_cast<double*>(start.data()), DType::f64, {matrices}));
  ReferenceParams r{.q = cuda::operand(p.args.q),
                    .k = cuda::operand(p.args.k),
                    .v = cuda::operand(p.args.v),
                    .g = cuda::operand(p.args.g),
                    .beta = cuda::operand(p.args.beta),
                    .cu_seqlens = p.cu64.tensor.ptr<int64_t>(),
                    .gate = cuda::gate_params(p.args.gate),
                    .beta_kind = c.beta_kind,
                    .l2norm = c.l2norm,
                    .l2_eps = 1e-6,
                    .scale = 1 / std::sqrt(static_cast<double>(c.D)),
                    .heads = c.Hv,
                    .group = c.Hv / c.H,
                    .D = c.D,
                    .T = static_cast<int>(p.T),
                    .keys = keys.tensor.ptr<double>(),
                    .queries = queries.tensor.ptr<double>(),
                    .decays = decays.tensor.ptr<double>(),
                    .state_in = initial.tensor.ptr<double>(),
                    .state_out = final.tensor.ptr<double>(),
                    .out = out.tensor.ptr<double>()};
  cuda::launch(reference_operands, {.grid = static_cast<unsigned>((p.T * c.Hv + 7) / 8), .block = 256}, r);
  const dim3 grid(static_cast<unsigned>(c.D / 32), static_cast<unsigned>(c.Hv), static_cast<unsigned>(p.N));
  if (c.D == 128)
    cuda::launch(reference_recurrence<128>, {.grid = grid, .block = 256}, r);
  else
    cuda::launch(reference_recurrence<64>, {.grid = grid, .block = 256}, r);
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "the reference of ", c.name);

  Ctx ctx;
  ctx.device = Device::cuda;
  std::vector<double> first_out, first_state;
  bool same = true;
  for (int run = 0; run < 2; ++run) {
    p.reset_state();
    KL_CUDA_CHECK(cudaMemset(p.out.tensor.data, 0xff, static_cast<size_t>(p.out.tensor.bytes())),
                  "poisoning");
    KL_CUDA_CHECK(cudaMemset(p.workspace.tensor.data, 0xff, static_cast<size_t>(p.workspace.tensor.bytes())),
                  "poisoning");
    cuda::kda_prefill_sm90(ctx, p.args);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "the kernels of ", c.name);
    const std::vector<double> o = floats(p.out.tensor), s = states(p);
    if (run == 0) {
      first_out = o, first_state = s;
    } else {
      same = std::equal(o.begin(), o.end(), first_out.begin(), [](double a, double b) { return a == b; }) &&
             std::equal(s.begin(), s.end(), first_state.begin(), [](double a, double b) { return a == b; });
    }
  }
  const double o_error = relative_rms(first_out, floats(out.tensor)),
               s_error = relative_rms(first_state, floats(final.tensor));
  const bool good = o_error <= 5e-3 && s_error <= 5e-3 && same;
  std::printf("%-44s o %.2e  state %.2e  %s  %s\n", c.name.c_str(), o_error, s_error,
              same ? "same bits" : "BITS DIFFER", good ? "ok" : "FAILED");
  std::fflush(stdout);
  return good;
}

// A state written at a checkpoint has the bits of the final state of the sequence cut off there; what is not
// written to keeps its bits; negative slots are left alone.
bool check_slots() {
  Problem p({"slots and checkpoints", {480}, 128, 128, 128, Gate::softplus}, 7);
  const int64_t H = 128, D = 128;
  DeviceTensor pools[3];  // whole, cut off, negative
  std::vector<double> states[3], before;
  for (int i = 0; i < 3; ++i) {
    pools[i] = cuda::device_tensor(DType::f32, {4, H, D, D});
    fill(pools[i].tensor, Fill::normal, 99, 0, 0.5);
    std::vector<int32_t> from{i == 2 ? -1 : 0}, to{i == 2 ? -1 : 1}, rows{160, 320}, slots{2, 3};
    const int64_t T = i == 1 ? 160 : 480;
    std::vector<int64_t> cu{0, T};
    const DeviceTensor slot = cuda::to_device(Tensor(from.data(), DType::i32, {1})),
                       slot_out = cuda::to_device(Tensor(to.data(), DType::i32, {1})),
                       row = cuda::to_device(Tensor(rows.data(), DType::i32, {2})),
                       checkpoint = cuda::to_device(Tensor(slots.data(), DType::i32, {2})),
                       ends = cuda::to_device(Tensor(cu.data(), DType::i64, {2}));
    KdaArgs a = p.args;
    for (Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out}) *t = t->slice(0, 0, T);
    a.cu_seqlens = ends.tensor, a.state = pools[i].tensor, a.slot = slot.tensor, a.slot_out = slot_out.tensor;
    if (i == 0)
      a.checkpoint_row = row.tensor, a.checkpoint_slot = checkpoint.tensor, before = floats(pools[0].tensor);
    const DeviceTensor workspace = cuda::device_tensor(DType::u8, {cuda::kda_prefill_sm90_workspace(a)});
    a.workspace = workspace.tensor;
    Ctx ctx;
    ctx.device = Device::cuda;
    cuda::kda_prefill_sm90(ctx, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "slots and checkpoints");
    states[i] = floats(pools[i].tensor);
  }
  const int64_t one = H * D * D;
  const auto same = [&](const std::vector<double>& x, int i, const std::vector<double>& y, int j, int count) {
    return std::equal(x.begin() + i * one, x.begin() + (i + count) * one, y.begin() + j * one);
  };
  const bool good = same(states[0], 2, states[1], 1, 1) && same(states[0], 0, before, 0, 1) &&
                    !same(states[0], 1, before, 1, 1) && !same(states[0], 3, before, 3, 1) &&
                    same(states[1], 2, before, 2, 2) && same(states[2], 0, before, 0, 4);
  std::printf("%-44s %s\n", "slots, slot_out, checkpoints, by bits", good ? "ok" : "FAILED");
  return good;
}

// ---- Times ----

struct Timing {
  double median, low, high;  // ms
};
Timing time(const Case& c) {
  std::vector<Problem> sets;
  sets.emplace_back(c, 1);
  const double l2 = static_cast<double>(cuda::current_device().l2_bytes);
  const int count = static_cast<int>(std::clamp(std::ceil(3 * l2 / sets[0].bytes()), 2., 24.));
  for (int i = 1; i < count; ++i) sets.emplace_back(c, 1, i);
  cudaStream_t stream;
  KL_CUDA_CHECK(cudaStreamCreate(&stream), "a stream");
  Ctx ctx;
  ctx.device = Device::cuda, ctx.stream = stream;
  for (Problem& p : sets) cuda::kda_prefill_sm90(ctx, p.args);
  KL_CUDA_CHECK(cudaStreamSynchronize(stream), "warming up ", c.name);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  KL_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (Problem& p : sets) cuda::kda_prefill_sm90(ctx, p.args);
  KL_CUDA_CHECK(cudaStreamEndCapture(stream, &graph), "capture");
  KL_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0), "graph");
  cudaEvent_t begin, end;
  KL_CUDA_CHECK(cudaEventCreate(&begin), "event");
  KL_CUDA_CHECK(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < 33; ++i) {
    KL_CUDA_CHECK(cudaEventRecord(begin, stream), "event");
    KL_CUDA_CHECK(cudaGraphLaunch(exec, stream), "graph");
    KL_CUDA_CHECK(cudaEventRecord(end, stream), "event");
    KL_CUDA_CHECK(cudaEventSynchronize(end), "timing ", c.name);
    float ms = 0;
    KL_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 3) times.push_back(static_cast<double>(ms) / count);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return {times[times.size() / 2], times[times.size() / 10], times[times.size() * 9 / 10]};
}

const char* name_of(Gate gate) {
  constexpr const char* names[] = {"bounded -5", "softplus", "weak -0.1",   "-160 a step",
                                   "spikes",     "-inf",     "alternating", "no decay"};
  return names[static_cast<int>(gate)];
}
std::vector<int64_t> equal(int n, int64_t length) {
  return std::vector<int64_t>(static_cast<size_t>(n), length);
}

struct Target {
  Case c;
  double must, aim;  // ms, bounded gate
};
std::vector<Target> targets() {
  const std::vector<int64_t> pack{1300, 547, 2048, 963, 271, 3063};
  std::vector<Target> all{{{"B1 T1024 H32", {1024}, 32, 32, 128}, 0.060, 0.035},
                          {{"B1 T8192 H32", {8192}, 32, 32, 128}, 0.22, 0.14},
                          {{"B1 T8192 H64", {8192}, 64, 64, 128}, 0.42, 0.27},
                          {{"B1 T8192 H96", {8192}, 96, 96, 128}, 0.60, 0.40},
                          {{"B1 T65536 H32", {65536}, 32, 32, 128}, 1.8, 1.1},
                          {{"B1 T65536 H8", {65536}, 8, 8, 128}, 0.55, 0.35},
                          {{"B8 T1024 H32", equal(8, 1024), 32, 32, 128}, 0.22, 0.14},
                          {{"pack of 6 H96", pack, 96, 96, 128}, 0.60, 0.40}};
  const auto small = [&](int64_t T, int H, int N) {  // T tokens in all
    all.push_back({{"T" + std::to_string(T) + " H" + std::to_string(H) + " N" + std::to_string(N),
                    equal(N, T / N), H, H, 128},
                   0,
                   0});
  };
  small(2048, 12, 1), small(2048, 16, 1), small(4096, 8, 1), small(4096, 12, 1), small(8192, 12, 4);
  small(8192, 16, 1), small(1024, 4, 1), small(3072, 10, 1), small(8192, 24, 1), small(16384, 16, 8);
  return all;
}

std::vector<Case> checks() {
  std::vector<Case> all;
  for (const Gate gate : {Gate::bounded, Gate::softplus, Gate::weak, Gate::steep, Gate::spikes,
                          Gate::infinite, Gate::alternating, Gate::none})
    for (const int H : {4, 96}) {
      const std::string name = std::string(name_of(gate)) + (H == 4 ? ", split" : ", whole");
      all.push_back({name, {H == 4 ? 4000 : 500}, H, H, 128, gate});
    }
  all.push_back({"lengths 1 16 17 0 15 300 0", {1, 16, 17, 0, 15, 300, 0}, 2, 2, 128, Gate::softplus});
  all.push_back({"lengths, 256 sequences", {}, 2, 2, 128, Gate::softplus});
  for (int i = 0; i < 256; ++i) all.back().lengths.push_back(i * 37 % 61);
  all.push_back({"uneven split 3000 100 1700", {3000, 100, 1700}, 4, 4, 128, Gate::weak});
  all.push_back({"GVA 2 -> 8", {900}, 2, 8, 128, Gate::softplus});
  all.push_back({"f32 gate", {2000}, 4, 4, 128, Gate::softplus, true});
  all.push_back({"f32 gate -160", {2000}, 4, 4, 128, Gate::steep, true});
  all.push_back({"D 64", {2000}, 4, 4, 64, Gate::softplus});
  all.push_back({"D 64 f32 gate GVA whole", {333, 64, 1}, 64, 128, 64, Gate::weak, true});
  Case c{"V first, i32, bf16 pool", {777, 1200}, 8, 8, 128, Gate::softplus};
  c.v_first = c.i32 = c.state_bf16 = true;
  all.push_back(c);
  c = {"no l2norm, |k| about 1.2", {2000}, 8, 8, 128, Gate::bounded};
  c.l2norm = false;
  all.push_back(c);
  c = {"beta in (1, 2)", {2000}, 8, 8, 128, Gate::softplus};
  c.beta_kind = KdaBeta::sigmoid2, c.beta_shift = 3;
  all.push_back(c);
  c = {"equal keys, beta 1, no decay, T 16384", {16384}, 2, 2, 128, Gate::none};
  c.equal_keys = true, c.beta_shift = 8;
  all.push_back(c);
  c.name += ", whole", c.H = c.Hv = 128, c.lengths = {2048};
  all.push_back(c);
  all.push_back({"T 65536 H8 softplus", {65536}, 8, 8, 128, Gate::softplus});
  all.push_back({"T 8192 H32 bounded", {8192}, 32, 32, 128, Gate::bounded});
  return all;
}

int run(const std::string& mode, const std::string& only) {
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };
  int failed = 0;
  if (mode != "time") {
    for (const Case& c : checks())
      if (wanted(c.name)) failed += !check(c);
    if (wanted("slots and checkpoints")) failed += !check_slots();
  }
  if (mode != "check") {
    double logs[3] = {};
    std::printf("%-18s %8s %8s | ms: %10s %10s %10s | GB/s (bounded) | must  aim\n", "shape", "GB", "",
                "bounded -5", "softplus", "weak -0.1");
    const std::vector<Target> all = targets();
    for (size_t i = 0; i < all.size(); ++i) {
      if (!wanted(all[i].c.name)) continue;
      double ms[3];
      for (int gate = 0; gate < 3; ++gate) {
        Case c = all[i].c;
        c.gate = static_cast<Gate>(gate);
        ms[gate] = time(c).median;
        if (i >= all.size() - 10) logs[gate] += std::log(ms[gate]) / 10;
      }
      const Case& c = all[i].c;
      double tokens = 0;
      for (const int64_t n : c.lengths) tokens += static_cast<double>(n);
      const double gb =
          (tokens * c.H * (10 * 128 + 2) + 8. * static_cast<double>(c.lengths.size()) * c.H * 128 * 128) *
          1e-9;
      std::printf("%-18s %8.3f %8s |     %10.4f %10.4f %10.4f | %8.0f | %.3f %.3f\n", c.name.c_str(), gb, "",
                  ms[0], ms[1], ms[2], gb / ms[0] * 1e3, all[i].must, all[i].aim);
      std::fflush(stdout);
    }
    std::printf("%-18s %8s %8s |     %10.4f %10.4f %10.4f |\n", "ten, geomean", "", "", std::exp(logs[0]),
                std::exp(logs[1]), std::exp(logs[2]));
  }
  if (mode != "time") std::printf("%d checks failed\n", failed);
  return failed != 0;
}

}  // namespace
}  // namespace kl::bench

int main(int argc, char** argv) {
  try {
    return kl::bench::run(argc > 1 ? argv[1] : "all", argc > 2 ? argv[2] : "");
  } catch (const kl::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
