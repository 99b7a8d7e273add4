// Vector arithmetic of KDA's CPU kernels: gates, norms and rows of any element type. Like simd/vec.h, which
// it adds to, only for x_cpu.cc files.
#pragma once

#include "ops/kda/kda_cpu.h"
#include "simd/bf16_pairs.h"

namespace kl::KL_ISA {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- functions ----

inline Vec sigmoid(Vec x) { return 1.f / (1.f + exp(-x)); }

// log(1 + y) for y in [0, 1], as 2 artanh(s), s = y / (2 + y) <= 1/3; what follows is below 2e-9 of it.
inline Vec log1p_unit(Vec y) {
  const Vec s = y / (2.f + y), s2 = s * s;
  Vec p = s2 * (2.f / 15) + 2.f / 13;
  p = p * s2 + 2.f / 11;
  p = p * s2 + 2.f / 9;
  p = p * s2 + 2.f / 7;
  p = p * s2 + 2.f / 5;
  p = p * s2 + 2.f / 3;
  return s * s2 * p + 2.f * s;
}

// log(1 + e^x) without a cut-off: relative accuracy holds for the weakest gates too.
inline Vec softplus(Vec x) {
  const Vec magnitude = (Vec)((BitVec)x & 0x7fffffffu);
  return max(x, Vec{}) + log1p_unit(exp(-magnitude));
}

// The same and e^x, x <= 0, to a few 1e-6: for kernels that round to bf16 anyway.
inline Vec exp_rounded(Vec x) {
  constexpr float kRound = 0x1.8p23f;
  const Vec t = x * 0x1.715476p0f, shifted = t + kRound, r = t - (shifted - kRound);
  Vec p = r * 0.009570102f + 0.05591786f;  // 2^r, |r| <= 1/2, to 2.6e-6
  p = p * r + 0.24024745f;
  p = p * r + 0.69312181f;
  p = p * r + 0.99999926f;
  return t < -126.f ? Vec{} : p * (Vec)(((BitVec)shifted << 23) + 0x3f800000u);
}
inline Vec softplus_rounded(Vec x) {
  const Vec y = exp_rounded(-(Vec)((BitVec)x & 0x7fffffffu));
  Vec p = y * 0.014141021f - 0.066401793f;  // log(1 + y) / y, y in [0, 1], to 1.3e-6
  p = p * y + 0.14922387f;
  p = p * y - 0.2350386f;
  p = p * y + 0.33109449f;
  p = p * y - 0.49986966f;
  p = p * y + 0.99999873f;
  return max(x, Vec{}) + y * p;
}

// A factor e^x, x <= 0, of a state S, as keep · S + change · S. A weak decay adds expm1(x) · S: e^-1e-4,
// rounded to f32, is wrong by the same 2e-8 at every step, and a thousand steps later the state by 2e-5.
struct Decay {
  Vec keep, change;
};
inline Decay decay_of(Vec x) {
  Vec p = x * (1.f / 362880) + 1.f / 40320;  // (e^x - 1) / x by Taylor; the next term is below 6e-10 at 0.5
  p = p * x + 1.f / 5040;
  p = p * x + 1.f / 720;
  p = p * x + 1.f / 120;
  p = p * x + 1.f / 24;
  p = p * x + 1.f / 6;
  p = p * x + 0.5f;
  p = p * x + 1.f;
  const auto strong = x < -0.5f;
  return {strong ? Vec{} : broadcast(1.f), strong ? exp(x) : p * x};
}

// ---- rows ----

// Columns [first, first + n) of row t -> n values and zeros up to kda_padded(n).
inline void load_columns(const KdaHeadRows& rows, int64_t t, int64_t first, int64_t n, float* to) {
  const char* const row = rows.data + t * rows.stride;
  const auto load_all = [&](const auto* from) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(to + i, load(from + i));
    if (i < n) store(to + i, load_part(from + i, n - i)), i += kLanes;
    for (; i < kda_padded(n); i += kLanes) store(to + i, Vec{});
  };
  if (rows.dtype == DType::f32) return load_all(reinterpret_cast<const float*>(row) + first);
  if (rows.dtype == DType::bf16) return load_all(reinterpret_cast<const bf16*>(row) + first);
  const double* const from = reinterpret_cast<const double*>(row) + first;
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(from[i]);
  for (int64_t i = n; i < kda_padded(n); ++i) to[i] = 0;
}

inline HalfVec narrow_bf16(Vec v) { return __builtin_convertvector(round_bf16(v), HalfVec); }

// n values, filled up as by load_columns(), -> columns [first, first + n) of row t.
inline void store_columns(const float* from, const KdaHeadRows& rows, int64_t t, int64_t first, int64_t n) {
  char* const row = rows.data + t * rows.stride;
  if (rows.dtype == DType::f32) {
    __builtin_memcpy(reinterpret_cast<float*>(row) + first, from, static_cast<size_t>(4 * n));
  } else if (rows.dtype == DType::bf16) {
    char* const to = row + 2 * first;
    for (int64_t i = 0; i < n; i += kLanes) {
      const HalfVec half = narrow_bf16(load(from + i));
      __builtin_memcpy(to + 2 * i, &half, n - i >= kLanes ? sizeof half : static_cast<size_t>(2 * (n - i)));
    }
  } else {
    double* const to = reinterpret_cast<double*>(row) + first;
    for (int64_t i = 0; i < n; ++i) to[i] = static_cast<double>(from[i]);
  }
}

// A factor of a whole row, in two parts: rounded to one f32, its error would scale the row.
struct RowScale {
  float high, low;
};
inline Vec operator*(const RowScale& s, Vec x) { return x * s.high + x * s.low; }

// factor / |x|, or `factor` without l2norm. The length is taken in double: its error would scale the whole
// row, and k enters every later state twice.
inline RowScale scale_of(const KdaCpuHead& h, float factor, const float* x) {
  double scale = static_cast<double>(factor);
  if (h.l2norm) {
    constexpr int kHalf = kLanes / 2;  // as many doubles fill a register
    typedef float HalfRegister __attribute__((vector_size(4 * kHalf)));
    typedef double Wide __attribute__((vector_size(8 * kHalf)));
    Wide squares[2] = {};
    for (int64_t i = 0; i < kda_padded(h.K); i += kLanes)
      for (int half = 0; half < 2; ++half) {
        const Wide wide = __builtin_convertvector(load_bits<HalfRegister>(x + i + half * kHalf), Wide);
        squares[half] += wide * wide;
      }
    const Wide both = squares[0] + squares[1];
    double total = static_cast<double>(h.l2_eps);
    for (int lane = 0; lane < kHalf; ++lane) total += both[lane];
    scale /= __builtin_sqrt(total);
  }
  const float high = static_cast<float>(scale);
  return {high, static_cast<float>(scale - static_cast<double>(high))};
}

// x <- factor · x / |x|, or factor · x without l2norm.
inline void normalise(const KdaCpuHead& h, float factor, float* x) {
  const RowScale scale = scale_of(h, factor, x);
  for (int64_t i = 0; i < kda_padded(h.K); i += kLanes) store(x + i, scale * load(x + i));
}

// factor / |x|, or `factor` without l2norm, of four rows in f32: for kernels that round to bf16 anyway.
inline Quad scales_of(const KdaCpuHead& h, Quad factors, const float* const (&rows)[4]) {
  if (!h.l2norm) return factors;
  Vec squares[4] = {};
  for (int64_t i = 0; i < kda_padded(h.K); i += kLanes)
    for (int r = 0; r < 4; ++r) squares[r] += load(rows[r] + i) * load(rows[r] + i);
  const Quad lengths = sum(squares[0], squares[1], squares[2], squares[3]) + h.l2_eps;
  for (int r = 0; r < 4; ++r) factors[r] /= __builtin_sqrtf(lengths[r]);
  return factors;
}

// Raw values -> log-decays from 0 to -inf; `rounded`: to a few 1e-6.
template <bool rounded = false>
inline void apply_gate(const KdaCpuHead& h, float* z) {
  if (h.gate == KdaGateKind::log_decay) return;
  for (int64_t i = 0; i < h.K; i += kLanes) {
    const int64_t rest = h.K - i;
    const Vec x = load(z + i) + (rest >= kLanes ? load(h.bias + i) : load_part(h.bias + i, rest));
    if (h.gate == KdaGateKind::bounded)
      store(z + i, h.lower_bound * sigmoid(h.rate * x));
    else
      store(z + i, -h.rate * (rounded ? softplus_rounded(x) : softplus(x)));
  }
}

}  // namespace kl::KL_ISA
