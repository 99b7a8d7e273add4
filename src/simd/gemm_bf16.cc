#include "simd/gemm_bf16.h"

#include <algorithm>

#include "base/check.h"
#include "simd/gemm_tiles.h"
#include "simd/isa.h"

namespace kl {

#if defined(__x86_64__)
namespace avx512_bf16 {  // gemm_bf16_cpu.cc; the other instruction sets have no product of bf16
void pack_bf16(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed);
void gemm_nt_bf16(const GemmBf16&);
}  // namespace avx512_bf16

bool has_gemm_bf16() { return active_isa() >= Isa::avx512_bf16; }
int64_t bf16_group() { return active_isa() == Isa::amx ? kTileGroup : kBf16Rows; }

void pack_bf16(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed) {
  KL_CHECK(has_gemm_bf16(), "pack_bf16: expected avx512_bf16, found ", name_of(active_isa()));
  if (active_isa() == Isa::amx) return avx512_bf16::pack_tiles(x, ldx, m, k, packed);
  avx512_bf16::pack_bf16(x, ldx, m, k, packed);
}

void gemm_nt_bf16(const GemmBf16& g) {
  KL_CHECK(has_gemm_bf16(), "gemm_nt_bf16: expected avx512_bf16, found ", name_of(active_isa()));
  active_isa() == Isa::amx ? avx512_bf16::gemm_nt_tiles(g) : avx512_bf16::gemm_nt_bf16(g);
}
#else
bool has_gemm_bf16() { return false; }
int64_t bf16_group() { return kBf16Rows; }
void pack_bf16(const float*, int64_t, int64_t, int64_t, bf16*) {
  KL_CHECK(false, "pack_bf16: this processor has no product of bf16");
}
void gemm_nt_bf16(const GemmBf16&) { KL_CHECK(false, "gemm_nt_bf16: this processor has no product of bf16"); }
#endif

int64_t packed_bf16_columns(int64_t k) {
  return bf16_group() == kTileGroup ? packed_tile_columns(k) : packed_dot_columns(k);
}

int64_t gemm_bf16_most_rows() { return bf16_group() == kTileGroup ? kTileTaskRows : kGemmBf16TaskRows; }

constexpr int64_t kStreamedBytes = 3 << 17;  // of B, some 10 us of reading

int64_t gemm_bf16_task_columns(int64_t m, int64_t k) {
  // Many rows: a panel of A, loaded anew for every block of k, is used for enough columns to be worth that.
  if (m > 4 * kBf16Rows) return kGemmBf16TaskColumns;
  constexpr int64_t kWholeTiles = 48;  // of six rows of B, and whole lines of a row of C
  const int64_t wanted = kStreamedBytes / std::max<int64_t>(1, 2 * k);
  return std::max(kWholeTiles, wanted / kWholeTiles * kWholeTiles);
}

}  // namespace kl
