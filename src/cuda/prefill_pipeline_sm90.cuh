// The pipeline of a Hopper prefill inside one block: a ring of slots in shared memory, one chunk each.
//
//   loader (1 warp)       raw rows of the next chunk                                  -> slot, `raw` barrier
//   producers (7 warps)   a chunk each: decays, the inverse, factors; in place        -> `ready` barrier
//   consumers (8 warps)   the state of 64 value channels per warpgroup, in registers  -> `free` barrier
//
// Chunk number n of the block goes through slot n % kSlots and producer n % kProducers. Nobody waits for a
// whole block: each role follows the numbers on its own.
//
// An operator is a type with
//
//   Params              PrefillParams and what its producers need
//   Maps                what the copy engine knows of its inputs
//   Slot                how a slot is laid out (Ring says what is asked of it)
//   kMayProbe           can its gates be known to forget soon (PrefillParams::probes)?
//   kKnowsGates         is there an expected_forgetting(...): of a head, the less the later it forgets
//   load(...)           the copies of one chunk
//   HeadPart            what the loader itself stores into each slot of a head's chunks
//   produce(...)        one producer warp, until the end
#pragma once

#include "cuda/prefill_segments.cuh"
#include "cuda/tensor_map.h"

namespace kl::cuda {

constexpr int kProducers = 7;
constexpr int kHold = 2;  // chunks that a loader sends before it has seen the first one arrive
constexpr int kBlockThreads = 32 * (kConsumerWarps + kProducers + 1);

// join, none: the end of a block's items, with something left to be joined or not.
enum class Item : int { value, transition, join, none };
KL_DEVICE bool is_end(Item item) { return item == Item::join || item == Item::none; }

// What the consumers have to look at besides the factors: of a chunk, most often nothing.
enum ChunkFlag : int {
  kLastChunk = 1,        // of its item
  kCheckpointAfter = 2,  // ChunkInfo::checkpoint
  kSteep = 4             // some channels are not held at the middle of the chunk (Ring::after)
};

// What a chunk is, written by the loader; kSteep by its producer.
struct alignas(16) ChunkInfo {
  int rows;   // 0 to 16 valid tokens
  int flags;  // ChunkFlag
  Item item;
  int64_t token;  // first row of the tensors
  int head;       // value head
  int sequence;
  int segment;  // Segment::id
  int chunk;    // of the segment
  int chunks;   // of the item
  int segment_index, segment_count;
  int serial;      // of the item in this block
  int checkpoint;  // first one at the end of this chunk, if there are any
  bool first;      // of the item, in this block
};

// A panel is 128 bytes wide: 64 bf16 channels (32 of f32), its rows' eight 16-byte pieces swizzled by the
// row, as the copy engine leaves them and the tensor cores expect them.
constexpr uint32_t kPanelBytes = kChunkTokens * 128;

// The ring in shared memory. Slot, an operator's, says
//
//   D, kSlots            channels; slots that fit
//   kSlotBytes           of a slot, a multiple of 1024
//   kPair                [panel][32 rows]  factors of products with the state: those of R, those of O
//   kWrite               [panel][16 rows]  R's factors in the state
//   kValue               [panel][16 rows]  v
//   kValuesApart         v enters state and outputs by factors of its own ...
//   kKeys, kSmall        ... those in the state, [panel][16 rows]; Br, Bo and A, 16 x 16 each. Without it A
//                        stands outside the slots (kRead)
//   kApartBytes          more of a slot, outside of it
//   kScratchBytes        of a producer
//   kMiddle              consumers hold the state as it is in the middle of a chunk (Scan)
//   kScaled              v, R and O have a factor a token, which consumers multiply by (Scan)
//
// Rows past the end of a sequence hold whatever follows it in memory: producers may not let it into a sum,
// and leave zeros for the consumers.
template <class Slot>
struct Ring : Slot {
  using Slot::D, Slot::kSlots, Slot::kSlotBytes, Slot::kMiddle, Slot::kScaled;
  static constexpr int kPanels = D / 64;

  // Offsets from the start of shared memory, which is 1024-byte aligned.
  static constexpr uint32_t kApart = kSlots * kSlotBytes;                  // [slot]
  static constexpr uint32_t kDecay = kApart + kSlots * Slot::kApartBytes;  // [slot][D] f32, before a chunk
  static constexpr uint32_t kAfter = kDecay + kSlots * D * 4;              // [slot][D] f32, after a chunk
  static constexpr uint32_t kScale = kAfter + (kMiddle ? kSlots * D * 4 : 0);  // [slot][v, R, O][16] f32
  static constexpr uint32_t kRead = kScale + (kScaled ? kSlots * 3 * kChunkTokens * 4 : 0);  // [slot] A
  static constexpr uint32_t kScratch = kRead + kSlots * (Slot::kValuesApart ? 0 : 512);      // [producer]
  static constexpr uint32_t kStage =
      kScratch + kProducers * Slot::kScratchBytes;  // [consumer warp] 16 x 16 bf16
  static constexpr uint32_t kInfo = kStage + kConsumerWarps * 512;
  static constexpr uint32_t kBarriers = kInfo + kSlots * sizeof(ChunkInfo);  // raw, ready, free [slot]
  static constexpr uint32_t kNorms = kBarriers + 3 * 8 * kSlots;             // [2][consumer warp] f32
  static constexpr uint32_t kStopped = kNorms + 2 * 4 * kConsumerWarps;
  static constexpr uint32_t kBytes = kStopped + 16;
  static_assert(kBytes <= 232448 && kSlots > kProducers && kSlotBytes % 1024 == 0);

  char* memory;
  KL_DEVICE uint32_t base() const { return smem_address(memory); }
  KL_DEVICE uint32_t slot(int s) const { return base() + s * kSlotBytes; }
  KL_DEVICE uint32_t raw(int s) const { return base() + kBarriers + 8 * s; }
  KL_DEVICE uint32_t ready(int s) const { return base() + kBarriers + 8 * (kSlots + s); }
  KL_DEVICE uint32_t free(int s) const { return base() + kBarriers + 8 * (2 * kSlots + s); }
  KL_DEVICE uint32_t apart(int s) const { return base() + kApart + s * Slot::kApartBytes; }
  // Right operands of 32 x 16: [Br, Bo] where values stand apart; A in the second half.
  KL_DEVICE uint32_t value_matrix(int s) const { return slot(s) + Slot::kSmall; }
  KL_DEVICE uint32_t read_matrix(int s) const {
    if constexpr (Slot::kValuesApart)
      return slot(s) + Slot::kSmall + 512;
    else
      return base() + kRead + s * 512 - 512;
  }
  KL_DEVICE ChunkInfo& info(int s) const { return reinterpret_cast<ChunkInfo*>(memory + kInfo)[s]; }
  // What the state decays by in a chunk, per channel; before the producer writes it what the operator likes.
  // With kMiddle: from the middle of the chunk before, or from the item's start, to the middle of this one.
  KL_DEVICE float* decay(int s) const { return reinterpret_cast<float*>(memory + kDecay) + s * D; }
  // With kMiddle: from the middle of the chunk to its end. Negative, if only by its sign bit, for a channel
  // that decays by too much for that: its factors are relative to the chunk's start and its end, and it
  // decays by the amount of this between being read and being written, and not after the chunk.
  KL_DEVICE float* after(int s) const { return reinterpret_cast<float*>(memory + kAfter) + s * D; }
  // kScaled: factors of the tokens' v; R's stand kChunkTokens further, O's after them. Before the producer
  // writes them what the operator likes.
  KL_DEVICE float* scale(int s) const {
    return reinterpret_cast<float*>(memory + kScale) + s * 3 * kChunkTokens;
  }
  // Serial of the transition that was closed last. Atomics only, since nothing orders the two sides.
  KL_DEVICE int* stopped() const { return reinterpret_cast<int*>(memory + kStopped); }
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

// An element of Ring::after: the decay after the chunk, and that between reading and writing.
KL_DEVICE float decay_after(float x) { return __float_as_int(x) < 0 ? 1.f : x; }
KL_DEVICE float decay_between(float x) { return __float_as_int(x) < 0 ? -x : 1.f; }

// ---- The loader -------------------------------------------------------------------------------------------

// One warp; lane 0 takes numbers, one lane (elected()) fills slots.
template <class Op>
struct Loader {
  using R = Ring<typename Op::Slot>;
  const typename Op::Params& p;
  const typename Op::Maps& maps;
  R ring;
  Turn<R::kSlots> turn{0};
  int serial = 0, sent = 0;

  KL_DEVICE Loader(const typename Op::Params& params, const typename Op::Maps& m, R r)
      : p(params), maps(m), ring(r) {}

  // The same in all lanes, and the compiler knows: what the copy engine is told of goes to uniform registers
  // at once. Otherwise every box costs a loop over the lanes, 120 cycles.
  KL_DEVICE static int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }
  KL_DEVICE int stopped() const {
    int x = 0;
    if (threadIdx.x % 32 == 0) x = atomicAdd(ring.stopped(), 0);
    return uniform(x);
  }

  // store(slot): what else comes with the chunk, by the whole warp.
  template <class Store>
  KL_DEVICE void load_chunk(ChunkInfo info, int qk_head, Store&& store) {
    const int slot = uniform(turn.slot);
    info.token = uniform(static_cast<int>(info.token));
    info.head = uniform(info.head), qk_head = uniform(qk_head);
    // Far ahead of the others: it may sleep, and leave them the issue slots.
    while (!mbarrier_try_wait(ring.free(slot), turn.phase ^ 1)) __nanosleep(200);
    // The first chunks of all blocks before anybody's others: nobody can start without one.
    if (sent == kHold) mbarrier_wait(ring.raw(0), 0);
    ++sent;
    fence_proxy_async();  // others have read the slot; the copy engine writes over it
    if (elected()) {
      ring.info(slot) = info;
      if (info.rows > 0)
        Op::load(p, ring, slot, maps, info, qk_head);
      else
        mbarrier_arrive(ring.raw(slot));
    }
    store(slot);  // while the copies are on their way
    mbarrier_arrive_warp(ring.raw(slot));
    turn.advance(1);
  }

  KL_DEVICE void load_item(Item item, const Segment& s, int head, int first, int end) {
    const int qk_head = p.group == 1 ? head : head / p.group;
    const typename Op::HeadPart part(p, head);
    int64_t offset = static_cast<int64_t>(s.first_chunk + first) * kChunkTokens;  // in the sequence
    int checkpoint = first_checkpoint(p, s.begin + offset);
    ChunkInfo info{.rows = 0,
                   .flags = 0,
                   .item = item,
                   .token = 0,
                   .head = head,
                   .sequence = s.sequence,
                   .segment = s.id,
                   .chunk = 0,
                   .chunks = end,
                   .segment_index = s.index,
                   .segment_count = s.count,
                   .serial = ++serial,
                   .checkpoint = -1,
                   .first = true};
    for (int c = first; c < end; ++c, offset += kChunkTokens) {
      if (item == Item::transition && stopped() == serial) return;
      info.token = s.begin + offset;
      info.rows = static_cast<int>(min(static_cast<int64_t>(kChunkTokens), s.length - offset));
      info.chunk = c;
      info.flags = c + 1 == end ? kLastChunk : 0;
      if (item == Item::value && info.rows > 0) {
        const auto here = [&] {
          return checkpoint < p.checkpoints && p.checkpoint_row[checkpoint] == info.token + info.rows;
        };
        if (here()) info.checkpoint = checkpoint, info.flags |= kCheckpointAfter;
        while (here()) ++checkpoint;
      }
      load_chunk(info, qk_head, [&](int slot) { part.store(ring, slot); });
      info.first = false;
    }
  }

  // Taking the items of a list in order, each by one block. An item waits only for items of its own list
  // with smaller numbers and for lists that are taken before: some running block has those, all that it waits
  // for in turn comes before them, and its loader has sent their chunks before it looks at anything else. So
  // nobody waits in a circle, however few of the grid's blocks run at a time.
  KL_DEVICE int take(int* list) const {  // lane 0's
    int i = 0;
    if (threadIdx.x % 32 == 0) i = atomicAdd(list, 1);
    return i;
  }

  KL_DEVICE void run() {
    constexpr int kMaps = sizeof(maps) / sizeof(CUtensorMap);
    if (threadIdx.x % 32 < kMaps)  // the first boxes need not wait for them
      prefetch_tensor_map(reinterpret_cast<const CUtensorMap*>(&maps) + threadIdx.x % 32);
    wait_for_previous_kernel();  // inputs are there, the counters are cleared; nobody reads before a chunk
                                 // comes
    // The first number is on its way while sequences are counted.
    int* list = &p.counters->items;
    int ticket = 0;
    if (threadIdx.x % 32 == 0) ticket = atomicAdd(list, 1);
    const Sequences sequences(p);
    const int firsts = p.sequences * p.heads;
    // Items of segments that are not their sequence's first, of one kind.
    const int later = p.progress != nullptr ? sequences.count_segments() * p.heads - firsts : 0;
    int items = p.probes ? firsts + later : firsts + 2 * later;
    bool rest = false, open = !p.probes && later > 0;
    for (;; ticket = take(list)) {
      int i = uniform(ticket);
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
      int head = i % p.heads, number = i / p.heads;
      if (!value && p.by_slowness != nullptr) {  // those that may be long before the others
        const int segments = later / p.heads;
        head = p.by_slowness[i / segments], number = i % segments;
      }
      const Segment s =
          sequences.segment(among, among == Among::first ? sequences.by_length(number) : number);
      const int begin = rest ? min(kProbeChunks, s.chunks) : 0;
      const bool closed = rest && wait_for_progress(s.id * p.heads + head) < 0;
      if (begin < s.chunks && !closed)
        load_item(value ? Item::value : Item::transition, s, head, begin, s.chunks);
    }
    const ChunkInfo end{.rows = 0,
                        .flags = 0,
                        .item = open ? Item::join : Item::none,
                        .token = 0,
                        .head = 0,
                        .sequence = 0,
                        .segment = 0,
                        .chunk = 0,
                        .chunks = 0,
                        .segment_index = 0,
                        .segment_count = 0,
                        .serial = 0,
                        .checkpoint = -1,
                        .first = true};
    for (int w = 0; w < kProducers; ++w)  // every producer and the consumers see an end
      load_chunk(end, 0, [](int) {});
  }

  // Waits for all probes: has one not closed its M?
  KL_DEVICE bool probes_left_open(int probes) const {
    while (load_acquire(&p.counters->probed) < probes) __nanosleep(100);
    return __shfl_sync(0xffffffffu, *static_cast<volatile int*>(&p.counters->open), 0) > 0;
  }
  // A probe that closed its M may be counted before its number is seen.
  KL_DEVICE int wait_for_progress(int item) const {
    int x;
    while ((x = load_acquire(p.progress + item)) == 0) __nanosleep(100);
    return x;
  }
};

}  // namespace kl::cuda
