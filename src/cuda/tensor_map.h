// Tensor maps: what the copy engine of sm_90 and up needs to know of a tensor in memory to move boxes of it.
// Made on the host; a kernel takes one as a `const __grid_constant__ CUtensorMap` parameter, or inside a
// struct that is one.
#pragma once

#include <cuda.h>

#include "base/tensor.h"
#include "cuda/launch.h"

namespace kl::cuda {

// Rows [token, head, channel] of a bf16 or f32 tensor in boxes of `tokens` x 1 x 128 bytes, swizzled in
// shared memory by 128 bytes: the 16-byte piece p of a box's row r stands at piece p ^ (r % 8). Rows start at
// multiples of 16 bytes.
inline CUtensorMap row_boxes(const Tensor& t, unsigned tokens) {
  static const auto encode = [] {
    void* entry = nullptr;
    cudaDriverEntryPointQueryResult found{};
    KL_CUDA_CHECK(
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found),
        "finding cuTensorMapEncodeTiled");
    KL_CHECK(found == cudaDriverEntryPointSuccess, "the CUDA driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry);
  }();
  const auto size = [&](int d) { return static_cast<cuuint64_t>(t.size(d)); };
  const cuuint64_t element = static_cast<cuuint64_t>(size_of(t.dtype));
  // No box of an empty tensor is ever asked for; a map of one needs a size all the same.
  const cuuint64_t sizes[3] = {size(2), size(1), t.size(0) > 0 ? size(0) : 1};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(t.stride[1]) * element,
                                 static_cast<cuuint64_t>(t.stride[0]) * element};
  const cuuint32_t box[3] = {static_cast<cuuint32_t>(128 / element), 1, tokens}, steps[3] = {1, 1, 1};
  CUtensorMap map;
  const CUresult status = encode(
      &map, t.dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 3,
      t.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  KL_CHECK(status == CUDA_SUCCESS, "a tensor map of ", t.shape_string(), " with strides of ", t.stride[0],
           " and ", t.stride[1], " elements was refused with CUDA error ", static_cast<int>(status));
  return map;
}

}  // namespace kl::cuda
