// The Hopper prefill's pipeline inside one block: a ring of slots in shared memory, one chunk each.
//
//   loader (1 warp)       raw q, k, v, g of the next chunk         -> slot, `raw` barrier
//   producers (7 warps)   a chunk each: gates, norms, decays, the inverse; in place -> `ready` barrier
//   consumers (8 warps)   the state of 64 value channels per warpgroup, in registers  -> `free` barrier
//
// Chunk number n of the block goes through slot n % kSlots and producer n % kProducers. Nobody waits for a
// whole block: each role follows the numbers on its own.
#pragma once

#include "cuda/tensor_map.h"
#include "ops/kda/kda_chunk.cuh"

namespace kl::cuda {

constexpr int kProducers = 7;
constexpr int kBlockThreads = 32 * (kConsumerWarps + kProducers + 1);

// join, none: the end of a block's items, with something left to be joined or not.
enum class Item : int { value, transition, join, none };
KL_DEVICE bool is_end(Item item) { return item == Item::join || item == Item::none; }

// What a chunk is, written by the loader.
struct alignas(16) ChunkInfo {
  Item item;
  int rows;       // 0 to 16 valid tokens
  int64_t token;  // first row of the tensors
  int head;       // value head
  int sequence;
  int segment;  // Segment::id
  int chunk;    // of the segment
  int chunks;   // of the item
  int segment_index, segment_count;
  int serial;      // of the item in this block
  int checkpoint;  // first one at the end of this chunk; -1: none
};

// A slot's operands. A panel is 128 bytes wide: 64 bf16 channels (32 of an f32 gate), its rows' eight 16-byte
// pieces swizzled by the row, as the copy engine leaves them and the tensor cores expect them.
//   pair    [panel][k rows 0-15, q rows 0-15]   raw k, q; then -k·e^G and q·scale·e^G
//   write   [panel][16]                         raw bf16 g; then (T^T)(k·e^(Gend - G))
//   value   [panel][16]                         v
// Rows past the end of a sequence hold whatever follows it in memory: nobody may let it into a sum.
template <int D, bool kGateF32>
struct Ring {
  static constexpr int kPanels = D / 64;
  static constexpr int kSlots = kGateF32 && D == 128 ? 8 : 12;
  static constexpr uint32_t kPanelBytes = kChunkTokens * 128;
  static constexpr uint32_t kPair = 0;
  static constexpr uint32_t kWrite = kPanels * 2 * kPanelBytes;
  static constexpr uint32_t kValue = kPanels * 3 * kPanelBytes;
  static constexpr uint32_t kSlotBytes = kPanels * 4 * kPanelBytes;
  static constexpr uint32_t kGateBytes = kGateF32 ? kPanels * 2 * kPanelBytes : 0;

  // Offsets from the start of shared memory, which is 1024-byte aligned.
  static constexpr uint32_t kGate = kSlots * kSlotBytes;           // [slot] f32 g in panels
  static constexpr uint32_t kDecay = kGate + kSlots * kGateBytes;  // [slot][D] f32: dt_bias; then e^Gend
  static constexpr uint32_t kRead = kDecay + kSlots * D * 4;       // [slot] A T, 16 x 16 bf16
  static constexpr uint32_t kScratch = kRead + kSlots * 512;
  static constexpr uint32_t kScratchBytes = 16 * 20 * 4 + 2 * 512;           // [producer]
  static constexpr uint32_t kStage = kScratch + kProducers * kScratchBytes;  // [consumer warp] 16 x 16 bf16
  static constexpr uint32_t kInfo = kStage + kConsumerWarps * 512;
  static constexpr uint32_t kBarriers = kInfo + kSlots * sizeof(ChunkInfo);  // raw, ready, free [slot]
  static constexpr uint32_t kNorms = kBarriers + 3 * 8 * kSlots;             // [2][consumer warp] f32
  static constexpr uint32_t kStopped = kNorms + 2 * 4 * kConsumerWarps;      // serial of the item ended early
  static constexpr uint32_t kBytes = kStopped + 16;
  static_assert(kBytes <= 232448 && kSlots > kProducers);

  char* memory;
  KL_DEVICE uint32_t base() const { return smem_address(memory); }
  KL_DEVICE uint32_t slot(int s) const { return base() + s * kSlotBytes; }
  KL_DEVICE uint32_t raw(int s) const { return base() + kBarriers + 8 * s; }
  KL_DEVICE uint32_t ready(int s) const { return base() + kBarriers + 8 * (kSlots + s); }
  KL_DEVICE uint32_t free(int s) const { return base() + kBarriers + 8 * (2 * kSlots + s); }
  KL_DEVICE ChunkInfo& info(int s) const { return reinterpret_cast<ChunkInfo*>(memory + kInfo)[s]; }
  KL_DEVICE float* decay(int s) const { return reinterpret_cast<float*>(memory + kDecay) + s * D; }
  KL_DEVICE volatile int& stopped() const { return *reinterpret_cast<volatile int*>(memory + kStopped); }
};

// Where a role stands in the ring.
template <int kSlots>
struct Turn {
  int slot;
  uint32_t phase = 0;
  KL_DEVICE explicit Turn(int first) : slot(first) {}
  KL_DEVICE void advance(int by) {
    slot += by;
    if (slot >= kSlots) slot -= kSlots, phase ^= 1;
  }
};

// Byte of the 16-byte piece `piece` (0 to 7) of a panel's row.
KL_DEVICE uint32_t piece_at(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ (row & 7)) << 4));
}

// ---- The loader -------------------------------------------------------------------------------------------

// What the copy engine knows of the inputs.
struct PrefillMaps {
  CUtensorMap q, k, v, g;
};

// The first checkpoint past `row`.
KL_DEVICE int first_checkpoint(const PrefillParams& p, int64_t row) {
  int low = 0, high = p.checkpoints;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (p.checkpoint_row[middle] > row)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// One warp. All lanes find items; lane 0 alone walks the ring.
template <int D, bool kGateF32>
struct Loader {
  using R = Ring<D, kGateF32>;
  const PrefillParams& p;
  const PrefillMaps& maps;
  R ring;
  Turn<R::kSlots> turn{0};
  int serial = 0;

  KL_DEVICE Loader(const PrefillParams& params, const PrefillMaps& m, R r) : p(params), maps(m), ring(r) {}

  KL_DEVICE void load_chunk(const ChunkInfo& info, int qk_head) {
    // Far ahead of the others: it may sleep, and leave them the issue slots.
    while (!mbarrier_try_wait(ring.free(turn.slot), turn.phase ^ 1)) __nanosleep(200);
    ring.info(turn.slot) = info;
    const uint32_t bar = ring.raw(turn.slot), slot = ring.slot(turn.slot);
    if (info.rows > 0) {
      const bool value = info.item == Item::value;
      const int token = static_cast<int>(info.token);
      constexpr uint32_t kPanel = R::kPanelBytes, kGateBytes = kGateF32 ? R::kGateBytes : R::kPanels * kPanel;
      mbarrier_arrive_expect_tx(
          bar, R::kPanels * (value ? 3 : 2) * kPanel + kGateBytes + (p.bias_in_ring ? 4 * D : 0));
      if (p.bias_in_ring)
        bulk_load(smem_address(ring.decay(turn.slot)), p.gate.dt_bias + info.head * p.gate.dt_stride, 4 * D,
                  bar);
#pragma unroll
      for (int panel = 0; panel < R::kPanels; ++panel) {
        box_load(slot + R::kPair + panel * 2 * kPanel, &maps.k, 64 * panel, qk_head, token, bar);
        box_load(slot + R::kPair + panel * 2 * kPanel + kPanel, &maps.q, 64 * panel, qk_head, token, bar);
        if (!kGateF32)
          box_load(slot + R::kWrite + panel * kPanel, &maps.g, 64 * panel, info.head, token, bar);
        if (value) box_load(slot + R::kValue + panel * kPanel, &maps.v, 64 * panel, info.head, token, bar);
      }
      if (kGateF32)
#pragma unroll
        for (int panel = 0; panel < 2 * R::kPanels; ++panel)
          box_load(ring.base() + R::kGate + turn.slot * kGateBytes + panel * kPanel, &maps.g, 32 * panel,
                   info.head, token, bar);
    } else {
      mbarrier_arrive(bar);
    }
    turn.advance(1);
  }

  KL_DEVICE void load_item(Item item, const Segment& s, int head, int first, int end) {
    if (threadIdx.x % 32 != 0) return;
    int64_t offset = static_cast<int64_t>(s.first_chunk + first) * kChunkTokens;  // in the sequence
    int checkpoint = first_checkpoint(p, s.begin + offset);
    ChunkInfo info{.item = item,
                   .rows = 0,
                   .token = 0,
                   .head = head,
                   .sequence = s.sequence,
                   .segment = s.id,
                   .chunk = 0,
                   .chunks = end,
                   .segment_index = s.index,
                   .segment_count = s.count,
                   .serial = ++serial,
                   .checkpoint = -1};
    for (int c = first; c < end; ++c, offset += kChunkTokens) {
      if (item == Item::transition && ring.stopped() == serial) return;
      info.token = s.begin + offset;
      info.rows = static_cast<int>(min(static_cast<int64_t>(kChunkTokens), s.length - offset));
      info.chunk = c;
      info.checkpoint = -1;
      if (item == Item::value && info.rows > 0) {
        const auto here = [&] {
          return checkpoint < p.checkpoints && p.checkpoint_row[checkpoint] == info.token + info.rows;
        };
        if (here()) info.checkpoint = checkpoint;
        while (here()) ++checkpoint;
      }
      load_chunk(info, head / p.group);
    }
  }

  // Taking the items of a list in order, each by one block. An item waits only for items of its own list
  // with smaller numbers and for lists that are taken before: some running block has those, all that it waits
  // for in turn comes before them, and its loader has sent their chunks before it looks at anything else. So
  // nobody waits in a circle, however few of the grid's blocks run at a time.
  KL_DEVICE int take(int* list) const {
    int i = 0;
    if (threadIdx.x % 32 == 0) i = atomicAdd(list, 1);
    return __shfl_sync(0xffffffffu, i, 0);
  }

  KL_DEVICE void run() {
    const int firsts = p.sequences * p.heads;
    // Items of segments that are not their sequence's first, of one kind.
    const int later = p.progress != nullptr ? count_segments(p) * p.heads - firsts : 0;
    int* list = &p.counters->items;
    int items = p.probes ? firsts + later : firsts + 2 * later;
    bool rest = false, open = !p.probes && later > 0;
    wait_for_previous_kernel();  // the counters are cleared
    for (;;) {
      int i = take(list);
      if (i >= items) {
        if (rest || !p.probes || later == 0 || !probes_left_open(later)) break;
        // Then the transitions that the probes left open, from where they stopped.
        rest = open = true, list = &p.counters->rest, items = later;
        continue;
      }
      Among among = rest ? Among::later : Among::all;
      bool value = !rest;
      if (!p.probes) {  // the long ones first: first segments, the others, then transitions
        among = i < firsts ? Among::first : Among::later;
        value = i < firsts + later;
        if (i >= firsts) i -= value ? firsts : firsts + later;
      }
      const int head = i % p.heads, number = i / p.heads;
      const Segment s =
          find_segment(p, among, among == Among::first ? sequence_by_length(p, number) : number);
      const int begin = rest ? min(kProbeChunks, s.chunks) : 0;
      const bool closed = rest && load_acquire(p.progress + s.id * p.heads + head) < 0;
      if (begin < s.chunks && !closed)
        load_item(value ? Item::value : Item::transition, s, head, begin, s.chunks);
      __syncwarp();
    }
    if (threadIdx.x % 32 != 0) return;
    const ChunkInfo end{.item = open ? Item::join : Item::none,
                        .rows = 0,
                        .token = 0,
                        .head = 0,
                        .sequence = 0,
                        .segment = 0,
                        .chunk = 0,
                        .chunks = 0,
                        .segment_index = 0,
                        .segment_count = 0,
                        .serial = 0,
                        .checkpoint = -1};
    for (int w = 0; w < kProducers; ++w) load_chunk(end, 0);  // every producer and the consumers see an end
  }

  // Waits for all probes: has one not closed its M?
  KL_DEVICE bool probes_left_open(int probes) const {
    while (load_acquire(&p.counters->probed) < probes) __nanosleep(100);
    return __shfl_sync(0xffffffffu, *static_cast<volatile int*>(&p.counters->open), 0) > 0;
  }
};

}  // namespace kl::cuda
