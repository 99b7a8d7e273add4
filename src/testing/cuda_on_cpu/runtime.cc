// CUDA's runtime as far as cuda_runtime.h of this folder declares it: device memory is memory.
#include "testing/cuda_on_cpu/cuda_runtime.h"

#include <map>

#include "base/check.h"
#include "testing/cuda_on_cpu/cuda.h"

namespace {

// Around each allocation stand bytes that stay as they are.
constexpr size_t kGuardBytes = 256;
constexpr unsigned char kGuard = 0xa5;
std::map<unsigned char*, size_t>& allocations() {
  static std::map<unsigned char*, size_t> all;
  return all;
}

}  // namespace

namespace kl::cuda_on_cpu {

std::string device_memory_damage() {
  for (const auto& [data, bytes] : allocations())
    for (size_t i = 1; i <= kGuardBytes; ++i) {
      if (*(data - i) != kGuard) return cat(i, " bytes before an allocation of ", bytes, " was written");
      if (data[bytes + i - 1] != kGuard)
        return cat("byte ", i - 1, " behind an allocation of ", bytes, " bytes was written");
    }
  return "";
}

}  // namespace kl::cuda_on_cpu

const char* cudaGetErrorName(cudaError_t e) { return e == cudaSuccess ? "cudaSuccess" : "cudaError"; }
const char* cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "refused by cuda_on_cpu";
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMultiProcessorCount: *value = kl::testing::cuda_on_cpu_multiprocessors(); break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = 232448; break;
    case cudaDevAttrL2CacheSize: *value = 50 << 20; break;
  }
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaMalloc(void** p, size_t bytes) {
  const size_t whole = kGuardBytes + (bytes + 255) / 256 * 256 + kGuardBytes;
  auto* const memory = static_cast<unsigned char*>(std::aligned_alloc(256, whole));
  if (memory == nullptr) return cudaErrorMemoryAllocation;
  std::memset(memory, kGuard, whole);
  std::memset(memory + kGuardBytes, 0xff, bytes);  // NaN
  allocations()[memory + kGuardBytes] = bytes;
  *p = memory + kGuardBytes;
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  auto* const data = static_cast<unsigned char*>(p);
  if (allocations().erase(data) == 0) return cudaErrorInvalidValue;
  std::free(data - kGuardBytes);
  return cudaSuccess;
}
cudaError_t cudaMemset(void* p, int byte, size_t bytes) { return std::memset(p, byte, bytes), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* p, int byte, size_t bytes, cudaStream_t) {
  return cudaMemset(p, byte, bytes);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memmove(to, from, bytes), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
cudaError_t cudaFuncGetName(const char** name, const void*) { return *name = "a kernel", cudaSuccess; }
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int value) {
  return value <= 232448 ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** entry, unsigned, int,
                                             cudaDriverEntryPointQueryResult* found) {
  if (std::strcmp(name, "cuTensorMapEncodeTiled") != 0) return cudaErrorInvalidValue;
  *entry = reinterpret_cast<void*>(&cuTensorMapEncodeTiled), *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Refuses what the driver refuses, of what this project asks for.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* steps, CUtensorMapInterleave, CUtensorMapSwizzle,
                                CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  if (rank != 3 || reinterpret_cast<uintptr_t>(data) % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
  *map = {};
  map->data = static_cast<char*>(data);
  map->element = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 4;
  for (int d = 0; d < 3; ++d) {
    map->size[d] = sizes[d], map->stride[d] = d == 0 ? map->element : strides[d - 1], map->box[d] = box[d];
    const bool fits =
        sizes[d] > 0 && sizes[d] <= (uint64_t{1} << 32) && box[d] > 0 && box[d] <= 256 && steps[d] == 1;
    if (!fits || (d > 0 && map->stride[d] % 16 != 0)) return CUDA_ERROR_INVALID_VALUE;
  }
  if (box[0] * map->element > 128) return CUDA_ERROR_INVALID_VALUE;
  return CUDA_SUCCESS;
}
