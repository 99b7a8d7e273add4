// Elements in memory <-> floats in registers, one or four at a time, for f32 and bf16. Arithmetic is always
// f32.
#pragma once

#include "base/tensor.h"
#include "cuda/ptx.cuh"

namespace kl::cuda {

KL_DEVICE float to_float(float x) { return x; }
KL_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }

template <class T>
KL_DEVICE T from_float(float x);
template <>
KL_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KL_DEVICE bf16 from_float<bf16>(float x) {
  bf16 y;
  y.bits = static_cast<uint16_t>(pack_bf16(x, 0.f));
  return y;
}

KL_DEVICE float4 unpack_bf16x4(uint2 v) {
  return {__uint_as_float(v.x << 16), __uint_as_float(v.x & 0xffff0000u), __uint_as_float(v.y << 16),
          __uint_as_float(v.y & 0xffff0000u)};
}
KL_DEVICE uint2 pack_bf16x4(float4 v) { return {pack_bf16(v.x, v.y), pack_bf16(v.z, v.w)}; }
KL_DEVICE float4 as_float4(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}
KL_DEVICE uint4 as_uint4(float4 v) {
  return {__float_as_uint(v.x), __float_as_uint(v.y), __float_as_uint(v.z), __float_as_uint(v.w)};
}

// Two or four neighbours, aligned to their joint size.
KL_DEVICE float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
KL_DEVICE float4 load4(const bf16* p) { return unpack_bf16x4(*reinterpret_cast<const uint2*>(p)); }
KL_DEVICE float2 load2(const float* p) { return *reinterpret_cast<const float2*>(p); }
KL_DEVICE float2 load2(const bf16* p) {
  const uint32_t v = *reinterpret_cast<const uint32_t*>(p);
  return {__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u)};
}
KL_DEVICE void store2(float* p, float2 v) { *reinterpret_cast<float2*>(p) = v; }
KL_DEVICE void store2(bf16* p, float2 v) { *reinterpret_cast<uint32_t*>(p) = pack_bf16(v.x, v.y); }
KL_DEVICE void store4(float* p, float4 v) { *reinterpret_cast<float4*>(p) = v; }
KL_DEVICE void store4(bf16* p, float4 v) { *reinterpret_cast<uint2*>(p) = pack_bf16x4(v); }

// Four channels from `first` (a multiple of 4) on.
KL_DEVICE void load_channels(float (&x)[4], const float* channels, int first) {
  const float4 four = load4(channels + first);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}

// True if every row of `t` can be moved four elements at a time; its last dimension is contiguous.
inline bool in_fours(const Tensor& t) {
  for (int d = 0; d + 1 < t.rank; ++d)
    if (t.stride[d] % 4 != 0) return false;
  return t.size(-1) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(t.data) % (4 * static_cast<size_t>(size_of(t.dtype))) == 0;
}

// f<T>() for the element types that CUDA kernels take: dispatch_operand(t.dtype, [&]<class T>() { ... }).
template <class F>
decltype(auto) dispatch_operand(DType dtype, F&& f) {
  KL_CHECK(dtype == DType::f32 || dtype == DType::bf16, "expected a tensor of F32 or BF16, found ",
           name_of(dtype));
  return dtype == DType::bf16 ? f.template operator()<bf16>() : f.template operator()<float>();
}

}  // namespace kl::cuda
