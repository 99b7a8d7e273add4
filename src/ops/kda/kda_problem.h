// Random problems for the tests of KDA, for every implementation of the operator: inputs, a pool of states
// with garbage in every slot that is not read, and runs that write into fresh, poisoned memory.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>

#include "ops/kda/kda.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl::testing {

struct KdaCase {
  std::vector<int64_t> lengths = {64};
  int64_t H = 1, Hv = 1, K = 64, V = 64;
  DType dtype = DType::f32;   // of the inputs
  bool initial_state = true;  // else sequences start at zero (slot < 0) and slot_out keeps their states
  bool state_v_first = false;
  bool fused_rows = false;  // q, k and v are slices of one row per token
  double key_spread = 1;    // keys are (common + key_spread · noise); 1: noise alone
  KdaGateKind gate = KdaGateKind::softplus;
  bool gate_parameters = true;  // A_log and dt_bias
  KdaBeta beta_kind = KdaBeta::sigmoid;
  std::function<double(Random&, int64_t t, int64_t channel)> g = [](Random& r, int64_t, int64_t) {
    return r.normal();
  };
  std::function<double(Random&, int64_t t)> beta = [](Random& r, int64_t) { return r.normal(); };
};

struct KdaResult {
  OwnedTensor out, state;
};

// An index tensor [n] of i32.
struct KdaIndices {
  std::vector<int32_t> values;
  Tensor tensor() { return Tensor(values.data(), DType::i32, {static_cast<int64_t>(values.size())}); }
};

// The implementations on the CPU, as functions of their arguments alone.
inline void recurrence_f64(const KdaArgs& args) { kda_recurrent_ref(args, KdaPrecision::f64); }
inline void recurrence_f32(const KdaArgs& args) { kda_recurrent_ref(args, KdaPrecision::f32); }
inline void prefill(const KdaArgs& args) {
  Ctx ctx;
  kda_prefill(ctx, args);
}
inline void decode(const KdaArgs& args) {
  Ctx ctx;
  kda_decode(ctx, args);
}

// Rows [begin, end) of all row tensors; cu_seqlens and slots are the caller's business.
inline KdaArgs kda_rows(KdaArgs args, int64_t begin, int64_t end) {
  for (Tensor* t : {&args.q, &args.k, &args.v, &args.g, &args.beta, &args.out}) *t = t->slice(0, begin, end);
  return args;
}

class KdaProblem {
 public:
  KdaProblem(const KdaCase& c, uint64_t seed) : case_(c) {
    Random random(seed);
    const int64_t N = static_cast<int64_t>(c.lengths.size());
    const int64_t T = std::accumulate(c.lengths.begin(), c.lengths.end(), int64_t{0});
    make_rows(T, random);
    make_indices(random);
    pool_ = c.state_v_first ? make_tensor(DType::f32, {N + 3, c.Hv, c.V, c.K})
                            : make_tensor(DType::f32, {N + 3, c.Hv, c.K, c.V});
    fill_nan(pool_.tensor);
    for (int64_t n = 0; c.initial_state && n < N; ++n) fill_normal(pool_.tensor[slot_of(n)], random);
  }

  // All but `out` and `state`, which run() adds.
  KdaArgs args;

  const Tensor& pool() const { return pool_.tensor; }
  int32_t slot_of(int64_t sequence) const { return slots_[static_cast<size_t>(sequence)]; }

  // Runs `kda` on a copy of the pool and an output full of NaN, both of type `result`.
  KdaResult run(const std::function<void(const KdaArgs&)>& kda, DType result = DType::f32) const {
    KdaArgs a = args;
    KdaResult r{make_tensor(result, {a.v.size(0), a.v.size(1), a.v.size(2)}), copy_of(pool_.tensor, result)};
    fill_nan(r.out.tensor);
    a.out = r.out.tensor, a.state = r.state.tensor;
    kda(a);
    return r;
  }

  // rel-RMS of the outputs and of the states in the slots of the sequences, whichever is larger.
  double error(const KdaResult& found, const KdaResult& expected) const {
    return std::max(rel_rms(found.out.tensor, expected.out.tensor),
                    rel_rms(states_of(found), states_of(expected)));
  }
  bool finite(const KdaResult& r) const {
    std::vector<double> all = to_doubles(r.out.tensor), states = states_of(r);
    all.insert(all.end(), states.begin(), states.end());
    return std::all_of(all.begin(), all.end(), [](double x) { return std::isfinite(x); });
  }
  // Elements of the states in the slots of the sequences.
  std::vector<double> states_of(const KdaResult& r) const {
    std::vector<double> values;
    for (const int32_t slot : slots_) {
      const std::vector<double> one = to_doubles(r.state.tensor[slot]);
      values.insert(values.end(), one.begin(), one.end());
    }
    return values;
  }

  // True if every slot that belongs to no sequence has the bits it had.
  bool others_untouched(const KdaResult& r) const {
    for (int32_t slot = 0; slot < pool_.tensor.size(0); ++slot) {
      const bool owned = std::find(slots_.begin(), slots_.end(), slot) != slots_.end();
      if (!owned && !same_bits(r.state.tensor[slot], pool_.tensor[slot])) return false;
    }
    return true;
  }

  static OwnedTensor copy_of(const Tensor& t, DType dtype) {
    OwnedTensor copy = make_tensor(dtype, {t.size(0), t.size(1), t.size(2), t.size(3)});
    if (dtype == t.dtype) {
      std::memcpy(copy.tensor.data, t.data, static_cast<size_t>(t.bytes()));
    } else {
      const std::vector<double> values = to_doubles(t);
      fill(copy.tensor, [&](int64_t i) { return values[static_cast<size_t>(i)]; });
    }
    return copy;
  }

 private:
  // Room for rows of `width` values, full of NaN.
  Tensor room(int64_t T, int64_t width) {
    owned_.push_back(make_tensor(case_.dtype, {T, width}));
    fill_nan(owned_.back().tensor);
    return owned_.back().tensor;
  }
  // [T, heads, n] at a column of a room.
  static Tensor columns(const Tensor& room, int64_t column, int64_t heads, int64_t n) {
    Tensor t = room.slice(1, column, column + heads * n);
    t.rank = 3;
    t.shape = {room.size(0), heads, n};
    t.stride = {room.stride[0], n, 1};
    return t;
  }
  // Calls f(token, channel of the head) for every element in row-major order: the same values for any layout.
  template <class F>
  static void fill_rows(const Tensor& rows, F&& f) {
    dispatch_float(rows.dtype, [&]<class T>() {
      for (int64_t t = 0; t < rows.size(0); ++t)
        for (int64_t head = 0; head < rows.size(1); ++head)
          for (int64_t i = 0; i < rows.size(2); ++i)
            rows.at<T>(t, head)[i] = static_cast<T>(static_cast<float>(f(t, i)));
    });
  }

  void make_rows(int64_t T, Random& random) {
    const KdaCase& c = case_;
    const int64_t qk = c.H * c.K, v = c.Hv * c.V;
    if (c.fused_rows) {
      const Tensor row = room(T, 2 * qk + v + 5);  // the last 5 belong to nobody
      args.q = columns(row, 0, c.H, c.K), args.k = columns(row, qk, c.H, c.K);
      args.v = columns(row, 2 * qk, c.Hv, c.V);
      const Tensor gates = room(T, c.Hv * (c.K + 1) + 2);
      args.g = columns(gates, 1, c.Hv, c.K);
      args.beta = gates.slice(1, 1 + c.Hv * c.K, 1 + c.Hv * (c.K + 1));
    } else {
      args.q = columns(room(T, qk), 0, c.H, c.K), args.k = columns(room(T, qk), 0, c.H, c.K);
      args.v = columns(room(T, v), 0, c.Hv, c.V), args.g = columns(room(T, c.Hv * c.K), 0, c.Hv, c.K);
      args.beta = room(T, c.Hv);
    }
    std::vector<double> common(static_cast<size_t>(c.K));
    for (double& x : common) x = c.key_spread == 1 ? 0 : random.normal();
    const auto normal = [&](int64_t, int64_t) { return random.normal(); };
    fill_rows(args.q, normal);
    fill_rows(args.k, [&](int64_t, int64_t i) {
      return common[static_cast<size_t>(i)] + c.key_spread * random.normal();
    });
    fill_rows(args.v, normal);
    fill_rows(args.g, [&](int64_t t, int64_t i) { return c.g(random, t, i); });
    Tensor beta = args.beta;
    beta.rank = 3, beta.shape[2] = 1, beta.stride[2] = 1;
    fill_rows(beta, [&](int64_t t, int64_t) { return c.beta(random, t); });
    args.gate.kind = c.gate, args.beta_kind = c.beta_kind, args.state_v_first = c.state_v_first;
    if (!c.gate_parameters) return;
    owned_.push_back(random_normal(DType::f32, {c.Hv}, random, 0.5));
    args.gate.A_log = owned_.back().tensor;
    owned_.push_back(random_normal(DType::f32, {c.Hv, c.K}, random, 0.5));
    args.gate.dt_bias = owned_.back().tensor;
  }

  // Each sequence has a slot somewhere in a pool with three slots more than sequences.
  void make_indices(Random& random) {
    const size_t N = case_.lengths.size();
    cu_seqlens_.assign(1, 0);
    for (const int64_t length : case_.lengths)
      cu_seqlens_.push_back(cu_seqlens_.back() + static_cast<int32_t>(length));
    std::vector<int32_t> all(N + 3);
    std::iota(all.begin(), all.end(), 0);
    for (size_t i = all.size() - 1; i > 0; --i)
      std::swap(all[i], all[static_cast<size_t>(random.integer(0, static_cast<int64_t>(i)))]);
    slots_.assign(all.begin(), all.begin() + static_cast<int64_t>(N));
    none_.assign(N, -1);
    const int64_t n = static_cast<int64_t>(N);
    args.cu_seqlens = Tensor(cu_seqlens_.data(), DType::i32, {n + 1});
    args.slot = Tensor(case_.initial_state ? slots_.data() : none_.data(), DType::i32, {n});
    if (!case_.initial_state) args.slot_out = Tensor(slots_.data(), DType::i32, {n});
  }

  KdaCase case_;
  std::vector<OwnedTensor> owned_;
  std::vector<int32_t> cu_seqlens_, slots_, none_;
  OwnedTensor pool_;
};

}  // namespace kl::testing
