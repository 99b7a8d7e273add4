// The Hopper prefill's pipeline inside one block: a ring of slots in shared memory, one chunk each.
//
//   loader (1 warp)       raw q, k, v, g of the next chunk         -> slot, `raw` barrier
//   producers (7 warps)   a chunk each: gates, norms, decays, the inverse; in place -> `ready` barrier
//   consumers (8 warps)   the state of 64 value channels per warpgroup, in registers  -> `free` barrier
//
// Chunk number n of the block goes through slot n % kSlots and producer n % kProducers. Nobody waits for a
// whole block: each role follows the numbers on its own.
#pragma once

#include "ops/kda/kda_chunk.cuh"

namespace kl::cuda {

constexpr int kConsumerWarps = 8;  // of D = 128; D = 64 leaves four without work
constexpr int kProducers = 7;
constexpr int kBlockThreads = 32 * (kConsumerWarps + kProducers + 1);

enum class Item : int { value, probe, transition, none };

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

// A slot's operands. A panel is 64 channels wide: rows of 128 bytes with their eight 16-byte pieces swizzled
// by the row, as the tensor cores expect it.
//   pair    [panel][k rows 0-15, q rows 0-15][64]   raw k, q; then -k·e^G and q·scale·e^G
//   write   [panel][16][64]                         raw bf16 g; then (T^T)(k·e^(Gend - G))
//   value   [panel][16][64]                         v
template <int D, bool kGateF32>
struct Ring {
  static constexpr int kPanels = D / 64;
  static constexpr int kSlots = kGateF32 && D == 128 ? 8 : 12;
  static constexpr uint32_t kPair = 0;
  static constexpr uint32_t kWrite = kPanels * 4096;
  static constexpr uint32_t kValue = kPanels * 6144;
  static constexpr uint32_t kSlotBytes = kPanels * 8192;
  static constexpr uint32_t kGateRow = D * 4 + 16;  // of f32 g: rows apart by 4 banks

  // Offsets from the start of shared memory, which is 1024-byte aligned.
  static constexpr uint32_t kDecay = kSlots * kSlotBytes;     // [slot][D] f32: e^Gend
  static constexpr uint32_t kRead = kDecay + kSlots * D * 4;  // [slot] Aqk·T, 16 x 16 bf16
  static constexpr uint32_t kGate = kRead + kSlots * 512;     // [slot][16] rows of f32 g
  static constexpr uint32_t kScratch = kGate + (kGateF32 ? kSlots * 16 * kGateRow : 0);
  static constexpr uint32_t kScratchBytes = 16 * 20 * 4 + 2 * 512;           // [producer]
  static constexpr uint32_t kStage = kScratch + kProducers * kScratchBytes;  // [consumer warp] 16 x 16 bf16
  static constexpr uint32_t kInfo = kStage + kConsumerWarps * 512;
  static constexpr uint32_t kBarriers = kInfo + kSlots * sizeof(ChunkInfo);  // raw, ready, free [slot]
  static constexpr uint32_t kNorms = kBarriers + 3 * 8 * kSlots;             // [consumer warp] f32
  static constexpr uint32_t kStopped = kNorms + 4 * kConsumerWarps;          // serial of the item ended early
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

// 16 rows of D channels -> panels. Lanes take neighbouring pieces of a row.
template <int D, uint32_t kPanelBytes>
KL_DEVICE void load_rows(uint32_t to, const Operand& t, int64_t token, int head, int rows) {
  constexpr int kPieces = D / 8, kRowsAtOnce = 32 / kPieces;
  const int lane = static_cast<int>(threadIdx.x % 32), piece = lane % kPieces;
  const bf16* base = static_cast<const bf16*>(t.data);
  const bf16* from = base + offset_of(t, token, head) + 8 * piece;
#pragma unroll
  for (int r = 0; r < kChunkTokens; r += kRowsAtOnce) {
    const int row = r + lane / kPieces;
    cp_async16_zfill(to + piece / 8 * kPanelBytes + piece_at(row, piece % 8),
                     row < rows ? from + row * t.token_stride : base, row < rows ? 16 : 0);
  }
}
template <int D, uint32_t kRowBytes>
KL_DEVICE void load_rows_f32(uint32_t to, const Operand& t, int64_t token, int head, int rows) {
  constexpr int kPieces = D / 4;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const float* base = static_cast<const float*>(t.data);
  const float* from = base + offset_of(t, token, head);
#pragma unroll
  for (int i = lane; i < kChunkTokens * kPieces; i += 32) {
    const int row = i / kPieces, piece = i % kPieces;
    cp_async16_zfill(to + row * kRowBytes + piece * 16,
                     row < rows ? from + row * t.token_stride + 4 * piece : base, row < rows ? 16 : 0);
  }
}

// Finds the first checkpoint past `row`.
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

template <int D, bool kGateF32>
struct Loader {
  using R = Ring<D, kGateF32>;
  const PrefillParams& p;
  R ring;
  Turn<R::kSlots> turn{0};
  int serial = 0;

  KL_DEVICE Loader(const PrefillParams& params, R r) : p(params), ring(r) {}

  KL_DEVICE void describe(const ChunkInfo& info) {
    mbarrier_wait(ring.free(turn.slot), turn.phase ^ 1);
    if (threadIdx.x % 32 == 0) ring.info(turn.slot) = info;
  }
  // The lanes' copies arrive when they have landed; lane 0 arrives also for the description.
  KL_DEVICE void publish() {
    cp_async_arrive(ring.raw(turn.slot));
    if (threadIdx.x % 32 == 0) mbarrier_arrive(ring.raw(turn.slot));
    turn.advance(1);
  }

  KL_DEVICE void load_item(Item item, const Segment& s, int head, int first, int end) {
    const int qk_head = head / p.group;
    int64_t offset = static_cast<int64_t>(s.first_chunk + first) * kChunkTokens;  // in the sequence
    int checkpoint = first_checkpoint(p, s.begin + offset);
    ChunkInfo info{.item = item,
                   .head = head,
                   .sequence = s.sequence,
                   .segment = s.id,
                   .chunks = end,
                   .segment_index = s.index,
                   .segment_count = s.count,
                   .serial = ++serial};
    for (int c = first; c < end; ++c, offset += kChunkTokens) {
      if (item == Item::transition && ring.stopped() == serial) return;
      info.token = s.begin + offset;
      info.rows = static_cast<int>(min(static_cast<int64_t>(kChunkTokens), s.length - offset));
      info.chunk = c;
      const bool at_checkpoint = item == Item::value && checkpoint < p.checkpoints &&
                                 p.checkpoint_row[checkpoint] == info.token + info.rows && info.rows > 0;
      info.checkpoint = at_checkpoint ? checkpoint : -1;
      while (at_checkpoint && checkpoint < p.checkpoints &&
             p.checkpoint_row[checkpoint] == info.token + info.rows)
        ++checkpoint;
      describe(info);
      const uint32_t slot = ring.slot(turn.slot);
      load_rows<D, 4096>(slot + R::kPair, p.k, info.token, qk_head, info.rows);
      load_rows<D, 4096>(slot + R::kPair + 2048, p.q, info.token, qk_head, info.rows);
      if constexpr (kGateF32)
        load_rows_f32<D, R::kGateRow>(ring.base() + R::kGate + turn.slot * 16 * R::kGateRow, p.g, info.token,
                                      head, info.rows);
      else
        load_rows<D, 2048>(slot + R::kWrite, p.g, info.token, head, info.rows);
      if (item == Item::value) load_rows<D, 2048>(slot + R::kValue, p.v, info.token, head, info.rows);
      publish();
    }
  }

  // First all probes, then all values; in the second kernel the transitions that the probes left open.
  KL_DEVICE void run(bool second) {
    const int total = count_segments(p) * p.heads;
    const bool split = p.progress != nullptr;
    const int items = second || !split ? total : 2 * total;
    for (;;) {
      int i = 0;
      if (threadIdx.x % 32 == 0) i = atomicAdd(p.next_item + second, 1);
      i = __shfl_sync(0xffffffffu, i, 0);
      if (i >= items) break;
      const bool value = !second && i >= items - total;
      const int of_kind = i >= total ? i - total : i, head = of_kind % p.heads;
      const Segment s = find_segment(p, of_kind / p.heads);
      if (value) {
        load_item(Item::value, s, head, 0, s.chunks);
      } else if (s.index > 0) {
        const int probed = min(kProbeChunks, s.chunks);
        if (!second)
          load_item(Item::probe, s, head, 0, probed);
        else if (probed < s.chunks && p.progress[s.id * p.heads + head] > 0)
          load_item(Item::transition, s, head, probed, s.chunks);
      }
    }
    for (int w = 0; w < kProducers; ++w) {  // every producer and the consumers see an end
      describe({.item = Item::none});
      publish();
    }
  }
};

}  // namespace kl::cuda
