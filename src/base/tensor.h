// Tensor: a typed, shaped view of memory that somebody else owns (a Buffer, an Arena, a mapped file).
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>

#include "base/dtype.h"

namespace kl {

enum class Device : uint8_t { cpu, cuda };

constexpr std::string_view name_of(Device device) { return device == Device::cpu ? "cpu" : "cuda"; }

constexpr int kMaxRank = 4;

struct Tensor {
  void* data = nullptr;
  DType dtype = DType::f32;
  Device device = Device::cpu;
  int rank = 0;
  std::array<int64_t, kMaxRank> shape{};
  std::array<int64_t, kMaxRank> stride{};  // in elements

  Tensor() = default;

  // A contiguous (row-major) view.
  Tensor(void* memory, DType type, std::initializer_list<int64_t> dims, Device where = Device::cpu)
      : data(memory), dtype(type), device(where), rank(static_cast<int>(dims.size())) {
    KL_CHECK(dims.size() <= kMaxRank, "a tensor has at most ", kMaxRank, " dimensions, found ", dims.size());
    int d = 0;
    for (const int64_t n : dims) shape[d++] = n;
    set_contiguous_strides();
  }

  explicit operator bool() const { return data != nullptr; }

  // Sizes; negative indices count from the end.
  int64_t size(int d) const { return shape[d < 0 ? d + rank : d]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int d = 0; d < rank; ++d) n *= shape[d];
    return n;
  }
  int64_t bytes() const { return numel() * size_of(dtype); }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int d = rank - 1; d >= 0; --d) {
      if (shape[d] != 1 && stride[d] != expected) return false;
      expected *= shape[d];
    }
    return true;
  }

  // Typed pointer to the first element. Throws if T is not the element type.
  template <class T>
  T* ptr() const {
    KL_CHECK(dtype == dtype_of<T>, "expected a tensor of ", name_of(dtype_of<T>), ", found ", name_of(dtype));
    return static_cast<T*>(data);
  }
  // Typed pointer to element (i, ...): t.at<float>(row), t.at<float>(token, head).
  template <class T, class... Index>
  T* at(Index... index) const {
    T* p = ptr<T>();
    int d = 0;
    ((p += static_cast<int64_t>(index) * stride[d++]), ...);
    return p;
  }

  // Elements [begin, end) of dimension d.
  Tensor slice(int d, int64_t begin, int64_t end) const {
    KL_CHECK(d < rank && 0 <= begin && begin <= end && end <= shape[d], "slice [", begin, ", ", end,
             ") of dimension ", d, " of a tensor ", shape_string());
    Tensor t = *this;
    t.data = static_cast<char*>(data) + begin * stride[d] * size_of(dtype);
    t.shape[d] = end - begin;
    return t;
  }
  // Element i of the first dimension; the rank falls by one.
  Tensor operator[](int64_t i) const {
    Tensor t = slice(0, i, i + 1);
    --t.rank;
    for (int d = 0; d < t.rank; ++d) t.shape[d] = t.shape[d + 1], t.stride[d] = t.stride[d + 1];
    t.shape[t.rank] = t.stride[t.rank] = 0;
    return t;
  }
  // The same elements under another shape. The tensor must be contiguous; one size may be -1.
  Tensor view(std::initializer_list<int64_t> dims) const {
    KL_CHECK(is_contiguous(), "view of a tensor that is not contiguous: ", shape_string());
    KL_CHECK(dims.size() <= kMaxRank, "a tensor has at most ", kMaxRank, " dimensions, found ", dims.size());
    int64_t known = 1;
    for (const int64_t n : dims) known *= n == -1 ? 1 : n;
    Tensor t = *this;
    t.rank = 0;
    for (const int64_t n : dims) t.shape[t.rank++] = n == -1 ? (known ? numel() / known : 0) : n;
    KL_CHECK(t.numel() == numel(), "view of ", shape_string(), " as ", t.shape_string());
    t.set_contiguous_strides();
    return t;
  }

  std::string shape_string() const {  // "[4, 128]"
    std::string s = "[";
    for (int d = 0; d < rank; ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
    return s + "]";
  }

 private:
  void set_contiguous_strides() {
    int64_t step = 1;
    for (int d = rank - 1; d >= 0; --d) stride[d] = step, step *= shape[d];
  }
};

// Throws unless `t` has this shape (-1 fits any size). `name` opens the message.
inline void check_shape(std::string_view name, const Tensor& t, std::initializer_list<int64_t> expected) {
  bool fits = t.rank == static_cast<int>(expected.size());
  int d = 0;
  for (const int64_t n : expected) fits = fits && (n == -1 || n == t.shape[d]), ++d;
  if (fits) return;
  std::string want = "[";
  for (const int64_t n : expected)
    want += (want.size() > 1 ? ", " : "") + (n == -1 ? "any" : std::to_string(n));
  detail::fail(cat(name, ": expected shape ", want, "], found ", t.shape_string()));
}

// Throws unless `t` has one of these element types.
inline void check_dtype(std::string_view name, const Tensor& t, std::initializer_list<DType> expected) {
  std::string want;
  for (const DType dtype : expected) {
    if (t.dtype == dtype) return;
    want += (want.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  detail::fail(cat(name, ": expected ", want, ", found ", name_of(t.dtype)));
}

// Throws unless `t` lies in the memory of this device.
inline void check_device(std::string_view name, const Tensor& t, Device expected) {
  KL_CHECK(t.device == expected, name, ": expected a tensor on ", name_of(expected), ", found one on ",
           name_of(t.device));
}

// Throws unless the elements of a row (the last dimension) lie side by side. Other dimensions may be strided.
inline void check_rows(std::string_view name, const Tensor& t) {
  KL_CHECK(t.rank > 0 && (t.shape[t.rank - 1] <= 1 || t.stride[t.rank - 1] == 1), name,
           ": expected a last dimension of stride 1, found ", t.rank > 0 ? t.stride[t.rank - 1] : 0);
}

// Throws if `out` begins where `in` does but its elements lie elsewhere: an element-wise operator can work in
// place, but not while it moves what it has yet to read.
inline void check_in_place(std::string_view name, const Tensor& out, const Tensor& in) {
  if (out.data != in.data || out.numel() == 0) return;
  bool same = out.rank == in.rank && out.dtype == in.dtype;
  for (int d = 0; d < out.rank; ++d) same = same && (out.shape[d] == 1 || out.stride[d] == in.stride[d]);
  KL_CHECK(same, name, ": shares its memory with an input of another type or other strides");
}

}  // namespace kl
