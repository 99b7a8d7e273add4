// What the door of short_conv calls on the CPU, once compiled per instruction set (conv_cpu.cc).
#pragma once

#include <cstdint>

#include "simd/isa.h"

namespace kl {

constexpr int64_t kConvChannels = 256;  // of one call: its taps and its past stay in the first-level cache

// Up to kConvChannels channels of all sequences; x and out f32. As in ShortConvArgs, checked.
struct ConvChannels {
  const float* x;                // [T, channels]
  const float* weight;           // [channels, W], contiguous
  float* out;                    // [T, channels]
  float* state;                  // [slots, channels, W - 1], each slot contiguous
  int64_t x_stride, out_stride;  // elements from row to row
  int64_t state_stride;          // elements from slot to slot
  const int32_t *cu_seqlens, *slot;
  int64_t N, channels, W;
};

KL_DECLARE_PER_ISA(void conv_channels(const ConvChannels&);)

}  // namespace kl
