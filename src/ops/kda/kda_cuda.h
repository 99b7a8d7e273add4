// The CUDA back-ends of Kimi Delta Attention, for the switch of kda.cc. Arguments have passed kda_check(),
// all tensors are device memory, work is queued on ctx.stream and no call waits for the device.
#pragma once

#include "ops/kda/kda.h"
#include "ops/kda/kda_replay.h"
#include "ops/kda/kda_step.h"

namespace kl::cuda {

// One step of the recurrence after another: what kda_decode() runs, and kda_prefill() for short sequences.
// Any lengths, any K and V up to 256, checkpoints too. Chooses between two ways, which can also be asked for:
void kda_decode(const Ctx&, const KdaArgs&);
// tiles of states in registers, every GPU and everything above;
void kda_decode_tiles(const Ctx&, const KdaArgs&);
// whole states through a ring in shared memory, sm_90 and up: K = V = 64 or 128, states of a slot contiguous,
// no checkpoints. Ask first whether it takes the arguments; it pays from some hundred heads on.
bool kda_decode_pipeline_takes(const KdaArgs&);
bool kda_decode_pipeline_pays(const KdaArgs&);
void kda_decode_pipeline(const Ctx&, const KdaArgs&);

// The fused decode step of kda_step.h, in the pipelined kernel or, for few heads of 128, in tiles.
bool kda_step_takes(const KdaStepArgs&);
void kda_step(const Ctx&, const KdaStepArgs&);
void kda_step_pipeline(const Ctx&, const KdaStepArgs&);
bool kda_step_tiles_takes(const KdaStepArgs&);
bool kda_step_tiles_pays(const KdaStepArgs&);
void kda_step_tiles(const Ctx&, const KdaStepArgs&);

// Replay decode of kda_replay.h, every GPU. Chooses between the same two ways; the pipeline takes heads of
// 128.
void kda_replay(const Ctx&, const KdaReplayArgs&);
void kda_replay_tiles(const Ctx&, const KdaReplayArgs&);
bool kda_replay_pipeline_takes(const KdaReplayArgs&);
bool kda_replay_pipeline_pays(const KdaReplayArgs&);
void kda_replay_pipeline(const Ctx&, const KdaReplayArgs&);

// Chunkwise with mma.sync: sm_80 and up, any K and V up to 256; no workspace. The first leaves short
// sequences to kda_decode().
void kda_prefill(const Ctx&, const KdaArgs&);
void kda_prefill_chunks(const Ctx&, const KdaArgs&);

// Chunkwise with wgmma, sm_90 only: K = V = 64 or 128, q, k, v and out in bf16, rows of q, k, v, g and out
// that start at multiples of 16 bytes, rows of states at multiples of four elements. Ask first whether it
// takes the arguments; their workspace may be absent then.
bool kda_prefill_sm90_takes(const KdaArgs&);
int64_t kda_prefill_sm90_workspace(const KdaArgs&);  // bytes
void kda_prefill_sm90(const Ctx&, const KdaArgs&);

}  // namespace kl::cuda
