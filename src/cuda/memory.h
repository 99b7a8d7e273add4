// DeviceBuffer: an owner of device memory. DeviceTensor: one that also has a shape. Tests and benchmarks move
// their data with these; operators get their memory from the caller.
// Include from .cu files, or from .cc files under KL_CUDA.
#pragma once

#include <cstring>
#include <initializer_list>
#include <vector>

#include "base/buffer.h"
#include "base/tensor.h"
#include "cuda/launch.h"

namespace kl::cuda {

// Movable, not copyable. Memory is not initialised.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes) : size_(bytes) {
    if (bytes > 0) KL_CUDA_CHECK(cudaMalloc(&data_, bytes), "allocating ", bytes, " bytes of device memory");
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  void* data_ = nullptr;
  size_t size_ = 0;
};

struct DeviceTensor {
  DeviceBuffer buffer;
  Tensor tensor;
};

// A contiguous device tensor with one byte value everywhere; 0xff makes every float a NaN.
inline DeviceTensor device_tensor(DType dtype, std::initializer_list<int64_t> dims, int byte = 0xff) {
  Tensor shape(nullptr, dtype, dims, Device::cuda);
  DeviceTensor t{DeviceBuffer(static_cast<size_t>(shape.bytes())), shape};
  t.tensor.data = t.buffer.data();
  if (t.buffer.size() > 0)
    KL_CUDA_CHECK(cudaMemset(t.tensor.data, byte, t.buffer.size()), "filling a tensor");
  return t;
}

// Copies of contiguous tensors, complete when they return.
inline DeviceTensor to_device(const Tensor& host) {
  KL_CHECK(host.is_contiguous(), "to_device: expected a contiguous tensor, found ", host.shape_string());
  DeviceTensor t{DeviceBuffer(static_cast<size_t>(host.bytes())), host};
  t.tensor.data = t.buffer.data();
  t.tensor.device = Device::cuda;
  if (t.buffer.size() > 0)
    KL_CUDA_CHECK(cudaMemcpy(t.tensor.data, host.data, t.buffer.size(), cudaMemcpyHostToDevice),
                  "copying a tensor to the device");
  return t;
}
inline OwnedTensor to_host(const Tensor& device) {
  KL_CHECK(device.is_contiguous(), "to_host: expected a contiguous tensor, found ", device.shape_string());
  OwnedTensor t{Buffer::host(static_cast<size_t>(device.bytes())), device};
  t.tensor.data = t.buffer.data();
  t.tensor.device = Device::cpu;
  if (device.bytes() > 0)
    KL_CUDA_CHECK(
        cudaMemcpy(t.tensor.data, device.data, static_cast<size_t>(device.bytes()), cudaMemcpyDeviceToHost),
        "copying a tensor to the host");
  return t;
}

}  // namespace kl::cuda
