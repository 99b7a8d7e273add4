// The consumers of the Hopper prefill: a warpgroup carries 64 value channels of one head's state through the
// chunks of an item, transposed, as the f32 accumulators of its matrix instructions. Per chunk, with the
// factors that kda_factors_sm90.cuh names:
//
//   [R | O]  = [v | 0]^T + S^T [-k e^G | scale q e^G]^T        64 x 32 x D
//   O       += R (A T)^T                                       64 x 16 x 16
//   S^T      = S^T Diag(e^Gend) + R (T^T (k e^(Gend - G)))     64 x D x 16
//
// S and R are rounded to bf16 where they are left operands; accumulators are rearranged into them inside a
// thread. Lane (g, t) of warp w has value channels 16 w + g and 16 w + g + 8.
#pragma once

#include "ops/kda/kda_pipeline_sm90.cuh"

namespace kl::cuda {

template <int D, bool kGateF32>
class Consumer {
  using R = Ring<D, kGateF32>;
  static constexpr int kWarps = D / 16;

 public:
  KL_DEVICE Consumer(const PrefillParams& params, R r, int w)
      : p(params), ring(r), warp(w), lane(static_cast<int>(threadIdx.x % 32)), g(lane / 4), t(lane % 4) {}

  KL_DEVICE void run() {
    for (;;) {
      wait();
      const Item item = ring.info(turn.slot).item;
      if (item == Item::none) return;
      if (item == Item::value)
        run_item<true>();
      else
        run_item<false>();
    }
  }

 private:
  const PrefillParams& p;
  R ring;
  int warp, lane, g, t;
  Turn<R::kSlots> turn{0};

  KL_DEVICE void wait() { mbarrier_wait(ring.ready(turn.slot), turn.phase); }
  KL_DEVICE void release() {
    __syncwarp();
    if (lane == 0) mbarrier_arrive(ring.free(turn.slot));
    turn.advance(1);
  }

  template <bool kValue>
  KL_DEVICE void run_item() {
    const ChunkInfo& first = ring.info(turn.slot);
    const int serial = first.serial;
    const int64_t row = first.token + lane / 2;
    const int v = 16 * warp + 8 * (lane % 2);
    bf16* out = kValue ? static_cast<bf16*>(p.out.data) + offset_of(p.out, row, first.head) + v
                       : static_cast<bf16*>(p.queries) + (row * p.heads + first.head) * D + v;
    const int64_t out_step = kChunkTokens * (kValue ? p.out.token_stride : static_cast<int64_t>(p.heads) * D);
    float S[D / 2];  // [channel / 8][2 (v / 8) + channel % 2]
    load_state(first, S);
    if (first.rows == 0) {  // an empty sequence
      if (kValue) end_value(first, S);
      release();
      return;
    }
    int left = first.chunks - first.chunk;
    for (;;) {
      const int checkpoint = chunk<kValue>(left == 1, out, S);
      out += out_step;
      const ChunkInfo& info = ring.info(turn.slot);
      const bool last = --left == 0;
      bool over = last;
      if (kValue) {
        if (checkpoint >= 0) store_checkpoints(info, S);
        if (last) end_value(info, S);
      } else {
        over = transition_over(info, S, last);
      }
      release();
      if (over) break;
      wait();
    }
    // Chunks that the loader had sent before it heard that the item is over.
    for (wait(); ring.info(turn.slot).serial == serial; wait()) release();
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
  KL_DEVICE int64_t matrix(const ChunkInfo& info) const {  // of `carried` and `transition`
    return (static_cast<int64_t>(info.segment) * p.heads + info.head) * D * D;
  }
  KL_DEVICE void store_matrix(float* to, float* S) const {
    for_each_pair(S, [&](int v, int k, const float* x) {
      *reinterpret_cast<float2*>(to + v * D + k) = {x[0], x[1]};
    });
  }
  KL_DEVICE void load_state(const ChunkInfo& info, float* S) const {
    if (info.item == Item::transition) {
      const float* from = p.transition + matrix(info);
      for_each_pair(S, [&](int v, int k, float* x) {
        const float2 two = *reinterpret_cast<const float2*>(from + v * D + k);
        x[0] = two.x, x[1] = two.y;
      });
      return;
    }
    if (info.item == Item::probe) {
      for_each_pair(S, [&](int v, int k, float* x) { x[0] = v == k, x[1] = v == k + 1; });
      return;
    }
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
  KL_DEVICE void end_value(const ChunkInfo& info, float* S) const {
    if (info.segment_count > 1)
      store_matrix(p.carried + matrix(info), S);
    else if (p.slot != nullptr)
      store_pool((p.slot_out != nullptr ? p.slot_out : p.slot)[info.sequence], info.head, S);
  }
  // After a chunk of a transition: true if nothing of the item is left to do.
  KL_DEVICE bool transition_over(const ChunkInfo& info, float* S, bool last) const {
    const int done = info.chunk + 1;
    if (!last && (info.item == Item::probe || done % 4 != 0)) return false;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) sum = fmaf(S[i], S[i], sum);
    sum = warp_sum(sum);
    float* norms = reinterpret_cast<float*>(ring.memory + R::kNorms);
    if (lane == 0) norms[warp] = sum;
    named_barrier_sync(1, 32 * kWarps);  // all parts of the norm are there
    float norm = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) norm += norms[w];
    named_barrier_sync(1, 32 * kWarps);  // ... and have been read
    const bool negligible = norm <= kNegligible * kNegligible;
    if (warp == 0 && lane == 0 && (last || negligible)) {
      p.progress[info.segment * p.heads + info.head] = negligible ? -done : done;
      if (!last) ring.stopped() = info.serial;
    }
    if (last && !negligible) store_matrix(p.transition + matrix(info), S);
    return last || negligible;
  }

  // ---- One chunk ----

  // Returns the chunk's checkpoint.
  template <bool kValue>
  KL_DEVICE int chunk(bool last, bf16* out, float* S) const {
    // The same in all lanes, and the compiler knows: descriptors go to uniform registers at once.
    const int slot = __shfl_sync(0xffffffffu, turn.slot, 0);
    const uint32_t base = ring.slot(slot);
    const uint64_t pair = wgmma_matrix(base + R::kPair, 16, 1024, WgmmaLayout::swizzle_128);
    const uint64_t write = wgmma_matrix(base + R::kWrite, R::kPanelBytes, 1024, WgmmaLayout::swizzle_128);

    float RO[16];  // R of tokens 0-7, 8-15, O of tokens 0-7, 8-15
#pragma unroll
    for (int i = 0; i < 16; ++i) RO[i] = 0;
    if (kValue) {
      uint32_t v[4];  // matrix m: tokens 8 (m % 2) ..., value channels 8 (m / 2) ...
      ldmatrix_x4_trans(
          v, base + R::kValue + warp / 4 * R::kPanelBytes + piece_at(lane % 16, 2 * (warp % 4) + lane / 16));
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int e = 4 * (m % 2) + 2 * (m / 2);
        RO[e] = __uint_as_float(v[m] << 16), RO[e + 1] = __uint_as_float(v[m] & 0xffff0000u);
      }
      if (last) {
        const int rows = ring.info(slot).rows;
#pragma unroll
        for (int e = 0; e < 8; ++e)
          if (2 * t + e % 2 + e / 4 * 8 >= rows) RO[e] = 0;
      }
    }
    uint32_t s[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[step][i] = pack_bf16(S[8 * step + 2 * i], S[8 * step + 2 * i + 1]);
    // Behind the issue of the first product this would be free, but ptxas then spills or serialises every
    // wgmma.
    const float* decay = ring.decay(slot) + 2 * t;
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const float2 d = *reinterpret_cast<const float2*>(decay + 8 * c);
      S[4 * c] *= d.x, S[4 * c + 1] *= d.y, S[4 * c + 2] *= d.x, S[4 * c + 3] *= d.y;
    }

    wgmma_pin<D / 2>(S);
    wgmma_pin<16>(RO);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      wgmma_m64n32k16<0>(RO, s[step], pair + (step / 4 * 2 * R::kPanelBytes + step % 4 * 32) / 16);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_pin<16>(RO);
    const uint32_t r[4] = {pack_bf16(RO[0], RO[1]), pack_bf16(RO[2], RO[3]), pack_bf16(RO[4], RO[5]),
                           pack_bf16(RO[6], RO[7])};
    wgmma_pin<16>(RO);
    wgmma_pin<D / 2>(S);
    wgmma_fence();
    // The first half of this product's right operand is whatever stands before A T, and its result is not
    // used: an accumulator of eight registers inside one of sixteen would be serialised.
    wgmma_m64n32k16<0>(RO, r,
                       wgmma_matrix(ring.base() + R::kRead + slot * 512 - 512, 128, 256, WgmmaLayout::plain));
    if constexpr (D == 128)
      wgmma_m64n128k16<1>(S, r, write);
    else
      wgmma_m64n64k16<1>(S, r, write);
    wgmma_commit();
    const int checkpoint = kValue ? ring.info(slot).checkpoint : -1;
    wgmma_wait<0>();
    wgmma_pin<16>(RO);
    wgmma_pin<D / 2>(S);
    const uint32_t o[4] = {pack_bf16(RO[8], RO[9]), pack_bf16(RO[10], RO[11]), pack_bf16(RO[12], RO[13]),
                           pack_bf16(RO[14], RO[15])};
    // 16 value channels x 16 tokens through the warp's corner of shared memory, so that 32 bytes of a row
    // leave at a time.
    const uint32_t stage = ring.base() + R::kStage + warp * 512;
    stmatrix_x4_trans(stage + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16, o);
    __syncwarp();
    const uint4 eight = *reinterpret_cast<const uint4*>(ring.memory + R::kStage + warp * 512 + lane * 16);
    if (!last || lane / 2 < ring.info(slot).rows) *reinterpret_cast<uint4*>(out) = eight;
    __syncwarp();
    return checkpoint;
  }
};

}  // namespace kl::cuda
