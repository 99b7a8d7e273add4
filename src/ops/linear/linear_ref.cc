// The definition of linear: one sum after another in f64, rounded once. Not checked: the door in linear.cc
// is.
#include "ops/linear/linear.h"

namespace kl {

void linear_ref(const LinearArgs& a) {
  dispatch_float(a.w.dtype, [&]<class W>() {
    for (int64_t t = 0; t < a.x.size(0); ++t) {
      const float* x = a.x.at<float>(t);
      for (int64_t o = 0; o < a.w.size(0); ++o) {
        const W* w = a.w.at<W>(o);
        float* out = a.out.at<float>(t, o);
        double sum = a.accumulate ? *out : 0;
        for (int64_t i = 0; i < a.x.size(1); ++i)
          sum += static_cast<double>(x[i]) * static_cast<double>(w[i]);
        *out = static_cast<float>(sum);
      }
    }
  });
}

}  // namespace kl
