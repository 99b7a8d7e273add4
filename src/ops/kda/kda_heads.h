// What the ways to run prefill on the CPU share: a head as the chunk kernel wants it, and its state in
// panels.
#pragma once

#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_head.h"

namespace kl::kda {

// Pointers of `head` into the tensors of h and into `gate`.
KdaCpuHead cpu_head(const Head& h, const HeadGate<float>& gate);

// The state at `slot` <-> panels (kda_cpu.h). A negative slot reads as zeros and is not written.
void load_panels(const Head&, int64_t slot, float* panels);
void store_panels(const Head&, const float* panels, int64_t slot);
constexpr int64_t panel_index(int64_t K, int64_t d, int64_t i) {
  return i / kKdaPanel * kda_panel_stride(K) + d * kKdaPanel + i % kKdaPanel;
}

// Floats of memory that a head takes beside its panels, whatever its products.
constexpr int64_t prefill_memory(int64_t K, int64_t V) {
  return std::max(kda_chunks_memory(K, V), kda_tiles_memory(K, V));
}

// Rows [begin, end) of the head; the state passes from row to row in `panels`. Checkpoints in (begin, end]
// are written. Rows are cut into chunks from `begin` on.
void prefill_rows(const Head&, const KdaCpuHead&, int64_t begin, int64_t end, KdaProducts, float* panels,
                  float* memory);

// Prefill with args.segment (kda_segments.cc).
void prefill_segments(Ctx&, const KdaArgs&, KdaProducts);

}  // namespace kl::kda
