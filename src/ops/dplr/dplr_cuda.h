// The CUDA back-end of DPLR, for the switch of dplr.cc. Arguments have passed dplr_check(), all tensors are
// device memory, work is queued on ctx.stream and no call waits for the device.
#pragma once

#include "ops/dplr/dplr.h"

namespace kl::cuda {

// Chunkwise with mma.sync: sm_80 and up, any lengths, any K and V up to 256; no workspace.
void dplr_chunks(const Ctx&, const DplrArgs&);

}  // namespace kl::cuda
