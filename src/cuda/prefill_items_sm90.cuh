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
  KL_DEVICE Consumer(const PrefillParams& params, R r, int w)
      : p(params),
        ring(r),
        scan(r, w),
        warp(w),
        lane(static_cast<int>(threadIdx.x % 32)),
        g(lane / 4),
        t(lane % 4) {}

  // Until the block's items end; true if something is left to be joined.
  KL_DEVICE bool run() {
    for (;;) {
      wait();
      const ChunkInfo& info = ring.info(turn.slot);
      const Item item = info.item;
      if (is_end(item)) return item == Item::join;
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
  int warp, lane, g, t;
  Turn<R::kSlots> turn{0};
  int norms = 0;  // which of the two buffers is next

  KL_DEVICE void wait() { mbarrier_wait(ring.ready(turn.slot), turn.phase); }
  KL_DEVICE void release() {
    mbarrier_arrive_warp(ring.free(turn.slot));
    turn.advance(1);
  }

  KL_DEVICE void run_value(int probed) {
    const ChunkInfo& first = ring.info(turn.slot);
    const int64_t row = first.token + lane / 2;
    bf16* out =
        static_cast<bf16*>(p.out.data) + offset_of(p.out, row, first.head) + 16 * warp + 8 * (lane % 2);
    const int64_t out_step = kChunkTokens * p.out.token_stride;
    float S[D / 2];
    load_state(first, S);
    if (first.rows > 0) {  // not an empty sequence
      for (int left = first.chunks;;) {
        const int checkpoint = scan.template chunk<true>(turn.slot, left == 1, out, S);
        out += out_step;
        if (checkpoint >= 0) store_checkpoints(ring.info(turn.slot), S);
        if (--left == 0) break;
        release();
        wait();
      }
    }
    end_value(ring.info(turn.slot), probed, S);
    release();
  }

  // A transition, or the first chunks of a value item's, whose slots it leaves to the values. Returns the
  // number of chunks after which M was closed, or 0.
  KL_DEVICE int run_transition(bool probe) {
    const ChunkInfo& first = ring.info(turn.slot);
    const int serial = first.serial;
    const int end = probe ? min(kProbeChunks, first.chunks) : first.chunks;
    bf16* out = static_cast<bf16*>(p.queries) + ((first.token + lane / 2) * p.heads + first.head) * D +
                16 * warp + 8 * (lane % 2);
    const int64_t out_step = static_cast<int64_t>(kChunkTokens) * p.heads * D;
    float S[D / 2];
    load_transition(first, S);
    int closed;
    for (int done = first.chunk + 1;; ++done) {
      scan.template chunk<false>(turn.slot, done == ring.info(turn.slot).chunks, out, S);
      out += out_step;
      const bool last = done == end;
      closed = (probe || last || done % 4 == 0) && negligible(S) ? done : 0;
      if (last || closed > 0) break;
      probe ? turn.advance(1) : release();
      wait();
    }
    end_transition(ring.info(turn.slot), probe, end, closed, S);
    if (probe) return closed;
    release();
    // Chunks that the loader had sent before it heard that the item is over.
    for (wait(); ring.info(turn.slot).serial == serial; wait()) release();
    return closed;
  }

  // ---- States ----

  // Calls f(value channel, key channel, element) for the lane's pairs of neighbouring key channels.
  template <class F>
  KL_DEVICE void for_each_pair(float* S, F&& f) const {
#pragma unroll
    for (int c = 0; c < D / 8; ++c)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(16 * warp + g + 8 * half, 8 * c + 2 * t, S + 4 * c + 2 * half);
  }
  KL_DEVICE int item(const ChunkInfo& info) const { return info.segment * p.heads + info.head; }
  KL_DEVICE void store_matrix(float* matrices, int number, float* S) const {
    float* to = matrices + static_cast<int64_t>(number) * D * D;
    for_each_pair(S, [&](int v, int k, const float* x) {
      *reinterpret_cast<float2*>(to + v * D + k) = {x[0], x[1]};
    });
  }
  KL_DEVICE void load_transition(const ChunkInfo& info, float* S) const {
    if (info.chunk == 0) {
      for_each_pair(S, [&](int v, int k, float* x) { x[0] = v == k, x[1] = v == k + 1; });
      return;
    }
    const float* from = p.transition + static_cast<int64_t>(item(info)) * D * D;
    for_each_pair(S, [&](int v, int k, float* x) {
      const float2 two = *reinterpret_cast<const float2*>(from + v * D + k);
      x[0] = two.x, x[1] = two.y;
    });
  }
  KL_DEVICE void load_state(const ChunkInfo& info, float* S) const {
    const int slot = info.segment_index == 0 && p.slot != nullptr ? p.slot[info.sequence] : -1;
    if (slot < 0) {
#pragma unroll
      for (int i = 0; i < D / 2; ++i) S[i] = 0;
      return;
    }
    const StatePlace place = state_place(p, slot, info.head);
    for_each_pair(S, [&](int v, int k, float* x) {
      x[0] = load_element(place.pool, place.base + k * place.k_stride + v * place.v_stride);
      x[1] = load_element(place.pool, place.base + (k + 1) * place.k_stride + v * place.v_stride);
    });
  }
  KL_DEVICE void store_pool(int slot, int head, float* S) const {
    if (slot < 0) return;
    const StatePlace place = state_place(p, slot, head);
    for_each_pair(S, [&](int v, int k, const float* x) {
      store_element(place.pool, place.base + k * place.k_stride + v * place.v_stride, x[0]);
      store_element(place.pool, place.base + (k + 1) * place.k_stride + v * place.v_stride, x[1]);
    });
  }
  KL_DEVICE void store_checkpoints(const ChunkInfo& info, float* S) const {
    for (int c = info.checkpoint; c < p.checkpoints && p.checkpoint_row[c] == info.token + info.rows; ++c)
      store_pool(p.checkpoint_slot[c], info.head, S);
  }
  KL_DEVICE void store_final(const ChunkInfo& info, float* S) const {
    if (p.slot != nullptr)
      store_pool((p.slot_out != nullptr ? p.slot_out : p.slot)[info.sequence], info.head, S);
  }

  // ---- Ends of items ----

  KL_DEVICE bool negligible(float* S) {
    float sums[4] = {};  // one would be a chain of D / 2 dependent instructions
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sums[i % 4] = fmaf(S[i], S[i], sums[i % 4]);
    const float sum = warp_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    float* parts = reinterpret_cast<float*>(ring.memory + R::kNorms) + norms * kConsumerWarps;
    norms ^= 1;  // the next one does not have to wait until everybody has read this one
    if (lane == 0) parts[warp] = sum;
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
    if (warp != 0 || lane != 0) return;
    store_release(p.progress + item(info), closed > 0 ? -closed : end);
    if (probe) {
      if (closed == 0) atomicAdd(&p.counters->open, 1);
      add_release(&p.counters->probed, 1);
    } else {
      ring.stopped() = info.serial;
    }
  }
  // A warp needs of other items what the same warp wrote there, so warps wait for each other one by one.
  KL_DEVICE int* ready(int number) const { return p.ready + number * kConsumerWarps + warp; }
  KL_DEVICE int wait_for(int number) const {
    int x = kNotReady;
    while (lane == 0 && (x = load_acquire(ready(number))) == kNotReady) __nanosleep(20);
    return __shfl_sync(0xffffffffu, x, 0);
  }
  KL_DEVICE void end_value(const ChunkInfo& info, int probed, float* S) const {
    if (info.segment_count == 1) return store_final(info, S);
    const int own = item(info);
    const bool is_state = info.segment_index == 0 || probed > 0;
    if (kProbes && is_state && info.segment_index + 1 == info.segment_count) {
      wait_for(own - info.segment_index * p.heads);  // the first segment has read what may be overwritten
      store_final(info, S);
    } else {
      store_matrix(p.carried, own, S);
    }
    __syncwarp();
    if (lane == 0) store_release(ready(own), is_state ? kState : kPart);
    if (kProbes && probed > 0) add_incoming(info, probed);
  }

  // Adds the part that the state before the segment has in the outputs, where the state is known already; for
  // the warp's value channels.
  KL_DEVICE void add_incoming(const ChunkInfo& info, int probed) const {
    const int before = item(info) - p.heads;
    const int64_t first = info.token - info.chunk * kChunkTokens;
    const int64_t end = min(first + probed * kChunkTokens, info.token + info.rows);
    StatePart<D, 1> part;
    part.load(p, info.head, first, end, 16 * warp);
    if (wait_for(before) != kState) return;
    uint32_t state[2][D / 32][4];
    const float* from =
        p.carried + static_cast<int64_t>(before) * D * D + (16 * warp + g / 2 * 4 + g % 2) * D + 8 * t;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int step = 0; step < D / 32; ++step) {
        const float4 a = load4(from + 2 * tile * D + 32 * step),
                     b = load4(from + 2 * tile * D + 32 * step + 4);
        uint32_t(&s)[4] = state[tile][step];
        s[0] = pack_bf16(a.x, a.y), s[1] = pack_bf16(a.z, a.w);
        s[2] = pack_bf16(b.x, b.y), s[3] = pack_bf16(b.z, b.w);
      }
    for (int64_t token = first;;) {
      part.add([&](int, int step, uint32_t(&x)[2][4]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[0][i] = state[0][step][i], x[1][i] = state[1][step][i];
      });
      token += kChunkTokens;
      if (token >= end) return;
      part.load(p, info.head, token, end, 16 * warp);
    }
  }
};

}  // namespace kl::cuda
