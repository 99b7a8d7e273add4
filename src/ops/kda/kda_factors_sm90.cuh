// The producers of KDA's Hopper prefill (cuda/prefill_factors_sm90.cuh). With G_i the inclusive sum of
// log-decays from the chunk's start to token i, per channel, and
//
//   L_ij = beta_i Σ k_i k_j e^(G_i - G_j)  (i > j)     A_ij = scale Σ q_i k_j e^(G_i - G_j)  (i >= j)
//   T = (I + L)^-1 Diag(beta)
//
// the consumers, which hold the state at the chunk's middle (Gm), need  k_i e^(G_i - Gm),  q_i e^(G_i - Gm),
// T^T (k e^(Gm - G)),  A T,  e^(Gm)  and  e^(Gend - Gm). The first three are factors of L and A anyway.
//
// q and k are taken as they come: what makes them of length one, nk and nq (and scale), is known only when
// all channels have been seen, and is a factor a token. With raw L_ij = Σ k_i k_j e^(G_i - G_j) and A alike,
//
//   R'_i = -nk_i^2 (k_i S e^(..) - v_i / nk_i)          (R_i = R'_i / nk_i)
//   T'   = Diag(nk) (I + Diag(beta nk) L Diag(nk))^-1 Diag(beta / nk)
//   S   += (k e^(..))^T T' R'     o_i = nq_i (q_i S e^(..) + A T' R')
//
// R' could do without the factor nk^2, but with it equal keys of no decay are written as they are read: T'^T
// k is k then, and not rounded again.
#pragma once

#include "cuda/prefill_factors_sm90.cuh"
#include "ops/kda/kda_operand.cuh"

namespace kl::cuda {

struct KdaPrefillParams : PrefillParams {
  Operand beta;
  GateParams gate;
  KdaBeta beta_kind;
  bool l2norm;
  float l2_eps, scale;
};

// What the copy engine knows of the inputs.
struct KdaPrefillMaps {
  CUtensorMap q, k, v, g;
};

// A slot's operands:
//   pair    [panel][k rows 0-15, q rows 0-15]   raw k, q; then k·e^(G - Gm) and q·e^(G - Gm)
//   write   [panel][16]                         raw bf16 g; then (T'^T)(k·e^(Gm - G))
//   value   [panel][16]                         v
// and an f32 g outside of it, in panels of 32 channels.
template <int D_, bool kGateF32>
struct KdaSlot {
  static constexpr int D = D_, kSlots = kGateF32 && D == 128 ? 8 : 12;
  static constexpr bool kValuesApart = false, kMiddle = true, kScaled = true;
  static constexpr uint32_t kPair = 0;
  static constexpr uint32_t kWrite = D / 64 * 2 * kPanelBytes;
  static constexpr uint32_t kValue = D / 64 * 3 * kPanelBytes;
  static constexpr uint32_t kSlotBytes = D / 64 * 4 * kPanelBytes;
  static constexpr uint32_t kApartBytes = kGateF32 ? D / 64 * 2 * kPanelBytes : 0;
  static constexpr uint32_t kScratchBytes = 16 * 20 * 4;
};

// What turns a raw gate and its bias into log2 of a decay.
struct GateForm {
  float in;   // a factor before the nonlinear part
  float out;  // one after it; of a bounded gate its inverse
};
KL_DEVICE GateForm gate_form(const GateParams& gate, int head) {
  const float rate = gate.A_log != nullptr ? expf(gate.A_log[head]) : 1.f;
  switch (gate.kind) {
    case KdaGateKind::softplus: return {kLog2e, -rate * kDroppedBits};
    case KdaGateKind::bounded:  // the inverse of next to nothing times 0 is 0, and not NaN
      return {-kLog2e * rate, fmaxf(1 / (gate.lower_bound * kLog2e * kDroppedBits), -1e38f)};
    default: return {kLog2e * kDroppedBits, 1.f};
  }
}
KL_DEVICE float log2_decay_softplus(const GateForm& f, float y) {
  const float u = exp2_approx(-fabsf(y));
  // log2(1 + u) to 3.9e-4 of itself, also where u is small: slow gates act over a million tokens. A weight
  // e^G is off by |G| e^G times that, by 1.4e-4 at most.
  const float ratio = fmaf(u, fmaf(u, fmaf(u, -0.107254424f, 0.366480611f), -0.701747259f), 1.44212809f);
  return f.out * fmaf(u, ratio, fmaxf(y, 0.f));
}
// Elements e / 4 = 0 and 1 have one bias each, multiplied by `in` already. kDeep: they may be below
// kMinLogDecay.
template <KdaGateKind kKind, bool kDeep>
KL_DEVICE void log2_decays(const GateForm& f, const float (&bias)[2], float (&x)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e) x[e] = fmaf(x[e], f.in, bias[e / 4]);
  if constexpr (kKind == KdaGateKind::bounded) {
#pragma unroll
    for (float& e : x) e = rcp_approx(fmaf(exp2_approx(e), f.out, f.out));
  } else if constexpr (kKind == KdaGateKind::softplus) {
#pragma unroll
    for (float& e : x) e = log2_decay_softplus(f, e);
  }
  if constexpr (kDeep) {
#pragma unroll
    for (float& e : x) e = fmaxf(e, kMinLogDecay);
  }
}

template <int kWidth, bool kGateF32, KdaGateKind kKind>
class KdaProducer : FactorWarp<KdaSlot<kWidth, kGateF32>> {
  using Base = FactorWarp<KdaSlot<kWidth, kGateF32>>;
  using Base::D, Base::g, Base::lane, Base::pack, Base::ring, Base::t;
  using typename Base::R;
  static constexpr uint32_t kPairPanels = 2 * kPanelBytes;  // panels of `pair` are as far apart
  // Below this, of half a chunk, factors and states would leave the range of f32. log2; a gate with the bound
  // -5 stays above it.
  static constexpr float kLeastDecay = -64.f;
  static constexpr uint32_t kOnes = 0x3f803f80u;  // in bf16

 public:
  KL_DEVICE KdaProducer(const KdaPrefillParams& params, R r, int warp)
      : Base(r),
        p(params),
        scratch(reinterpret_cast<float*>(r.memory + R::kScratch + warp * R::kScratchBytes)) {}

  KL_DEVICE void run(int warp) {
    Base::follow_ring(warp, [&](int slot, const ChunkInfo& info, auto full) {
      constexpr bool kFull = decltype(full)::value;
      if (kFull && kKind == KdaGateKind::bounded && gentle())
        chunk<kFull, false>(slot, info);
      else
        chunk<kFull, true>(slot, info);
    });
  }

 private:
  const KdaPrefillParams& p;
  float* scratch;

  // Of tokens g and g + 8: 1 / length and the length, squares being on the diagonal of x x^T.
  KL_DEVICE void lengths(const float (&squares)[2][4], float (&inverse)[2], float (&length)[2]) const {
    const int from = (lane & ~3) | g / 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float(&x)[4] = squares[half];
      const float square = __shfl_sync(0xffffffffu, g % 2 ? x[2 * half + 1] : x[2 * half], from) + p.l2_eps;
      inverse[half] = p.l2norm ? rsqrt_approx(square) : 1.f;
      length[half] = p.l2norm ? square * inverse[half] : 1.f;
    }
  }

  // Raw gates of tokens 2t, 2t + 1, 2t + 8, 2t + 9 of channels g, g + 8 (right operands), and their biases:
  // on their way while the step before is worked on.
  struct RawGate {
    uint32_t x[kGateF32 ? 8 : 4];
    float bias[2];
  };
  KL_DEVICE void load_gate(int slot, int step, RawGate& raw) const {
    if constexpr (kGateF32) {
      const char* from = ring.memory + R::kApart + slot * R::kApartBytes;
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        const int row = 2 * t + e % 2 + e / 2 % 2 * 8, channel = 16 * step + g + e / 4 * 8;
        raw.x[e] = *reinterpret_cast<const uint32_t*>(from + channel / 32 * kPanelBytes +
                                                      piece_at(row, channel % 32 / 4) + channel % 4 * 4);
      }
    } else {
      ldmatrix_x4_trans(raw.x, Base::template block<kPanelBytes>(ring.slot(slot) + R::kWrite, step));
    }
    if constexpr (kKind != KdaGateKind::log_decay) {  // before the step's decays take their place
      const float* bias = ring.decay(slot) + 16 * step + g;
      raw.bias[0] = bias[0], raw.bias[1] = bias[8];
    }
  }
  template <bool kFull, bool kDeep>
  KL_DEVICE void gates(const RawGate& raw, const GateForm& form, int rows, float (&x)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      x[e] = kGateF32 ? __uint_as_float(raw.x[kGateF32 ? e : 0])
             : e % 2  ? high_half(raw.x[e / 2])
                      : low_half(raw.x[e / 2]);
    log2_decays<kKind, kDeep>(form, raw.bias, x);
    if (!kFull) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        if (2 * t + e % 2 + e / 2 % 2 * 8 >= rows) x[e] = 0.f;
    }
  }

  // Adds to L and A what 16 channels give, pair by pair.
  KL_DEVICE void add_pairs(uint32_t pair, int step, int rows, const float (&sum)[8], float (&L)[2][4],
                           float (&A)[2][4]) const {
    const auto place = [&](int token, int channel) -> float& { return scratch[token * 17 + channel]; };
    Base::for_each_pair(sum, place, [&](int e, int i, int j, auto&& decay) {
      if (i < j || i >= rows) return;
      float kk = 0, qk = 0;
#pragma unroll 1
      for (int c = 0; c < 16; ++c) {
        const float w = Base::template element<kPairPanels>(pair, step, j, c) * decay(c);
        kk = fmaf(Base::template element<kPairPanels>(pair, step, i, c), w, kk);
        qk = fmaf(Base::template element<kPairPanels>(pair + kPanelBytes, step, i, c), w, qk);
      }
#pragma unroll
      for (int r = 0; r < 8; ++r)
        if (r == e) L[r / 4][r % 4] += kk, A[r / 4][r % 4] += qk;
    });
  }

  // Of channels 2t and 2t + 1, 8 half behind the step's first ones: before the chunk's middle and after it.
  KL_DEVICE void store_decays(int slot, int step, int half, float2 before, float2 after) const {
    const int k = 16 * step + 8 * half + 2 * t;
    *reinterpret_cast<float2*>(ring.decay(slot) + k) = before;
    *reinterpret_cast<float2*>(ring.after(slot) + k) = after;
  }

  // Adds to L and A what 16 channels give, decays split at the middle of what a pair has in common: a half,
  // or the chunk.
  KL_DEVICE void add_quarters(const float (&sum)[8], const float (&near)[8], const uint32_t (&k)[4],
                              const uint32_t (&q)[4], float (&L)[2][4], float (&A)[2][4]) const {
    float x[8];
    uint32_t decay[4], left[4], right[4];
    const auto exponents = [&](auto&& exponent) {
#pragma unroll
      for (int e = 0; e < 8; ++e) x[e] = exp2_approx(exponent(e));
      pack(x, decay);
    };
    exponents([&](int e) { return -near[e]; });
    multiply(k, decay, right);
    exponents([&](int e) { return near[e]; });
    multiply(k, decay, left);
    Base::add_same_half(L, left, right);
    multiply(q, decay, left);
    Base::add_same_half(A, left, right);
    exponents([&](int e) { return -fabsf(sum[e]); });  // to the middle of the chunk, or from there
    multiply(k, decay, right);
    Base::add_across(L, right, right);
    multiply(q, decay, left);
    Base::add_across(A, left, right);
  }
  // Elements by decays that have been rounded, and by such that have not.
  KL_DEVICE static void multiply(const uint32_t (&x)[4], const float (&y)[8], uint32_t (&to)[4]) {
    float z[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint32_t two = x[2 * (e / 4) + e / 2 % 2];
      z[e] = (e % 2 ? high_half(two) : low_half(two)) * y[e];
    }
    pack(z, to);
  }
  KL_DEVICE static void multiply(const uint32_t (&x)[4], const uint32_t (&y)[4], uint32_t (&to)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = multiply_bf16x2(x[i], y[i]);
  }

  // 16 channels in which half a chunk may decay by more than an f32 can hold.
  KL_DEVICE void steep_step(int slot, uint32_t pair, int step, int rows, float (&sum)[8],
                            const uint32_t (&k)[4], const uint32_t (&q)[4], float (&L)[2][4],
                            float (&A)[2][4], uint32_t (&read_k)[4], uint32_t (&read_q)[4],
                            uint32_t (&keep)[4]) const {
    const auto d = Base::whole_decays(sum);
    float near[8];
    if (Base::from_quarters(sum, -kLeastDecay, near))
      add_quarters(sum, near, k, q, L, A);
    else
      add_pairs(pair, step, rows, sum, L, A);
    if (g == 7) {
#pragma unroll
      for (int half = 0; half < 2; ++half)
        store_decays(slot, step, half, {1, 1}, {-d.chunk[2 * half], -d.chunk[2 * half + 1]});
    }
    uint32_t decay[4];
    pack(d.from_start, decay);
    multiply(k, decay, read_k), multiply(q, decay, read_q);
    pack(d.to_end, decay);
    multiply(k, decay, keep);
  }

  // Is no channel steep, whatever the raw gates are, and no strength above 1? With 1.001 for the gate's own
  // rounding.
  KL_DEVICE bool gentle() const {
    return p.gate.lower_bound * (kLog2e * kChunkTokens / 2 * 1.001f) >= kLeastDecay &&
           p.beta_kind == KdaBeta::sigmoid;
  }

  // kFull: all 16 tokens are there. kMayBeSteep: any channel may be. Without the branch two steps are worked
  // on at a time. Write factors have rounded decays there, which with strengths to 2 would cost too much.
  template <bool kFull, bool kMayBeSteep>
  KL_DEVICE void chunk(int slot, const ChunkInfo& info) const {
    const int rows = info.rows, head = info.head;
    const uint32_t pair = ring.slot(slot) + R::kPair, write = ring.slot(slot) + R::kWrite;
    // Lane's strength: of token lane % 16. Wanted after the loop; the load is under way meanwhile.
    RawElement raw_beta;
    if (lane % 16 < rows) raw_beta = load_raw(p.beta, offset_of(p.beta, info.token + lane % 16, head));

    const float2 in_out = *reinterpret_cast<const float2*>(ring.scale(slot));
    const GateForm form{in_out.x, in_out.y};
    float L[2][4] = {}, A[2][4] = {};  // raw; [token j / 8][fragment]
    float q_squares[2][4] = {};        // q q^T inside the halves
    bool any_steep = false;
    RawGate raw{};
    load_gate(slot, 0, raw);
    __syncwarp();  // biases of the first step have been read
#pragma unroll(kMayBeSteep ? 1 : 2)
    for (int step = 0; step < D / 16; ++step) {
      float sum[8];
      {
        float x[8];
        gates<kFull, kMayBeSteep>(raw, form, rows, x);
        load_gate(slot, (step + 1) % (D / 16), raw);  // after the last step whatever is there
        Base::sum_gates(x, sum);
      }
      uint32_t k[4], q[4];
      {
        uint32_t by_tokens[4];  // q
        ldmatrix_x4(k, Base::template block<kPairPanels>(pair, step));
        ldmatrix_x4(q, Base::template block<kPairPanels>(pair + kPanelBytes, step));
        ldmatrix_x4(by_tokens, Base::template block_by_tokens<kPairPanels>(pair + kPanelBytes, step));
        if (!kFull) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (g + i % 2 * 8 >= rows) k[i] = q[i] = 0;
            if (g + i / 2 * 8 >= rows) by_tokens[i] = 0;
          }
        }
        mma_bf16(q_squares[0], q, by_tokens[0], by_tokens[1]);
        mma_bf16(q_squares[1], q, by_tokens[2], by_tokens[3]);
      }

      uint32_t read_k[4], read_q[4], keep[4];
      if (!kMayBeSteep || !Base::steep_half(sum, kLeastDecay)) {
        float from[8], to[8];  // the middle
#pragma unroll
        for (int e = 0; e < 8; ++e) from[e] = exp2_approx(sum[e]), to[e] = exp2_approx(-sum[e]);
        uint32_t from2[4];
        pack(from, from2);
        if constexpr (kMayBeSteep) {
          multiply(k, to, keep);
        } else {
          uint32_t to2[4];
          pack(to, to2);
          multiply(k, to2, keep);
        }
        if (g == 7) {  // rows 7 and 15 have the sums of the halves
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int e = 4 * half;
            store_decays(slot, step, half, {from[e], from[e + 1]}, {from[e + 2], from[e + 3]});
            from2[2 * half] = kOnes, keep[2 * half] = k[2 * half];  // token 7
          }
        }
        multiply(k, from2, read_k);
        mma_bf16(L[0], read_k, keep[0], keep[2]);
        mma_bf16(L[1], read_k, keep[1], keep[3]);
        multiply(q, from2, read_q);
        mma_bf16(A[0], read_q, keep[0], keep[2]);
        mma_bf16(A[1], read_q, keep[1], keep[3]);
      } else {
        any_steep = true;
        steep_step(slot, pair, step, rows, sum, k, q, L, A, read_k, read_q, keep);
      }
      __syncwarp();  // the block has been read by every lane
      stmatrix_x4(Base::template block<kPairPanels>(pair, step), read_k);
      stmatrix_x4(Base::template block<kPairPanels>(pair + kPanelBytes, step), read_q);
      const uint32_t by_tokens[4] = {keep[0], keep[2], keep[1], keep[3]};
      stmatrix_x4(Base::template block_by_tokens<kPanelBytes>(write, step), by_tokens);
    }
    if (any_steep && lane == 0) ring.info(slot).flags |= kSteep;
    float nk[2], k_length[2], nq[2], q_length[2];
    lengths(L, nk, k_length);  // no decay on the diagonal
    lengths(q_squares, nq, q_length);
    if (!kFull) {  // a factor of a row that is not there may be inf
      if (g >= rows) nk[0] = nq[0] = k_length[0] = 0;
      if (g + 8 >= rows) nk[1] = nq[1] = k_length[1] = 0;
    }
    if (t < 2) {
      const float of_k = t == 0 ? nk[0] : nk[1];
      float* scale = ring.scale(slot) + g + 8 * t;
      scale[0] = t == 0 ? -k_length[0] : -k_length[1];
      scale[kChunkTokens] = -of_k * of_k;
      scale[2 * kChunkTokens] = p.scale * (t == 0 ? nq[0] : nq[1]);
    }
    const float beta = lane % 16 < rows ? write_strength(p.beta_kind, value_of(p.beta, raw_beta)) : 0.f;
    uint32_t high[4], low[4];  // T'^T
    // Of token lane % 16.
    const auto own = [&](const float(&x)[2]) {
      const float a = __shfl_sync(0xffffffffu, x[0], lane % 8 * 4),
                  b = __shfl_sync(0xffffffffu, x[1], lane % 8 * 4);
      return lane % 16 < 8 ? a : b;
    };
    const float own_nk = own(nk), own_length = own(k_length);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // of tokens i
      const float factor = __shfl_sync(0xffffffffu, beta, g + 8 * half) * nk[half] * nk[half];
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        *reinterpret_cast<float2*>(scratch + (g + 8 * half) * Base::kInverseRow + 2 * t + 8 * tile) = {
            factor * L[tile][2 * half], factor * L[tile][2 * half + 1]};
    }
    __syncwarp();  // L is there
    Base::invert(scratch, scratch, lane % 16, own_nk, beta * own_length, high, low);

    Base::keep_lower(A);
    float z[2][4] = {};
    Base::fold_outputs(A, high, low, z);
    // 8 x 8 blocks of 128 bytes: [token i / 8][token j / 8].
    char* read = ring.memory + R::kRead + slot * 512 + g * 16 + t * 4;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        *reinterpret_cast<uint32_t*>(read + 256 * half + 128 * tile) =
            pack_bf16(z[tile][2 * half], z[tile][2 * half + 1]);
    Base::fold_rows(write, high, low);
  }
};

template <int D, bool kGateF32>
struct KdaPrefill {
  using Params = KdaPrefillParams;
  using Maps = KdaPrefillMaps;
  using Slot = KdaSlot<D, kGateF32>;
  static constexpr bool kMayProbe = true, kKnowsGates = true;
  using R = Ring<Slot>;

  // The gate's form, where a chunk's factors for tokens will stand, and dt_bias times GateForm::in, where its
  // decays will.
  struct HeadPart {
    static constexpr int kOwn = D / 32;
    GateForm form;
    float bias[kOwn];
    KL_DEVICE HeadPart(const Params& p, int head) : form(gate_form(p.gate, head)) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) bias[i] = dt_bias_of(p.gate, head, first() + i) * form.in;
    }
    KL_DEVICE void store(R ring, int s) const {
#pragma unroll
      for (int i = 0; i < kOwn; i += 2)
        *reinterpret_cast<float2*>(ring.decay(s) + first() + i) = {bias[i], bias[i + 1]};
      if (threadIdx.x % 32 == 0) *reinterpret_cast<float2*>(ring.scale(s)) = {form.in, form.out};
    }
    KL_DEVICE static int first() { return static_cast<int>(threadIdx.x % 32) * kOwn; }
  };

  KL_DEVICE static void load(const Params&, R ring, int s, const Maps& maps, const ChunkInfo& info,
                             int qk_head) {
    const uint32_t bar = ring.raw(s), slot = ring.slot(s);
    const bool value = info.item == Item::value;
    const int token = static_cast<int>(info.token);
    constexpr uint32_t kPanel = kPanelBytes, kGateBytes = kGateF32 ? R::kApartBytes : R::kPanels * kPanel;
    mbarrier_arrive_expect_tx(bar, R::kPanels * (value ? 3 : 2) * kPanel + kGateBytes);
#pragma unroll
    for (int panel = 0; panel < R::kPanels; ++panel) {
      box_load(slot + R::kPair + panel * 2 * kPanel, &maps.k, 64 * panel, qk_head, token, bar);
      box_load(slot + R::kPair + panel * 2 * kPanel + kPanel, &maps.q, 64 * panel, qk_head, token, bar);
      if (!kGateF32) box_load(slot + R::kWrite + panel * kPanel, &maps.g, 64 * panel, info.head, token, bar);
      if (value) box_load(slot + R::kValue + panel * kPanel, &maps.v, 64 * panel, info.head, token, bar);
    }
    if (kGateF32)
#pragma unroll
      for (int panel = 0; panel < 2 * R::kPanels; ++panel)
        box_load(ring.apart(s) + panel * kPanel, &maps.g, 32 * panel, info.head, token, bar);
  }

  // What the head's slowest channel decays by in a token whose raw gate is 0. For a whole warp.
  KL_DEVICE static float expected_forgetting(const Params& p, int head) {
    const float A_log = A_log_of(p.gate, head);
    float bias = INFINITY;  // the least
#pragma unroll
    for (int k = 0; k < D; k += 32)
      bias = fminf(bias, dt_bias_of(p.gate, head, k + static_cast<int>(threadIdx.x % 32)));
#pragma unroll
    for (int bit = 16; bit > 0; bit >>= 1) bias = fminf(bias, __shfl_xor_sync(0xffffffffu, bias, bit));
    return -log_decay(p.gate, expf(A_log), bias);
  }

  KL_DEVICE static void produce(const Params& p, R ring, int producer) {
    switch (p.gate.kind) {
      case KdaGateKind::log_decay:
        return KdaProducer<D, kGateF32, KdaGateKind::log_decay>(p, ring, producer).run(producer);
      case KdaGateKind::softplus:
        return KdaProducer<D, kGateF32, KdaGateKind::softplus>(p, ring, producer).run(producer);
      case KdaGateKind::bounded:
        return KdaProducer<D, kGateF32, KdaGateKind::bounded>(p, ring, producer).run(producer);
    }
  }
};

}  // namespace kl::cuda
