// Loops over rows in scratch. A row is padded with zeros to a multiple of kLanes, so that inner loops of
// constant length fit every dimension.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace kl::recurrence {

constexpr int64_t kMaxDim = 256;  // the longest row
constexpr int64_t kLanes = 16;
inline int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

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

// to = x ⊙ factor
template <class Real>
void multiply(Real* __restrict to, const Real* __restrict x, const Real* __restrict factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) to[i + lane] = x[i + lane] * factor[i + lane];
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

template <class Real>
Real dot(const Real* __restrict a, const Real* __restrict b, int64_t n) {
  Real sum[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += a[i + lane] * b[i + lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

// A matrix in scratch.
template <class Real>
struct Rows {
  Real* data = nullptr;
  int64_t width = 0;
  Real* operator[](int64_t i) const { return data + i * width; }
  Rows from(int64_t i) const { return {(*this)[i], width}; }
};

// Matrices of one size each in one block of memory.
template <class Real>
class Matrices {
 public:
  struct Entry {
    Rows<Real>& matrix;
    int64_t height, width;
  };
  void allocate(std::initializer_list<Entry> entries) {
    int64_t size = 0;
    for (const Entry& e : entries) size += e.height * e.width;
    memory_.resize(static_cast<size_t>(size));
    Real* next = memory_.data();
    for (const Entry& e : entries) {
      e.matrix = {next, e.width};
      next += e.height * e.width;
    }
  }

 private:
  std::vector<Real> memory_;
};

// The left factor of a product: element (i, j) is data[i * row_step + j * step].
template <class Real>
struct Factor {
  const Real* data;
  int64_t row_step, step;
};
template <class Real>
Factor<Real> normal(Rows<Real> a) {
  return {a.data, a.width, 1};
}
template <class Real>
Factor<Real> transposed(Rows<Real> a) {
  return {a.data, 1, a.width};
}

// out_i += sign · sum_{j < depth} a_ij b_j. Sixteen terms at a time are summed on their own: a sum of 256
// then has the rounding error of one of 32.
template <class Real>
void add_product(Rows<Real> out, Real sign, Factor<Real> a, Rows<Real> b, int64_t rows, int64_t depth) {
  Real sum[kMaxDim];
  for (int64_t first = 0; first < depth; first += 16) {
    const int64_t last = std::min(first + 16, depth);
    for (int64_t i = 0; i < rows; ++i) {
      std::fill(sum, sum + out.width, Real(0));
      for (int64_t j = first; j < last; ++j)
        add_scaled(sum, a.data[i * a.row_step + j * a.step], b[j], out.width);
      add_scaled(out[i], sign, sum, out.width);
    }
  }
}

// out_i += sign · sum_{j <= i} a_ij b_j. Row by row: a NaN of a later token stays its own.
template <class Real>
void add_lower_product(Rows<Real> out, Real sign, Rows<Real> a, Rows<Real> b, int64_t rows) {
  for (int64_t i = 0; i < rows; ++i) add_product(out.from(i), sign, normal(a.from(i)), b, 1, i + 1);
}

}  // namespace kl::recurrence
