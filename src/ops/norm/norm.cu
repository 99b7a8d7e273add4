// RMS norms on CUDA. A row is read twice, the second time from the L1 cache: one block for a row of the
// residual stream, one warp for a row of a head. Sums are f32 in a fixed order.
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "ops/norm/norm_cuda.h"

namespace kl::cuda {
namespace {

constexpr int kThreads = 256;

// kWidth neighbours (4 or 1) as floats.
template <int kWidth>
struct Pack {
  float x[kWidth];
};
template <int kWidth, class T>
KL_DEVICE Pack<kWidth> load(const T* p) {
  if constexpr (kWidth == 4) {
    const float4 v = load4(p);
    return {v.x, v.y, v.z, v.w};
  } else {
    return {to_float(*p)};
  }
}
template <int kWidth, class T>
KL_DEVICE void store(T* p, const Pack<kWidth>& v) {
  if constexpr (kWidth == 4)
    store4(p, {v.x[0], v.x[1], v.x[2], v.x[3]});
  else
    *p = from_float<T>(v.x[0]);
}

// The part of sum(x²) over a row of D elements that belongs to `first`, `first` + step, ...
template <int kWidth, class X>
KL_DEVICE float sum_of_squares(const X* x, int64_t D, int64_t first, int64_t step) {
  float sum = 0;
  for (int64_t i = first; i < D; i += step) {
    const Pack<kWidth> v = load<kWidth>(x + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sum = fmaf(v.x[j], v.x[j], sum);
  }
  return sum;
}

// One block per row. No __restrict__: `out` may be x; a thread reads its elements before it writes them.
template <int kWidth, class X, class Out>
__global__ void __launch_bounds__(kThreads)
    rms_norm_kernel(const X* x, int64_t x_stride, const float* weight, Out* out, int64_t out_stride,
                    int64_t D, float eps) {
  __shared__ float partial[kThreads / 32];
  x += blockIdx.x * x_stride;
  out += blockIdx.x * out_stride;
  const int64_t first = threadIdx.x * kWidth, step = kThreads * kWidth;
  const float sum = block_sum<kThreads>(sum_of_squares<kWidth>(x, D, first, step), partial);
  const float scale = rsqrtf(sum / static_cast<float>(D) + eps);
  for (int64_t i = first; i < D; i += step) {
    Pack<kWidth> v = load<kWidth>(x + i);
    const Pack<kWidth> w = load<kWidth>(weight + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v.x[j] *= scale * w.x[j];
    store<kWidth>(out + i, v);
  }
}

// A [T, H, D] view: where row (t, h) starts, in elements.
template <class T>
struct Rows {
  T* data;
  int64_t token_stride, head_stride;
  KL_DEVICE T* at(int64_t token, int64_t head) const {
    return data + token * token_stride + head * head_stride;
  }
};

// One warp per (token, head).
template <int kWidth, class X, class Gate, class Out>
__global__ void __launch_bounds__(kThreads)
    rms_norm_gated_kernel(Rows<const X> xs, Rows<const Gate> gates, const float* weight, Rows<Out> outs,
                          int64_t rows, int64_t H, int64_t D, float eps) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp
  const int64_t token = row / H, head = row % H;
  const X* x = xs.at(token, head);
  const Gate* gate = gates.at(token, head);
  Out* out = outs.at(token, head);
  const int64_t first = threadIdx.x % 32 * kWidth, step = 32 * kWidth;
  const float sum = warp_sum(sum_of_squares<kWidth>(x, D, first, step));
  const float scale = rsqrtf(sum / static_cast<float>(D) + eps);
  for (int64_t i = first; i < D; i += step) {
    Pack<kWidth> v = load<kWidth>(x + i);
    const Pack<kWidth> w = load<kWidth>(weight + i), z = load<kWidth>(gate + i);
#pragma unroll
    for (int j = 0; j < kWidth; ++j) v.x[j] *= scale * w.x[j] / (1.f + __expf(-z.x[j]));
    store<kWidth>(out + i, v);
  }
}

template <class T, class Element>
Rows<T> rows_of(const Tensor& t) {
  return {t.ptr<Element>(), t.stride[0], t.stride[1]};
}

}  // namespace

void rms_norm(const Ctx& ctx, const RmsNormArgs& a) {
  const bool fours = in_fours(a.x) && in_fours(a.weight) && in_fours(a.out);
  const LaunchConfig config{dim3(static_cast<unsigned>(a.x.size(0))), dim3(kThreads), 0,
                            static_cast<cudaStream_t>(ctx.stream)};
  dispatch_operand(a.x.dtype, [&]<class X>() {
    dispatch_operand(a.out.dtype, [&]<class Out>() {
      launch(fours ? rms_norm_kernel<4, X, Out> : rms_norm_kernel<1, X, Out>, config, a.x.ptr<X>(),
             a.x.stride[0], a.weight.ptr<float>(), a.out.ptr<Out>(), a.out.stride[0], a.x.size(1), a.eps);
    });
  });
}

void rms_norm_gated(const Ctx& ctx, const RmsNormGatedArgs& a) {
  const int64_t H = a.x.size(1), D = a.x.size(2), rows = a.x.size(0) * H;
  const bool fours = in_fours(a.x) && in_fours(a.gate) && in_fours(a.weight) && in_fours(a.out);
  const int64_t per_block = kThreads / 32;
  const LaunchConfig config{dim3(static_cast<unsigned>((rows + per_block - 1) / per_block)), dim3(kThreads),
                            0, static_cast<cudaStream_t>(ctx.stream)};
  dispatch_operand(a.x.dtype, [&]<class X>() {
    dispatch_operand(a.gate.dtype, [&]<class Gate>() {
      dispatch_operand(a.out.dtype, [&]<class Out>() {
        launch(fours ? rms_norm_gated_kernel<4, X, Gate, Out> : rms_norm_gated_kernel<1, X, Gate, Out>,
               config, rows_of<const X, X>(a.x), rows_of<const Gate, Gate>(a.gate), a.weight.ptr<float>(),
               rows_of<Out, Out>(a.out), rows, H, D, a.eps);
      });
    });
  });
}

}  // namespace kl::cuda
