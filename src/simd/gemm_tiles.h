// The back-end of gemm_bf16.h for processors with AMX: the same product, A packed in another way. Groups of
// kTileGroup rows; of each group 32 elements at a time, as pairs: the first pair of every row, then the
// second pair of every row, and so on. Rows and elements that fill up the last ones are zero.
//
// avx512_bf16:: needs Isa::amx; the others are plain code with the same result up to the order of f32 sums,
// for tests.
#pragma once

#include "simd/gemm_bf16.h"
#include "simd/isa.h"

namespace kl {

constexpr int64_t kTileGroup = 16;

KL_DECLARE_PER_ISA(void pack_tiles(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed);
                   void gemm_nt_tiles(const GemmBf16&);)

}  // namespace kl
