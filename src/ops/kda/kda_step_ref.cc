// The definition of the fused decode step: its parts one after another, in f64.
#include <cmath>
#include <numeric>
#include <vector>

#include "base/buffer.h"
#include "ops/kda/kda_step.h"

namespace kl {
namespace {

double step_element(const Tensor& t, int64_t n, int64_t head, int64_t i) {
  return dispatch_float(
      t.dtype, [&]<class T>() { return static_cast<double>(static_cast<float>(*t.at<T>(n, head, i))); });
}

// silu(conv(x)) of every row, and the states one input further.
OwnedTensor convolve(const Tensor& x, const StepConv& conv, const Tensor& slots) {
  const int64_t N = x.size(0), H = x.size(1), D = x.size(2);
  OwnedTensor y = make_tensor(DType::f64, {N, H, D});
  for (int64_t n = 0; n < N; ++n) {
    const int32_t slot = *slots.at<int32_t>(n);
    for (int64_t c = 0; c < H * D; ++c) {
      float inputs[kStepTaps] = {};
      if (slot >= 0)
        for (int64_t j = 0; j + 1 < kStepTaps; ++j) inputs[j] = *conv.state.at<float>(slot, c, j);
      inputs[kStepTaps - 1] = static_cast<float>(step_element(x, n, c / D, c % D));
      double sum = 0;
      for (int64_t j = 0; j < kStepTaps; ++j)
        sum += static_cast<double>(*conv.weight.at<float>(c, j)) * inputs[j];
      *y.tensor.at<double>(n, c / D, c % D) = sum / (1 + std::exp(-sum));
      if (slot >= 0)
        for (int64_t j = 0; j + 1 < kStepTaps; ++j) *conv.state.at<float>(slot, c, j) = inputs[j + 1];
    }
  }
  return y;
}

void norm_and_gate(const Tensor& o, const KdaStepArgs& a) {
  const int64_t N = o.size(0), H = o.size(1), V = o.size(2);
  for (int64_t n = 0; n < N; ++n)
    for (int64_t h = 0; h < H; ++h) {
      const double* x = o.at<double>(n, h);
      const double squares = std::inner_product(x, x + V, x, 0.0);
      const double factor = 1 / std::sqrt(squares / static_cast<double>(V) + a.norm_eps);
      for (int64_t i = 0; i < V; ++i) {
        const double y =
            x[i] * factor * *a.norm_weight.at<float>(i) / (1 + std::exp(-step_element(a.out_gate, n, h, i)));
        dispatch_float(a.kda.out.dtype,
                       [&]<class T>() { *a.kda.out.at<T>(n, h, i) = static_cast<T>(static_cast<float>(y)); });
      }
    }
}

}  // namespace

void kda_step_ref(const KdaStepArgs& a, KdaPrecision precision) {
  KL_CHECK(a.kda.q.device == Device::cpu, "kda_step_ref: expected tensors on the cpu, found ",
           name_of(a.kda.q.device));
  const int64_t N = a.kda.q.size(0);
  const OwnedTensor q = convolve(a.kda.q, a.q, a.kda.slot), k = convolve(a.kda.k, a.k, a.kda.slot),
                    v = convolve(a.kda.v, a.v, a.kda.slot);
  OwnedTensor rows = make_tensor(DType::i32, {N + 1}),
              o = make_tensor(DType::f64, {N, a.kda.v.size(1), a.kda.v.size(2)});
  std::iota(rows.tensor.ptr<int32_t>(), rows.tensor.ptr<int32_t>() + N + 1, 0);
  KdaArgs step = a.kda;
  step.q = q.tensor, step.k = k.tensor, step.v = v.tensor, step.out = o.tensor, step.cu_seqlens = rows.tensor;
  kda_recurrent_ref(step, precision);
  norm_and_gate(o.tensor, a);
}

}  // namespace kl
