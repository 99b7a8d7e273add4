// What the ways of computing gemm_nt share: the order in which an element's terms are added. Only for
// x_cpu.cc files, as vec.h.
//
// k is taken in blocks of kDepth. In a block the terms l, l + kLanes, l + 2 kLanes, .. make one of kLanes
// sums, added one after the other to 0; those sums are added as a tree, half a vector apart first (sum() of
// vec.h); the blocks' totals one after the other.
#pragma once

#include "simd/gemm.h"
#include "simd/vec.h"

// Where outer products pay: with 16 registers of 8 lanes and an FMA.
#if defined(__AVX2__) && !defined(__AVX512F__)
#define KL_GEMM_PANELS
#endif

namespace kl::KL_ISA {

// In a product of few rows a tile's rows of A (24 KiB) stay in the first-level cache while rows of B pass.
constexpr int64_t kDepth = 1024;

#if defined(KL_GEMM_PANELS)
void gemm_nt_panels(const Gemm&);  // gemm_panels_cpu.cc
#endif

}  // namespace kl::KL_ISA
