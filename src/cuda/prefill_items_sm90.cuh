// The consumers of a Hopper prefill: the items of a block (prefill_segments.cuh), one after the other. A
// warpgroup has 64 value channels of the head's state; what it does with a chunk is prefill_scan_sm90.cuh's.
#pragma once

#include "cuda/prefill_join_sm90.cuh"
#include "cuda/prefill_scan_sm90.cuh"
#include "cuda/reduce.cuh"

namespace kl::cuda {

// kProbes: PrefillParams::probes.
template <class Slot, bool kProbes>
class Consumer {
  using R = Ring<Slot>;
  static constexpr int D = Slot::D;
  static constexpr int kWarps = D / 16;

 public:
  KL_DEVICE Consumer(const PrefillParams& params, R r, int w) : p(params), ring(r), scan(r, w), warp(w) {}

  // Until the block's items end; true if something is left to be joined.
  KL_DEVICE bool run() {
    for (;;) {
      // What a block's first item is, is known before its first factors are: they are waited for where they
      // are needed.
      mbarrier_wait(ring.raw(turn.slot), turn.phase);
      const ChunkInfo& info = ring.info(turn.slot);
      const Item item = info.item;
      if (is_end(item)) return wait(), item == Item::join;
      const bool value = item == Item::value;
      int closed = 0;  // chunks after which M was closed; 0: it was not, or nobody looked
      if (!value || (kProbes && info.segment_index > 0)) {
        const Turn<R::kSlots> first = turn;
        closed = run_transition(value);
        if (value) turn = first;  // the values pass through the same slots
      }
      if (value) run_value(closed);
    }
  }

 private:
  const PrefillParams& p;
  R ring;
  Scan<Slot> scan;
  int warp;
  Turn<R::kSlots> turn{0};
  int norms = 0;  // which of the two buffers is next

  // Outside of the loops, which have Scan::own_lane: read again and again, so that nothing that is made of it
  // takes a register of theirs.
  KL_DEVICE static uint32_t lane() { return opaque(threadIdx.x) % 32; }
  KL_DEVICE void wait() { mbarrier_wait(ring.ready(turn.slot), turn.phase); }
  // To the next chunk, done with this one. Of the chunk before, a producer needs its decay after it
  // (kMiddle).
  KL_DEVICE void next() {
    const int done = turn.slot;
    if (!R::kMiddle) mbarrier_arrive_warp(ring.free(done), scan.own_lane);
    turn.advance(1);
    wait();
    if (R::kMiddle) mbarrier_arrive_warp(ring.free(done), scan.own_lane);
  }

  KL_DEVICE void run_value(int probed) {
    const ChunkInfo& first = ring.info(turn.slot);
    const int64_t row = first.token + lane() / 2;
    bf16* out =
        static_cast<bf16*>(p.out.data) + offset_of(p.out, row, first.head) + 16 * warp + 8 * (lane() % 2);
    const int64_t out_step = kChunkTokens * p.out.token_stride;
    float S[D / 2];
    load_state(first, S);
    if (kProbes && first.segment_index == 0 && first.segment_count > 1) tell(item(first), kStarted);
    wait();
    wgmma_pin<D / 2>(S);  // or ptxas moves half of it about in every chunk
    int to_meet = probed;
    if (first.rows > 0) {  // not an empty sequence
      for (;;) {
        int flags;
        for (;;) {  // apart, so that nothing else has a say in where this loop keeps the state
          flags = scan.template chunk<true>(turn.slot, out, S);
          out += out_step;
          bool stop = (flags & (kLastChunk | kCheckpointAfter)) != 0;  // one branch for all that is rare
          if (kProbes) stop |= --to_meet == 0;
          if (stop) break;
          next();
        }
        if (kProbes && to_meet == 0) meet(ring.info(turn.slot));
        if (flags & kCheckpointAfter) store_checkpoints(ring.info(turn.slot), S);
        if (flags & kLastChunk) break;
        next();
      }
    }
    const int own = item(ring.info(turn.slot));
    const Ready told = end_value(ring.info(turn.slot), probed, S);
    next();
    // Nobody asks if nothing is left to be joined, and a release waits for all that was stored.
    if (told != kNotReady && ring.info(turn.slot).item != Item::none) tell(own, told);
  }

  // A transition, or the first chunks of a value item's, whose slots it leaves to the values. Returns the
  // number of chunks after which M was closed, or 0.
  KL_DEVICE int run_transition(bool probe) {
    const ChunkInfo& first = ring.info(turn.slot);
    const int serial = first.serial;
    const int end = probe ? min(kProbeChunks, first.chunks) : first.chunks;
    const int at = static_cast<int>(lane());
    bf16* out = static_cast<bf16*>(p.queries) + first.head * D;
    if constexpr (kProbes)
      out += (first.token + at / 4) * p.heads * D + query_at(16 * warp + 2 * (at % 4));
    else
      out += (first.token + at / 2) * p.heads * D + 16 * warp + 8 * (at % 2);
    const int64_t out_step = static_cast<int64_t>(kChunkTokens) * p.heads * D;
    float S[D / 2];
    load_transition(first, S);
    wait();
    int closed;
    for (int done = first.chunk + 1;; ++done) {
      scan.template chunk<false, kProbes>(turn.slot, out, S, out_step / 2);
      out += out_step;
      const bool last = done == end;
      // Hardly any gate closes it in one chunk, and looking takes most of a chunk's time.
      closed = (last || (probe ? done > 1 : done % 4 == 0)) && negligible(S) ? done : 0;
      if (last || closed > 0) break;
      if (probe)
        turn.advance(1), wait();
      else
        next();
    }
    end_transition(ring.info(turn.slot), probe, end, closed, S);
    if (probe) return closed;
    // And past the chunks that the loader had sent before it heard that the item is over.
    do next();
    while (ring.info(turn.slot).serial == serial);
    return closed;
  }

  // ---- States ----

  // Calls f(value channel, key channel, element) for the lane's pairs of neighbouring key channels.
  template <class F>
  KL_DEVICE void for_each_pair(float* S, F&& f) const {
    const int at = static_cast<int>(lane()), g = at / 4, t = at % 4;
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(16 * warp + g + 8 * half, 8 * c + 2 * t, S + 4 * c + 2 * half);
  }
  // What key channels k and k + 1 decay by after the chunk.
  KL_DEVICE float2 decays_after(int k) const {
    if constexpr (!R::kMiddle) return {1, 1};
    const float2 d = *reinterpret_cast<const float2*>(ring.after(turn.slot) + k);
    return {decay_after(d.x), decay_after(d.y)};
  }
  // The same for the state after the chunk: f(value channel, key channel, its two elements).
  template <class F>
  KL_DEVICE void for_each_pair_after(float* S, F&& f) const {
    for_each_pair(S, [&](int v, int k, const float* x) {
      const float2 d = decays_after(k);
      f(v, k, float2{x[0] * d.x, x[1] * d.y});
    });
  }
  KL_DEVICE int item(const ChunkInfo& info) const { return info.segment * p.heads + info.head; }
  KL_DEVICE void store_matrix(float* matrices, int number, float* S) const {
    float* to = matrices + static_cast<int64_t>(number) * D * D;
    for_each_pair_after(
        S, [&](int v, int k, float2 x) { *reinterpret_cast<float2*>(to + matrix_at<D>(v, k)) = x; });
  }
  KL_DEVICE void load_matrix(const float* matrices, int number, float* S) const {
    const float* from = matrices + static_cast<int64_t>(number) * D * D;
    for_each_pair(S, [&](int v, int k, float* x) {
      const float2 two = *reinterpret_cast<const float2*>(from + matrix_at<D>(v, k));
      x[0] = two.x, x[1] = two.y;
    });
  }
  KL_DEVICE void load_transition(const ChunkInfo& info, float* S) const {
    if (info.chunk == 0) {
      for_each_pair(S, [&](int v, int k, float* x) { x[0] = v == k, x[1] = v == k + 1; });
      return;
    }
    load_matrix(p.transition, item(info), S);
  }
  KL_DEVICE void load_state(const ChunkInfo& info, float* S) const {
    const int slot = info.segment_index == 0 && p.slot != nullptr ? p.slot[info.sequence] : -1;
    if (slot < 0) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) S[i] = 0;
      return;
    }
    const PoolFours pool(*this, slot, info.head);
    const char* from = pool.at;
    if (p.state.is_bf16) {
#pragma unroll
      for (int c = 0; c < D / 8; ++c, from += pool.step) {
        const uint2 four = *reinterpret_cast<const uint2*>(from);
        S[4 * c] = __uint_as_float(four.x), S[4 * c + 1] = __uint_as_float(four.y);
      }
#pragma unroll
      for (int c = 0; c < D / 8; ++c) {
        const uint32_t x = __float_as_uint(S[4 * c]), y = __float_as_uint(S[4 * c + 1]);
        S[4 * c] = low_half(x), S[4 * c + 1] = high_half(x), S[4 * c + 2] = low_half(y),
              S[4 * c + 3] = high_half(y);
      }
    } else {
#pragma unroll
      for (int c = 0; c < D / 8; ++c, from += pool.step) {
        const float4 four = *reinterpret_cast<const float4*>(from);
        S[4 * c] = four.x, S[4 * c + 1] = four.y, S[4 * c + 2] = four.z, S[4 * c + 3] = four.w;
      }
    }
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      *pool.four = {S[4 * c], S[4 * c + 1], S[4 * c + 2], S[4 * c + 3]};
      __syncwarp();
#pragma unroll
      for (int e = 0; e < 4; ++e) S[4 * c + e] = *pool.element(e);
      __syncwarp();
    }
  }
  // How a warp reads and writes the pool, four neighbours of a row at a time: 8 key channels by its 16 value
  // channels pass through its corner of shared memory.
  struct PoolFours {
    char* at;      // the lane's first four elements in the pool
    int64_t step;  // bytes to those of the next 8 key channels
    float4* four;  // where they stand in shared memory
    float* stage;
    int first, next_k, next_v;

    KL_DEVICE PoolFours(const Consumer& c, int slot, int head) {
      const PrefillParams& p = c.p;
      const int at_lane = static_cast<int>(lane()), g = at_lane / 4, t = at_lane % 4;
      stage = reinterpret_cast<float*>(c.ring.memory + R::kStage + c.warp * 512);
      int64_t row, column;
      if (p.state_v_first) {
        row = 16 * c.warp + at_lane / 2, column = 4 * (at_lane % 2), step = 8;
        four = reinterpret_cast<float4*>(stage) + at_lane;
        first = 8 * g + 2 * t, next_k = 1, next_v = 64;
      } else {
        row = at_lane / 4, column = 16 * c.warp + 4 * (at_lane % 4), step = 8 * p.state_row_stride;
        // Rows of 16 value channels; their fours turn with the key channel, for the banks' sake.
        four = reinterpret_cast<float4*>(stage) + 4 * g + (t + g / 2) % 4;
        first = 32 * t + (g / 4 + t) % 4 * 4 + g % 4, next_k = 16;
        next_v = 32 * t + (g / 4 + 2 + t) % 4 * 4 + g % 4 - first;
      }
      const int64_t size = p.state.is_bf16 ? 2 : 4;
      at = static_cast<char*>(p.state.data) +
           (offset_of(p.state, slot, head) + row * p.state_row_stride + column) * size;
      step *= size;
    }
    // Where the lane's elements of a state's 8 key channels stand, in the order of S.
    KL_DEVICE float* element(int e) const { return stage + first + e % 2 * next_k + e / 2 * next_v; }
  };
  KL_DEVICE void store_pool(int slot, int head, float* S) const {
    if (slot < 0) return;
    const PoolFours pool(*this, slot, head);
    char* to = pool.at;
    const int first = 2 * static_cast<int>(lane() % 4);
#pragma unroll
    for (int c = 0; c < D / 8; ++c, to += pool.step) {
      const float2 d = decays_after(8 * c + first);
#pragma unroll
      for (int e = 0; e < 4; ++e) *pool.element(e) = S[4 * c + e] * (e % 2 ? d.y : d.x);
      __syncwarp();
      const float4 x = *pool.four;
      if (p.state.is_bf16)
        *reinterpret_cast<uint2*>(to) = pack_bf16x4(x);
      else
        *reinterpret_cast<float4*>(to) = x;
      __syncwarp();
    }
  }
  KL_DEVICE void store_checkpoints(const ChunkInfo& info, float* S) const {
    for (int c = info.checkpoint; c < p.checkpoints && p.checkpoint_row[c] == info.token + info.rows; ++c)
      store_pool(p.checkpoint_slot[c], info.head, S);
  }
  KL_DEVICE void store_final(const ChunkInfo& info, float* S) const {
    if (p.slot != nullptr) store_pool(final_slots()[info.sequence], info.head, S);
  }
  KL_DEVICE const int32_t* final_slots() const { return p.slot_out != nullptr ? p.slot_out : p.slot; }

  // ---- Ends of items ----

  KL_DEVICE bool negligible(float* S) {
    float sums[4] = {};  // one would be a chain of D / 2 dependent instructions
    const auto add = [&](int k, float2 x) {
      float* two = sums + k / 8 % 2 * 2;
      two[0] = fmaf(x.x, x.x, two[0]), two[1] = fmaf(x.y, x.y, two[1]);
    };
    if (R::kMiddle && (ring.info(turn.slot).flags & kSteep) == 0) {
      const float* after = ring.after(turn.slot);
      for_each_pair(S, [&](int, int k, const float* x) {
        const float2 d = *reinterpret_cast<const float2*>(after + k);
        add(k, {x[0] * d.x, x[1] * d.y});
      });
    } else {
      for_each_pair_after(S, [&](int, int k, float2 x) { add(k, x); });
    }
    const float sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    float* parts = reinterpret_cast<float*>(ring.memory + R::kNorms) + norms * kConsumerWarps;
    norms ^= 1;  // the next one does not have to wait until everybody has read this one
    if (lane() == 0) parts[warp] = sum;
    named_barrier_sync(1, 32 * kWarps);  // all parts of the norm, and the outputs so far, are there
    float norm = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) norm += parts[w];
    return norm <= kNegligible * kNegligible;
  }
  KL_DEVICE void end_transition(const ChunkInfo& info, bool probe, int end, int closed, float* S) const {
    if (closed == 0) {
      store_matrix(p.transition, item(info), S);
      named_barrier_sync(1, 32 * kWarps);  // all of M is there
    }
    if (warp != 0 || lane() != 0) return;
    int* progress = p.progress + item(info);
    if (probe && closed > 0) {
      // A release would hold the values up until everything stored is there. Outputs and qt are released when
      // items meet, or with the word that the item is done; who needs this number waits until it is there.
      store_relaxed(progress, -closed);
      add_relaxed(&p.counters->probed, 1);
      return;
    }
    store_release(progress, closed > 0 ? -closed : end);
    if (!probe) {
      atomicExch(ring.stopped(), info.serial);
      return;
    }
    add_relaxed(&p.counters->open, 1);
    add_release(&p.counters->probed, 1);
  }
  // A warp needs of other items what the same warp wrote there, so warps wait for each other one by one.
  KL_DEVICE int* ready(int number) const { return p.ready + number * kConsumerWarps + warp; }
  KL_DEVICE void tell(int number, Ready x) const {
    __syncwarp();
    if (lane() == 0) store_release(ready(number), x);
  }
  KL_DEVICE void wait_for(int number, Ready least) const {
    while (lane() == 0 && load_acquire(ready(number)) < least) __nanosleep(20);
    __syncwarp();
  }
  KL_DEVICE int* met(int number) const { return p.met + number * kConsumerWarps + warp; }
  // The tokens up to this chunk's end are all that have a qt; qt and their own outputs are there.
  KL_DEVICE void meet(const ChunkInfo& info) const {
    __syncwarp();
    if (lane() == 0) add_release(met(item(info)), info.chunk * kChunkTokens + info.rows);
  }

  // What there is to be told of the item.
  KL_DEVICE Ready end_value(const ChunkInfo& info, int probed, float* S) const {
    if (info.segment_count == 1) {
      store_final(info, S);
      return kNotReady;
    }
    const int own = item(info), behind = own + p.heads;
    const bool is_state = info.segment_index == 0 || probed > 0;
    const bool last = info.segment_index + 1 == info.segment_count, final = kProbes && is_state && last;
    int share[2] = {0, 0};  // tokens behind that the state has a share in, own ones that the one before has
    int started = 0, slot = -1;
    if (kProbes) {  // one trip to memory, a word a lane
      const int at = static_cast<int>(lane());
      const int* words = nullptr;
      if (at == 0 && probed > 0) words = met(own);  // the lane that added to it sees what it added
      if (at == 1 && is_state && !last) words = met(behind);
      if (at == 2 && final) words = ready(own - info.segment_index * p.heads);
      if (at == 3 && final && p.slot != nullptr) words = final_slots() + info.sequence;
      int word = at == 3 ? -1 : 0;
      if (words != nullptr) word = load_acquire(words);
      __syncwarp();                                                // seen by one lane, seen by all
      share[1] = __shfl_sync(0xffffffffu, word, 0) - kStateFirst;  // negative: the item before adds it
      share[0] = __shfl_sync(0xffffffffu, word, 1);
      started = __shfl_sync(0xffffffffu, word, 2);
      slot = __shfl_sync(0xffffffffu, word, 3);
    }
    if (final) {
      // The first segment has read what may be overwritten.
      if (started < kStarted) wait_for(own - info.segment_index * p.heads, kStarted);
      store_pool(slot, info.head, S);
    } else if (share[0] == 0) {
      store_matrix(p.carried, own, S);
      if (kProbes && is_state) {
        __syncwarp();
        if (lane() == 0) share[0] = compare_and_swap(met(behind), 0, kStateFirst);
        __syncwarp();
        share[0] = __shfl_sync(0xffffffffu, share[0], 0);
      }
    }
    if (kProbes && share[0] > 0) {
      for_each_pair(S, [&](int, int k, float* x) {
        const float2 d = decays_after(k);
        x[0] *= d.x, x[1] *= d.y;
      });
      add_share(info.head, info.token + info.rows, share[0], S);
    }
    if (kProbes && share[1] > 0) {
      load_matrix(p.carried, own - p.heads, S);
      add_share(info.head, info.token - info.chunk * kChunkTokens, share[1], S);
    }
    return kDone;
  }

  // out += qt · S for these tokens and the warp's value channels.
  KL_DEVICE void add_share(int head, int64_t first, int tokens, const float* S) const {
    uint32_t state[2][D / 8];  // right operands: [value channel / 8]
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        state[tile][c] = pack_bf16(S[4 * c + 2 * tile], S[4 * c + 2 * tile + 1]);
#pragma unroll 1
    for (int done = 0; done < tokens; done += 2 * kChunkTokens) {  // two chunks' loads at a time
      ShareTokens chunks[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        load_share(head, first + done + i * kChunkTokens, tokens - done - i * kChunkTokens, chunks[i]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (done + i * kChunkTokens < tokens) add_share(state, chunks[i]);
    }
  }
  // The lane's part of 16 tokens: qt, and outputs so far.
  struct ShareTokens {
    uint4 q[2][D / 32];
    uint32_t* out[2];  // null: no such token
    uint32_t old[2][2];
  };
  KL_DEVICE void load_share(int head, int64_t first, int tokens, ShareTokens& x) const {
    const int at = static_cast<int>(lane()), g = at / 4, t = at % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = first + g + 8 * half;
      const bool valid = g + 8 * half < tokens;
      const bf16* from = static_cast<const bf16*>(p.queries) + (row * p.heads + head) * D + 8 * t;
      bf16* out = static_cast<bf16*>(p.out.data) + offset_of(p.out, row, head) + 16 * warp + 2 * t;
      x.out[half] = valid ? reinterpret_cast<uint32_t*>(out) : nullptr;
#pragma unroll
      for (int step = 0; step < D / 32; ++step)
        x.q[half][step] = valid ? *reinterpret_cast<const uint4*>(from + 32 * step) : uint4{0, 0, 0, 0};
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) x.old[half][tile] = valid ? x.out[half][4 * tile] : 0;
    }
  }
  KL_DEVICE static void add_share(const uint32_t (&state)[2][D / 8], const ShareTokens& x) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float d[4] = {};
#pragma unroll
      for (int step = 0; step < D / 32; ++step) {
        const uint4 a = x.q[0][step], b = x.q[1][step];
        const uint32_t* s = state[tile] + 4 * step;
        mma_bf16(d, {a.x, b.x, a.y, b.y}, s[0], s[1]);
        mma_bf16(d, {a.z, b.z, a.w, b.w}, s[2], s[3]);
      }
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (x.out[half] != nullptr) {
          const uint32_t old = x.old[half][tile];
          x.out[half][4 * tile] = pack_bf16(low_half(old) + d[2 * half], high_half(old) + d[2 * half + 1]);
        }
    }
  }
};

}  // namespace kl::cuda
