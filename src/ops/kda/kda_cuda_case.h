// One problem of Kimi Delta Attention on the GPU beside the f64 definition: inputs of every gate family in
// any layout, poisoned outputs, a pool with guard slots. Used by the tests and by the benchmarks of the CUDA
// back-ends.
#pragma once

#include <algorithm>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/memory.h"
#include "ops/kda/kda_cuda.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl::testing::gpu {

// How strongly the gates forget.
enum class Decay {
  production,  // bounded: lower bound -5, z of unit variance; softplus: the initialisation of the 48B
  weak,        // exp(g) within a few percent of 1
  steep,       // down to -100 a step
  none,        // exactly 0 (log_decay only)
  infinite,    // a tenth of the steps -inf, the rest weak (log_decay only)
  alternating  // half the channels decay in tokens 0-7 of every 16, the other half in 8-15 (log_decay only)
};

struct KdaCase {
  std::vector<int> lengths = {1};
  int H = 2, Hv = 2, K = 128, V = 128;
  KdaGateKind gate = KdaGateKind::softplus;
  Decay decay = Decay::production;
  bool gate_tensors = true;  // A_log and dt_bias are given
  KdaBeta beta = KdaBeta::sigmoid;
  bool l2norm = true;
  bool equal_keys = false;  // all keys of a head the same, beta near 1
  float scale = 0, l2_eps = 1e-6f;
  DType rows = DType::bf16;   // of q, k, v and out
  DType gates = DType::bf16;  // of g and beta
  DType state = DType::f32;
  bool v_first = false;
  int pad = 0;                                   // elements between the rows of two heads
  bool i64 = false;                              // cu_seqlens
  bool slot_out = false;                         // states go to other slots than they come from
  bool no_state_sometimes = false;               // every third sequence has slot -1
  std::vector<std::pair<int, int>> checkpoints;  // (sequence, token of it, a multiple of 16)
  uint64_t seed = 1;

  std::string name() const {
    std::string s = "lengths";
    for (size_t i = 0; i < lengths.size() && i < 8; ++i) s += " " + std::to_string(lengths[i]);
    return s + ", " + std::to_string(H) + "/" + std::to_string(Hv) + " heads, " + std::to_string(K) + " x " +
           std::to_string(V) + ", gate " + std::to_string(static_cast<int>(gate)) + " decay " +
           std::to_string(static_cast<int>(decay)) + (v_first ? ", V first" : "");
  }
};

// A host tensor whose rows along the last dimension stand `pad` elements apart, and its copy on the device.
struct Placed {
  OwnedTensor memory;
  cuda::DeviceTensor device_memory;
  Tensor host, device;  // views without the padding

  Placed() = default;
  // fill(i): the value of element i, counted without the padding.
  template <class F>
  Placed(DType dtype, std::initializer_list<int64_t> dims, int pad, F&& value) {
    std::array<int64_t, kMaxRank> d{};
    std::copy(dims.begin(), dims.end(), d.begin());
    const int rank = static_cast<int>(dims.size());
    const int64_t width = d[rank - 1];
    d[rank - 1] += pad;
    memory = rank == 1   ? make_tensor(dtype, {d[0]})
             : rank == 2 ? make_tensor(dtype, {d[0], d[1]})
             : rank == 3 ? make_tensor(dtype, {d[0], d[1], d[2]})
                         : make_tensor(dtype, {d[0], d[1], d[2], d[3]});
    const int64_t row = width + pad;
    fill(memory.tensor, [&](int64_t i) {
      return i % row < width ? value(i / row * width + i % row) : std::numeric_limits<double>::quiet_NaN();
    });
    device_memory = cuda::to_device(memory.tensor);
    host = memory.tensor.slice(rank - 1, 0, width);
    device = device_memory.tensor.slice(rank - 1, 0, width);
  }
};

// The tensors of a case, on the host and on the device, with equal values.
struct KdaProblem {
  KdaCase c;
  Placed q, k, v, g, beta, out, state, A_log, dt_bias;
  OwnedTensor cu, slot, slot_out, checkpoint_row, checkpoint_slot;
  cuda::DeviceTensor d_cu, d_slot, d_slot_out, d_checkpoint_row, d_checkpoint_slot;
  int64_t T = 0, slots = 0;

  explicit KdaProblem(const KdaCase& problem) : c(problem) {
    Random random(c.seed);
    const int64_t N = static_cast<int64_t>(c.lengths.size());
    T = std::accumulate(c.lengths.begin(), c.lengths.end(), int64_t(0));
    const auto normal = [&](int64_t) { return random.normal(); };
    q = Placed(c.rows, {T, c.H, c.K}, c.pad, normal);
    std::vector<double> common(static_cast<size_t>(c.H * c.K));
    for (double& x : common) x = random.normal();
    k = Placed(c.rows, {T, c.H, c.K}, c.pad, [&](int64_t i) {
      return c.equal_keys ? common[static_cast<size_t>(i % (c.H * c.K))]
             : c.l2norm   ? random.normal()
                          : 0.5 * random.normal() / std::sqrt(c.K / 4.0);
    });
    v = Placed(c.rows, {T, c.Hv, c.V}, c.pad, normal);
    g = Placed(c.gates, {T, c.Hv, c.K}, c.pad, [&](int64_t i) { return gate_value(random, i); });
    beta = Placed(c.gates, {T, c.Hv}, 0, [&](int64_t) {
      return c.beta == KdaBeta::value ? random.uniform(0, 1) : c.equal_keys ? 8 : random.normal();
    });
    A_log = Placed(DType::f32, {c.Hv}, 0,
                   [&](int64_t) { return std::log(random.uniform(1, 16)) * softplus_case(); });
    // The 48B's initialisation: softplus(dt_bias) spread over 0.001 to 0.1.
    dt_bias = Placed(DType::f32, {c.Hv, c.K}, 0, [&](int64_t) {
      const double dt = std::exp(random.uniform(std::log(1e-3), std::log(0.1)));
      return softplus_case() ? std::log(std::expm1(dt)) : 0.1 * random.normal();
    });
    out = Placed(c.rows, {T, c.Hv, c.V}, c.pad,
                 [](int64_t) { return std::numeric_limits<double>::quiet_NaN(); });
    make_indices(N);
    // A pool may be large: its values are drawn from a table.
    std::vector<double> table(4099);
    for (double& x : table) x = 0.5 * random.normal();
    state = Placed(c.state, {slots, c.Hv, c.v_first ? c.V : c.K, c.v_first ? c.K : c.V}, 0,
                   [&](int64_t i) { return table[static_cast<size_t>(i * 7919 % 4099)]; });
  }

  KdaArgs device_args() const { return args(true); }

  // Outputs and final pool of the f64 definition.
  struct Reference {
    std::vector<double> out, state;
  };
  Reference reference() const {
    KdaArgs a = args(false);
    OwnedTensor o = make_tensor(DType::f64, {T, c.Hv, c.V});
    OwnedTensor s = make_tensor(DType::f64, {slots, c.Hv, state.host.size(2), state.host.size(3)});
    const std::vector<double> start = to_doubles(state.host);
    std::copy(start.begin(), start.end(), s.tensor.ptr<double>());
    a.out = o.tensor, a.state = s.tensor;
    kda_recurrent_ref(a, KdaPrecision::f64);
    return {to_doubles(o.tensor), to_doubles(s.tensor)};
  }

  // Restores the poisoned output and the pool's first content on the device.
  void reset_device() {
    cuda::DeviceTensor o = cuda::to_device(out.memory.tensor), s = cuda::to_device(state.memory.tensor);
    KL_CUDA_CHECK(
        cudaMemcpy(out.device_memory.tensor.data, o.tensor.data, o.buffer.size(), cudaMemcpyDeviceToDevice),
        "resetting the output");
    KL_CUDA_CHECK(
        cudaMemcpy(state.device_memory.tensor.data, s.tensor.data, s.buffer.size(), cudaMemcpyDeviceToDevice),
        "resetting the pool");
  }

  // Slots that the problem writes.
  std::vector<bool> written() const {
    std::vector<bool> w(static_cast<size_t>(slots));
    const auto mark = [&](int32_t s) {
      if (s >= 0) w[static_cast<size_t>(s)] = true;
    };
    for (size_t n = 0; n < c.lengths.size(); ++n) mark(*(c.slot_out ? slot_out : slot).tensor.at<int32_t>(n));
    for (size_t m = 0; m < c.checkpoints.size(); ++m) mark(*checkpoint_slot.tensor.at<int32_t>(m));
    return w;
  }

 private:
  double softplus_case() const { return c.gate == KdaGateKind::softplus ? 1 : 0; }

  double gate_value(Random& random, int64_t i) const {
    if (c.gate == KdaGateKind::softplus) {
      if (c.decay == Decay::weak) return -6 + random.normal();
      if (c.decay == Decay::steep) return random.uniform(-5, 8);
      return random.normal();
    }
    if (c.gate == KdaGateKind::bounded)
      return c.decay == Decay::weak ? -6 + random.normal() : random.normal();
    const int64_t token = i / (c.Hv * c.K), channel = i % c.K;
    switch (c.decay) {
      case Decay::none: return 0;
      case Decay::weak: return -0.05 * random.uniform();
      case Decay::steep: return random.uniform() < 0.3 ? random.uniform(-100, 0) : random.uniform(-1, 0);
      case Decay::infinite:
        return random.uniform() < 0.1 ? -std::numeric_limits<double>::infinity() : -0.05 * random.uniform();
      case Decay::alternating: return (token % 16 < 8) == (channel < c.K / 2) ? -5 : -0.001;
      default: return -random.uniform(0, 2);
    }
  }

  // Slots in a shuffled order, a guard slot between any two.
  void make_indices(int64_t N) {
    cu = make_tensor(c.i64 ? DType::i64 : DType::i32, {N + 1});
    int64_t row = 0;
    std::vector<int64_t> start;
    for (int64_t n = 0; n <= N; ++n) {
      start.push_back(row);
      if (c.i64)
        *cu.tensor.at<int64_t>(n) = row;
      else
        *cu.tensor.at<int32_t>(n) = static_cast<int32_t>(row);
      if (n < N) row += c.lengths[static_cast<size_t>(n)];
    }
    const int64_t M = static_cast<int64_t>(c.checkpoints.size());
    slots = 2 * (2 * N + M) + 1;
    slot = make_tensor(DType::i32, {N}), slot_out = make_tensor(DType::i32, {N});
    for (int64_t n = 0; n < N; ++n) {
      const bool none = c.no_state_sometimes && n % 3 == 1;
      *slot.tensor.at<int32_t>(n) = none ? -1 : static_cast<int32_t>(2 * ((n * 7 + 3) % N) + 1);
      *slot_out.tensor.at<int32_t>(n) =
          c.no_state_sometimes && n % 3 == 2 ? -1 : static_cast<int32_t>(2 * (N + n) + 1);
    }
    // 7 and N may share a factor; then the plain order keeps the slots apart.
    if (N % 7 == 0)
      for (int64_t n = 0; n < N; ++n)
        if (*slot.tensor.at<int32_t>(n) >= 0) *slot.tensor.at<int32_t>(n) = static_cast<int32_t>(2 * n + 1);
    std::vector<std::pair<int32_t, int32_t>> points;
    for (int64_t m = 0; m < M; ++m)
      points.emplace_back(start[static_cast<size_t>(c.checkpoints[static_cast<size_t>(m)].first)] +
                              c.checkpoints[static_cast<size_t>(m)].second,
                          m % 5 == 4 ? -1 : static_cast<int32_t>(2 * (2 * N + m) + 1));
    std::sort(points.begin(), points.end());
    if (M > 0) {
      checkpoint_row = make_tensor(DType::i32, {M}), checkpoint_slot = make_tensor(DType::i32, {M});
      for (int64_t m = 0; m < M; ++m) {
        *checkpoint_row.tensor.at<int32_t>(m) = points[static_cast<size_t>(m)].first;
        *checkpoint_slot.tensor.at<int32_t>(m) = points[static_cast<size_t>(m)].second;
      }
      d_checkpoint_row = cuda::to_device(checkpoint_row.tensor);
      d_checkpoint_slot = cuda::to_device(checkpoint_slot.tensor);
    }
    d_cu = cuda::to_device(cu.tensor), d_slot = cuda::to_device(slot.tensor);
    d_slot_out = cuda::to_device(slot_out.tensor);
  }

  KdaArgs args(bool device) const {
    const auto pick = [&](const Placed& t) { return device ? t.device : t.host; };
    KdaArgs a;
    a.q = pick(q), a.k = pick(k), a.v = pick(v), a.g = pick(g), a.beta = pick(beta), a.out = pick(out);
    a.state = pick(state);
    a.cu_seqlens = device ? d_cu.tensor : cu.tensor;
    a.slot = device ? d_slot.tensor : slot.tensor;
    if (c.slot_out) a.slot_out = device ? d_slot_out.tensor : slot_out.tensor;
    if (!c.checkpoints.empty()) {
      a.checkpoint_row = device ? d_checkpoint_row.tensor : checkpoint_row.tensor;
      a.checkpoint_slot = device ? d_checkpoint_slot.tensor : checkpoint_slot.tensor;
    }
    a.gate.kind = c.gate;
    if (c.gate_tensors && c.gate != KdaGateKind::log_decay)
      a.gate.A_log = pick(A_log), a.gate.dt_bias = pick(dt_bias);
    a.beta_kind = c.beta;
    a.state_v_first = c.v_first;
    a.l2norm = c.l2norm;
    a.scale = c.scale, a.l2_eps = c.l2_eps;
    return a;
  }
};

// What came back, beside the definition.
struct KdaErrors {
  double out = 0, state = 0;  // rel-RMS
  bool guards_intact = true;  // slots that nobody writes, and the padding of `out`, kept their bits
};

inline KdaErrors compare(const KdaProblem& problem, const KdaProblem::Reference& reference) {
  const auto start = [](const OwnedTensor& t) { return static_cast<const std::byte*>(t.tensor.data); };
  const OwnedTensor out = cuda::to_host(problem.out.device_memory.tensor);
  const OwnedTensor pool = cuda::to_host(problem.state.device_memory.tensor);
  KdaErrors e;
  e.out = rel_rms(to_doubles(out.tensor.slice(2, 0, problem.c.V)), reference.out);
  e.state = rel_rms(to_doubles(pool.tensor), reference.state);
  const std::vector<bool> written = problem.written();
  const int64_t slot_bytes = pool.tensor.bytes() / problem.slots;
  for (size_t s = 0; s < written.size(); ++s)
    if (!written[s])
      e.guards_intact =
          e.guards_intact && std::equal(start(pool) + static_cast<int64_t>(s) * slot_bytes,
                                        start(pool) + static_cast<int64_t>(s + 1) * slot_bytes,
                                        start(problem.state.memory) + static_cast<int64_t>(s) * slot_bytes);
  const int64_t row = (problem.c.V + problem.c.pad) * size_of(problem.c.rows),
                used = problem.c.V * size_of(problem.c.rows);
  for (int64_t r = 0; problem.c.pad > 0 && r < problem.T * problem.c.Hv; ++r)
    e.guards_intact = e.guards_intact && std::equal(start(out) + r * row + used, start(out) + (r + 1) * row,
                                                    start(problem.out.memory) + r * row + used);
  return e;
}

}  // namespace kl::testing::gpu
