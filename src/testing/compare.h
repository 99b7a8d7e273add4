// How far two arrays are apart. Both measures first demand that NaN and infinities stand at the same places.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include "base/tensor.h"

namespace kl::testing {

// All elements as double, in row-major order; strides are followed.
inline std::vector<double> to_doubles(const Tensor& t) {
  std::vector<double> values;
  values.reserve(static_cast<size_t>(t.numel()));
  const auto n = [&](int d) { return d < t.rank ? t.shape[d] : 1; };
  const auto s = [&](int d) { return d < t.rank ? t.stride[d] : 0; };
  dispatch_float(t.dtype, [&]<class T>() {
    const T* p = t.ptr<T>();
    for (int64_t a = 0; a < n(0); ++a)
      for (int64_t b = 0; b < n(1); ++b)
        for (int64_t c = 0; c < n(2); ++c)
          for (int64_t d = 0; d < n(3); ++d)
            values.push_back(static_cast<double>(p[a * s(0) + b * s(1) + c * s(2) + d * s(3)]));
  });
  return values;
}

// Root mean square of the difference over that of the reference; infinity where sizes, NaN or infinities
// differ.
inline double rel_rms(const std::vector<double>& x, const std::vector<double>& reference) {
  constexpr double kApart = std::numeric_limits<double>::infinity();
  if (x.size() != reference.size()) return kApart;
  double error = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i]) || !std::isfinite(reference[i])) {
      const bool same = (std::isnan(x[i]) && std::isnan(reference[i])) || x[i] == reference[i];
      if (!same) return kApart;
      continue;
    }
    error += (x[i] - reference[i]) * (x[i] - reference[i]);
    norm += reference[i] * reference[i];
  }
  if (error == 0) return 0;
  return norm == 0 ? kApart : std::sqrt(error / norm);
}
inline double rel_rms(const Tensor& x, const Tensor& reference) {
  return rel_rms(to_doubles(x), to_doubles(reference));
}

// 1 - 2<x,y> / (<x,x> + <y,y>): 0 for equal arrays, about half the square of the relative error for near
// ones.
inline double diff(const std::vector<double>& x, const std::vector<double>& y) {
  if (std::isinf(rel_rms(x, y)) && x.size() != y.size()) return std::numeric_limits<double>::infinity();
  double xy = 0, sum = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    if (!std::isfinite(x[i]) || !std::isfinite(y[i])) {
      if (!((std::isnan(x[i]) && std::isnan(y[i])) || x[i] == y[i]))
        return std::numeric_limits<double>::infinity();
      continue;
    }
    xy += x[i] * y[i], sum += x[i] * x[i] + y[i] * y[i];
  }
  return sum == 0 ? 0 : 1 - 2 * xy / sum;
}

// True if the two arrays have the same bytes (both contiguous).
inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.bytes() == b.bytes() && __builtin_memcmp(a.data, b.data, static_cast<size_t>(a.bytes())) == 0;
}

}  // namespace kl::testing
