// Random problems for the tests of operators with a matrix state per head, and the questions that all of them
// have to answer: the chunkwise algorithm beside the f64 recurrence, packed beside alone, cut anywhere, any
// number of threads. An operator says what it has beside q, k and v (RecurrenceOp::extras).
#pragma once

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "base/context.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl::testing {

// The tensors of one call; `extras` in the order of RecurrenceOp::extras.
struct RecurrenceCall {
  Tensor q, k, v, out, cu_seqlens, state, slot, slot_out;
  std::vector<Tensor> extras;
};

// An input with one number per value head, or one per value head and key channel.
struct RecurrenceExtra {
  bool by_channel;
  std::function<double(Random&, int64_t t)> value;
};

struct RecurrenceOp {
  std::vector<RecurrenceExtra> extras;
  std::function<void(Ctx&, const RecurrenceCall&)> prefill, decode;
  std::function<void(const RecurrenceCall&)> definition;  // f64
};

struct RecurrenceCase {
  std::vector<int64_t> lengths = {64};
  int64_t H = 1, Hv = 1, K = 32, V = 32;
  DType dtype = DType::f32;   // of the inputs
  bool initial_state = true;  // else sequences start at zero (slot < 0) and slot_out keeps their states
  double key_size = 1;        // standard deviation of the elements of k
  int64_t row_pad = 2;        // values between the rows of two tokens, which belong to nobody
  int64_t out_pad = 3;        // on a GPU, between the rows of two heads of `out`
};

struct RecurrenceResult {
  OwnedTensor out, state;
};

inline OwnedTensor copy_as(const Tensor& t, DType dtype) {
  OwnedTensor copy = make_tensor(dtype, {t.size(0), t.size(1), t.size(2), t.size(3)});
  const std::vector<double> values = to_doubles(t);
  fill(copy.tensor, [&](int64_t i) { return values[static_cast<size_t>(i)]; });
  return copy;
}

class RecurrenceProblem {
 public:
  RecurrenceProblem(const RecurrenceOp& op, const RecurrenceCase& c, uint64_t seed) : op_(op), case_(c) {
    Random random(seed);
    const int64_t T = std::accumulate(c.lengths.begin(), c.lengths.end(), int64_t{0});
    call.q = rows(T, c.H, c.K, [&](int64_t) { return random.normal(); });
    call.k = rows(T, c.H, c.K, [&](int64_t) { return c.key_size * random.normal(); });
    call.v = rows(T, c.Hv, c.V, [&](int64_t) { return random.normal(); });
    for (const RecurrenceExtra& extra : op.extras) {
      Tensor t = rows(T, c.Hv, extra.by_channel ? c.K : 1, [&](int64_t t) { return extra.value(random, t); });
      if (!extra.by_channel) t.rank = 2;
      call.extras.push_back(t);
    }
    make_indices(random);
    const int64_t N = static_cast<int64_t>(c.lengths.size());
    pool_ = make_tensor(DType::f32, {N + 3, c.Hv, c.K, c.V});
    fill_nan(pool_.tensor);  // a slot that is not read holds garbage
    for (int64_t n = 0; c.initial_state && n < N; ++n) fill_normal(pool_.tensor[slot_of(n)], random);
  }

  // All but `out` and `state`, which run() adds.
  RecurrenceCall call;
  const Tensor& pool() const { return pool_.tensor; }
  int32_t slot_of(int64_t sequence) const { return slots_[static_cast<size_t>(sequence)]; }

  // Runs `f` on a copy of the pool and an output full of NaN, both of type `result`.
  RecurrenceResult run(const std::function<void(const RecurrenceCall&)>& f, DType result = DType::f32) const {
    RecurrenceCall c = call;
    RecurrenceResult r{make_tensor(result, {c.v.size(0), c.v.size(1), c.v.size(2)}),
                       copy_as(pool_.tensor, result)};
    fill_nan(r.out.tensor);
    c.out = r.out.tensor, c.state = r.state.tensor;
    f(c);
    return r;
  }
  RecurrenceResult prefill(ThreadPool* threads = nullptr) const {
    return run([&](const RecurrenceCall& c) {
      Ctx ctx{.pool = threads};
      op_.prefill(ctx, c);
    });
  }
  RecurrenceResult decode() const {
    return run([&](const RecurrenceCall& c) {
      Ctx ctx;
      op_.decode(ctx, c);
    });
  }
  RecurrenceResult definition() const { return run(op_.definition, DType::f64); }

  // The states in the slots of the sequences.
  std::vector<double> states_of(const RecurrenceResult& r) const {
    std::vector<double> values;
    for (const int32_t slot : slots_) {
      const std::vector<double> one = to_doubles(r.state.tensor[slot]);
      values.insert(values.end(), one.begin(), one.end());
    }
    return values;
  }

  // Rows [begin, end) as a call of one sequence whose state is at `slot` of `r`, written into r's rows.
  RecurrenceCall part(const RecurrenceResult& r, int64_t begin, int64_t end, int32_t* cu,
                      int32_t* slot) const {
    cu[0] = 0, cu[1] = static_cast<int32_t>(end - begin);
    RecurrenceCall c;
    c.q = call.q.slice(0, begin, end), c.k = call.k.slice(0, begin, end);
    c.v = call.v.slice(0, begin, end), c.out = r.out.tensor.slice(0, begin, end);
    for (const Tensor& t : call.extras) c.extras.push_back(t.slice(0, begin, end));
    c.cu_seqlens = Tensor(cu, DType::i32, {2}), c.slot = Tensor(slot, DType::i32, {1});
    c.state = r.state.tensor;
    return c;
  }

 private:
  // [T, heads, n] with what belongs to nobody.
  template <class F>
  Tensor rows(int64_t T, int64_t heads, int64_t n, F&& value) {
    const int64_t row = heads * n + case_.row_pad;
    owned_.push_back(make_tensor(case_.dtype, {T, row}));
    fill_nan(owned_.back().tensor);
    Tensor t = owned_.back().tensor;
    t.rank = 3, t.shape = {T, heads, n}, t.stride = {row, n, 1};
    dispatch_float(t.dtype, [&]<class E>() {
      for (int64_t token = 0; token < T; ++token)
        for (int64_t i = 0; i < heads * n; ++i)
          t.at<E>(token)[i] = static_cast<E>(static_cast<float>(value(token)));
    });
    return t;
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
    call.cu_seqlens = Tensor(cu_seqlens_.data(), DType::i32, {n + 1});
    call.slot = Tensor(case_.initial_state ? slots_.data() : none_.data(), DType::i32, {n});
    if (!case_.initial_state) call.slot_out = Tensor(slots_.data(), DType::i32, {n});
  }

  const RecurrenceOp& op_;
  RecurrenceCase case_;
  std::vector<OwnedTensor> owned_;
  std::vector<int32_t> cu_seqlens_, slots_, none_;
  OwnedTensor pool_;
};

// Gates from none at all to one that forgets everything, and a mixture of them in one sequence.
struct GateFamily {
  std::string name;
  std::function<double(Random&, int64_t t)> log_decay;
};
inline std::vector<GateFamily> gate_families() {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  std::vector<GateFamily> families;
  for (const double g : {0., -1e-4, -5., -160., -kInf})
    families.push_back({cat(g), [g](Random&, int64_t) { return g; }});
  families.push_back({"0 to -5", [](Random& r, int64_t) { return r.uniform(-5, 0); }});
  families.push_back({"mixed", [](Random& r, int64_t) {
                        const double choices[] = {0, -1e-4, -0.1, -5, -160, -kInf};
                        const int64_t i = r.integer(0, 23);  // strong ones rarely, or little is left to see
                        return choices[i < 6 ? i : i % 3];
                      }});
  return families;
}

inline const std::vector<int64_t>& interesting_lengths() {
  static const std::vector<int64_t> lengths = {0, 1, 15, 16, 17, 63, 64, 65, 200};
  return lengths;
}

// Both f32 forms beside the f64 recurrence.
inline void expect_near_definition(const RecurrenceOp& op, const RecurrenceCase& c, uint64_t seed,
                                   double tolerance) {
  const RecurrenceProblem problem(op, c, seed);
  const RecurrenceResult expected = problem.definition();
  for (const RecurrenceResult& r : {problem.prefill(), problem.decode()}) {
    EXPECT_LE(rel_rms(r.out.tensor, expected.out.tensor), tolerance);
    EXPECT_LE(rel_rms(problem.states_of(r), problem.states_of(expected)), tolerance);
  }
}

// All lengths in one call: beside each alone, and slots of nobody keep their bits.
inline void expect_packed_equals_alone(const RecurrenceOp& op, RecurrenceCase c) {
  c.lengths = interesting_lengths();
  const RecurrenceProblem problem(op, c, 31);
  const RecurrenceResult packed = problem.prefill();
  RecurrenceResult alone{make_tensor(DType::f32, {problem.call.v.size(0), c.Hv, c.V}),
                         copy_as(problem.pool(), DType::f32)};
  fill_nan(alone.out.tensor);
  for (size_t n = 0, begin = 0; n < c.lengths.size(); begin += static_cast<size_t>(c.lengths[n++])) {
    int32_t cu[2], slot = problem.slot_of(static_cast<int64_t>(n));
    const int64_t first = static_cast<int64_t>(begin);
    Ctx ctx;
    op.prefill(ctx, problem.part(alone, first, first + c.lengths[n], cu, &slot));
  }
  EXPECT_TRUE(same_bits(packed.out.tensor, alone.out.tensor));
  EXPECT_TRUE(same_bits(packed.state.tensor, alone.state.tensor));
}

// A sequence cut in two calls, the state handed over in its slot: the recurrence gives the same bits; the
// chunkwise form has other chunk boundaries, so the same numbers to f32 rounding, and the same bits at a
// multiple of its 64 tokens.
inline void expect_cut_anywhere(const RecurrenceOp& op, RecurrenceCase c) {
  c.lengths = {150};
  const RecurrenceProblem problem(op, c, 32);
  const RecurrenceResult whole = problem.prefill(), steps = problem.decode();
  const auto cut = [&](const auto& f, int64_t at) {
    RecurrenceResult r{make_tensor(DType::f32, {150, c.Hv, c.V}), copy_as(problem.pool(), DType::f32)};
    fill_nan(r.out.tensor);
    int32_t cu[2], slot = problem.slot_of(0);
    Ctx ctx;
    f(ctx, problem.part(r, 0, at, cu, &slot));
    f(ctx, problem.part(r, at, 150, cu, &slot));
    return r;
  };
  for (const int64_t at : {0, 1, 15, 16, 17, 63, 64, 65, 128, 149, 150}) {
    SCOPED_TRACE(cat("cut at ", at));
    const RecurrenceResult s = cut(op.decode, at), p = cut(op.prefill, at);
    EXPECT_TRUE(same_bits(s.out.tensor, steps.out.tensor) && same_bits(s.state.tensor, steps.state.tensor));
    EXPECT_LE(rel_rms(p.out.tensor, whole.out.tensor), 5e-6);
    EXPECT_LE(rel_rms(problem.states_of(p), problem.states_of(whole)), 5e-6);
    if (at % 64 != 0) continue;
    EXPECT_TRUE(same_bits(p.out.tensor, whole.out.tensor) && same_bits(p.state.tensor, whole.state.tensor));
  }
}

// NaN from token 40 on, in the middle of a chunk: outputs before it keep their bits.
inline void expect_causal(const RecurrenceOp& op, RecurrenceCase c) {
  constexpr int64_t kFirst = 40;
  c.lengths = {100};
  const RecurrenceProblem clean(op, c, 35), spoilt(op, c, 35);
  std::vector<Tensor> rows = {spoilt.call.q, spoilt.call.k, spoilt.call.v};
  rows.insert(rows.end(), spoilt.call.extras.begin(), spoilt.call.extras.end());
  for (const Tensor& t : rows)
    for (int64_t token = kFirst; token < 100; ++token)
      std::fill_n(t.at<float>(token), t.stride[0] - 2, std::numeric_limits<float>::quiet_NaN());
  const RecurrenceResult expected = clean.prefill(), found = spoilt.prefill();
  EXPECT_TRUE(same_bits(found.out.tensor.slice(0, 0, kFirst), expected.out.tensor.slice(0, 0, kFirst)));
  EXPECT_TRUE(std::isnan(*found.out.tensor.at<float>(kFirst)));
}

inline void expect_threads_do_not_matter(const RecurrenceOp& op, RecurrenceCase c) {
  c.lengths = {70, 3, 0, 41};
  const RecurrenceProblem problem(op, c, 33);
  ThreadPool threads(3);
  const RecurrenceResult one = problem.prefill(), three = problem.prefill(&threads);
  EXPECT_TRUE(same_bits(one.out.tensor, three.out.tensor));
  EXPECT_TRUE(same_bits(one.state.tensor, three.state.tensor));
}

// What `f` says when it refuses; empty if it does not.
inline std::string error_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

// What the operator says to a call that `spoil` has changed.
inline std::string error_of_call(const RecurrenceOp& op, const RecurrenceCase& c,
                                 const std::function<void(RecurrenceCall&)>& spoil) {
  const RecurrenceProblem problem(op, c, 34);
  return error_of([&] {
    problem.run([&](RecurrenceCall call) {
      spoil(call);
      Ctx ctx{.device = call.q.device};
      op.prefill(ctx, call);
    });
  });
}

}  // namespace kl::testing
