// Random test data, reproducible from a seed on every machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "base/buffer.h"

namespace kl::testing {

// xoshiro256** seeded through splitmix64.
class Random {
 public:
  explicit Random(uint64_t seed) {
    for (uint64_t& s : state_) {
      seed += 0x9e3779b97f4a7c15u;
      uint64_t z = seed;
      z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
      z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
      s = z ^ (z >> 31);
    }
  }
  uint64_t bits() {
    const auto rotl = [](uint64_t x, int k) { return (x << k) | (x >> (64 - k)); };
    const uint64_t result = rotl(state_[1] * 5, 7) * 9, t = state_[1] << 17;
    state_[2] ^= state_[0], state_[3] ^= state_[1], state_[1] ^= state_[2], state_[0] ^= state_[3];
    state_[2] ^= t, state_[3] = rotl(state_[3], 45);
    return result;
  }
  double uniform(double low = 0, double high = 1) {
    return low + (high - low) * static_cast<double>(bits() >> 11) * 0x1p-53;
  }
  double normal() {  // Box-Muller, one of the pair
    const double u = 1 - uniform(), v = uniform();
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v);
  }
  int64_t integer(int64_t low, int64_t high) {  // inclusive
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }

 private:
  uint64_t state_[4];
};

// Calls f(i) for every element of a contiguous floating-point tensor and stores what it returns.
template <class F>
void fill(const Tensor& t, F&& f) {
  KL_CHECK(t.is_contiguous(), "fill: expected a contiguous tensor");
  dispatch_float(t.dtype, [&]<class T>() {
    T* p = t.ptr<T>();
    for (int64_t i = 0; i < t.numel(); ++i) p[i] = static_cast<T>(static_cast<float>(f(i)));
  });
}
inline void fill_normal(const Tensor& t, Random& random, double deviation = 1, double mean = 0) {
  fill(t, [&](int64_t) { return mean + deviation * random.normal(); });
}
inline void fill_nan(const Tensor& t) {
  fill(t, [](int64_t) { return std::numeric_limits<float>::quiet_NaN(); });
}

inline OwnedTensor random_normal(DType dtype, std::initializer_list<int64_t> dims, Random& random,
                                 double deviation = 1, double mean = 0) {
  OwnedTensor t = make_tensor(dtype, dims);
  fill_normal(t.tensor, random, deviation, mean);
  return t;
}

}  // namespace kl::testing
