// The Hopper prefill's division of labour: chunks, segments of a sequence, the workspace, and the parameters
// that its kernels share. No arithmetic of KDA.
//
// A sequence is cut into chunks of 16 tokens, counted from its start. With few heads its chunks are also cut
// into segments that are worked on at the same time:
//
//   S after a segment = M · S before it + C          o inside it = o from a zero state + (S before)ᵀ · qt
//
// A "value" item runs the recurrence of one (segment, head) from a zero state: it yields C and o. A
// "transition" item runs the same recurrence on the columns of the identity, with v = 0: it yields M and, as
// its outputs, the effective queries qt. Once the Frobenius norm of M has fallen under kNegligible what it
// would still contribute is under the rounding of f32, whatever the gates, keys and strengths, and the item
// ends: with strong gates after its first chunks (the probe), with weak ones never.
#pragma once

#include "base/tensor.h"
#include "ops/kda/kda_operand.cuh"

namespace kl::cuda {

constexpr int kChunkTokens = 16;
constexpr int kMinSegmentChunks = 8;
constexpr int kMostSegments = 256;       // of a sequence, however uneven the batch is
constexpr int kProbeChunks = 4;          // of a transition item before anybody asks whether it may end
constexpr float kNegligible = 0x1p-24f;  // of the norm of M

struct PrefillParams {
  Operand q, k, v, g, beta, out;
  RowNumbers cu_seqlens;
  int sequences, heads, group;  // heads: value heads; group: value heads per query/key head
  Operand state;                // token_stride: of a slot; head_stride: of a head
  int64_t state_row_stride;
  bool state_v_first;
  const int32_t *slot, *slot_out;
  const int32_t *checkpoint_row, *checkpoint_slot;
  int checkpoints;
  GateParams gate;
  KdaBeta beta_kind;
  bool l2norm;
  float l2_eps, scale;
  int segment_chunks;  // a sequence of n chunks has ceil(n / segment_chunks) segments, up to kMostSegments

  // Workspace; all but `next_item` null where no sequence can have two segments.
  int* next_item;  // zero before the kernel, where no sequence can have two segments
  int*
      progress;  // [segments, heads] chunks with qt written, negated once M is negligible or nobody's concern
  float* carried;  // [segments, heads, D (v), D (k)] C; made the state before the next segment by the chain
  float* transition;  // [segments, heads, D (column), D (k)] M
  void* queries;      // [T, heads, D] bf16, qt
};

// What the workspace holds, in bytes from its start.
struct PrefillWorkspace {
  int64_t progress, carried, transition, queries, total;
};
inline int64_t max_segments(int64_t T, int64_t N, int64_t segment_chunks) {
  return N + (T / kChunkTokens + N) / segment_chunks;
}
inline PrefillWorkspace prefill_workspace(int64_t T, int64_t heads, int64_t D, int64_t segments) {
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  PrefillWorkspace w{};
  w.progress = 256;
  w.total = 256;
  if (segments == 0) return w;  // no split
  w.carried = w.progress + aligned(4 * segments * heads);
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
  return min((chunks + p.segment_chunks - 1) / p.segment_chunks, kMostSegments);
}

// Lane-parallel walk over the sequences, by a whole warp. Calls f(lane's sequence or -1, begin, length,
// chunks, segments, segments before it); stops when f returns true for all lanes.
template <class F>
KL_DEVICE void walk_sequences(const PrefillParams& p, F&& f) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  int before = 0;
  for (int n0 = 0; n0 < p.sequences; n0 += 32) {
    const int n = n0 + lane;
    int64_t begin = 0, length = 0;
    int chunks = 0, segments = 0;
    if (n < p.sequences) {
      begin = row_number(p.cu_seqlens, n);
      length = row_number(p.cu_seqlens, n + 1) - begin;
      chunks = chunks_of(length);
      segments = segments_of(p, chunks);
    }
    int sum = segments;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(0xffffffffu, sum, step);
      if (lane >= step) sum += other;
    }
    if (f(n < p.sequences ? n : -1, begin, length, chunks, segments, before + sum - segments)) return;
    before += __shfl_sync(0xffffffffu, sum, 31);
  }
}

KL_DEVICE int count_segments(const PrefillParams& p) {  // the same in every lane
  int total = 0;
  walk_sequences(p, [&](int, int64_t, int64_t, int, int segments, int) {
    total += static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(segments)));
    return false;
  });
  return total;
}

KL_DEVICE Segment find_segment(const PrefillParams& p, int id) {  // the same in every lane
  Segment s;
  walk_sequences(p, [&](int n, int64_t begin, int64_t length, int chunks, int segments, int before) {
    const bool here = n >= 0 && before <= id && id < before + segments;
    const unsigned found = __ballot_sync(0xffffffffu, here);
    if (found == 0) return false;
    const int lane = __ffs(static_cast<int>(found)) - 1;
    s.sequence = __shfl_sync(0xffffffffu, n, lane);
    s.begin = __shfl_sync(0xffffffffu, begin, lane);
    s.length = __shfl_sync(0xffffffffu, length, lane);
    s.count = __shfl_sync(0xffffffffu, segments, lane);
    s.index = id - __shfl_sync(0xffffffffu, before, lane);
    s.id = id;
    const int64_t all = __shfl_sync(0xffffffffu, chunks, lane);
    s.first_chunk = static_cast<int>(all * s.index / s.count);
    s.chunks = static_cast<int>(all * (s.index + 1) / s.count) - s.first_chunk;
    return true;
  });
  return s;
}

// Whole sequences, the longest first where a warp can see them all: the last ones to start are short.
KL_DEVICE Segment find_by_length(const PrefillParams& p, int rank) {
  if (p.sequences > 32) return find_segment(p, rank);
  int number = 0;
  walk_sequences(p, [&](int n, int64_t, int64_t, int chunks, int, int) {
    int before = 0;
    for (int m = 0; m < p.sequences; ++m) {
      const int other = __shfl_sync(0xffffffffu, chunks, m);
      before += other > chunks || (other == chunks && m < n);
    }
    number = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, n >= 0 && before == rank))) - 1;
    return true;
  });
  return find_segment(p, number);
}

// Where one head's state stands in the pool.
struct StatePlace {
  Operand pool;
  int64_t base, k_stride, v_stride;
};
KL_DEVICE StatePlace state_place(const PrefillParams& p, int slot, int head) {
  return {p.state, offset_of(p.state, slot, head), opaque(p.state_v_first ? int64_t{1} : p.state_row_stride),
          opaque(p.state_v_first ? p.state_row_stride : int64_t{1})};
}

// The kernels behind kda_prefill_sm90() that make one out of many segments: states before each segment and
// final states, then what they add to the outputs.
void chain_segments(const PrefillParams&, int64_t D, int64_t segments, int64_t T, cudaStream_t);

}  // namespace kl::cuda
