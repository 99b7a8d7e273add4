// The arithmetic of a Hopper prefill's consumers: a warpgroup carries 64 value channels of one head's state
// through a chunk, transposed, as the f32 accumulators of its matrix instructions. With factors that the
// operator's producers have prepared, one row a token:
//
//   [R | O]  = [v | 0]^T + S^T [Er | Eo]^T      64 x 32 x D
//   O       += R A^T                            64 x 16 x 16
//   S^T      = S^T Diag(e^Gend) + R F           64 x D x 16
//
// Where v enters apart from R (Slot::kValuesApart) the first line has v^T [Br | Bo]^T in place of [v | 0]^T,
// one more step of 16, and the last one more product, v^T Fv.
//
// With Slot::kScaled each token has three factors: of v, of R before it goes on, and of O in the end.
//
// With Slot::kMiddle S is held as it would be in the middle of the chunk without the chunk's own writes, and
// factors are relative to that: S^T decays first, by what lies between two middles (Ring::decay), and once
// only.
//
// S and R are rounded to bf16 where they are left operands; accumulators are rearranged into them inside a
// thread. Lane (g, t) of warp w has value channels 16 w + g and 16 w + g + 8.
#pragma once

#include "cuda/prefill_pipeline_sm90.cuh"

namespace kl::cuda {

template <class Slot>
class Scan {
  using R = Ring<Slot>;
  static constexpr int D = Slot::D;

 public:
  KL_DEVICE Scan(R r, int w) : own_lane(threadIdx.x % 32), ring(r), warp(w) {}

  const uint32_t own_lane;  // kept: from its special register it takes up to 75 cycles

  // The chunk in slot `at`; returns its flags. S: [channel / 8][2 (v / 8) + channel % 2]. out: where the
  // lane's 8 value channels of token lane / 2 belong. Transitions are run with the columns of the identity
  // for value channels, and v = 0. kQueryOrder: outputs stand as query_at() says, `out` is where that of the
  // first channel of lane % 4 and token lane / 4 belongs, and eight_tokens further that of 8 tokens later. A
  // branch costs more here than what it would save.
  template <bool kValue, bool kQueryOrder = false>
  KL_DEVICE int chunk(int at, bf16* out, float* S, int64_t eight_tokens = 0) const {
    // Addresses that depend on the lane are made anew in each chunk, rather than spilled.
    const uint32_t lane = opaque(own_lane), t = lane % 4;
    // The same in all lanes, and the compiler knows: descriptors go to uniform registers at once.
    const int slot = __shfl_sync(0xffffffffu, at, 0);
    const int rows = ring.info(slot).rows, flags = ring.info(slot).flags;
    const uint32_t base = ring.slot(slot);
    const uint64_t pair = wgmma_matrix(base + R::kPair, 16, 1024, WgmmaLayout::swizzle_128);
    const uint64_t write = wgmma_matrix(base + R::kWrite, kPanelBytes, 1024, WgmmaLayout::swizzle_128);

    float RO[16];  // R of tokens 0-7, 8-15, O of tokens 0-7, 8-15
#pragma unroll
    for (int i = 0; i < 16; ++i) RO[i] = 0;
    constexpr bool kApart = kValue && Slot::kValuesApart;
    uint32_t v[4];
    if constexpr (kApart) {  // a left operand: value channels 8 (m % 2) ..., tokens 8 (m / 2) ...
      load_values(base, lane % 8 + lane / 16 * 8, lane / 8 % 2, v);
    } else if constexpr (kValue) {
      load_values(base, lane % 16, lane / 16, v);  // tokens 8 (m % 2) ..., value channels 8 (m / 2) ...
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const int e = 4 * (m % 2) + 2 * (m / 2);
        RO[e] = low_half(v[m]), RO[e + 1] = high_half(v[m]);
      }
      if constexpr (Slot::kScaled) {
        TokenFactors of_v;
        of_v.load(ring.scale(slot) + 2 * t), of_v.multiply(RO);
      }
    }
    const float* decay = ring.decay(slot) + 2 * t;
    if constexpr (Slot::kMiddle) multiply(S, decay, [](float d) { return d; });
    uint32_t s[D / 16][4];
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
#pragma unroll
      for (int i = 0; i < 4; ++i) s[step][i] = pack_bf16(S[8 * step + 2 * i], S[8 * step + 2 * i + 1]);
    // Behind the issue of the first product this would be free, but ptxas then spills or serialises every
    // wgmma.
    if constexpr (!Slot::kMiddle) multiply(S, decay, [](float d) { return d; });

    wgmma_pin<D / 2>(S);
    wgmma_pin<16>(RO);
    wgmma_fence();
    if constexpr (kApart) wgmma_m64n32k16<0>(RO, v, small_matrix(ring.value_matrix(slot)));
#pragma unroll
    for (int step = 0; step < D / 16; ++step)
      wgmma_m64n32k16<0>(RO, s[step], wgmma_behind(pair, step / 4 * 2 * kPanelBytes + step % 4 * 32));
    wgmma_commit();
    TokenFactors of_R, of_O;  // on their way during the waits for what they multiply
    if constexpr (Slot::kScaled) of_R.load(ring.scale(slot) + kChunkTokens + 2 * t);
    wgmma_wait<0>();
    if constexpr (Slot::kMiddle)
      if (flags & kSteep) multiply(S, ring.after(slot) + 2 * t, decay_between);
    wgmma_pin<16>(RO);
    float left[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) left[e] = RO[e];
    if constexpr (Slot::kScaled) of_R.multiply(left);
    const uint32_t r[4] = {pack_bf16(left[0], left[1]), pack_bf16(left[2], left[3]),
                           pack_bf16(left[4], left[5]), pack_bf16(left[6], left[7])};
    wgmma_pin<16>(RO);
    wgmma_pin<D / 2>(S);
    wgmma_fence();
    // The first half of this product's right operand is whatever stands before A, and its result is not used:
    // an accumulator of eight registers inside one of sixteen would be serialised.
    wgmma_m64n32k16<0>(RO, r, small_matrix(ring.read_matrix(slot)));
    wgmma_commit();
    update(S, r, write);
    if constexpr (kApart)
      update(S, v, wgmma_matrix(base + R::kKeys, kPanelBytes, 1024, WgmmaLayout::swizzle_128));
    wgmma_commit();
    if constexpr (Slot::kScaled) of_O.load(ring.scale(slot) + 2 * kChunkTokens + 2 * t);
    wgmma_wait<1>();  // O is there; the state is not yet
    wgmma_pin<16>(RO);
    if constexpr (Slot::kScaled) of_O.multiply(RO + 8);
    const uint32_t o[4] = {pack_bf16(RO[8], RO[9]), pack_bf16(RO[10], RO[11]), pack_bf16(RO[12], RO[13]),
                           pack_bf16(RO[14], RO[15])};
    // 16 value channels x 16 tokens through the warp's corner of shared memory, so that 32 bytes of a row
    // leave at a time.
    const uint32_t stage = ring.base() + R::kStage + warp * 512;
    stmatrix_x4_trans(stage + (lane % 8 + lane / 16 * 8) * 32 + lane / 8 % 2 * 16, o);
    __syncwarp();
    const char* staged = ring.memory + R::kStage + warp * 512;
    if constexpr (!kQueryOrder) {
      const uint4 eight = *reinterpret_cast<const uint4*>(staged + lane * 16);
      wgmma_wait<0>();
      wgmma_pin<D / 2>(S);
      if (static_cast<int>(lane / 2) < rows) *reinterpret_cast<uint4*>(out) = eight;
    } else {
      uint2 four[2];  // of tokens lane / 4 and 8 more
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const auto* token = reinterpret_cast<const uint32_t*>(staged + (lane / 4 + 8 * half) * 32);
        four[half] = {token[t], token[4 + t]};
      }
      wgmma_wait<0>();
      wgmma_pin<D / 2>(S);
#pragma unroll
      for (int half = 0; half < 2; ++half)
        if (static_cast<int>(lane / 4) + 8 * half < rows)
          *reinterpret_cast<uint2*>(out + half * eight_tokens) = four[half];
    }
    __syncwarp();
    return flags;
  }

 private:
  // S^T by a factor a channel, factor(x) for what stands in `of`, from the lane's first channel on.
  template <class Factor>
  KL_DEVICE static void multiply(float* S, const float* of, Factor&& factor) {
#pragma unroll
    for (int c = 0; c < D / 8; ++c) {
      const float2 x = *reinterpret_cast<const float2*>(of + 8 * c);
      const float d0 = factor(x.x), d1 = factor(x.y);
      S[4 * c] *= d0, S[4 * c + 1] *= d1, S[4 * c + 2] *= d0, S[4 * c + 3] *= d1;
    }
  }
  // A factor for each of the lane's tokens; `from` is that of the first one.
  struct TokenFactors {
    float2 half[2];
    KL_DEVICE void load(const float* from) {
#pragma unroll
      for (int i = 0; i < 2; ++i) half[i] = *reinterpret_cast<const float2*>(from + 8 * i);
    }
    KL_DEVICE void multiply(float* x) const {  // R or O
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] *= e % 2 ? half[e / 4].y : half[e / 4].x;
    }
  };
  // Four blocks of 8 x 8, transposed, of the warp's value channels.
  KL_DEVICE void load_values(uint32_t slot, int token, int piece, uint32_t (&v)[4]) const {
    ldmatrix_x4_trans(v, slot + R::kValue + warp / 4 * kPanelBytes + piece_at(token, 2 * (warp % 4) + piece));
  }
  // 32 rows of 16, in 8 x 8 blocks of 128 bytes.
  KL_DEVICE static uint64_t small_matrix(uint32_t at) {
    return wgmma_matrix(at, 128, 256, WgmmaLayout::plain);
  }
  KL_DEVICE static void update(float* S, const uint32_t (&left)[4], uint64_t right) {
    if constexpr (D == 128)
      wgmma_m64n128k16<1>(S, left, right);
    else
      wgmma_m64n64k16<1>(S, left, right);
  }

  R ring;
  int warp;
};

}  // namespace kl::cuda
