// Stands in for CUDA's cuda_runtime.h where kernels are compiled for the CPU (machine.h): its words of the
// language, its built-in functions, and as much of the runtime as this project calls.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "testing/cuda_on_cpu/machine.h"

// ---- The language -----------------------------------------------------------------------------------------

#define __CUDA_ARCH__ 900
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__ thread_local  // a block is a thread

namespace kl::cuda_on_cpu {
// An index of CUDA's; objects, since its runtime has members of these names.
template <Index3 (*kGet)()>
struct BuiltIn {
  struct {
    operator unsigned() const { return kGet().x; }
  } x;
  struct {
    operator unsigned() const { return kGet().y; }
  } y;
  struct {
    operator unsigned() const { return kGet().z; }
  } z;
};
inline Index3 thread_index() { return current->thread; }
}  // namespace kl::cuda_on_cpu
inline constexpr kl::cuda_on_cpu::BuiltIn<kl::cuda_on_cpu::thread_index> threadIdx{};
inline constexpr kl::cuda_on_cpu::BuiltIn<kl::cuda_on_cpu::block_index> blockIdx{};
inline constexpr kl::cuda_on_cpu::BuiltIn<kl::cuda_on_cpu::block_size> blockDim{};
inline constexpr kl::cuda_on_cpu::BuiltIn<kl::cuda_on_cpu::grid_size> gridDim{};

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};

// ---- Functions of one thread ------------------------------------------------------------------------------

inline float __uint_as_float(unsigned x) { return __builtin_bit_cast(float, x); }
inline unsigned __float_as_uint(float x) { return __builtin_bit_cast(unsigned, x); }
inline float __int_as_float(int x) { return __builtin_bit_cast(float, x); }
inline int __float_as_int(float x) { return __builtin_bit_cast(int, x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}
// Of two integers, the type that C++ gives their sum.
template <class A, class B>
constexpr std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>, std::common_type_t<A, B>> min(
    A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return y < x ? y : x;
}
template <class A, class B>
constexpr std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>, std::common_type_t<A, B>> max(
    A a, B b) {
  const std::common_type_t<A, B> x = a, y = b;
  return x < y ? y : x;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }

// One thread of the system runs at a time.
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> x) {
  const T old = *p;
  *p = old + x;
  return old;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> x) {
  const T old = *p;
  *p = x;
  return old;
}
inline void __nanosleep(unsigned) { ::kl::cuda_on_cpu::sleep(); }
inline size_t __cvta_generic_to_shared(const void* p) { return ::kl::cuda_on_cpu::shared_address(p); }

// ---- Functions of a warp or a block -----------------------------------------------------------------------

namespace kl::cuda_on_cpu {

// f(lane, value of a lane) for each lane of the warp: its result.
template <class T>
struct Exchange {
  T value, result;
  int argument;
};
template <class T, class From>
T shuffle(unsigned mask, T x, int argument, From) {
  Exchange<T> e{x, x, argument};
  meet_with(mask, "a shuffle", e, [](Meeting& m) {
    for (int i = 0; i < 32; ++i) {
      if (!(m.arrived >> i & 1)) continue;
      auto& to = *static_cast<Exchange<T>*>(m.brought[i]);
      const int from = From{}(i, to.argument);
      if (from >= 0 && from < 32 && (m.arrived >> from & 1))
        to.result = static_cast<const Exchange<T>*>(m.brought[from])->value;
    }
  });
  return e.result;
}
// All lanes get f(...f(f(lane 0's, lane 1's), lane 2's)...).
template <class T, class F>
T reduce(unsigned mask, T x, F) {
  Exchange<T> e{x, x, 0};
  meet_with(mask, "a reduction", e, [](Meeting& m) {
    bool first = true;
    T sum{};
    for (int i = 0; i < 32; ++i) {
      if (!(m.arrived >> i & 1)) continue;
      const T value = static_cast<Exchange<T>*>(m.brought[i])->value;
      sum = first ? value : F{}(sum, value);
      first = false;
    }
    for (int i = 0; i < 32; ++i)
      if (m.arrived >> i & 1) static_cast<Exchange<T>*>(m.brought[i])->result = sum;
  });
  return e.result;
}

}  // namespace kl::cuda_on_cpu

template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return ::kl::cuda_on_cpu::shuffle(mask, x, lane, [](int, int from) { return from & 31; });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits) {
  return ::kl::cuda_on_cpu::shuffle(mask, x, bits, [](int lane, int b) { return lane ^ b; });
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int by) {
  return ::kl::cuda_on_cpu::shuffle(mask, x, by, [](int lane, int b) { return lane - b; });
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by) {
  return ::kl::cuda_on_cpu::shuffle(mask, x, by, [](int lane, int b) { return lane + b; });
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  const unsigned own = x != 0 ? 1u << ::kl::cuda_on_cpu::current->lane : 0;
  return ::kl::cuda_on_cpu::reduce(mask, own, [](unsigned a, unsigned b) { return a | b; });
}
inline int __any_sync(unsigned mask, int x) { return __ballot_sync(mask, x) != 0; }
inline int __all_sync(unsigned mask, int x) { return __ballot_sync(mask, x == 0) == 0; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
  return ::kl::cuda_on_cpu::reduce(mask, x, [](unsigned a, unsigned b) { return a + b; });
}
inline unsigned __reduce_max_sync(unsigned mask, unsigned x) {
  return ::kl::cuda_on_cpu::reduce(mask, x, [](unsigned a, unsigned b) { return a < b ? b : a; });
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  ::kl::cuda_on_cpu::meet(mask, "__syncwarp", nullptr, nullptr);
}
inline void __syncthreads() { ::kl::cuda_on_cpu::block_barrier(0, 0); }

// ---- The runtime: everything is over when a call returns --------------------------------------------------

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorMemoryAllocation = 2 };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrL2CacheSize
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
enum { cudaEnableDefault = 0 };
using cudaStream_t = void*;

struct cudaLaunchAttributeValue {
  dim3 clusterDim;
  int programmaticStreamSerializationAllowed;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

const char* cudaGetErrorName(cudaError_t);
const char* cudaGetErrorString(cudaError_t);
cudaError_t cudaGetLastError();
cudaError_t cudaGetDeviceCount(int* count);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
cudaError_t cudaDeviceSynchronize();
cudaError_t cudaStreamSynchronize(cudaStream_t);
cudaError_t cudaMalloc(void** p, size_t bytes);
cudaError_t cudaFree(void* p);
cudaError_t cudaMemset(void* p, int byte, size_t bytes);
cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t);
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t);
cudaError_t cudaFuncGetName(const char** name, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned version, int flags,
                                             cudaDriverEntryPointQueryResult* found);

// Throws kl::Error, unlike the real one, if the kernel does not come to an end.
template <class... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(Params...),
                               std::type_identity_t<Params>... args) {
  struct Call final : ::kl::cuda_on_cpu::Launch {
    void (*kernel)(Params...);
    std::tuple<std::remove_const_t<Params>...> args;
    Call(void (*k)(Params...), Params... a) : kernel(k), args(a...) {}
    void thread() override { std::apply(kernel, args); }
  } call(kernel, args...);
  call.grid = {c->gridDim.x, c->gridDim.y, c->gridDim.z};
  call.block = {c->blockDim.x, c->blockDim.y, c->blockDim.z};
  call.shared_bytes = c->dynamicSmemBytes;
  for (unsigned i = 0; i < c->numAttrs; ++i)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) call.cluster = c->attrs[i].val.clusterDim.x;
  ::kl::cuda_on_cpu::run(call);
  return cudaSuccess;
}
