// What the portable chunkwise kernels are made of, KDA and its relatives alike: chunks of 16 tokens, blocks
// of eight warps, and a warp that keeps 16 value channels of one head's state, transposed, in the accumulator
// fragments of mma.sync. Products run as three bf16 products of halves (hi·hi + hi·lo + lo·hi, an error near
// 2^-16). No recurrence is known here.
#pragma once

#include "cuda/operand.cuh"

namespace kl::cuda::chunks {

constexpr int kChunk = 16, kWarps = 8, kThreads = 32 * kWarps;
constexpr int kWidth = 16 * kWarps;  // value channels of a block
// 2^x is 0 in f32 below it already. Log2-decays are held there, so that sums stay finite and differences
// exact enough behind a step of -inf.
constexpr float kLeastDecay = -150.f;
constexpr float kLog2e = 1.44269504f;

// A log-decay as a log2-decay; NaN stays NaN.
KL_DEVICE float log2_decay(float g) { return g * kLog2e < kLeastDecay ? kLeastDecay : g * kLog2e; }

// {hi, lo} bf16 of a float.
struct Halves {
  uint16_t hi, lo;
};
KL_DEVICE Halves halves_of(float x) {
  const bf16 hi = from_float<bf16>(x);
  return {hi.bits, from_float<bf16>(x - to_float(hi)).bits};
}

// ---- Operands in shared memory, {hi, lo}. Rows are padded so that the eight rows of a matrix fragment start
// in different banks. ---------------------------------------------------------------------------------------

template <int KP>
struct alignas(16) KeyRows {  // [token][key channel]
  uint16_t half[2][kChunk][KP + 8];
  KL_DEVICE void put(int token, int channel, float x) {
    const Halves h = halves_of(x);
    half[0][token][channel] = h.hi, half[1][token][channel] = h.lo;
  }
};
template <int kPad>
struct alignas(16) ValueColumns {  // [value channel][token]
  uint16_t half[2][kWidth][kChunk + kPad];
  KL_DEVICE void put(int token, int channel, float x) {
    const Halves h = halves_of(x);
    half[0][channel][token] = h.hi, half[1][channel][token] = h.lo;
  }
};
struct alignas(16) Triangle {  // [token i][token j], 0 where j does not act on i
  uint16_t half[2][kChunk][kChunk + 8];
  KL_DEVICE void put(int i, int j, float x) {
    const Halves h = halves_of(x);
    half[0][i][j] = h.hi, half[1][i][j] = h.lo;
  }
};

// ---- A warp's fragments ----

// A warp's part of the state, transposed: S[n] is the accumulator fragment of value channels (16) x key
// channels 8 n to 8 n + 7. With g = lane / 4, t = lane % 4 its elements are (g, 2t), (g, 2t + 1), (g + 8,
// 2t), (g + 8, 2t + 1).
template <int KP>
using WarpState = float[KP / 8][4];

// Accumulator fragments of the warp's value channels (16) x the chunk's tokens (two times 8).
using WarpTokens = float[2][4];
KL_DEVICE int token_of(int n, int e) { return 8 * n + 2 * (threadIdx.x % 4) + e % 2; }
KL_DEVICE int value_channel_of(int e) { return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + e / 2 * 8; }

// The bf16 halves of two neighbouring accumulator fragments are left operands of a 16 x 16 product.
KL_DEVICE void left_operand(uint32_t (&hi)[4], uint32_t (&lo)[4], const float (&x)[4], const float (&y)[4]) {
  const float pairs[4][2] = {{x[0], x[1]}, {x[2], x[3]}, {y[0], y[1]}, {y[2], y[3]}};
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    hi[r] = pack_bf16(pairs[r][0], pairs[r][1]);
    lo[r] = pack_bf16(pairs[r][0] - __uint_as_float(hi[r] << 16),
                      pairs[r][1] - __uint_as_float(hi[r] & 0xffff0000u));
  }
}
KL_DEVICE void mma_halves(float (&d)[4], const uint32_t (&a_hi)[4], const uint32_t (&a_lo)[4],
                          const uint32_t* b_hi, const uint32_t* b_lo) {
  mma_bf16(d, a_lo, b_hi[0], b_hi[1]);
  mma_bf16(d, a_hi, b_lo[0], b_lo[1]);
  mma_bf16(d, a_hi, b_hi[0], b_hi[1]);
}

// The halves of the warp's value channels x the chunk's tokens, as left operands.
struct WarpColumns {
  uint32_t hi[4], lo[4];
};
template <int kPad>
KL_DEVICE WarpColumns load_columns(const ValueColumns<kPad>& x) {
  const int v = threadIdx.x / 32 * 16 + threadIdx.x % 16, first = threadIdx.x % 32 / 16 * 8;
  WarpColumns columns;
  ldmatrix_x4(columns.hi, smem_address(&x.half[0][v][first]));
  ldmatrix_x4(columns.lo, smem_address(&x.half[1][v][first]));
  return columns;
}
// -x: the sign of both halves.
KL_DEVICE void negate(WarpColumns& x) {
#pragma unroll
  for (int r = 0; r < 4; ++r) x.hi[r] ^= 0x80008000u, x.lo[r] ^= 0x80008000u;
}

// ---- Products of a warp ----

// d[m] += S rows[m]ᵀ for kRows operands that share the work of splitting S.
template <int KP, int kRows>
KL_DEVICE void multiply_state(WarpTokens (&d)[kRows], const WarpState<KP>& S,
                              const KeyRows<KP>* const (&rows)[kRows]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < KP; c += 16) {
    uint32_t hi[4], lo[4], b[kRows][2][4];
    left_operand(hi, lo, S[c / 8], S[c / 8 + 1]);
    // Matrices of ldmatrix: tokens 0-7 then 8-15, channels c then c + 8.
    const int row = lane % 8 + lane / 16 * 8, column = c + lane / 8 % 2 * 8;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int m = 0; m < kRows; ++m)
        ldmatrix_x4(b[m][half], smem_address(&rows[m]->half[half][row][column]));
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int m = 0; m < kRows; ++m) mma_halves(d[m][n], hi, lo, b[m][0] + 2 * n, b[m][1] + 2 * n);
  }
}

// d_i += Σ_j A_ij x_j
KL_DEVICE void multiply_triangle(WarpTokens& d, const Triangle& A, const WarpColumns& x) {
  const int lane = threadIdx.x % 32, i = lane % 8 + lane / 16 * 8, j = lane / 8 % 2 * 8;
  uint32_t b[2][4];
  ldmatrix_x4(b[0], smem_address(&A.half[0][i][j]));
  ldmatrix_x4(b[1], smem_address(&A.half[1][i][j]));
#pragma unroll
  for (int n = 0; n < 2; ++n) mma_halves(d[n], x.hi, x.lo, b[0] + 2 * n, b[1] + 2 * n);
}

// S <- S decay + Σ_m x[m]ᵀ rows[m]; decay(channel) are the factors of that channel and the next.
template <int KP, int kRows, class Decay>
KL_DEVICE void update_state(WarpState<KP>& S, Decay&& decay, const WarpColumns (&x)[kRows],
                            const KeyRows<KP>* const (&rows)[kRows]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int c = 0; c < KP; c += 16) {
    uint32_t b[kRows][2][4];
    // Transposed matrices: tokens 0-7 then 8-15 of channels c, then of c + 8.
    const int row = lane % 16, column = c + lane / 16 * 8;
#pragma unroll
    for (int m = 0; m < kRows; ++m) {
      ldmatrix_x4_trans(b[m][0], smem_address(&rows[m]->half[0][row][column]));
      ldmatrix_x4_trans(b[m][1], smem_address(&rows[m]->half[1][row][column]));
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      float(&d)[4] = S[c / 8 + n];
      const float2 f = decay(c + 8 * n + 2 * (lane % 4));
      d[0] *= f.x, d[1] *= f.y, d[2] *= f.x, d[3] *= f.y;
#pragma unroll
      for (int m = 0; m < kRows; ++m) mma_halves(d, x[m].hi, x[m].lo, b[m][0] + 2 * n, b[m][1] + 2 * n);
    }
  }
}

// x_i -= Σ_{j<i} L_ij x_j, column by column of L: what an x changes is independent of each other. columns[j]
// is L_.j; what stands there for i <= j is not used. done(j, x_j) is called in order.
template <class F>
KL_DEVICE void substitute(float (&x)[kChunk], const float (*columns)[kChunk], F&& done) {
#pragma unroll
  for (int j = 0; j < kChunk; ++j) {
#pragma unroll
    for (int i4 = (j + 1) / 4 * 4; i4 < kChunk; i4 += 4) {
      float L[4];
      load_channels(L, columns[j], i4);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (i4 + e > j) x[i4 + e] = fmaf(-L[e], x[j], x[i4 + e]);
    }
    done(j, x[j]);
  }
}

// ---- Memory ----

// Calls f(element, x) for the lane's elements of a head's state inside K x V. `state` is the head's.
template <int KP, class State, class F>
KL_DEVICE void for_each_element(WarpState<KP>& S, State* state, int64_t k_stride, int64_t v_stride, int K,
                                int V, int v0, F&& f) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int n = 0; n < KP / 8; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int k = 8 * n + 2 * (lane % 4) + e % 2, v = v0 + 16 * warp + lane / 4 + e / 2 * 8;
      if (k < K && v < V) f(state + (k * k_stride + v * v_stride), S[n][e]);
    }
}

// The warp's outputs of the chunk's first `tokens` tokens; value channels of the block begin at v0.
KL_DEVICE void store_outputs(const WarpTokens& o, const Operand& out, int64_t row, int tokens, int head,
                             int v0, int V) {
#pragma unroll
  for (int n = 0; n < 2; ++n)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = token_of(n, e), v = v0 + value_channel_of(e);
      if (token < tokens && v < V) store_element(out, offset_of(out, row + token, head) + v, o[n][e]);
    }
}

}  // namespace kl::cuda::chunks
