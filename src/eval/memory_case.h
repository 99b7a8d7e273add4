// Inputs for the operators with a matrix state: random rows of f64, f32 or bf16, and what every one of their
// argument structs has (q, k, v, out, cu_seqlens, state, slot), connected by name.
#pragma once

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "base/buffer.h"

namespace kl::eval {

// The same numbers from a seed everywhere, which std::normal_distribution does not promise.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double uniform(double low = 0, double high = 1) {
    return low + (high - low) * static_cast<double>(engine_() >> 11) * 0x1p-53;
  }
  double normal() {
    const double u = 1 - uniform(), v = uniform();
    return std::sqrt(-2 * std::log(u)) * std::cos(2 * M_PI * v);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937_64 engine_;
};

using Values = std::vector<double>;

inline Values normal_values(int64_t n, Random& random) {
  Values values(static_cast<size_t>(n));
  for (double& x : values) x = random.normal();
  return values;
}
// Every `width` of them scaled to length 1.
inline Values unit_rows(Values values, int64_t width) {
  for (auto row = values.begin(); row != values.end(); row += width) {
    double squares = 0;
    for (int64_t i = 0; i < width; ++i) squares += row[i] * row[i];
    for (int64_t i = 0; i < width; ++i) row[i] /= std::sqrt(squares);
  }
  return values;
}

inline OwnedTensor to_tensor(DType dtype, std::initializer_list<int64_t> dims, const Values& values) {
  OwnedTensor t = make_tensor(dtype, dims);
  dispatch_float(dtype, [&]<class T>() {
    for (size_t i = 0; i < values.size(); ++i) {
      if constexpr (sizeof(T) == 2)
        t.tensor.ptr<T>()[i] = T(static_cast<float>(values[i]));
      else
        t.tensor.ptr<T>()[i] = static_cast<T>(values[i]);
    }
  });
  return t;
}
inline Values to_values(const Tensor& t) {  // contiguous
  Values values(static_cast<size_t>(t.numel()));
  dispatch_float(t.dtype, [&]<class T>() {
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<double>(t.ptr<T>()[i]);
  });
  return values;
}

inline double squared_distance(const Values& x, const Values& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += (x[i] - y[i]) * (x[i] - y[i]);
  return sum;
}
// Root mean square of the difference over that of y; NaN if there is one in either.
inline double relative_error(const Values& x, const Values& y) {
  const double error = squared_distance(x, y), norm = squared_distance(y, Values(y.size()));
  return error == 0 ? 0 : std::sqrt(error / norm);
}

// N packed sequences, the state of sequence n in slot n.
struct MemoryCase {
  std::vector<int64_t> lengths;
  int64_t H, K, V;
  Values q, k, v, state;  // [T, H, K] twice, [T, H, V], [N, H, K, V]

  int64_t tokens() const {
    int64_t T = 0;
    for (const int64_t length : lengths) T += length;
    return T;
  }
  int64_t sequences() const { return static_cast<int64_t>(lengths.size()); }
};

// What a call left behind.
struct MemoryResult {
  Values out, state;
};
inline Values joined(const MemoryResult& r) {
  Values all = r.out;
  all.insert(all.end(), r.state.begin(), r.state.end());
  return all;
}

struct MemoryTypes {
  DType inputs, state, out;
};
constexpr MemoryTypes kAllF64{DType::f64, DType::f64, DType::f64};
constexpr MemoryTypes kAllF32{DType::f32, DType::f32, DType::f32};

// Calls `work` with an Args whose common fields are connected to tensors of these types.
template <class Args, class F>
MemoryResult run(const MemoryCase& c, const MemoryTypes& types, F&& work) {
  const int64_t T = c.tokens(), N = c.sequences();
  std::vector<int32_t> cu(1, 0), slot;
  for (int64_t n = 0; n < N; ++n) {
    cu.push_back(cu.back() + static_cast<int32_t>(c.lengths[static_cast<size_t>(n)]));
    slot.push_back(static_cast<int32_t>(n));
  }
  const OwnedTensor q = to_tensor(types.inputs, {T, c.H, c.K}, c.q),
                    k = to_tensor(types.inputs, {T, c.H, c.K}, c.k),
                    v = to_tensor(types.inputs, {T, c.H, c.V}, c.v),
                    state = to_tensor(types.state, {N, c.H, c.K, c.V}, c.state),
                    out = make_tensor(types.out, {T, c.H, c.V});
  Args args;
  args.q = q.tensor, args.k = k.tensor, args.v = v.tensor, args.out = out.tensor, args.state = state.tensor;
  args.cu_seqlens = Tensor(cu.data(), DType::i32, {N + 1});
  args.slot = Tensor(slot.data(), DType::i32, {N});
  work(args);
  return {to_values(out.tensor), to_values(state.tensor)};
}

}  // namespace kl::eval
