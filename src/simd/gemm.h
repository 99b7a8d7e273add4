// The matrix products of all CPU operators: one thread, f32 sums, the second factor as it lies in a
// checkpoint or a cache.
//
//   gemm_nt   C[i, j] = sum_l A[i, l] · B[j, l]     B [n, k]: a linear layer's weight, keys
//   gemm_nn   C[i, j] = sum_l A[i, l] · B[l, j]     B [k, n]: values, a weight that is applied transposed
//
// The order in which an element's terms are added depends on k alone: not on m, n, the strides or the
// element's place, so that a row of C has the same bits whatever it is computed together with.
#pragma once

#include <cstdint>

#include "base/dtype.h"
#include "simd/isa.h"

namespace kl {

struct Gemm {
  const float* a;
  int64_t lda;    // elements from row to row
  const void* b;  // f32|bf16|f16
  DType b_dtype;
  int64_t ldb;
  float* c;
  int64_t ldc;
  int64_t m, n, k;
  bool accumulate = false;  // C += instead of C =
};

// Products of so many rows and more copy blocks of kGemmPanelBlock x 1024 elements of A into an order of
// their own, on the stack (1 MiB), where the instruction set gains by that (AVX2).
constexpr int64_t kGemmPanelRows = 200, kGemmPanelBlock = 258;

// For operators that share a product among threads: multiply-adds that are worth a task (some 5 us, or 20 us
// where B comes from memory), how many of m rows of A a task takes, and how many columns of C a task of m
// rows needs to be worth its start and the copying.
constexpr int64_t kGemmTask = 1 << 18;
int64_t gemm_task_rows(int64_t m);
int64_t gemm_task_columns(int64_t m, int64_t k);

KL_DECLARE_UP_TO_AVX512(void gemm_nt(const Gemm&); void gemm_nn(const Gemm&);)

}  // namespace kl
