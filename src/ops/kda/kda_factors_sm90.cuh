// The producers of the Hopper prefill: one warp turns the raw operands of one chunk of 16 tokens into the
// factors of the chunkwise recurrence, in place, without a word to any other warp.
//
// With G_i the inclusive sum of log-decays from the chunk's start to token i, per channel, and
//
//   L_ij = beta_i Σ k_i k_j e^(G_i - G_j)  (i > j)     A_ij = scale Σ q_i k_j e^(G_i - G_j)  (i >= j)
//   T = (I + L)^-1 Diag(beta)
//
// the consumers need  -k_i e^(G_i),  scale q_i e^(G_i),  T^T (k e^(Gend - G)),  A T  and  e^(Gend).
// All of it stands in the fragments of mma.sync: with g = lane / 4 and t = lane % 4 a lane has tokens g and
// g + 8 of channels 2t, 2t + 1, 2t + 8 and 2t + 9 of every 16; element e = 4 (channel / 8) + 2 (token / 8) +
// channel % 2. The same registers are the left operand of a product over channels and the right one of
// another, so L and A never leave them.
//
// The decays of L and A are split at the middle of the chunk, e^(G_i - Gm) · e^(Gm - G_j): good as long as no
// channel decays by more than about 2^118 in the chunk (a gate bounded at -5 never does). Where one does, its
// 16 channels take every pair (i, j) by itself. Entries above the diagonal may be inf and are never looked
// at.
#pragma once

#include "ops/kda/kda_pipeline_sm90.cuh"

namespace kl::cuda {

constexpr float kLog2e = 1.4426950408889634f;
constexpr float kMaxSpan = 100.f;       // of half a chunk, in powers of two
constexpr float kMinLogDecay = -384.f;  // a step; 2^-384 is 0 in f32, and so is its product with anything

KL_DEVICE float low_half(uint32_t x) { return __uint_as_float(x << 16); }
KL_DEVICE float high_half(uint32_t x) { return __uint_as_float(x & 0xffff0000u); }

// What turns a raw gate and its bias into log2 of a decay.
struct GateForm {
  float in, out;  // factors before and after the nonlinear part
};
KL_DEVICE GateForm gate_form(const GateParams& gate, int head) {
  const float rate = gate.A_log != nullptr ? expf(gate.A_log[head]) : 1.f;
  switch (gate.kind) {
    case KdaGateKind::softplus: return {kLog2e, -rate};
    case KdaGateKind::bounded: return {-kLog2e * rate, gate.lower_bound * kLog2e};
    default: return {kLog2e, 1.f};
  }
}
KL_DEVICE float log2_decay_softplus(const GateForm& f, float y) {
  const float u = exp2_approx(-fabsf(y));
  // log2(1 + u) to 9e-6 of itself, also where u is small: slow gates act over a million tokens.
  const float ratio =
      fmaf(u,
           fmaf(u, fmaf(u, fmaf(u, fmaf(u, -0.0344359055f, 0.146032885f), -0.303036213f), 0.469174057f),
                -0.720426142f),
           1.44268286f);
  return f.out * fmaf(u, ratio, fmaxf(y, 0.f));
}
// Elements e / 4 = 0 and 1 have one bias each.
template <KdaGateKind kKind>
KL_DEVICE void log2_decays(const GateForm& f, const float (&bias)[2], float (&x)[8]) {
  const float b[2] = {bias[0] * f.in, bias[1] * f.in};
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = fmaf(x[e], f.in, b[e / 4]);
  if constexpr (kKind == KdaGateKind::bounded) {
#pragma unroll
    for (float& e : x) e = f.out * rcp_approx(1.f + exp2_approx(e));
  } else if constexpr (kKind == KdaGateKind::softplus) {
#pragma unroll
    for (float& e : x) e = log2_decay_softplus(f, e);
  }
  if (kKind != KdaGateKind::bounded || f.out < kMinLogDecay) {
#pragma unroll
    for (float& e : x) e = fmaxf(e, kMinLogDecay);
  }
}

template <int D, bool kGateF32, KdaGateKind kKind>
class Producer {
  using R = Ring<D, kGateF32>;

 public:
  KL_DEVICE Producer(const PrefillParams& params, R r, int warp)
      : p(params), ring(r), lane(static_cast<int>(threadIdx.x % 32)), g(lane / 4), t(lane % 4) {
    scratch = reinterpret_cast<float*>(ring.memory + R::kScratch + warp * R::kScratchBytes);
    // Rows of the sums over a half of the chunk, as left operands: for token i < 7 minus the sum of tokens
    // i + 1 to 7, in row 7 the sum of tokens 0 to 7, for i > 7 the sum of tokens 8 to i. All relative to the
    // middle, so that a steep token does not cost the others their precision.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 2 * t + i;
      sums[0][i] = __float_as_uint(g == 7 ? 1.f : token > g ? -1.f : 0.f);
      sums[1][i] = __float_as_uint(token <= g ? 1.f : 0.f);
    }
  }

  KL_DEVICE void run(int warp) {
    Turn<R::kSlots> turn(warp);
    for (;;) {
      mbarrier_wait(ring.raw(turn.slot), turn.phase);
      const ChunkInfo& info = ring.info(turn.slot);
      const bool end = is_end(info.item);
      if (info.rows == kChunkTokens)
        chunk<true>(turn.slot, info);
      else if (info.rows > 0)
        chunk<false>(turn.slot, info);
      fence_proxy_async();  // the factors become visible to the tensor cores
      __syncwarp();
      if (lane == 0) mbarrier_arrive(ring.ready(turn.slot));
      if (end) return;
      turn.advance(kProducers);
    }
  }

 private:
  const PrefillParams& p;
  R ring;
  int lane, g, t;
  uint32_t sums[2][2];  // of each half; for tokens 2t and 2t + 1 of it
  float* scratch;

  // Lane's address for ldmatrix and stmatrix of the 16 x 16 block `step`; panels kApart bytes apart.
  template <uint32_t kApart>
  KL_DEVICE uint32_t block(uint32_t region, int step) const {
    return region + step / 4 * kApart + piece_at(lane % 16, 2 * (step % 4) + lane / 16);
  }

  // 1 / |x| of tokens g and g + 8, from the diagonal of x x^T.
  KL_DEVICE void inverse_lengths(uint32_t region, float (&inverse)[2]) const {
    float d0[4] = {}, d1[4] = {};
#pragma unroll
    for (int step = 0; step < D / 16; ++step) {
      uint32_t x[4];
      ldmatrix_x4(x, block<2 * R::kPanelBytes>(region, step));
      mma_bf16_k8(d0, x[0], x[1], x[0]);
      mma_bf16_k8(d1, x[0], x[1], x[1]);
      mma_bf16_k8(d0, x[2], x[3], x[2]);
      mma_bf16_k8(d1, x[2], x[3], x[3]);
    }
    const int from = (lane & ~3) | g / 2;
    inverse[0] = rsqrt_approx(__shfl_sync(0xffffffffu, g % 2 ? d0[1] : d0[0], from) + p.l2_eps);
    inverse[1] = rsqrt_approx(__shfl_sync(0xffffffffu, g % 2 ? d1[3] : d1[2], from) + p.l2_eps);
  }

  // Raw gates of tokens 2t, 2t + 1, 2t + 8, 2t + 9 of channels g, g + 8 (right operands), and their biases:
  // on their way while the step before is worked on.
  struct RawGate {
    uint32_t x[kGateF32 ? 8 : 4];
    float bias[2];
  };
  KL_DEVICE void load_gate(int slot, const float* bias, int step, RawGate& raw) const {
    if constexpr (kGateF32) {
      const char* from = ring.memory + R::kGate + slot * R::kGateBytes;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = 2 * t + e % 2 + e / 2 % 2 * 8, channel = 16 * step + g + e / 4 * 8;
        raw.x[e] = *reinterpret_cast<const uint32_t*>(from + channel / 32 * R::kPanelBytes +
                                                      piece_at(row, channel % 32 / 4) + channel % 4 * 4);
      }
    } else {
      ldmatrix_x4_trans(raw.x, block<R::kPanelBytes>(ring.slot(slot) + R::kWrite, step));
    }
    if (bias != nullptr) raw.bias[0] = bias[16 * step + g], raw.bias[1] = bias[16 * step + g + 8];
  }
  template <bool kFull>
  KL_DEVICE void gates(const RawGate& raw, const GateForm& form, int rows, float (&x)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = kGateF32 ? __uint_as_float(raw.x[kGateF32 ? e : 0])
             : e % 2  ? high_half(raw.x[e / 2])
                      : low_half(raw.x[e / 2]);
    log2_decays<kKind>(form, raw.bias, x);
    if (!kFull) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (2 * t + e % 2 + e / 2 % 2 * 8 >= rows) x[e] = 0.f;
    }
  }

  // Sums of log-decays between each token and the middle; in row 7 that of tokens 0 to 7. Log-decays are
  // rounded to 11 bits, without bias. A decayed weight e^G is off by |G| e^G times that, never by more than
  // 2^-13 of what it is a weight of.
  KL_DEVICE void sum_gates(const float (&x)[8], float (&sum)[8]) const {
    float d[2][4] = {};
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const float* y = x + 4 * tile;
      mma_tf32(d[tile], {sums[0][0], 0, sums[0][1], 0}, to_tf32(y[0]), to_tf32(y[1]));
      mma_tf32(d[tile], {0, sums[1][0], 0, sums[1][1]}, to_tf32(y[2]), to_tf32(y[3]));
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) sum[e] = d[e / 4][e % 4];
  }

  // Adds to L and A what 16 channels give, pair by pair. The differences of sums over one side of the middle
  // are sums over the tokens between.
  KL_DEVICE void add_pairs(uint32_t pair, int step, int rows, const float (&sum)[8],
                           const float (&k_scale)[2], const float (&q_scale)[2], float (&L)[2][4],
                           float (&A)[2][4]) const {
    float* sums_of = scratch;  // [token][channel]
    __syncwarp();
#pragma unroll
    for (int e = 0; e < 8; ++e) sums_of[(g + e / 2 % 2 * 8) * 17 + 2 * t + e % 2 + e / 4 * 8] = sum[e];
    __syncwarp();
    const char* memory = ring.memory - ring.base();
    const auto element = [&](uint32_t region, int row, int channel) {
      return to_float(*reinterpret_cast<const bf16*>(memory + region + step / 4 * 2 * R::kPanelBytes +
                                                     piece_at(row, 2 * (step % 4) + channel / 8) +
                                                     channel % 8 * 2));
    };
#pragma unroll 1
    for (int e = 0; e < 8; ++e) {  // L[e / 4][e % 4]
      const int i = g + e % 4 / 2 * 8, j = 2 * t + e % 2 + e / 4 * 8;
      const float kj = __shfl_sync(0xffffffffu, k_scale[0], 4 * (j % 8));
      const float kj8 = __shfl_sync(0xffffffffu, k_scale[1], 4 * (j % 8));
      if (i < j || i >= rows) continue;
      float kk = 0, qk = 0;
#pragma unroll 1
      for (int c = 0; c < 16; ++c) {
        const float w = element(pair, j, c) * exp2_approx(sums_of[i * 17 + c] - sums_of[j * 17 + c]);
        kk = fmaf(element(pair, i, c), w, kk);
        qk = fmaf(element(pair + R::kPanelBytes, i, c), w, qk);
      }
      const float scale_j = j < 8 ? kj : kj8;
      const float l = kk * scale_j * (i < 8 ? k_scale[0] : k_scale[1]);
      const float a = qk * scale_j * (i < 8 ? q_scale[0] : q_scale[1]);
#pragma unroll
      for (int r = 0; r < 8; ++r)
        if (r == e) L[r / 4][r % 4] += l, A[r / 4][r % 4] += a;
    }
    __syncwarp();
  }

  // 16 channels in which half a chunk may decay by more than an f32 can hold.
  KL_DEVICE void steep_step(uint32_t pair, int step, int rows, float (&sum)[8], const float (&k)[8],
                            const float (&q)[8], const float (&k_scale)[2], const float (&q_scale)[2],
                            float (&L)[2][4], float (&A)[2][4], uint32_t (&read_k)[4], uint32_t (&read_q)[4],
                            uint32_t (&keep)[4], float (&decay)[4]) const {
    float first[4], second[4];  // logs, here
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int e = 4 * (c / 2) + c % 2;
      first[c] = __shfl_sync(0xffffffffu, sum[e], 28 + t);
      second[c] = __shfl_sync(0xffffffffu, sum[e + 2], 28 + t);
      if (g == 7) sum[e] = 0.f;
      decay[c] = exp2_approx(first[c] + second[c]);
    }
    add_pairs(pair, step, rows, sum, k_scale, q_scale, L, A);
    float from_start_k[8], from_start_q[8], to_end[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int c = 2 * (e / 4) + e % 2;
      const float start = exp2_approx(sum[e] + first[c]);
      from_start_k[e] = -k[e] * start, from_start_q[e] = q[e] * start;
      to_end[e] = k[e] * exp2_approx(second[c] - sum[e]);
    }
    pack(from_start_k, read_k), pack(from_start_q, read_q), pack(to_end, keep);
  }

  // Elements -> fragment.
  KL_DEVICE static void pack(const float (&f)[8], uint32_t (&r)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int e = 4 * (i / 2) + 2 * (i % 2);
      r[i] = pack_bf16(f[e], f[e + 1]);
    }
  }

  // kFull: all 16 tokens are there.
  template <bool kFull>
  KL_DEVICE void chunk(int slot, const ChunkInfo& info) const {
    const int rows = info.rows, head = info.head;
    const uint32_t pair = ring.slot(slot) + R::kPair, write = ring.slot(slot) + R::kWrite;
    // Lane's strength: of token lane % 16. Wanted after the loop; the load is under way meanwhile.
    RawElement raw_beta;
    if (lane % 16 < rows) raw_beta = load_raw(p.beta, offset_of(p.beta, info.token + lane % 16, head));

    float k_scale[2] = {1, 1}, q_scale[2] = {1, 1};
    if (p.l2norm) inverse_lengths(pair, k_scale), inverse_lengths(pair + R::kPanelBytes, q_scale);
    q_scale[0] *= p.scale, q_scale[1] *= p.scale;
    if (!kFull && g >= rows) k_scale[0] = q_scale[0] = 0;  // their own may be a NaN
    if (!kFull && g + 8 >= rows) k_scale[1] = q_scale[1] = 0;
    // Below this the factors of a decay would leave the range of f32; keys of length 1 leave more room.
    const float least_decay = p.l2norm ? 0x1p-118f : 0x1p-100f;
    const GateForm form = gate_form(p.gate, head);
    // A step's biases are read before its decays take their place.
    const float* bias = p.bias_in_ring ? ring.decay(slot)
                        : p.gate.dt_bias != nullptr && kKind != KdaGateKind::log_decay
                            ? p.gate.dt_bias + head * p.gate.dt_stride
                            : nullptr;

    float L[2][4] = {}, A[2][4] = {};  // L without beta; A. [token j / 8][fragment]
    RawGate raw{};
    load_gate(slot, bias, 0, raw);
#pragma unroll 1
    for (int step = 0; step < D / 16; ++step) {
      float sum[8];
      {
        float x[8];
        gates<kFull>(raw, form, rows, x);
        load_gate(slot, bias, min(step + 1, D / 16 - 1), raw);
        sum_gates(x, sum);
      }
      uint32_t k_raw[4], q_raw[4];
      ldmatrix_x4(k_raw, block<2 * R::kPanelBytes>(pair, step));
      ldmatrix_x4(q_raw, block<2 * R::kPanelBytes>(pair + R::kPanelBytes, step));
      if (!kFull) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          if (g + i % 2 * 8 >= rows) k_raw[i] = q_raw[i] = 0;
      }
      float k[8], q[8];  // normalised; q also scaled
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // register i: tokens i % 2, channels i / 2
        const int e = 4 * (i / 2) + 2 * (i % 2);
        k[e] = k_scale[i % 2] * low_half(k_raw[i]), k[e + 1] = k_scale[i % 2] * high_half(k_raw[i]);
        q[e] = q_scale[i % 2] * low_half(q_raw[i]), q[e + 1] = q_scale[i % 2] * high_half(q_raw[i]);
      }

      float from_middle[8], to_middle[8];  // e^(G - Gm), e^(Gm - G)
#pragma unroll
      for (int e = 0; e < 8; ++e) from_middle[e] = exp2_approx(sum[e]), to_middle[e] = exp2_approx(-sum[e]);
      // Of the halves, e^Gm and e^(Gend - Gm), and of the chunk; channels 2t, 2t + 1, 2t + 8, 2t + 9.
      float first[4], second[4], decay[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int e = 4 * (c / 2) + c % 2;
        first[c] = __shfl_sync(0xffffffffu, from_middle[e], 28 + t);
        second[c] = __shfl_sync(0xffffffffu, from_middle[e + 2], 28 + t);
        if (g == 7) from_middle[e] = to_middle[e] = 1.f;
        decay[c] = first[c] * second[c];
      }
      const float least = fminf(fminf(decay[0], decay[1]), fminf(decay[2], decay[3]));
      uint32_t read_k[4], read_q[4], keep[4];
      if (!__any_sync(0xffffffffu, least < least_decay)) {
        float left_k[8], left_q[8], right[8];
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          left_k[e] = k[e] * from_middle[e], left_q[e] = q[e] * from_middle[e];
          right[e] = k[e] * to_middle[e];
        }
        uint32_t a[4], b[4];
        pack(right, b);
        pack(left_k, a);
        mma_bf16(L[0], a, b[0], b[2]);
        mma_bf16(L[1], a, b[1], b[3]);
        pack(left_q, a);
        mma_bf16(A[0], a, b[0], b[2]);
        mma_bf16(A[1], a, b[1], b[3]);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
          const int c = 2 * (e / 4) + e % 2;
          left_k[e] *= -first[c], left_q[e] *= first[c], right[e] *= second[c];
        }
        pack(left_k, read_k), pack(left_q, read_q), pack(right, keep);
      } else {
        steep_step(pair, step, rows, sum, k, q, k_scale, q_scale, L, A, read_k, read_q, keep, decay);
      }
      __syncwarp();  // the block has been read by every lane
      stmatrix_x4(block<2 * R::kPanelBytes>(pair, step), read_k);
      stmatrix_x4(block<2 * R::kPanelBytes>(pair + R::kPanelBytes, step), read_q);
      stmatrix_x4(block<R::kPanelBytes>(write, step), keep);
      if (g == 0) {
        float2* to = reinterpret_cast<float2*>(ring.decay(slot) + 16 * step + 2 * t);
        to[0] = {decay[0], decay[1]}, to[4] = {decay[2], decay[3]};
      }
    }
    const float beta = lane % 16 < rows ? write_strength(p.beta_kind, value_of(p.beta, raw_beta)) : 0.f;
    uint32_t high[4], low[4];  // T^T, a left operand
    invert(L, beta, high, low);
    finish(slot, write, A, high, low);
  }

  // T = (I + L)^-1 Diag(beta), by forward substitution in f32; lane % 16 is a column. Leaves T^T as two bf16
  // terms.
  KL_DEVICE void invert(const float (&L)[2][4], float beta, uint32_t (&high)[4], uint32_t (&low)[4]) const {
    const float beta_i[2] = {__shfl_sync(0xffffffffu, beta, g), __shfl_sync(0xffffffffu, beta, g + 8)};
    constexpr int kRow = 20;
#pragma unroll
    for (int half = 0; half < 2; ++half)  // of tokens i
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        *reinterpret_cast<float2*>(scratch + (g + 8 * half) * kRow + 2 * t + 8 * tile) = {
            beta_i[half] * L[tile][2 * half], beta_i[half] * L[tile][2 * half + 1]};
    __syncwarp();
    const int j = lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float row[16];
#pragma unroll
      for (int l = 0; l < i; l += 4)
        *reinterpret_cast<float4*>(row + l) = *reinterpret_cast<const float4*>(scratch + i * kRow + l);
      float even = i == j ? 1.f : 0.f, odd = 0;
#pragma unroll
      for (int l = 0; l < i; ++l) (l % 2 ? odd : even) = fmaf(-row[l], x[l], l % 2 ? odd : even);
      x[i] = even + odd;
    }
    uint32_t terms[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float a = x[2 * i] * beta, b = x[2 * i + 1] * beta;
      terms[i] = pack_bf16(a, b);
      if (lane >= 16) terms[i] = pack_bf16(a - low_half(terms[i]), b - high_half(terms[i]));
    }
    uint4* to = reinterpret_cast<uint4*>(scratch + 16 * kRow) + 2 * lane;  // lanes 16 to 31: the second term
    to[0] = {terms[0], terms[1], terms[2], terms[3]};
    to[1] = {terms[4], terms[5], terms[6], terms[7]};
    __syncwarp();
    const uint32_t from = smem_address(scratch + 16 * kRow) + lane % 16 * 32 + lane / 16 * 16;
    ldmatrix_x4(high, from);
    ldmatrix_x4(low, from + 512);
  }

  // A T for the outputs, T^T (k e^(Gend - G)) for the state.
  KL_DEVICE void finish(int slot, uint32_t write, float (&A)[2][4], const uint32_t (&high)[4],
                        const uint32_t (&low)[4]) const {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int r = 0; r < 4; ++r)
        if (g + r / 2 * 8 < 2 * t + r % 2 + 8 * tile) A[tile][r] = 0.f;
    const uint32_t a[4] = {pack_bf16(A[0][0], A[0][1]), pack_bf16(A[0][2], A[0][3]),
                           pack_bf16(A[1][0], A[1][1]), pack_bf16(A[1][2], A[1][3])};
    float z[2][4] = {};
    mma_bf16(z[0], a, high[0], high[2]);
    mma_bf16(z[1], a, high[1], high[3]);
    mma_bf16(z[0], a, low[0], low[2]);
    mma_bf16(z[1], a, low[1], low[3]);
    // 8 x 8 blocks of 128 bytes: [token i / 8][token j / 8].
    char* read = ring.memory + R::kRead + slot * 512 + g * 16 + t * 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(read + 256 * half + 128 * tile) =
            pack_bf16(z[tile][2 * half], z[tile][2 * half + 1]);
#pragma unroll 2
    for (int step = 0; step < D / 16; ++step) {
      const uint32_t at = block<R::kPanelBytes>(write, step);
      uint32_t b[4];
      ldmatrix_x4_trans(b, at);
      float d[2][4] = {};
      mma_bf16(d[0], high, b[0], b[1]);
      mma_bf16(d[1], high, b[2], b[3]);
      mma_bf16(d[0], low, b[0], b[1]);
      mma_bf16(d[1], low, b[2], b[3]);
      const uint32_t out[4] = {pack_bf16(d[0][0], d[0][1]), pack_bf16(d[0][2], d[0][3]),
                               pack_bf16(d[1][0], d[1][1]), pack_bf16(d[1][2], d[1][3])};
      __syncwarp();  // the block has been read by every lane
      stmatrix_x4(at, out);
    }
  }
};

}  // namespace kl::cuda
