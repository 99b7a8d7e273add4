// One value head of one packed sequence: the unit of work of the CPU code. What it reads and writes of a
// KdaArgs (rows, states, checkpoints), free of element types, strides and layouts; no arithmetic of KDA.
//
// Rows and states in scratch are padded with zeros to a multiple of kLanes, so that inner loops of constant
// length fit every K and V.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/kda/kda_gate.h"

namespace kl::kda {

constexpr int64_t kMaxDim = 256;  // the most that K and V can be
constexpr int64_t kLanes = 16;
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct Head {
  const KdaArgs& args;
  int64_t head, qk_head;          // of the Hv value heads; of the H query/key heads
  int64_t begin, end;             // rows of the sequence
  int64_t read_slot, write_slot;  // where the state comes from and goes to; < 0: from zero, nowhere
  int64_t K, V;
  double scale;
};

Head head_of(const KdaArgs&, int64_t sequence, int64_t head);
// work(head) for all of them, on the threads of `pool`; null: here.
void for_each_head(ThreadPool* pool, const KdaArgs&, void (*work)(const Head&));

// The work. Heads are independent of each other.
template <class Real>
void recurrent_head(const Head&);  // kda_ref.cc; Real is float or double
void chunk_head(const Head&);      // kda_chunk_ref.cc
constexpr int64_t kChunk = 64;     // tokens of its chunks

// Element i of a tensor [n] of i32 or i64.
inline int64_t index_at(const Tensor& t, int64_t i) {
  return t.dtype == DType::i64 ? *t.at<int64_t>(i) : *t.at<int32_t>(i);
}

// Row t of one head of a tensor [T, heads, n] -> padded(n) values.
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

// A row of q or k, divided by its length where args.l2norm asks for it. The length is taken in double: its
// error would scale the whole row, and k enters every later state twice.
template <class Real>
void load_qk_row(const Head& h, const Tensor& rows, int64_t t, Real* to) {
  load_row(rows, t, h.qk_head, to);
  if (!h.args.l2norm) return;
  double squares = 0;
  for (int64_t i = 0; i < h.K; ++i) squares += static_cast<double>(to[i]) * static_cast<double>(to[i]);
  const double factor = 1 / std::sqrt(squares + h.args.l2_eps);
  for (int64_t i = 0; i < h.K; ++i) to[i] = static_cast<Real>(to[i] * factor);
}

// beta of token t. Its formula is evaluated in double whatever the caller computes in: near 2 a step is a
// reflection, and an error of beta is repeated by every later step.
template <class Real>
Real load_beta(const Head& h, int64_t t) {
  const double x = dispatch_float(
      h.args.beta.dtype, [&]<class T>() { return static_cast<double>(*h.args.beta.at<T>(t, h.head)); });
  return static_cast<Real>(write_strength(h.args.beta_kind, x));
}

// f(element, d, i) for all elements (d, i) of the [K, V] state at `slot`, for either layout of the pool.
template <class F>
void for_each_of_state(const Head& h, int64_t slot, F&& f) {
  const Tensor pool = h.args.state[slot][h.head];
  const int64_t step_k = pool.stride[h.args.state_v_first ? 1 : 0],
                step_v = pool.stride[h.args.state_v_first ? 0 : 1];
  dispatch_float(pool.dtype, [&]<class T>() {
    T* const elements = pool.ptr<T>();
    for (int64_t d = 0; d < h.K; ++d)
      for (int64_t i = 0; i < h.V; ++i) f(elements[d * step_k + i * step_v], d, i);
  });
}

// The state at `slot` <-> S[K][width]. A negative slot reads as zeros.
template <class Real>
void load_state(const Head& h, int64_t slot, Real* S, int64_t width) {
  std::fill(S, S + h.K * width, Real(0));
  if (slot < 0) return;
  for_each_of_state(h, slot, [&](auto x, int64_t d, int64_t i) { S[d * width + i] = static_cast<Real>(x); });
}
template <class Real>
void store_state(const Head& h, const Real* S, int64_t slot, int64_t width) {
  if (slot < 0) return;
  for_each_of_state(h, slot,
                    [&]<class T>(T& x, int64_t d, int64_t i) { x = static_cast<T>(S[d * width + i]); });
}

template <class Real>
void load_state(const Head& h, int64_t slot, Real* S) {
  load_state(h, slot, S, padded(h.V));
}
template <class Real>
void store_state(const Head& h, const Real* S, int64_t slot) {
  store_state(h, S, slot, padded(h.V));
}

// f(row, slot) for the checkpoints at rows (from, to], in ascending order.
template <class F>
void for_each_checkpoint(const KdaArgs& args, int64_t from, int64_t to, F&& f) {
  if (!args.checkpoint_row) return;
  const int32_t* rows = args.checkpoint_row.ptr<int32_t>();
  const int32_t* end = rows + args.checkpoint_row.size(0);
  for (const int32_t* row = std::upper_bound(rows, end, from); row != end && *row <= to; ++row) {
    const int64_t slot = index_at(args.checkpoint_slot, row - rows);
    if (slot >= 0) f(*row, slot);
  }
}

// y += a · x over n values, a multiple of kLanes.
template <class Real>
void add_scaled(Real* __restrict y, Real a, const Real* __restrict x, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) y[i + lane] += a * x[i + lane];
}

// x *= a
template <class Real>
void scale_by(Real* x, Real a, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) x[i + lane] *= a;
}

// x *= exp(log_decay). A weak decay adds expm1(log_decay) · x: exp(-1e-4), rounded to f32, is wrong by the
// same 2e-8 at every step, and a thousand steps later the state by 2e-5.
template <class Real>
void decay_by(Real* x, Real log_decay, int64_t n) {
  if (log_decay < Real(-0.5)) return scale_by(x, std::exp(log_decay), n);
  const Real change = std::expm1(log_decay);
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) x[i + lane] += change * x[i + lane];
}

}  // namespace kl::kda
