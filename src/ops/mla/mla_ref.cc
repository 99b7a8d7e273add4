// The definition of MLA as written in mla.h, in f64: every key and value expanded, a softmax over all visible
// keys. Not checked: the doors in mla.cc are.
#include <algorithm>
#include <cmath>
#include <vector>

#include "ops/mla/mla.h"

namespace kl {
namespace {

using Vector = std::vector<double>;

double dot(const Vector& x, const Vector& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

Vector to_vector(const Tensor& t, int64_t n, auto... index) {
  Vector v(n);
  dispatch_float(t.dtype, [&]<class T>() { std::copy_n(t.at<T>(index...), n, v.begin()); });
  return v;
}

// [c | p] of a sequence's token.
Vector cache_row(const MlaCache& cache, int64_t sequence, int64_t position) {
  const int64_t page_size = cache.rows.size(1);
  const int32_t page = *cache.page_table.at<int32_t>(sequence, position / page_size);
  return to_vector(cache.rows, cache.rows.size(2), page, position % page_size);
}

// Rows [row, row + n) of w times c.
Vector times(const Tensor& w, int64_t row, int64_t n, const Vector& c) {
  Vector result(n);
  for (int64_t i = 0; i < n; ++i) result[i] = dot(to_vector(w, w.size(1), row + i), c);
  return result;
}

Vector softmax(Vector score) {
  const double top = *std::max_element(score.begin(), score.end());
  double sum = 0;
  for (double& s : score) sum += s = std::exp(s - top);
  for (double& s : score) s /= sum;
  return score;
}

}  // namespace

void mla_ref(const MlaArgs& a) {
  const int64_t A = a.q.size(1), V = a.out.size(2), R = a.kv_b_proj.size(1);
  const int64_t Nk = a.kv_b_proj.size(0) / A - V, width = a.q.size(2);
  const int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  for (int64_t n = 0; n + 1 < a.cu_seqlens.size(0); ++n) {
    const int64_t context = *a.cache.context.at<int32_t>(n), length = cu[n + 1] - cu[n];
    for (int64_t head = 0; head < A && length > 0; ++head) {
      std::vector<Vector> keys, values;
      for (int64_t j = 0; j < context + length; ++j) {
        const Vector row = cache_row(a.cache, n, j), c(row.begin(), row.begin() + R);
        keys.push_back(times(a.kv_b_proj, head * (Nk + V), Nk, c));
        keys.back().insert(keys.back().end(), row.begin() + R, row.end());
        values.push_back(times(a.kv_b_proj, head * (Nk + V) + Nk, V, c));
      }
      for (int64_t t = 0; t < length; ++t) {
        const Vector q = to_vector(a.q, width, cu[n] + t, head);
        Vector score;
        for (int64_t j = 0; j <= context + t; ++j)
          score.push_back(dot(q, keys[j]) / std::sqrt(static_cast<double>(width)));
        const Vector weight = softmax(score);
        for (int64_t v = 0; v < V; ++v) {
          double sum = 0;
          for (size_t j = 0; j < weight.size(); ++j) sum += weight[j] * values[j][v];
          a.out.at<float>(cu[n] + t, head)[v] = static_cast<float>(sum);
        }
      }
    }
  }
}

}  // namespace kl
