// What operators with a matrix state per head have in common on the CPU, whatever their recurrence is: packed
// sequences, heads, a pool of states. Checks them, cuts a call into heads, moves rows and states between the
// caller's tensors and padded scratch.
#pragma once

#include <string_view>

#include "base/context.h"
#include "base/tensor.h"
#include "recurrence/vector.h"

namespace kl::recurrence {

enum class Precision { f32, f64 };

// The part of an operator's arguments that its recurrence does not touch.
struct Problem {
  std::string_view op;  // opens every message
  Tensor q, k;          // [T, H, K]
  Tensor v, out;        // [T, Hv, V]
  Tensor cu_seqlens;    // [N + 1]
  Tensor state;         // [slots, Hv, K, V]
  Tensor slot;          // [N]
  Tensor slot_out;      // [N] or absent
  float scale = 0;      // 0: K^-0.5
};

// Each throws kl::Error with what was found and what was expected. On a GPU the values of index tensors are
// not looked at: that would cost a synchronisation.
void check_problem(const Problem&);
// An input of this shape: f32 or bf16, on the CPU f64 too, rows contiguous.
void check_input(const Problem&, std::string_view name, const Tensor&, std::initializer_list<int64_t> shape);
// An optional parameter: f32, on the CPU f64 too.
void check_parameter(const Problem&, std::string_view name, const Tensor&,
                     std::initializer_list<int64_t> shape);
void check_device(const Problem&, Device expected);
[[noreturn]] void fail_without_cuda(std::string_view op);

// Every input read and every output written once, and each state both; `gates` are the inputs beside q, k, v.
double bytes_moved(const Problem&, std::initializer_list<Tensor> gates);

// Element i of a tensor [n] of i32 or i64.
inline int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::i64 ? *t.at<int64_t>(i) : *t.at<int32_t>(i);
}

// One value head of one sequence: the unit of work, so that results do not depend on the number of threads.
struct Head {
  int64_t head, qk_head;          // of the Hv value heads; of the H query/key heads
  int64_t begin, end;             // rows of the sequence
  int64_t read_slot, write_slot;  // where the state comes from and goes to; < 0: from zero, nowhere
  int64_t K, V;
  double scale;
  Tensor pool;  // [slots, Hv, K, V]

  bool idle() const { return begin == end && read_slot == write_slot; }
};
Head head_of(const Problem&, int64_t sequence, int64_t head);

// work(head) for all of them, on the threads of `pool`; null: here.
template <class F>
void for_each_head(ThreadPool* pool, const Problem& p, F&& work) {
  const int64_t N = p.cu_seqlens.size(0) - 1, Hv = p.v.size(1);
  parallel_for(pool, N * Hv, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) work(head_of(p, task / Hv, task % Hv));
  });
}

// Row t of one head of a tensor [T, heads, n] <-> padded(n) values.
template <class Real>
void load_row(const Tensor& rows, int64_t t, int64_t head, Real* to) {
  const int64_t n = rows.size(2);
  dispatch_float(rows.dtype, [&]<class T>() {
    const T* from = rows.at<T>(t, head);
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Real>(from[i]);
  });
  std::fill(to + n, to + padded(n), Real(0));
}
template <class Real>
void store_row(const Real* from, const Tensor& rows, int64_t t, int64_t head) {
  dispatch_float(rows.dtype, [&]<class T>() {
    T* to = rows.at<T>(t, head);
    for (int64_t i = 0; i < rows.size(2); ++i) to[i] = static_cast<T>(from[i]);
  });
}

// Element (t, head) of a tensor [T, heads], or element i of a tensor [n].
template <class... Index>
double element(const Tensor& t, Index... index) {
  return dispatch_float(t.dtype, [&]<class T>() { return static_cast<double>(*t.at<T>(index...)); });
}

// The state at `slot` <-> S[K][padded(V)]. A negative slot reads as zeros and keeps nothing.
template <class Real>
void load_state(const Head& h, int64_t slot, Real* S) {
  const int64_t width = padded(h.V);
  std::fill(S, S + h.K * width, Real(0));
  for (int64_t d = 0; slot >= 0 && d < h.K; ++d) load_row(h.pool[slot], h.head, d, S + d * width);
}
template <class Real>
void store_state(const Head& h, const Real* S, int64_t slot) {
  const int64_t width = padded(h.V);
  for (int64_t d = 0; slot >= 0 && d < h.K; ++d) store_row(S + d * width, h.pool[slot], h.head, d);
}

}  // namespace kl::recurrence
