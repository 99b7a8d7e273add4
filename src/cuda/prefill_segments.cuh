// The division of labour of the Hopper prefills (KDA, DPLR): chunks, segments of a sequence, the workspace,
// and the parameters that their parts share. No recurrence is known here but that it is linear in the state.
//
// A sequence is cut into chunks of 16 tokens, counted from its start. With few heads its chunks are also cut
// into segments that are worked on at the same time:
//
//   S after a segment = M · S before it + C          o inside it = o from a zero state + (S before)ᵀ · qt
//
// A "value" item runs the recurrence of one (segment, head) from a zero state: it yields C and o. A
// "transition" item runs the same recurrence on the columns of the identity, with v = 0: it yields M and, as
// its outputs, the effective queries qt. Once the Frobenius norm of M has fallen under kNegligible what it
// would still contribute is under the rounding of f32, whatever the gates, keys and strengths: M is closed.
//
// Where gates are expected to close M soon (PrefillParams::probes), a value item first runs its segment's
// transition over its own first chunks. If that closes M, the state after the segment is C, and its share in
// the outputs of the segment behind is added by whichever of the two items is there last
// (PrefillParams::met). Elsewhere transitions are items beside the values. Whatever is left when both are
// done is joined: states first, then outputs (prefill_join_sm90.cuh).
#pragma once

#include "base/tensor.h"
#include "cuda/operand.cuh"

namespace kl::cuda {

constexpr int kChunkTokens = 16;
constexpr int kMinSegmentChunks = 4;
constexpr int kMostSegments = 256;       // of a sequence, however uneven the batch is
constexpr int kProbeChunks = 4;          // that a value item follows its segment's transition for
constexpr float kNegligible = 0x1p-24f;  // of the norm of M
constexpr int kConsumerWarps = 8;        // of D = 128; D = 64 leaves four without work

// What blocks tell each other; zero when they start.
struct PrefillCounters {
  int items, rest, chains, parts;  // of each list: how many have been taken
  int probed, open;                // probes that are over, and those that did not close their M
};

// What an operator adds to it are parameters of its producers.
struct PrefillParams {
  Operand out;
  RowNumbers cu_seqlens;
  int sequences, heads, group;  // heads: value heads; group: value heads per query/key head
  Operand state;                // token_stride: of a slot; head_stride: of a head
  int64_t state_row_stride;
  bool state_v_first;
  const int32_t *slot, *slot_out;
  const int32_t *checkpoint_row, *checkpoint_slot;
  int checkpoints;
  int segment_chunks;  // of a segment; a sequence has up to kMostSegments
  int first_shares;    // a sequence's first segment is this many times as long: it has no transition
  bool probes;         // value items look by themselves whether their transition is negligible

  // Workspace; all but `counters` null where no sequence can have two segments.
  PrefillCounters* counters;
  // [segments, heads] chunks with qt written, negated once M is closed; 0: not known yet. Of a probe that
  // left M open it is the probe's, until somebody has followed M to its end.
  int* progress;
  int* ready;  // [segments, heads, kConsumerWarps] Ready of a value item's rows
  // [segments, heads, kConsumerWarps] How a value item whose M is closed and the one before it meet: it adds
  // the number of its tokens that have a qt, when their own outputs are there; the one before sets a 0 to
  // kStateFirst when its state is in `carried`, and finding a number it adds the state's share to these
  // tokens itself, which mostly it does, and has nothing to store.
  int* met;
  int* chained;      // [sequences, heads] value channels whose states are all known
  int* by_slowness;  // [heads] value heads, those first whose gates are expected to forget last; or null
  // Matrices stand as matrix_at() says.
  float* carried;  // [segments, heads, D (v), D (k)] C; made the state before the next segment by the chain
  float* transition;  // [segments, heads, D (column), D (k)] M
  void* queries;      // [T, heads, D] bf16, qt; with probes channels stand as query_at() says
};

// How far a warp's rows of a value item are: the state that they start from has been read (told of a
// sequence's first segment, where the last one waits for it); all that the item has to store is there.
enum Ready : int { kNotReady, kStarted, kDone };

constexpr int kStateFirst = 0x10000;

// Of every 32 channels, as four rows of four twos, the transpose: its own inverse. A qt in this order is what
// fours of lanes need that hold a state as right operands of mma.sync, lane t channels 2t and 2t + 1 of every
// 8; and a state in this order is what a qt needs that is not.
KL_DEVICE int query_at(int k) { return k / 32 * 32 + k % 8 / 2 * 8 + k % 32 / 8 * 2 + k % 2; }

// Where element (row, k) of a matrix in the workspace stands. Its columns are in blocks of 8, so that what a
// warp's fragments have of it is runs of 256 bytes, and in different banks of shared memory.
template <int D>
KL_DEVICE int matrix_at(int row, int k) {
  return k / 8 * (8 * D) + row * 8 + k % 8;
}

// What the workspace holds, in bytes from its start. What stands before by_slowness is cleared.
struct PrefillWorkspace {
  int64_t progress, ready, met, chained, by_slowness, carried, transition, queries, total;
};
// Segments of N sequences of T tokens in all, at most: as many as if one of them had all chunks.
inline int64_t max_segments(int64_t T, int64_t N, int64_t segment_chunks, int64_t first_shares) {
  const int64_t later = (T / kChunkTokens + N) / segment_chunks + 1 - first_shares;
  return N + (later > 0 ? later : 0);
}
inline PrefillWorkspace prefill_workspace(int64_t T, int64_t N, int64_t heads, int64_t D, int64_t segments) {
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  PrefillWorkspace w{};
  w.progress = w.by_slowness = w.total = aligned(sizeof(PrefillCounters));
  if (segments == 0) return w;  // no split
  w.ready = w.progress + aligned(4 * segments * heads);
  w.met = w.ready + 4 * segments * heads * kConsumerWarps;
  w.chained = w.met + 4 * segments * heads * kConsumerWarps;
  w.by_slowness = aligned(w.chained + 4 * N * heads);
  w.carried = aligned(w.by_slowness + 4 * heads);
  w.transition = w.carried + 4 * segments * heads * D * D;
  w.queries = w.transition + 4 * segments * heads * D * D;
  w.total = w.queries + aligned(2 * T * heads * D);
  return w;
}

// One segment of one sequence.
struct Segment {
  int sequence = -1;  // -1: there is none of this number
  int index, count;   // of the sequence's segments
  int id;             // counted over all sequences
  int first_chunk, chunks;
  int64_t begin, length;  // rows of the sequence; its first row is a row of the tensors
};

KL_DEVICE int chunks_of(int64_t length) {  // an empty sequence has one chunk without rows
  return length > 0 ? static_cast<int>((length + kChunkTokens - 1) / kChunkTokens) : 1;
}
KL_DEVICE int segments_of(const PrefillParams& p, int chunks) {
  const int behind = max(chunks - p.first_shares * p.segment_chunks, 0);
  return min(1 + (behind + p.segment_chunks - 1) / p.segment_chunks, kMostSegments);
}
// The first chunk of a segment; of number `count`, the end of the sequence. Last ones have what is left:
// their end, the final state, takes longest.
KL_DEVICE int first_chunk_of(const PrefillParams& p, int chunks, int index, int count) {
  const int before = index == 0 ? 0 : p.first_shares + index - 1, shares = p.first_shares + count - 1;
  return chunks / shares * before + min(chunks % shares, before);
}

struct Sequence {
  int number = -1;  // -1: there is none
  int64_t begin, length;
  int chunks, segments;
  int first_id;  // of its segments
};

// Segments are numbered over all sequences: all of them, the first of each, or those that are not.
enum class Among : int { all, first, later };

// The sequences of a call, for a whole warp: a lane has one of every 32. Answers are the same in all lanes.
class Sequences {
 public:
  KL_DEVICE explicit Sequences(const PrefillParams& params) : p(params), first(some(0, 0)) {}

  // Calls f(lane's sequence) for 32 after the other; stops when it returns true, which it does for all lanes
  // alike.
  template <class F>
  KL_DEVICE void walk(F&& f) const {
    Sequence q = first;
    for (int n0 = 0;;) {
      if (f(q)) return;
      if ((n0 += 32) >= p.sequences) return;
      q = some(n0, __shfl_sync(0xffffffffu, q.first_id + q.segments, 31));
    }
  }

  KL_DEVICE int count_segments() const {
    int total = 0;
    walk([&](const Sequence& q) {
      total += static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(q.segments)));
      return false;
    });
    return total;
  }

  // The sequence that is(sequence) is true for.
  template <class Is>
  KL_DEVICE Sequence find(Is&& is) const {
    Sequence s;
    walk([&](const Sequence& q) {
      const unsigned found = __ballot_sync(0xffffffffu, q.number >= 0 && is(q));
      if (found == 0) return false;
      const int lane = __ffs(static_cast<int>(found)) - 1;
      s.number = __shfl_sync(0xffffffffu, q.number, lane);
      s.begin = __shfl_sync(0xffffffffu, q.begin, lane);
      s.length = __shfl_sync(0xffffffffu, q.length, lane);
      s.chunks = __shfl_sync(0xffffffffu, q.chunks, lane);
      s.segments = __shfl_sync(0xffffffffu, q.segments, lane);
      s.first_id = __shfl_sync(0xffffffffu, q.first_id, lane);
      return true;
    });
    return s;
  }

  KL_DEVICE Segment segment(Among among, int number) const {
    const auto first_number = [&](const Sequence& q) {
      return among == Among::all ? q.first_id : among == Among::first ? q.number : q.first_id - q.number;
    };
    const Sequence q = find([&](const Sequence& x) {
      const int count = among == Among::all ? x.segments : among == Among::first ? 1 : x.segments - 1;
      return first_number(x) <= number && number < first_number(x) + count;
    });
    const int index = number - first_number(q) + (among == Among::later);
    const int begin = first_chunk_of(p, q.chunks, index, q.segments);
    return {.sequence = q.number,
            .index = index,
            .count = q.segments,
            .id = q.first_id + index,
            .first_chunk = begin,
            .chunks = first_chunk_of(p, q.chunks, index + 1, q.segments) - begin,
            .begin = q.begin,
            .length = q.length};
  }

  // The sequence of that rank by length, the longest first, where a warp can see them all: the last ones to
  // start are short.
  KL_DEVICE int by_length(int rank) const {
    if (p.sequences > 32) return rank;
    int before = 0;
    for (int m = 0; m < p.sequences; ++m) {
      const int other = __shfl_sync(0xffffffffu, first.chunks, m);
      before += other > first.chunks || (other == first.chunks && m < first.number);
    }
    return __ffs(static_cast<int>(__ballot_sync(0xffffffffu, first.number >= 0 && before == rank))) - 1;
  }

 private:
  const PrefillParams& p;
  Sequence first;  // the lane's of the first 32

  // Sequence n0 + lane, before_id segments before sequence n0.
  KL_DEVICE Sequence some(int n0, int before_id) const {
    const int lane = static_cast<int>(threadIdx.x % 32), n = n0 + lane;
    Sequence q{.number = -1, .begin = 0, .length = 0, .chunks = 0, .segments = 0, .first_id = 0};
    if (n < p.sequences) {
      q.number = n;
      q.begin = row_number(p.cu_seqlens, n);
      q.length = row_number(p.cu_seqlens, n + 1) - q.begin;
      q.chunks = chunks_of(q.length);
      q.segments = segments_of(p, q.chunks);
    }
    int sum = q.segments;
    if (p.sequences > 1)
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += other;
      }
    q.first_id = before_id + sum - q.segments;
    return q;
  }
};

// Where one head's state stands in the pool.
struct StatePlace {
  Operand pool;
  int64_t base, k_stride, v_stride;
};
KL_DEVICE StatePlace state_place(const PrefillParams& p, int slot, int head) {
  return {p.state, offset_of(p.state, slot, head), opaque(p.state_v_first ? int64_t{1} : p.state_row_stride),
          opaque(p.state_v_first ? p.state_row_stride : int64_t{1})};
}

}  // namespace kl::cuda
