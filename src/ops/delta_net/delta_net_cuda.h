// The CUDA back-end of the delta rule, for the switch of delta_net.cc. Arguments have passed
// delta_net_check(), all tensors are device memory, work is queued on ctx.stream and no call waits for the
// device.
#pragma once

#include "ops/delta_net/delta_net.h"

namespace kl::cuda {

// Chunkwise with mma.sync: sm_80 and up, any lengths, any K and V up to 256; no workspace.
void delta_net_chunks(const Ctx&, const DeltaNetArgs&);

}  // namespace kl::cuda
