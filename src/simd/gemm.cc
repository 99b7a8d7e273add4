#include "simd/gemm.h"

#include <algorithm>

namespace kl {
namespace {

bool in_panels(int64_t m) { return active_isa() == Isa::avx2 && m >= kGemmPanelRows; }

}  // namespace

int64_t gemm_task_rows(int64_t m) {
  // With 1024 columns 240 KiB of A, which stay in a core's second-level cache beside the weights. A Zen 3
  // core (512 KiB) does 73 GFLOP/s with 60 rows, 67 with 96 and 73 with 48, which read the weights more
  // often.
  constexpr int64_t kRows = 60;
  return std::min(m, in_panels(m) ? kGemmPanelBlock : kRows);
}

int64_t gemm_task_columns(int64_t m, int64_t k) {
  if (in_panels(m)) return 512;
  constexpr int64_t kWholeLines = 64;  // of a row of C, and several tiles
  const int64_t wanted = kGemmTask / std::max<int64_t>(1, m * k);
  return std::max(kWholeLines, wanted / kWholeLines * kWholeLines);
}

}  // namespace kl
