// The norms for f32 operands. The sum of squares and the scale are f64, so that they neither overflow nor
// lose digits; weight and gate are f32.
#include "ops/norm/norm_cpu.h"

#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

typedef double DoubleVec __attribute__((vector_size(8 * kLanes)));

// DoubleVec is wider than a register and stays inside functions: passing one has no settled convention.
double sum_of_squares(const float* x, int64_t D) {
  DoubleVec partial{};
  const auto add = [&](Vec v) {
    const DoubleVec wide = __builtin_convertvector(v, DoubleVec);
    partial += wide * wide;
  };
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) add(load(x + i));
  if (i < D) add(load_part(x + i, D - i));
  double sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += partial[lane];
  return sum;
}

inline Vec normed(Vec x, double scale, Vec weight) {
  return __builtin_convertvector(__builtin_convertvector(x, DoubleVec) * scale, Vec) * weight;
}

void norm_row(const float* x, const float* weight, float* out, int64_t D, double scale) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes) store(out + i, normed(load(x + i), scale, load(weight + i)));
  const int64_t rest = D - i;
  if (rest > 0) store_part(out + i, normed(load_part(x + i, rest), scale, load_part(weight + i, rest)), rest);
}

void norm_row_gated(const float* x, const float* weight, const float* gate, float* out, int64_t D,
                    double scale) {
  int64_t i = 0;
  for (; i + kLanes <= D; i += kLanes)
    store(out + i, normed(load(x + i), scale, load(weight + i)) / (1.f + exp(-load(gate + i))));
  const int64_t rest = D - i;
  if (rest > 0)
    store_part(out + i,
               normed(load_part(x + i, rest), scale, load_part(weight + i, rest)) /
                   (1.f + exp(-load_part(gate + i, rest))),
               rest);
}

}  // namespace

void norm_rows(const NormRows& r) {
  for (int64_t row = 0; row < r.rows; ++row) {
    const float* x = r.x + row * r.x_stride;
    float* out = r.out + row * r.out_stride;
    const double mean = sum_of_squares(x, r.D) / static_cast<double>(r.D);
    const double scale = 1 / __builtin_sqrt(mean + static_cast<double>(r.eps));
    if (r.gate)
      norm_row_gated(x, r.weight, r.gate + row * r.gate_stride, out, r.D, scale);
    else
      norm_row(x, r.weight, out, r.D, scale);
  }
}

}  // namespace kl::KL_ISA
