#include "simd/gemm.h"

#include <algorithm>

namespace kl {

int64_t gemm_task_columns(int64_t m, int64_t k) {
  constexpr int64_t kWholeLines = 64;  // of a row of C, and several tiles
  const int64_t wanted = kGemmTask / std::max<int64_t>(1, m * k);
  return std::max(kWholeLines, wanted / kWholeLines * kWholeLines);
}

}  // namespace kl
