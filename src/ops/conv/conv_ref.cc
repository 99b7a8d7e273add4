// The definition of short_conv: plain loops. Taps are added in f32 from the oldest to the current, SiLU is
// f32, the result is rounded once. Inputs pass through the state unrounded, so a sequence cut anywhere gives
// the same bits as one in one piece. Not checked: the door in conv.cc is.
#include <algorithm>
#include <cmath>
#include <limits>

#include "ops/conv/conv.h"

namespace kl {
namespace {

// x · sigmoid(x); 0, not NaN, where a sum has overflowed to -inf. A NaN stays one.
float silu(float x) {
  x = std::max(x, std::numeric_limits<float>::lowest());
  return x / (1 + std::exp(-x));
}

// One sequence: what it has seen before its first row, and its rows.
template <class X>
struct Sequence {
  const Tensor& x;
  Tensor past;  // [C, W - 1] f32; without memory for a sequence that starts at zero
  int64_t begin, end;
  int64_t W;

  // Channel c of the input at `row`, which may be up to W - 1 before the first.
  float input(int64_t row, int64_t c) const {
    if (row >= begin) return x.at<X>(row)[c];
    return past ? *past.at<float>(c, W - 1 + row - begin) : 0.f;
  }
};

template <class X, class Out>
void convolve(const Sequence<X>& s, const Tensor& weight, const Tensor& out_rows) {
  for (int64_t t = s.begin; t < s.end; ++t) {
    Out* out = out_rows.at<Out>(t);
    for (int64_t c = 0; c < out_rows.size(1); ++c) {
      const float* w = weight.at<float>(c);
      float sum = 0;
      for (int64_t j = 0; j < s.W; ++j) sum += w[j] * s.input(t - s.W + 1 + j, c);
      out[c] = static_cast<Out>(silu(sum));
    }
  }
}

// The last W - 1 inputs become the past of the next call. From the oldest on: what a step reads of the old
// past is never something that an earlier step has overwritten.
template <class X>
void remember(const Sequence<X>& s) {
  for (int64_t c = 0; c < s.x.size(1); ++c)
    for (int64_t i = 0; i < s.W - 1; ++i) *s.past.template at<float>(c, i) = s.input(s.end - s.W + 1 + i, c);
}

}  // namespace

void short_conv_ref(const ShortConvArgs& a) {
  dispatch_f32_bf16(a.x.dtype, [&]<class X>() {
    dispatch_f32_bf16(a.out.dtype, [&]<class Out>() {
      for (int64_t n = 0; n < a.slot.size(0); ++n) {
        const int32_t slot = *a.slot.at<int32_t>(n);
        const Sequence<X> s = {.x = a.x,
                               .past = slot < 0 ? Tensor() : a.state[slot],
                               .begin = *a.cu_seqlens.at<int32_t>(n),
                               .end = *a.cu_seqlens.at<int32_t>(n + 1),
                               .W = a.weight.size(1)};
        if (s.begin == s.end) continue;
        convolve<X, Out>(s, a.weight, a.out);
        if (slot >= 0) remember(s);
      }
    });
  });
}

}  // namespace kl
