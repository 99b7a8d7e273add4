// Numbers about repeated measurements.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

namespace kl::app {

inline double now() {  // seconds
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

inline double mean(const std::vector<double>& x) {
  double sum = 0;
  for (const double v : x) sum += v;
  return sum / static_cast<double>(x.size());
}

// Of the population that the samples come from; 0 for a single one.
inline double standard_deviation(const std::vector<double>& x) {
  if (x.size() < 2) return 0;
  const double m = mean(x);
  double sum = 0;
  for (const double v : x) sum += (v - m) * (v - m);
  return std::sqrt(sum / static_cast<double>(x.size() - 1));
}

// The value below which a share `q` of the samples lies.
inline double quantile(std::vector<double> x, double q) {
  std::sort(x.begin(), x.end());
  return x[static_cast<size_t>(std::lround(q * static_cast<double>(x.size() - 1)))];
}

}  // namespace kl::app
