// launch(): the only way this project starts a kernel. It checks the launch and says which kernel, with which
// configuration, was refused. Also here: the check of any other runtime call, and what the current device is.
// Include from .cu files, or from .cc files under KL_CUDA.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <utility>

#include "base/check.h"

// KL_CUDA_CHECK(cudaMemcpyAsync(...), "copying the slot table"): throws kl::Error with CUDA's own words.
#define KL_CUDA_CHECK(call, ...)                                                          \
  do {                                                                                    \
    const cudaError_t kl_status_ = (call);                                                \
    if (kl_status_ != cudaSuccess) [[unlikely]]                                           \
      ::kl::detail::fail(::kl::cat(__VA_ARGS__, ": ", cudaGetErrorName(kl_status_), " (", \
                                   cudaGetErrorString(kl_status_), ")"));                 \
  } while (false)

namespace kl::cuda {

// What kernels are chosen and sized by. Read once per device and kept.
struct DeviceInfo {
  int arch = 0;  // compute capability, 90 for 9.0
  int multiprocessors = 0;
  size_t max_smem = 0;  // dynamic shared memory one block can ask for
  size_t l2_bytes = 0;
};

inline DeviceInfo query_device(int device) {
  const auto attribute = [&](cudaDeviceAttr a) {
    int value = 0;
    KL_CUDA_CHECK(cudaDeviceGetAttribute(&value, a, device), "reading attribute ", static_cast<int>(a),
                  " of CUDA device ", device);
    return value;
  };
  DeviceInfo info;
  info.arch =
      10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
  info.multiprocessors = attribute(cudaDevAttrMultiProcessorCount);
  info.max_smem = static_cast<size_t>(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  info.l2_bytes = static_cast<size_t>(attribute(cudaDevAttrL2CacheSize));
  return info;
}

// The calling thread's current device.
inline const DeviceInfo& current_device() {
  static thread_local int known = -1;
  static thread_local DeviceInfo info;
  int device = 0;
  KL_CUDA_CHECK(cudaGetDevice(&device), "finding the current CUDA device");
  if (device != known) info = query_device(device), known = device;
  return info;
}

struct LaunchConfig {
  dim3 grid;
  dim3 block;
  size_t smem = 0;  // dynamic shared memory, bytes
  cudaStream_t stream = nullptr;
  unsigned cluster = 1;  // blocks of a cluster along x (sm_90 and up)
  // The kernel may be brought in while its predecessor in the stream still runs; it must wait for that
  // (follow_previous_kernel()) before it touches memory. Without effect below sm_90.
  bool overlap_previous = false;
};

// Blocks may use this much dynamic shared memory without asking.
inline constexpr size_t kDefaultSmem = 48 * 1024;

namespace detail {
[[noreturn]] inline void launch_failed(const void* kernel, const LaunchConfig& c, const char* step,
                                       cudaError_t status) {
  const char* name = nullptr;
  if (cudaFuncGetName(&name, kernel) != cudaSuccess || name == nullptr) name = "unnamed kernel";
  cudaGetLastError();  // the error is reported here; do not leave it for the next call to find
  ::kl::detail::fail(cat(step, " of ", name, " <<<grid ", c.grid.x, " x ", c.grid.y, " x ", c.grid.z,
                         ", block ", c.block.x, " x ", c.block.y, " x ", c.block.z, ", ", c.smem,
                         " bytes of shared memory, cluster ", c.cluster, ">>>: ", cudaGetErrorName(status),
                         " (", cudaGetErrorString(status), ")"));
}
}  // namespace detail

// launch(kernel, {grid, block, smem, stream}, args...): arguments are converted to the kernel's own parameter
// types. An empty grid launches nothing.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), const LaunchConfig& c, Args&&... args) {
  static_assert(sizeof...(Params) == sizeof...(Args), "the kernel takes another number of arguments");
  if (c.grid.x == 0 || c.grid.y == 0 || c.grid.z == 0) return;
  const void* address = reinterpret_cast<const void*>(kernel);
  if (c.smem > kDefaultSmem) {
    const cudaError_t status =
        cudaFuncSetAttribute(address, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(c.smem));
    if (status != cudaSuccess) detail::launch_failed(address, c, "shared memory", status);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = c.grid;
  config.blockDim = c.block;
  config.dynamicSmemBytes = c.smem;
  config.stream = c.stream;
  cudaLaunchAttribute attributes[2];
  if (c.cluster > 1) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim = {c.cluster, 1, 1};
  }
  if (c.overlap_previous && current_device().arch >= 90) {
    cudaLaunchAttribute& a = attributes[config.numAttrs++];
    a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    a.val.programmaticStreamSerializationAllowed = 1;
  }
  config.attrs = attributes;
  const cudaError_t status =
      cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
  if (status != cudaSuccess) detail::launch_failed(address, c, "launch", status);
}

// True if there is a device to run on; a machine without a driver has none.
inline bool device_present() {
  int count = 0;
  const bool present = cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
  cudaGetLastError();
  return present;
}

}  // namespace kl::cuda
