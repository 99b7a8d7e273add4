// The matrix product of rounded activations: bf16 times bf16, some 2.5 times as fast as gemm_nt with
// many rows where the processor multiplies bf16 itself. One thread, f32 sums, B as it lies in a checkpoint.
//
//   C[i, j] = sum_l A[i, l] · B[j, l]        A [m, k] packed, B [n, k]
//
// As with gemm_nt, an element's bits depend on its row of A, its row of B and k alone. Products are exact and
// sums rounded to f32; numbers below 2^-126 count as zero.
//
// A is packed in groups of bf16_group() rows, kBf16Step elements of k at a time; how, is the matter of the
// back-end: dot products (gemm_bf16_cpu.cc) or AMX tiles (gemm_tiles.h). What fills up the last ones is zero.
// A packed matrix is for the instruction set that was active when it was packed.
#pragma once

#include <cstdint>

#include "base/dtype.h"

namespace kl {

constexpr int64_t kBf16Rows = 4, kBf16Step = 32;  // of the dot products: a group's rows; elements of a step

int64_t bf16_group();  // rows that are packed together: 4 or 16
// Elements from row to row of a packed matrix: of the back-end that is active, of the dot products.
int64_t packed_bf16_columns(int64_t k);
constexpr int64_t packed_dot_columns(int64_t k) { return (k + kBf16Step - 1) / kBf16Step * kBf16Step; }
inline int64_t packed_bf16_rows(int64_t m) { return (m + bf16_group() - 1) / bf16_group() * bf16_group(); }
// Elements of a packed matrix; a matrix that begins at row i, a multiple of bf16_group(), begins where a
// packed one of i rows ends.
inline int64_t packed_bf16_size(int64_t m, int64_t k) { return packed_bf16_rows(m) * packed_bf16_columns(k); }

struct GemmBf16 {
  const bf16* a;  // packed
  const bf16* b;
  int64_t ldb;  // elements from row to row
  float* c;
  int64_t ldc;
  int64_t m, n, k;
  bool accumulate = false;  // C += instead of C =
};

bool has_gemm_bf16();  // with the active instruction set; the functions below are for where it is true

void pack_bf16(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed);  // rounds to nearest even
void gemm_nt_bf16(const GemmBf16&);

// Where operators that share a product among threads cut it: a panel of A stays in a core's second-level
// cache, and what a task reads of B is worth its start.
constexpr int64_t kGemmBf16TaskColumns = 192;  // of many rows
constexpr int64_t kGemmBf16TaskRows = 128;
int64_t gemm_bf16_most_rows();  // that a task is better for: kGemmBf16TaskRows, or with AMX some times that
int64_t gemm_bf16_task_columns(int64_t m, int64_t k);

}  // namespace kl
