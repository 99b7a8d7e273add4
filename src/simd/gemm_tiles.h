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
// Groups lie an odd multiple of 4 KiB apart. Blocks of k of many groups are used together: at the distances
// that k has by itself, mostly multiples of powers of two, they would compete for the same places of the
// cache.
constexpr int64_t packed_tile_columns(int64_t k) {
  constexpr int64_t kPage = 4 * kBf16Step;
  return ((k + kPage - 1) / kPage | 1) * kPage;
}
constexpr int64_t kTileTaskRows = 512;  // that one panel of B is copied for

KL_DECLARE_PER_ISA(void pack_tiles(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed);
                   void gemm_nt_tiles(const GemmBf16&);)

}  // namespace kl
