// The checks of the Hopper prefill: o and the final state by rel-RMS beside the definition in f64,
// NaN-poisoned outputs, a second run bit by bit; slots and checkpoints; a million tokens; sequences alone and
// in a pack.
#pragma once

#include <algorithm>
#include <cstdio>

#include "ops/kda/bench/kda_bench_case.cuh"
#include "ops/kda/bench/kda_reference.cuh"

namespace kl::bench {
namespace {

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

// What the definition says, [T, Hv, D] and [N, Hv, K, V] in f64, on the device.
struct Expected {
  DeviceTensor out, state;
};
Expected reference(const Problem& p) {
  const Case& c = p.c;
  const std::vector<double> start = states(p);
  const int64_t rows = p.T * c.Hv * c.D, matrices = p.N * c.Hv * c.D * c.D;
  const auto f64 = [](int64_t n) { return cuda::device_tensor(DType::f64, {n}); };
  const DeviceTensor keys = f64(rows), queries = f64(rows), decays = f64(rows);
  const DeviceTensor initial =
      cuda::to_device(Tensor(const_cast<double*>(start.data()), DType::f64, {matrices}));
  Expected e{f64(rows), f64(matrices)};
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
                    .state_out = e.state.tensor.ptr<double>(),
                    .out = e.out.tensor.ptr<double>()};
  cuda::launch(reference_operands, {.grid = static_cast<unsigned>((p.T * c.Hv + 7) / 8), .block = 256}, r);
  const dim3 grid(static_cast<unsigned>(c.D / 32), static_cast<unsigned>(c.Hv), static_cast<unsigned>(p.N));
  if (c.D == 128)
    cuda::launch(reference_recurrence<128>, {.grid = grid, .block = 256}, r);
  else
    cuda::launch(reference_recurrence<64>, {.grid = grid, .block = 256}, r);
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "the reference of ", c.name);
  return e;
}

// One run from the first state, on poisoned memory.
void run_poisoned(Problem& p) {
  p.reset_state();
  KL_CUDA_CHECK(cudaMemset(p.out.tensor.data, 0xff, static_cast<size_t>(p.out.tensor.bytes())), "poisoning");
  KL_CUDA_CHECK(cudaMemset(p.workspace.tensor.data, 0xff, static_cast<size_t>(p.workspace.tensor.bytes())),
                "poisoning");
  Ctx ctx;
  ctx.device = Device::cuda;
  cuda::kda_prefill_sm90(ctx, p.args);
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "the kernels of ", p.c.name);
}

bool report(const std::string& name, double o_error, double s_error, bool same, const char* more = "") {
  const bool good = o_error <= 5e-3 && s_error <= 5e-3 && same;
  std::printf("%-44s o %.2e  state %.2e  %s  %s%s\n", name.c_str(), o_error, s_error,
              same ? "same bits" : "BITS DIFFER", good ? "ok" : "FAILED", more);
  std::fflush(stdout);
  return good;
}

bool check(const Case& c) {
  Problem p(c, 7);
  p.reset_state();
  const Expected expected = reference(p);
  std::vector<double> first_out, first_state;
  bool same = true;
  for (int run = 0; run < 2; ++run) {
    run_poisoned(p);
    const std::vector<double> o = floats(p.out.tensor), s = states(p);
    if (run == 0) {
      first_out = o, first_state = s;
    } else {
      same = std::equal(o.begin(), o.end(), first_out.begin(), [](double a, double b) { return a == b; }) &&
             std::equal(s.begin(), s.end(), first_state.begin(), [](double a, double b) { return a == b; });
    }
  }
  return report(c.name, relative_rms(first_out, floats(expected.out.tensor)),
                relative_rms(first_state, floats(expected.state.tensor)), same);
}

// Sums of (x - y)² and y² over n elements.
__global__ void compare_kernel(const bf16* x, const double* y, int64_t n, double* sums) {
  double error = 0, norm = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < n;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const double d = static_cast<double>(cuda::to_float(x[i])) - y[i];
    error += d * d, norm += y[i] * y[i];
  }
  for (int bit = 16; bit > 0; bit /= 2)
    error += __shfl_xor_sync(0xffffffffu, error, bit), norm += __shfl_xor_sync(0xffffffffu, norm, bit);
  if (threadIdx.x % 32 == 0) atomicAdd(sums, error), atomicAdd(sums + 1, norm);
}
double relative_rms_on_device(const Tensor& x, const Tensor& y, int64_t first, int64_t n) {
  const DeviceTensor sums = cuda::device_tensor(DType::f64, {2}, 0);
  cuda::launch(compare_kernel, {.grid = 1024, .block = 256}, x.ptr<bf16>() + first, y.ptr<double>() + first,
               n, sums.tensor.ptr<double>());
  const std::vector<double> s = floats(sums.tensor);
  return std::sqrt(s[0] / std::max(s[1], 1e-300));  // a NaN stays one, and is not <= anything
}
__global__ void differ_kernel(const uint16_t* x, const uint16_t* y, int64_t n, int* differ) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i < n && x[i] != y[i]) *differ = 1;
}

// A million tokens. Errors may not grow on the way: also by the last 65536 tokens alone.
bool check_million(Gate gate) {
  constexpr int64_t T = 1 << 20, kLast = 1 << 16;
  Problem p({std::string("T 1048576, ") + name_of(gate), {T}, 1, 1, 128, gate}, 7);
  p.reset_state();
  const Expected expected = reference(p);
  run_poisoned(p);
  const int64_t n = T * p.c.Hv * p.c.D, last = kLast * p.c.Hv * p.c.D;
  const DeviceTensor first = cuda::device_tensor(DType::bf16, {n}),
                     differ = cuda::device_tensor(DType::i32, {1}, 0);
  KL_CUDA_CHECK(
      cudaMemcpy(first.tensor.data, p.out.tensor.data, static_cast<size_t>(2 * n), cudaMemcpyDeviceToDevice),
      "keeping the outputs");
  const std::vector<double> state = states(p);
  run_poisoned(p);
  cuda::launch(differ_kernel, {.grid = static_cast<unsigned>((n + 255) / 256), .block = 256},
               static_cast<const uint16_t*>(first.tensor.data),
               static_cast<const uint16_t*>(p.out.tensor.data), n, differ.tensor.ptr<int32_t>());
  const OwnedTensor differs = cuda::to_host(differ.tensor);
  const double whole = relative_rms_on_device(p.out.tensor, expected.out.tensor, 0, n),
               end = relative_rms_on_device(p.out.tensor, expected.out.tensor, n - last, last);
  char more[64];
  std::snprintf(more, sizeof more, "  (last 65536: o %.2e)", end);
  return report(p.c.name, std::isnan(end) ? end : std::max(whole, end),
                relative_rms(state, floats(expected.state.tensor)),
                *differs.tensor.ptr<int32_t>() == 0 && states(p) == state, more);
}

// With batch_invariant: each sequence of a pack alone, bit for bit.
bool check_invariant(Case c) {
  c.name = "alone or in a pack, " + c.name;
  Problem p(c, 7);
  p.args.batch_invariant = true;
  p.workspace = cuda::device_tensor(DType::u8, {cuda::kda_prefill_sm90_workspace(p.args)});
  p.args.workspace = p.workspace.tensor;
  run_poisoned(p);
  const std::vector<double> out = floats(p.out.tensor), state = states(p);
  p.reset_state();
  KL_CUDA_CHECK(cudaMemset(p.out.tensor.data, 0xff, static_cast<size_t>(p.out.tensor.bytes())), "poisoning");
  Ctx ctx;
  ctx.device = Device::cuda;
  int64_t begin = 0;
  for (int64_t n = 0; n < p.N; begin += c.lengths[static_cast<size_t>(n++)]) {
    const int64_t length = c.lengths[static_cast<size_t>(n)];
    std::vector<int64_t> ends{0, length};
    const DeviceTensor cu = cuda::to_device(Tensor(ends.data(), DType::i64, {2}));
    KdaArgs a = p.args;
    for (Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out}) *t = t->slice(0, begin, begin + length);
    a.cu_seqlens = cu.tensor, a.slot = a.slot.slice(0, n, n + 1);
    const DeviceTensor workspace = cuda::device_tensor(DType::u8, {cuda::kda_prefill_sm90_workspace(a)});
    a.workspace = workspace.tensor;
    cuda::kda_prefill_sm90(ctx, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), c.name);
  }
  const auto same = [](const std::vector<double>& x, const std::vector<double>& y) {
    return x == y;  // a NaN differs from itself: poison left over fails too
  };
  const bool good = same(out, floats(p.out.tensor)) && same(state, states(p));
  std::printf("%-44s %s\n", c.name.c_str(), good ? "same bits  ok" : "FAILED");
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

std::vector<Case> checks() {
  std::vector<Case> all;
  for (const Gate gate : {Gate::bounded, Gate::softplus, Gate::weak, Gate::steep, Gate::spikes,
                          Gate::infinite, Gate::alternating, Gate::none})
    for (const int H : {4, 96}) {
      const std::string name = std::string(name_of(gate)) + (H == 4 ? ", split" : ", whole");
      all.push_back({name, {H == 4 ? 4000 : 500}, H, H, 128, gate});
    }
  // Gates that the guess of their kind is wrong for; more segments than blocks can take at a time.
  for (const Gate gate :
       {Gate::shut, Gate::stretches, Gate::mild, Gate::strong_softplus, Gate::softplus_stretches}) {
    const std::string name = name_of(gate);
    all.push_back({name, {4000}, 4, 4, 128, gate});
    all.push_back({name + ", H40", {3000}, 40, 40, 128, gate});
    all.push_back({name + ", D 64 f32 gate GVA", {2500, 40, 1300}, 3, 6, 64, gate, true});
    all.push_back({name + ", uneven", {1000, 0, 7000, 130, 1}, 5, 5, 128, gate});
  }
  all.push_back({"T 8192 H24 bounded", {8192}, 24, 24, 128, Gate::bounded});
  all.push_back({"T 1024 H4 bounded", {1024}, 4, 4, 128, Gate::bounded});
  // Segments of four chunks, as long as a probe.
  all.push_back({"T 1024 H4 bounded -1", {1024}, 4, 4, 128, Gate::mild});
  all.push_back({"T 8192 H12 N4 bounded", {2048, 2048, 2048, 2048}, 12, 12, 128, Gate::bounded});
  all.push_back({"T 8192 H96 softplus", {8192}, 96, 96, 128, Gate::softplus});
  all.push_back({"lengths 1 16 17 0 15 300 0", {1, 16, 17, 0, 15, 300, 0}, 2, 2, 128, Gate::softplus});
  all.push_back({"lengths, 256 sequences", {}, 2, 2, 128, Gate::softplus});
  for (int i = 0; i < 256; ++i) all.back().lengths.push_back(i * 37 % 61);
  all.push_back({"uneven split 3000 100 1700", {3000, 100, 1700}, 4, 4, 128, Gate::weak});
  // Many short sequences around a long one, which takes far more than its share of segments.
  all.push_back({"uneven, 99 empty and 300000", {}, 1, 1, 128, Gate::bounded});
  all.back().lengths.assign(100, 0), all.back().lengths[50] = 300000;
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
  c.name = "beta in (1, 2), weak", c.gate = Gate::weak;
  all.push_back(c);
  c.lengths = {1024}, c.H = c.Hv = 4;  // segments of 8 chunks, and of 5
  c.name = "beta in (1, 2), weak, T 1024 H4";
  all.push_back(c);
  c.lengths = {400}, c.H = c.Hv = 1;
  c.name = "beta in (1, 2), weak, T 400 H1";
  all.push_back(c);
  c.lengths = {2000}, c.H = c.Hv = 8;
  c.name = "beta in (1, 2), bounded", c.gate = Gate::bounded;
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

std::vector<Case> invariant_checks() {
  const std::vector<int64_t> pack{3000, 100, 1700, 0, 17, 9000, 1, 16, 300};
  std::vector<Case> all;
  for (const Gate gate : {Gate::bounded, Gate::softplus, Gate::none, Gate::stretches})
    for (const int H : {4, 32}) {
      Case c{std::string(name_of(gate)) + " H" + std::to_string(H), pack, H, H, 128, gate};
      all.push_back(c);
    }
  all.push_back({"256 lengths", {}, 2, 2, 128, Gate::bounded});
  for (int i = 0; i < 256; ++i) all.back().lengths.push_back(i * 37 % 61 + (i % 64 == 0 ? 2000 : 0));
  return all;
}

}  // namespace
}  // namespace kl::bench
