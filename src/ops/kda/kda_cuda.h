// The CUDA back-ends of Kimi Delta Attention, for the switch of kda.cc. Arguments have passed kda_check(),
// all tensors are device memory, work is queued on ctx.stream and no call waits for the device.
#pragma once

#include "ops/kda/kda.h"

namespace kl::cuda {

// One step of the recurrence after another: what kda_decode() runs, and kda_prefill() for short sequences.
// Any lengths, any K and V up to 256, checkpoints too.
void kda_decode(const Ctx&, const KdaArgs&);

// Chunkwise with mma.sync: sm_80 and up, any K and V up to 256.
void kda_prefill(const Ctx&, const KdaArgs&);

// Chunkwise with wgmma, sm_90 only.
void kda_prefill_sm90(const Ctx&, const KdaArgs&);

}  // namespace kl::cuda
