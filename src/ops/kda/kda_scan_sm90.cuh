// The arithmetic of the Hopper prefill's consumers: a warpgroup carries 64 value channels of one head's state
// through a chunk, transposed, as the f32 accumulators of its matrix instructions. With the factors that
// kda_factors_sm90.cuh names:
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
class Scan {
  using R = Ring<D, kGateF32>;

 public:
  KL_DEVICE Scan(R r, int w) : ring(r), warp(w), this_lane(static_cast<int>(threadIdx.x % 32)) {}

  // The chunk in slot `at`; returns its checkpoint. S: [channel / 8][2 (v / 8) + channel % 2]. out: where the
  // lane's 8 value channels of token lane / 2 belong. last: it may have fewer than 16 tokens. Transitions are
  // run with the columns of the identity for value channels, and v = 0.
  template <bool kValue>
  KL_DEVICE int chunk(int at, bool last, bf16* out, float* S) const {
    // Addresses that depend on the lane are made anew in each chunk, rather than spilled.
    const int lane = opaque(this_lane), t = lane % 4;
    // The same in all lanes, and the compiler knows: descriptors go to uniform registers at once.
    const int slot = __shfl_sync(0xffffffffu, at, 0);
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

 private:
  R ring;
  int warp, this_lane;
};

}  // namespace kl::cuda
