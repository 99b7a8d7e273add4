// The CUDA back-end of linear attention, for the switch of linear_attention.cc. Arguments have passed
// linear_attention_check(), all tensors are device memory, work is queued on ctx.stream and no call waits for
// the device.
#pragma once

#include "ops/linear_attention/linear_attention.h"

namespace kl::cuda {

// Chunkwise with mma.sync: sm_80 and up, any lengths, any K and V up to 256; no workspace.
void linear_attention_chunks(const Ctx&, const LinearAttentionArgs&);

}  // namespace kl::cuda
