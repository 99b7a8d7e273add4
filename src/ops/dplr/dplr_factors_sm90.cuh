// The producers of DPLR's Hopper prefill (cuda/prefill_factors_sm90.cuh). With G_i the inclusive sum of
// log-decays from the chunk's start to token i, per channel, and G_-1 = 0,
//
//   Ay_ij = scale Σ q_i y_j e^(G_i - G_j)  (j <= i)     By_ij = Σ b_i y_j e^(G_(i-1) - G_j)  (j < i)
//
// for y = k and y = a, what token i reads of the state S before it is the row p_i of (I + Ba)^-1 W, where
// W_i = S^T (b_i e^(G_(i-1))) + Σ_j Bk_ij v_j, and with T = (I + Ba)^-1
//
//   o = scale S^T (q e^G) + Ak v - (Aa T) W
//   S <- Diag(e^Gend) S + (k e^(Gend - G))^T v - (T^T (a e^(Gend - G)))^T W
//
// So the consumers' R is -W, and they need  -b_i e^(G_(i-1)),  scale q_i e^(G_i),  T^T (a e^(Gend - G)),
// k e^(Gend - G),  e^(Gend)  and the triangles  -Bk,  Ak  and  Aa T.
//
// What decays token j's vectors for q of token i decays them for b of token i + 1. Rows of b are therefore
// held one token ahead, b of token r + 1 in row r, in row 15 that of token 0, which needs no decay and has no
// earlier token in the chunk: one set of decays serves both sides. R's rows are in that order too.
#pragma once

#include "cuda/prefill_factors_sm90.cuh"

namespace kl::cuda {

struct DplrPrefillParams : PrefillParams {
  float scale;
};

// What the copy engine knows of the inputs.
struct DplrPrefillMaps {
  CUtensorMap q, k, a, b, v, g;
};

// A slot's operands:
//   pair    [panel][b rows 0-15, q rows 0-15]   raw b, q; then -b·e^G of the token before (rows one token
//                                               ahead) and q·scale·e^G
//   write   [panel][16]                         raw a; then T^T (a·e^(Gend - G)), rows one token ahead
//   keys    [panel][16]                         raw k; then k·e^(Gend - G)
//   value   [panel][16]                         v
//   gate    [panel][16]                         raw g; then scratch; at its end the small products
template <int D_>
struct DplrSlot {
  static constexpr int D = D_, kSlots = D == 128 ? 9 : 12;
  static constexpr bool kValuesApart = true, kMiddle = false, kScaled = false;
  static constexpr uint32_t kPair = 0;
  static constexpr uint32_t kWrite = D / 64 * 2 * kPanelBytes;
  static constexpr uint32_t kKeys = D / 64 * 3 * kPanelBytes;
  static constexpr uint32_t kValue = D / 64 * 4 * kPanelBytes;
  static constexpr uint32_t kGate = D / 64 * 5 * kPanelBytes;
  static constexpr uint32_t kSlotBytes = kGate + 4096;
  static constexpr uint32_t kSmall = kSlotBytes - 3 * 512;  // -Bk, Ak, Aa T
  static constexpr uint32_t kApartBytes = 0, kScratchBytes = 0;
};

template <int kWidth>
class DplrProducer : FactorWarp<DplrSlot<kWidth>> {
  using Base = FactorWarp<DplrSlot<kWidth>>;
  using Base::D, Base::g, Base::lane, Base::pack, Base::ring, Base::t;
  using typename Base::R;
  static constexpr uint32_t kPairPanels = 2 * kPanelBytes;  // panels of `pair` are as far apart
  // Below this the factors of a decay might leave the range of f32; vectors of lengths up to 2^27 have room.
  static constexpr float kLeastDecay = -100.f;  // log2

 public:
  KL_DEVICE DplrProducer(const DplrPrefillParams& params, R r) : Base(r), p(params) {}

  KL_DEVICE void run(int warp) {
    Base::follow_ring(
        warp, [&](int slot, const ChunkInfo& info, auto full) { chunk<decltype(full)::value>(slot, info); });
  }

 private:
  const DplrPrefillParams& p;

  // Products of two tokens' rows, [token j / 8][fragment]; A without `scale`, rows of B one token ahead.
  struct Triangles {
    float Ak[2][4] = {}, Aa[2][4] = {}, Bk[2][4] = {}, Ba[2][4] = {};
  };
  // Fragments of 16 channels: as they came, then decayed from the chunk's start (b, q) or to its end (a, k).
  struct Rows {
    uint32_t b[4], q[4], a[4], k[4];
  };

  // Lane's addresses of the 16 x 16 block `step` for ldmatrix and stmatrix.
  KL_DEVICE uint32_t pair_block(uint32_t region, int step) const {
    return Base::template block<kPairPanels>(region, step);
  }
  KL_DEVICE uint32_t row_block(uint32_t region, int step) const {
    return Base::template block<kPanelBytes>(region, step);
  }
  KL_DEVICE uint32_t next_token_block(uint32_t region, int step) const {
    return Base::template row_of_block<kPairPanels>(region, step, piece_at((lane + 1) % 16, lane / 16));
  }

  KL_DEVICE static void unpack(const uint32_t (&r)[4], float (&x)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // register i: tokens i % 2, channels i / 2
      const int e = 4 * (i / 2) + 2 * (i % 2);
      x[e] = low_half(r[i]), x[e + 1] = high_half(r[i]);
    }
  }
  KL_DEVICE static void scale_by(float (&x)[8], const float (&factor)[8]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= factor[e];
  }
  KL_DEVICE static void scale_channels(float (&x)[8], const float (&factor)[4]) {
#pragma unroll
    for (int e = 0; e < 8; ++e) x[e] *= factor[2 * (e / 4) + e % 2];
  }

  // log2-decays, right operands: the raw gates of tokens 2t, 2t + 1, 2t + 8, 2t + 9 of channels g, g + 8.
  template <bool kFull>
  KL_DEVICE void gates(const uint32_t (&raw)[4], int rows, float (&x)[8]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      x[e] =
          fmaxf(kLog2e * kDroppedBits * (e % 2 ? high_half(raw[e / 2]) : low_half(raw[e / 2])), kMinLogDecay);
      if (!kFull && 2 * t + e % 2 + e / 2 % 2 * 8 >= rows) x[e] = 0.f;
    }
  }

  // What 16 channels give, the decays split at the middle.
  KL_DEVICE void middle_step(const MiddleDecays& d, Rows& r, Triangles& m) const {
    float x[8];
    uint32_t right_k[4], right_a[4], left[4];
    unpack(r.k, x), scale_by(x, d.to), pack(x, right_k);
    scale_channels(x, d.second), pack(x, r.k);
    unpack(r.a, x), scale_by(x, d.to), pack(x, right_a);
    scale_channels(x, d.second), pack(x, r.a);

    unpack(r.q, x), scale_by(x, d.from), pack(x, left);
    mma_bf16(m.Ak[0], left, right_k[0], right_k[2]);
    mma_bf16(m.Ak[1], left, right_k[1], right_k[3]);
    mma_bf16(m.Aa[0], left, right_a[0], right_a[2]);
    mma_bf16(m.Aa[1], left, right_a[1], right_a[3]);
    float first[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) first[c] = d.first[c] * p.scale;
    scale_channels(x, first), pack(x, r.q);

    float b[8];
    unpack(r.b, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) b[e] = x[e] * d.from[e];
    pack(b, left);
    mma_bf16(m.Bk[0], left, right_k[0], right_k[2]);
    mma_bf16(m.Bk[1], left, right_k[1], right_k[3]);
    mma_bf16(m.Ba[0], left, right_a[0], right_a[2]);
    mma_bf16(m.Ba[1], left, right_a[1], right_a[3]);
    scale_channels(b, d.first);
    pack_before(b, x, r.b);
  }

  // -b e^(G of the token before); in row 15 stands token 0, whose state has not decayed.
  KL_DEVICE void pack_before(float (&decayed)[8], const float (&raw)[8], uint32_t (&r)[4]) const {
#pragma unroll
    for (int e = 0; e < 8; ++e) decayed[e] = -(e / 2 % 2 == 1 && g == 7 ? raw[e] : decayed[e]);
    pack(decayed, r);
  }

  // 16 channels in which half a chunk may decay by more than an f32 can hold: pair by pair.
  KL_DEVICE void steep_step(uint32_t slot, int step, int rows, float (&sum)[8], Rows& r, Triangles& m,
                            float (&decay)[4]) const {
    const auto d = Base::whole_decays(sum);
    // Gates of the first 32 channels have been read: their place holds the sums.
    char* const memory = ring.memory - ring.base() + slot + R::kGate;
    const auto place = [&](int token, int channel) -> float& {
      return *reinterpret_cast<float*>(memory + piece_at(token, channel / 4) + channel % 4 * 4);
    };
    Base::for_each_pair(sum, place, [&](int e, int i, int j, auto&& decay_of) {
      if (i < j || i >= rows) return;
      const auto pair = [&](uint32_t region, int row, int c) {
        return Base::template element<kPairPanels>(slot + R::kPair + region, step, row, c);
      };
      const bool reads = i + 1 < rows;
      float qk = 0, qa = 0, bk = 0, ba = 0;
#pragma unroll 1
      for (int c = 0; c < 16; ++c) {
        const float w = decay_of(c), q = pair(kPanelBytes, i, c), b = reads ? pair(0, i + 1, c) : 0.f;
        const float k = w * Base::template element<kPanelBytes>(slot + R::kKeys, step, j, c);
        const float a = w * Base::template element<kPanelBytes>(slot + R::kWrite, step, j, c);
        qk = fmaf(q, k, qk), qa = fmaf(q, a, qa), bk = fmaf(b, k, bk), ba = fmaf(b, a, ba);
      }
#pragma unroll
      for (int s = 0; s < 8; ++s)
        if (s == e) {
          m.Ak[s / 4][s % 4] += qk, m.Aa[s / 4][s % 4] += qa;
          m.Bk[s / 4][s % 4] += bk, m.Ba[s / 4][s % 4] += ba;
        }
    });
    float x[8], b[8];
    unpack(r.k, x), scale_by(x, d.to_end), pack(x, r.k);
    unpack(r.a, x), scale_by(x, d.to_end), pack(x, r.a);
    unpack(r.q, x), scale_by(x, d.from_start);
#pragma unroll
    for (float& e : x) e *= p.scale;
    pack(x, r.q);
    unpack(r.b, x);
#pragma unroll
    for (int e = 0; e < 8; ++e) b[e] = x[e] * d.from_start[e];
    pack_before(b, x, r.b);
#pragma unroll
    for (int c = 0; c < 4; ++c) decay[c] = d.chunk[c];
  }

  // kFull: all 16 tokens are there.
  template <bool kFull>
  KL_DEVICE void chunk(int s, const ChunkInfo& info) const {
    const int rows = info.rows;
    const uint32_t slot = ring.slot(s), b_at = slot + R::kPair, q_at = b_at + kPanelBytes;
    const uint32_t a_at = slot + R::kWrite, k_at = slot + R::kKeys, gate = slot + R::kGate;
    Triangles m;
    uint32_t raw[4];
    ldmatrix_x4_trans(raw, row_block(gate, 0));
#pragma unroll 1
    for (int step = 0; step < D / 16; ++step) {
      float sum[8];
      {
        float x[8];
        gates<kFull>(raw, rows, x);
        ldmatrix_x4_trans(raw, row_block(gate, min(step + 1, D / 16 - 1)));  // on its way meanwhile
        Base::sum_gates(x, sum);
      }
      Rows r;
      ldmatrix_x4(r.k, row_block(k_at, step));
      ldmatrix_x4(r.a, row_block(a_at, step));
      ldmatrix_x4(r.q, pair_block(q_at, step));
      ldmatrix_x4(r.b, next_token_block(b_at, step));
      if (!kFull) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = g + i % 2 * 8;
          if (token >= rows) r.k[i] = r.a[i] = r.q[i] = 0;
          if ((token + 1) % kChunkTokens >= rows) r.b[i] = 0;
        }
      }
      const bool steep = Base::steep(sum, kLeastDecay);
      MiddleDecays d = Base::decays(sum);
      if (!steep)
        middle_step(d, r, m);
      else
        steep_step(slot, step, rows, sum, r, m, d.chunk);
      __syncwarp();  // the blocks have been read by every lane
      stmatrix_x4(pair_block(b_at, step), r.b);
      stmatrix_x4(pair_block(q_at, step), r.q);
      stmatrix_x4(row_block(a_at, step), r.a);
      stmatrix_x4(row_block(k_at, step), r.k);
      if (g == 0) {
        float2* to = reinterpret_cast<float2*>(ring.decay(s) + 16 * step + 2 * t);
        to[0] = {d.chunk[0], d.chunk[1]}, to[4] = {d.chunk[2], d.chunk[3]};
      }
    }

    // The gates' place is free. Row r of Ba is token r + 1's.
    float* const scratch = reinterpret_cast<float*>(ring.memory + (gate - ring.base()));
    constexpr int kRow = Base::kInverseRow;
    __syncwarp();  // nobody reads gates any more
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int tile = 0; tile < 2; ++tile)
        *reinterpret_cast<float2*>(scratch + (g + 8 * half + 1) * kRow + 2 * t + 8 * tile) = {
            m.Ba[tile][2 * half], m.Ba[tile][2 * half + 1]};
    __syncwarp();              // Ba is there
    uint32_t high[4], low[4];  // T^T, rows one token ahead
    Base::invert(scratch, scratch + 17 * kRow, (lane + 1) % 16, 1.f, 1.f, high, low);

    Base::keep_lower(m.Ak), Base::keep_lower(m.Aa), Base::keep_lower(m.Bk);
    if (g == 7)  // token 0 reads nothing of this chunk
      m.Bk[0][2] = m.Bk[0][3] = m.Bk[1][2] = m.Bk[1][3] = 0.f;
    float z[2][4] = {};
    Base::fold_outputs(m.Aa, high, low, z);
    store_small(slot + R::kSmall, m.Bk, -1.f);
    store_small(slot + R::kSmall + 512, m.Ak, p.scale);
    store_small(slot + R::kSmall + 1024, z, p.scale);
    Base::fold_rows(a_at, high, low);
  }

  // 8 x 8 blocks of 128 bytes: [row / 8][column / 8].
  KL_DEVICE void store_small(uint32_t at, const float (&x)[2][4], float factor) const {
    const uint32_t r[4] = {
        pack_bf16(x[0][0] * factor, x[0][1] * factor), pack_bf16(x[1][0] * factor, x[1][1] * factor),
        pack_bf16(x[0][2] * factor, x[0][3] * factor), pack_bf16(x[1][2] * factor, x[1][3] * factor)};
    stmatrix_x4(at + lane * 16, r);
  }
};

template <int D>
struct DplrPrefill {
  using Params = DplrPrefillParams;
  using Maps = DplrPrefillMaps;
  using Slot = DplrSlot<D>;
  static constexpr bool kMayProbe = false, kKnowsGates = false;
  using R = Ring<Slot>;
  struct HeadPart {
    KL_DEVICE HeadPart(const Params&, int) {}
    KL_DEVICE void store(R, int) const {}
  };

  KL_DEVICE static void load(const Params&, R ring, int s, const Maps& maps, const ChunkInfo& info,
                             int head) {
    const uint32_t bar = ring.raw(s), slot = ring.slot(s);
    const bool value = info.item == Item::value;
    const int token = static_cast<int>(info.token);
    mbarrier_arrive_expect_tx(bar, R::kPanels * (value ? 6 : 5) * kPanelBytes);
#pragma unroll
    for (int panel = 0; panel < R::kPanels; ++panel) {
      const uint32_t apart = panel * kPanelBytes;
      box_load(slot + R::kPair + 2 * apart, &maps.b, 64 * panel, head, token, bar);
      box_load(slot + R::kPair + 2 * apart + kPanelBytes, &maps.q, 64 * panel, head, token, bar);
      box_load(slot + R::kWrite + apart, &maps.a, 64 * panel, head, token, bar);
      box_load(slot + R::kKeys + apart, &maps.k, 64 * panel, head, token, bar);
      box_load(slot + R::kGate + apart, &maps.g, 64 * panel, head, token, bar);
      if (value) box_load(slot + R::kValue + apart, &maps.v, 64 * panel, head, token, bar);
    }
  }

  KL_DEVICE static void produce(const Params& p, R ring, int producer) {
    DplrProducer<D>(p, ring).run(producer);
  }
};

}  // namespace kl::cuda
