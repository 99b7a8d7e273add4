// What the producers of the Hopper prefills have in common: one warp turns the raw operands of one chunk of
// 16 tokens into the factors of its operator's chunkwise recurrence, in place, without a word to any other
// warp.
//
// All of it stands in the fragments of mma.sync: with g = lane / 4 and t = lane % 4 a lane has tokens g and
// g + 8 of channels 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16; element e = 4 (channel / 8) + 2 (token / 8) +
// channel % 2. The same registers are the left operand of a product over channels and the right one of
// another, so products of two tokens' rows never leave them.
//
// With G_i the inclusive sum of log2-decays from the chunk's start to token i, per channel, and Gm that of
// tokens 0 to 7, decays between two tokens are split at the middle of the chunk, 2^(G_i - Gm) · 2^(Gm - G_j):
// good as long as no channel decays by more than an operator's limit (DPLR: 2^100 in the chunk; KDA, whose
// states are held at the middle: 2^64 in a half). Where one does, its 16 channels are done another way (KDA:
// pairs of tokens of one half are split at the half's middle, good for 2^64 in four tokens), and in the end
// by taking every pair (i, j) by itself. Products above the diagonal may be inf
// and are never looked at.
#pragma once

#include "cuda/prefill_pipeline_sm90.cuh"

namespace kl::cuda {

constexpr float kLog2e = 1.4426950408889634f;
// Dropping the last 13 bits of an f32's fraction takes 2^-11 / m of a number on average, m its fraction from
// 1 to 2; 1 / m is 0.721 on average over the numbers of all sizes.
constexpr float kDroppedBits = 1 + 0.721f * 0x1p-11f;
constexpr float kMinLogDecay = -384.f;  // a step; 2^-384 is 0 in f32, and so is its product with anything

// Decays of 16 channels: of the lane's elements from and to the middle of the chunk, and of channels 2t, 2t +
// 1, 2t + 8 and 2t + 9 those of the halves, 2^Gm and 2^(Gend - Gm), and of the chunk.
struct MiddleDecays {
  float from[8], to[8];
  float first[4], second[4], chunk[4];
};

template <class Slot>
class FactorWarp {
 protected:
  using R = Ring<Slot>;
  static constexpr int D = Slot::D;

  KL_DEVICE explicit FactorWarp(R r)
      : ring(r), lane(static_cast<int>(threadIdx.x % 32)), g(lane / 4), t(lane % 4) {
    // Rows of the sums over a half of the chunk, as left operands: for token i < 7 minus the sum of tokens
    // i + 1 to 7, in row 7 the sum of tokens 0 to 7, for i > 7 the sum of tokens 8 to i. All relative to the
    // middle, so that a steep token does not cost the others their precision.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * t + i;
      sums[2 * i] = __float_as_uint(g == 7 ? 1.f : token > g ? -1.f : 0.f);
      sums[2 * i + 1] = __float_as_uint(token <= g ? 1.f : 0.f);
    }
    own_rows = piece_at(lane % 16, lane / 16);
    own_tokens = piece_at(lane % 8 + lane / 16 * 8, lane / 8 % 2);
  }

  R ring;
  int lane, g, t;
  uint32_t sums[4];               // a left operand: those of the first half in rows 0 to 7
  uint32_t own_rows, own_tokens;  // lane's row in block() and block_by_tokens(), of a panel's first block

  // Chunk after chunk of the ring, from slot `warp` on: make(slot, info, all 16 tokens are there).
  template <class Make>
  KL_DEVICE void follow_ring(int warp, Make&& make) const {
    Turn<R::kSlots> turn(warp);
    for (;;) {
      // A producer does not see every phase of a slot. Once the slot has been given back, the copy of its
      // last chunk is over, and the phase that runs is the one to wait for.
      mbarrier_wait(ring.free(turn.slot), turn.phase ^ 1);
      mbarrier_wait(ring.raw(turn.slot), turn.phase);
      const ChunkInfo& info = ring.info(turn.slot);
      const bool end = is_end(info.item);
      if (info.rows == kChunkTokens) {
        make(turn.slot, info, std::true_type{});
      } else if (info.rows > 0) {
        make(turn.slot, info, std::false_type{});
        if (info.item == Item::value) clear_values(turn.slot, info.rows);
      } else if (R::kMiddle && !end) {
        for (int k = lane; k < D; k += 32) ring.after(turn.slot)[k] = 1;  // an empty sequence
      }
      if (R::kMiddle && !info.first) decay_from_before(turn);
      fence_proxy_async();  // the factors become visible to the tensor cores
      mbarrier_arrive_warp(ring.ready(turn.slot));
      if (end) return;
      turn.advance(kProducers);
    }
  }

  // Of tokens past the end of the sequence.
  KL_DEVICE void clear_values(int slot, int rows) const {
    for (int i = lane; i < D / 8 * (kChunkTokens - rows); i += 32) {
      const uint32_t at = slot * R::kSlotBytes + R::kValue + i % (D / 64) * kPanelBytes;
      *reinterpret_cast<uint4*>(ring.memory + at + piece_at(rows + i / (D / 8), i / (D / 64) % 8)) = {};
    }
  }
  // `decay` of a chunk from its own start becomes that from the middle of the chunk before.
  KL_DEVICE void decay_from_before(const Turn<R::kSlots>& turn) const {
    const bool wraps = turn.slot == 0;
    const int before = wraps ? R::kSlots - 1 : turn.slot - 1;
    float* const decay = ring.decay(turn.slot) + lane;
    const float* const after = ring.after(before) + lane;
    float x[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] = decay[32 * i];
    mbarrier_wait(ring.ready(before), wraps ? turn.phase ^ 1 : turn.phase);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) x[i] *= decay_after(after[32 * i]);
#pragma unroll
    for (int i = 0; i < D / 32; ++i) decay[32 * i] = x[i];
  }

  // Where a row of a panel's first block stands in the block `step`; panels are kApart bytes apart. Two
  // pieces further is another bit in the swizzle, too.
  template <uint32_t kApart>
  KL_DEVICE static uint32_t row_of_block(uint32_t region, int step, uint32_t row) {
    return region + step / 4 * kApart + (row ^ step % 4 * 32);
  }
  // Lane's address for ldmatrix and stmatrix of the 16 x 16 block `step`.
  template <uint32_t kApart>
  KL_DEVICE uint32_t block(uint32_t region, int step) const {
    return row_of_block<kApart>(region, step, own_rows);
  }

  // The same with the block's second and third matrix of 8 x 8 exchanged, so that the two that make a right
  // operand of 8 tokens stand in neighbouring registers.
  template <uint32_t kApart>
  KL_DEVICE uint32_t block_by_tokens(uint32_t region, int step) const {
    return row_of_block<kApart>(region, step, own_tokens);
  }

  // Elements -> fragment.
  KL_DEVICE static void pack(const float (&f)[8], uint32_t (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * (i / 2) + 2 * (i % 2);
      r[i] = pack_bf16(f[e], f[e + 1]);
    }
  }

  // Sums of log-decays between each token and the middle; in row 7 that of tokens 0 to 7. x are tokens 2t,
  // 2t + 1, 2t + 8, 2t + 9 of channels g, g + 8 (right operands). Of log-decays 11 bits are used, the others
  // dropped: who makes them multiplies by kDroppedBits, so that they are not off on average. A decayed weight
  // e^G is off by |G| e^G times 2^-10.6 at most, 2^-12 of what it is a weight of.
  KL_DEVICE void sum_gates(const float (&x)[8], float (&sum)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {  // two tokens of a half
      float d[4] = {};                // sums of either half, of which one is meant
      mma_tf32(d, sums, __float_as_uint(x[e]), __float_as_uint(x[e + 1]));
      sum[e] = d[e % 4], sum[e + 1] = d[e % 4 + 1];
    }
  }

  KL_DEVICE MiddleDecays decays(const float (&sum)[8]) const {
    MiddleDecays d;
#pragma unroll
    for (int e = 0; e < 8; ++e) d.from[e] = exp2_approx(sum[e]), d.to[e] = exp2_approx(-sum[e]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int e = 4 * (c / 2) + c % 2;
      d.first[c] = __shfl_sync(0xffffffffu, d.from[e], 28 + t);
      d.second[c] = __shfl_sync(0xffffffffu, d.from[e + 2], 28 + t);
      if (g == 7) d.from[e] = d.to[e] = 1.f;
      d.chunk[c] = d.first[c] * d.second[c];
    }
    return d;
  }
  // Do some of the 16 channels decay by more than 2^least in the chunk? Asked of the sums, so that the answer
  // is there before the decays are.
  KL_DEVICE bool steep(const float (&sum)[8], float least) const {
    const float decay =
        fminf(fminf(sum[0] + sum[2], sum[1] + sum[3]), fminf(sum[4] + sum[6], sum[5] + sum[7]));
    return __any_sync(0xffffffffu, g == 7 && decay < least);
  }

  // The same of each half of the chunk.
  KL_DEVICE bool steep_half(const float (&sum)[8], float least) const {
    const float a = fminf(fminf(sum[0], sum[1]), fminf(sum[2], sum[3]));
    const float b = fminf(fminf(sum[4], sum[5]), fminf(sum[6], sum[7]));
    return __any_sync(0xffffffffu, g == 7 && fminf(a, b) < least);
  }

  // For 16 channels in which half a chunk may decay by more than an f32 can hold: decays of the elements from
  // the chunk's start and to its end, and of the chunk. `sum` becomes that from the middle in row 7 too.
  struct WholeDecays {
    float from_start[8], to_end[8], chunk[4];
  };
  KL_DEVICE WholeDecays whole_decays(float (&sum)[8]) const {
    WholeDecays d;
    float first[4], second[4];  // logs
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int e = 4 * (c / 2) + c % 2;
      first[c] = __shfl_sync(0xffffffffu, sum[e], 28 + t);
      second[c] = __shfl_sync(0xffffffffu, sum[e + 2], 28 + t);
      if (g == 7) sum[e] = 0.f;
      d.chunk[c] = exp2_approx(first[c] + second[c]);
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = 2 * (e / 4) + e % 2;
      d.from_start[e] = exp2_approx(sum[e] + first[c]);
      d.to_end[e] = exp2_approx(second[c] - sum[e]);
    }
    return d;
  }
  // Sums between each token and the middle of its half, from `sum` with 0 in row 7. False if one of them is
  // more than `most`.
  KL_DEVICE bool from_quarters(const float (&sum)[8], float most, float (&near)[8]) const {
    bool small = true;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      near[e] = sum[e] - __shfl_sync(0xffffffffu, sum[e], 12 + t);
      small = small && fabsf(near[e]) < most;
    }
    return __all_sync(0xffffffffu, small);
  }
  // Adds the products of tokens of one half, or of a token of the second half and one of the first.
  KL_DEVICE static void add_same_half(float (&x)[2][4], const uint32_t (&left)[4],
                                      const uint32_t (&right)[4]) {
    mma_bf16(x[0], {left[0], 0, left[2], 0}, right[0], right[2]);
    mma_bf16(x[1], {0, left[1], 0, left[3]}, right[1], right[3]);
  }
  KL_DEVICE static void add_across(float (&x)[2][4], const uint32_t (&left)[4], const uint32_t (&right)[4]) {
    mma_bf16(x[0], {0, left[1], 0, left[3]}, right[0], right[2]);
  }

  // Calls f(e, i, j, decay) for the lane's elements [e / 4][e % 4] of a 16 x 16 product, all lanes together;
  // decay(c) is channel c's from token j to i >= j. place(token, channel) is a float of the warp's for each
  // of the 16 channels. The differences of sums over one side of the middle are sums over the tokens between.
  template <class Place, class F>
  KL_DEVICE void for_each_pair(const float (&sum)[8], Place&& place, F&& f) const {
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 8; ++e) place(g + e / 2 % 2 * 8, 2 * t + e % 2 + e / 4 * 8) = sum[e];
    __syncwarp();
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {
      const int i = g + e % 4 / 2 * 8, j = 2 * t + e % 2 + e / 4 * 8;
      f(e, i, j, [&](int c) { return exp2_approx(place(i, c) - place(j, c)); });
    }
    __syncwarp();
  }
  // Element (row, channel) of the 16 x 16 block `step`, as the caller gave it.
  template <uint32_t kApart>
  KL_DEVICE float element(uint32_t region, int step, int row, int channel) const {
    const char* memory = ring.memory - ring.base();
    return to_float(*reinterpret_cast<const bf16*>(
        memory + region + step / 4 * kApart + piece_at(row, 2 * (step % 4) + channel / 8) + channel % 8 * 2));
  }

  // The inverse of I + L by forward substitution in f32, a column a lane: x is column j of it times `first`
  // and `factor`. Leaves its transpose as two bf16 terms, a left operand, x in row lane % 16. rows: L with
  // kInverseRow floats to a row, of which what stands under the diagonal is used; terms: 1024 bytes, which
  // may be L's.
  static constexpr int kInverseRow = 20;
  KL_DEVICE void invert(const float* rows, float* terms_at, int j, float first, float factor,
                        uint32_t (&high)[4], uint32_t (&low)[4]) const {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float row[16];
#pragma unroll
      for (int l = 0; l < i; l += 4)
        *reinterpret_cast<float4*>(row + l) = *reinterpret_cast<const float4*>(rows + i * kInverseRow + l);
      float even = i == j ? first : 0.f, odd = 0;
#pragma unroll
      for (int l = 0; l < i; ++l) (l % 2 ? odd : even) = fmaf(-row[l], x[l], l % 2 ? odd : even);
      x[i] = even + odd;
    }
    __syncwarp();  // L has been read: the terms may take its place
    uint32_t terms[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = x[2 * i] * factor, b = x[2 * i + 1] * factor;
      terms[i] = pack_bf16(a, b);
      if (lane >= 16) terms[i] = pack_bf16(a - low_half(terms[i]), b - high_half(terms[i]));
    }
    uint4* to = reinterpret_cast<uint4*>(terms_at) + 2 * lane;  // lanes 16 to 31: the second term
    to[0] = {terms[0], terms[1], terms[2], terms[3]};
    to[1] = {terms[4], terms[5], terms[6], terms[7]};
    __syncwarp();
    const uint32_t from = smem_address(terms_at) + lane % 16 * 32 + lane / 16 * 16;
    ldmatrix_x4(high, from);
    ldmatrix_x4(low, from + 512);
  }

  // Of a product of tokens i and j what stands above the diagonal becomes 0.
  KL_DEVICE void keep_lower(float (&x)[2][4]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (g + r / 2 * 8 < 2 * t + r % 2 + 8 * tile) x[tile][r] = 0.f;
  }

  // z = A · (the inverse), for the outputs.
  KL_DEVICE static void fold_outputs(const float (&A)[2][4], const uint32_t (&high)[4],
                                     const uint32_t (&low)[4], float (&z)[2][4]) {
    const uint32_t a[4] = {pack_bf16(A[0][0], A[0][1]), pack_bf16(A[0][2], A[0][3]),
                           pack_bf16(A[1][0], A[1][1]), pack_bf16(A[1][2], A[1][3])};
    mma_bf16(z[0], a, high[0], high[2]);
    mma_bf16(z[1], a, high[1], high[3]);
    mma_bf16(z[0], a, low[0], low[2]);
    mma_bf16(z[1], a, low[1], low[3]);
  }

  // (The inverse)^T · rows, in place, for the state.
  KL_DEVICE void fold_rows(uint32_t region, const uint32_t (&high)[4], const uint32_t (&low)[4]) const {
    constexpr int kSteps = 4;  // at a time: one by one they would wait for each other
#pragma unroll 1
    for (int first = 0; first < D / 16; first += kSteps) {
      uint32_t x[kSteps][4];
#pragma unroll
      for (int s = 0; s < kSteps; ++s) ldmatrix_x4_trans(x[s], block<kPanelBytes>(region, first + s));
      __syncwarp();  // the blocks have been read by every lane
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        const uint32_t(&b)[4] = x[s];
        float d[2][4] = {};
        mma_bf16(d[0], high, b[0], b[1]);
        mma_bf16(d[1], high, b[2], b[3]);
        mma_bf16(d[0], low, b[0], b[1]);
        mma_bf16(d[1], low, b[2], b[3]);
        const uint32_t out[4] = {pack_bf16(d[0][0], d[0][1]), pack_bf16(d[0][2], d[0][3]),
                                 pack_bf16(d[1][0], d[1][1]), pack_bf16(d[1][2], d[1][3])};
        stmatrix_x4(block<kPanelBytes>(region, first + s), out);
      }
    }
  }
};

}  // namespace kl::cuda
