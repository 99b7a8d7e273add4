// States that the copy engine carries through a ring of slots in shared memory: what the pipelined kernels
// that step token by token are made of (kda_decode_pipeline.cu, kda_replay_pipeline.cu; sm_90 and up). One
// block per multiprocessor walks over its share of the items; an item is one (sequence, value head), or two
// heads of 64. A loader thread fills slots, stepping warps of 16 value channels each empty them.
#pragma once

#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {

constexpr int kSteppers = 8;  // warps

KL_DEVICE int first_head(const StepParams& p, int heads, int item) { return item % (p.Hv / heads) * heads; }

// An item's state in a slot, in parts. In [V,K] that is one, as it lies in memory. In [K,V] a warp's 16 value
// channels are the same 16 banks in every row, and eight lanes of an access touch two rows; so the two halves
// of a head's keys stand 16 banks apart, and lanes of neighbouring kg take their rows from different halves.
template <int D, bool kVFirst, class State>
struct alignas(128) StateSlot {
  static constexpr int kHeads = 16 * kSteppers / D;  // of an item
  static constexpr int kItem = kHeads * D * D;       // elements
  static constexpr int kParts = kVFirst ? 1 : 2 * kHeads, kPart = kItem / kParts;
  static constexpr int kApart = kPart + (kVFirst ? 0 : 64 / static_cast<int>(sizeof(State)));
  static constexpr uint32_t part_bytes() { return kPart * sizeof(State); }

  State state[kParts * kApart];

  // The item's state in memory, in slot `slot` of the pool.
  KL_DEVICE static State* in_pool(const StepParams& p, int item, int slot) {
    return static_cast<State*>(p.state) + slot * p.slot_stride + first_head(p, kHeads, item) * p.head_stride;
  }
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// Position in a ring of kCount places, with the phase of its barriers.
template <int kCount>
struct Turn {
  int place = 0;
  uint32_t phase = 0;
  KL_DEVICE void next() {
    if (++place == kCount) place = 0, phase ^= 1;
  }
};

// Items of this block, idle ones left out: f(item, sequence's work).
template <class F>
KL_DEVICE void for_each_item(const StepParams& p, int heads, F&& f) {
  const int groups = p.Hv / heads, items = p.N * groups;
  for (int item = blockIdx.x; item < items; item += gridDim.x) {
    const SequenceWork work = sequence_work(p, item / groups);
    if (!work.idle()) f(item, work);
  }
}

// Starts the copy of an item's state into its slot; the one arrival at `loaded` counts its bytes.
template <int D, bool kVFirst, class State>
KL_DEVICE void load_item(StateSlot<D, kVFirst, State>& to, const State* from, uint32_t loaded) {
  using Slot = StateSlot<D, kVFirst, State>;
  mbarrier_arrive_expect_tx(loaded, Slot::kParts * Slot::part_bytes());
#pragma unroll
  for (int part = 0; part < Slot::kParts; ++part)
    bulk_load(smem_address(to.state + part * Slot::kApart), from + part * Slot::kPart, Slot::part_bytes(),
              loaded);
}
template <int D, bool kVFirst, class State>
KL_DEVICE void store_item(State* to, const StateSlot<D, kVFirst, State>& from) {
  using Slot = StateSlot<D, kVFirst, State>;
#pragma unroll
  for (int part = 0; part < Slot::kParts; ++part)
    bulk_store(to + part * Slot::kPart, smem_address(from.state + part * Slot::kApart), Slot::part_bytes());
}

// The lane's part of a [K,V] state in two halves, `apart` elements from one to the other.
template <int D, class State>
KL_DEVICE void load_halves(LaneState<D, 4>& S, const State* tile, int apart) {
  const Place<false> at;
  const bool odd = at.kg % 2 != 0;
  const State* from = tile + 4 * at.kg * D + 4 * at.vg;
#pragma unroll
  for (int m = 0; m < D / 16; ++m) {
    const int row = 32 * (m / 4) + m % 4;
    const float4 x = load4(from + (odd ? apart : 0) + row * D), y = load4(from + (odd ? 0 : apart) + row * D);
    const float4 low = odd ? y : x, high = odd ? x : y;
    S[m][0] = low.x, S[m][1] = low.y, S[m][2] = low.z, S[m][3] = low.w;
    float(&to)[4] = S[m + D / 16];
    to[0] = high.x, to[1] = high.y, to[2] = high.z, to[3] = high.w;
  }
}
template <int D, class State>
KL_DEVICE void store_halves(const LaneState<D, 4>& S, State* tile, int apart) {
  const Place<false> at;
  const bool odd = at.kg % 2 != 0;
  State* to = tile + 4 * at.kg * D + 4 * at.vg;
#pragma unroll
  for (int m = 0; m < D / 16; ++m) {
    const int row = 32 * (m / 4) + m % 4, n = m + D / 16;
    const float4 low{S[m][0], S[m][1], S[m][2], S[m][3]}, high{S[n][0], S[n][1], S[n][2], S[n][3]};
    store4(to + (odd ? apart : 0) + row * D, odd ? high : low);
    store4(to + (odd ? 0 : apart) + row * D, odd ? low : high);
  }
}

// The lane's part of a slot; `warp` is one of the steppers and has value channels 16 warp to 16 warp + 15 of
// the item's heads.
template <int D, bool kVFirst, class State>
KL_DEVICE void load_lanes(LaneState<D, 4>& S, const StateSlot<D, kVFirst, State>& slot, int warp) {
  const int h = warp * 16 / D, v0 = warp * 16 % D;
  if constexpr (kVFirst)
    load_tile<D, 4, true>(S, slot.state + h * D * D + v0 * D + first_element<4, true>(D), D);
  else
    load_halves<D>(S, slot.state + 2 * h * slot.kApart + v0, slot.kApart);
}
template <int D, bool kVFirst, class State>
KL_DEVICE void store_lanes(const LaneState<D, 4>& S, StateSlot<D, kVFirst, State>& slot, int warp) {
  const int h = warp * 16 / D, v0 = warp * 16 % D;
  if constexpr (kVFirst)
    store_tile<D, 4, true>(S, slot.state + h * D * D + v0 * D + first_element<4, true>(D), D);
  else
    store_halves<D>(S, slot.state + 2 * h * slot.kApart + v0, slot.kApart);
}

#endif

}  // namespace kl::cuda
