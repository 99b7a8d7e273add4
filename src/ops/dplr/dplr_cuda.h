// The CUDA back-ends of DPLR, for the switch of dplr.cc. Arguments have passed dplr_check(), all tensors are
// device memory, work is queued on ctx.stream and no call waits for the device.
#pragma once

#include "ops/dplr/dplr.h"

namespace kl::cuda {

// Chunkwise with mma.sync: sm_80 and up, any lengths, any K and V up to 256; no workspace.
void dplr_chunks(const Ctx&, const DplrArgs&);

// Chunkwise with wgmma, sm_90 only: K = V = 64 or 128, all rows in bf16 and at multiples of 16 bytes. Ask
// first whether it takes the arguments; their workspace may be absent then.
bool dplr_prefill_sm90_takes(const DplrArgs&);
int64_t dplr_prefill_sm90_workspace(const DplrArgs&);  // bytes
void dplr_prefill_sm90(const Ctx&, const DplrArgs&);

}  // namespace kl::cuda
