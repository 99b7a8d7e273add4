// The definition of the norms: one row after another in f64, rounded once at the end. The sum of squares
// stays finite for every finite f32 or bf16 input. Not checked: the doors in norm.cc are.
#include <cmath>

#include "ops/norm/norm.h"

namespace kl {
namespace {

// 1 / sqrt(mean(x²) + eps)
template <class X>
double inverse_rms(const X* x, int64_t D, double eps) {
  double sum = 0;
  for (int64_t i = 0; i < D; ++i) {
    const double value = static_cast<float>(x[i]);
    sum += value * value;
  }
  return 1 / std::sqrt(sum / static_cast<double>(D) + eps);
}

template <class T>
T rounded(double value) {
  return static_cast<T>(static_cast<float>(value));
}

}  // namespace

void rms_norm_ref(const RmsNormArgs& a) {
  const int64_t T = a.x.size(0), D = a.x.size(1);
  const float* weight = a.weight.ptr<float>();
  dispatch_f32_bf16(a.x.dtype, [&]<class X>() {
    dispatch_f32_bf16(a.out.dtype, [&]<class Out>() {
      for (int64_t t = 0; t < T; ++t) {
        const X* x = a.x.at<X>(t);
        Out* out = a.out.at<Out>(t);
        const double scale = inverse_rms(x, D, a.eps);
        for (int64_t i = 0; i < D; ++i)
          out[i] = rounded<Out>(static_cast<double>(static_cast<float>(x[i])) * scale * weight[i]);
      }
    });
  });
}

void rms_norm_gated_ref(const RmsNormGatedArgs& a) {
  const int64_t T = a.x.size(0), H = a.x.size(1), D = a.x.size(2);
  const float* weight = a.weight.ptr<float>();
  dispatch_f32_bf16(a.x.dtype, [&]<class X>() {
    dispatch_f32_bf16(a.gate.dtype, [&]<class Gate>() {
      dispatch_f32_bf16(a.out.dtype, [&]<class Out>() {
        for (int64_t row = 0; row < T * H; ++row) {
          const X* x = a.x.at<X>(row / H, row % H);
          const Gate* gate = a.gate.at<Gate>(row / H, row % H);
          Out* out = a.out.at<Out>(row / H, row % H);
          const double scale = inverse_rms(x, D, a.eps);
          for (int64_t i = 0; i < D; ++i) {
            const double sigmoid = 1 / (1 + std::exp(-static_cast<double>(static_cast<float>(gate[i]))));
            out[i] =
                rounded<Out>(static_cast<double>(static_cast<float>(x[i])) * scale * weight[i] * sigmoid);
          }
        }
      });
    });
  });
}

}  // namespace kl
