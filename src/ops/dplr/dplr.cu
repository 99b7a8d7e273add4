// DPLR by chunks of 16 tokens with mma.sync: every GPU from sm_80 on, any K and V up to 256, any gate. Block,
// warps and state as in cuda/chunk.cuh: a block owns up to 128 value channels of one (sequence, head) and
// walks over its chunks. The scheme is that of the portable KDA prefill, so that the two can be compared:
// what is more here is what a general transition costs. With G the sums of log2-decays inside the chunk and
// p_i what token i reads of the state before it,
//
//   A_ij = scale Σ_c q_i y_j 2^(G_i - G_j), j <= i      for y = k and y = a
//   B_ij = Σ_c b_i y_j 2^(G_{i-1} - G_j),   j < i       likewise
//   W_i = S (b_i 2^G_{i-1})        Q_i = scale S (q_i 2^G_i)
//   p_i = W_i + Σ_{j<i} (Bk_ij v_j - Ba_ij p_j)         by substitution in f32
//   o_i = Q_i + Σ_{j<=i} (Ak_ij v_j - Aa_ij p_j)
//   S <- S 2^G_15 + Σ_i (v_i (k_i 2^(G_15 - G_i))ᵀ - p_i (a_i 2^(G_15 - G_i))ᵀ)
//
// Four triangles where KDA has two, one of them also a product with the values before the substitution; four
// decayed operands instead of three; and two products instead of one in the last two lines. Every power is of
// a sum that is not positive. Tokens past the end of the sequence have q = k = a = b = v = 0 and no decay.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "ops/dplr/dplr_cuda.h"

namespace kl::cuda {
namespace {

using namespace chunks;

struct DplrParams : PackedStates {
  Operand q, k, a, b, v, g, out;
  float scale;
  int K, V, N, H;
};

enum Pairs { kQueryKey, kQueryErase, kReadKey, kReadErase };  // Ak, Aa, Bk, Ba

template <int KP>
struct Shared {
  static constexpr int kRow = KP + 4;             // floats
  static constexpr int kPad = KP == 256 ? 0 : 8;  // 99 KiB is all that some GPUs have
  struct Inputs {
    float q[kChunk][kRow], k[kChunk][kRow], a[kChunk][kRow], b[kChunk][kRow],
        G[kChunk][kRow];  // q holds `scale`; G: log2-decays, then their sums
  };
  struct Factors {
    KeyRows<KP> bg, qg, kr, ar;
    union {
      float sums[2][4][kChunk][kChunk];  // [half of the channels][Pairs]
      ValueColumns<kPad> p;              // once the triangles are made
    };
    float W[kChunk][kWidth + 4];  // products of b with the state, and the values' part
  };
  union alignas(16) {
    Inputs in;
    Factors factors;  // after the pairs are done
  };
  ValueColumns<kPad> v;
  Triangle A_k, A_a, B_k;
  alignas(16) float B_a_columns[kChunk][kChunk];  // by columns
  float decay[KP];                                // 2^G_15
  float neighbours[4][kChunk];                    // A_ii, B_{i+1,i}: no decay between the two
};

// What a thread loads of a chunk: of token threadIdx.x / 16 the channels threadIdx.x % 16 + 16 m.
template <int KP>
struct RawChunk {
  RawElement q[KP / 16], k[KP / 16], a[KP / 16], b[KP / 16], g[KP / 16], v[kWidth / 16];
};
template <int KP>
KL_DEVICE void load_chunk(RawChunk<KP>& raw, const DplrParams& p, int64_t row, bool valid, int head, int v0) {
  raw = {};
  if (!valid) return;
  const int c0 = threadIdx.x % 16;
  const int64_t q = offset_of(p.q, row, head), k = offset_of(p.k, row, head), a = offset_of(p.a, row, head);
  const int64_t b = offset_of(p.b, row, head), g = offset_of(p.g, row, head);
  const int64_t v = offset_of(p.v, row, head) + v0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    if (c >= p.K) continue;
    raw.q[m] = load_raw(p.q, q + c), raw.k[m] = load_raw(p.k, k + c), raw.a[m] = load_raw(p.a, a + c);
    raw.b[m] = load_raw(p.b, b + c), raw.g[m] = load_raw(p.g, g + c);
  }
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m)
    if (v0 + c0 + 16 * m < p.V) raw.v[m] = load_raw(p.v, v + c0 + 16 * m);
}

// Operands, log2-decays and values of a chunk -> shared memory.
template <int KP>
KL_DEVICE void prepare_inputs(Shared<KP>& s, const RawChunk<KP>& raw, const DplrParams& p) {
  const int i = threadIdx.x / 16, c0 = threadIdx.x % 16;
  float qk = 0, qa = 0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    const float q = value_of(p.q, raw.q[m]) * p.scale, k = value_of(p.k, raw.k[m]);
    const float a = value_of(p.a, raw.a[m]);
    s.in.q[i][c] = q, s.in.k[i][c] = k, s.in.a[i][c] = a, s.in.b[i][c] = value_of(p.b, raw.b[m]);
    s.in.G[i][c] = log2_decay(value_of(p.g, raw.g[m]));
    qk = fmaf(q, k, qk), qa = fmaf(q, a, qa);
  }
  qk = lanes_sum<15>(qk), qa = lanes_sum<15>(qa);
  if (c0 == 0) s.neighbours[kQueryKey][i] = qk, s.neighbours[kQueryErase][i] = qa;
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m) s.v.put(i, c0 + 16 * m, value_of(p.v, raw.v[m]));
}

// Log2-decays -> their sums from the chunk's first token on; what b reads of the token just before.
template <int KP>
KL_DEVICE void sum_decays(Shared<KP>& s) {
  for (int c = threadIdx.x; c < KP; c += kThreads) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) s.in.G[i][c] = sum += s.in.G[i][c];
    s.decay[c] = exp2_approx(sum);
  }
  const int j = threadIdx.x / 16, c0 = threadIdx.x % 16, i = min(j + 1, kChunk - 1);
  float bk = 0, ba = 0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const float b = s.in.b[i][c0 + 16 * m];
    bk = fmaf(b, s.in.k[j][c0 + 16 * m], bk), ba = fmaf(b, s.in.a[j][c0 + 16 * m], ba);
  }
  bk = lanes_sum<15>(bk), ba = lanes_sum<15>(ba);
  if (c0 == 0) s.neighbours[kReadKey][j] = bk, s.neighbours[kReadErase][j] = ba;
}

// The four triangles below their first diagonals. A pair of tokens (i, j < i) is shared by the threads (i,
// j), first half of the channels, and (j, i), second half. What decays key j for query i decays it for b of
// token i + 1.
template <int KP>
KL_DEVICE void multiply_pairs(float (&sums)[4], const Shared<KP>& s) {
  const int x = threadIdx.x / 16, y = threadIdx.x % 16, i = max(x, y), j = min(x, y);
  const int next = min(i + 1, kChunk - 1);
#pragma unroll
  for (float& sum : sums) sum = 0;
  if (i == j) return;
  const int begin = x < y ? KP / 2 : 0, end = begin + KP / 2;
  for (int c = begin; c < end; c += 4) {
    float Gi[4], Gj[4], kj[4], aj[4], qi[4], bi[4];
    load_channels(Gi, s.in.G[i], c), load_channels(Gj, s.in.G[j], c);
    load_channels(kj, s.in.k[j], c), load_channels(aj, s.in.a[j], c);
    load_channels(qi, s.in.q[i], c), load_channels(bi, s.in.b[next], c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float decay = exp2_approx(Gi[e] - Gj[e]), k = kj[e] * decay, a = aj[e] * decay;
      sums[kQueryKey] = fmaf(qi[e], k, sums[kQueryKey]);
      sums[kQueryErase] = fmaf(qi[e], a, sums[kQueryErase]);
      sums[kReadKey] = fmaf(bi[e], k, sums[kReadKey]);
      sums[kReadErase] = fmaf(bi[e], a, sums[kReadErase]);
    }
  }
}

// Operands with the decays of their tokens, and the sums of the pairs, in the place of the inputs. All
// threads enter and leave together.
template <int KP>
KL_DEVICE void make_factors(Shared<KP>& s, const float (&sums)[4]) {
  const int x = threadIdx.x / 16, y = threadIdx.x % 16, i = x, c0 = y;
  float q[KP / 16], k[KP / 16], a[KP / 16], b[KP / 16], G[KP / 16], before[KP / 16], rest[KP / 16];
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    q[m] = s.in.q[i][c], k[m] = s.in.k[i][c], a[m] = s.in.a[i][c], b[m] = s.in.b[i][c], G[m] = s.in.G[i][c];
    before[m] = i > 0 ? s.in.G[max(i - 1, 0)][c] : 0.f;
    rest[m] = s.in.G[kChunk - 1][c] - G[m];
  }
  __syncthreads();  // the inputs have been read; their place may be written
  const int later = max(x, y), earlier = min(x, y), half = x < y;
  s.factors.sums[half][kQueryKey][later][earlier] = sums[kQueryKey];
  s.factors.sums[half][kQueryErase][later][earlier] = sums[kQueryErase];
  if (later + 1 < kChunk) {
    s.factors.sums[half][kReadKey][later + 1][earlier] = sums[kReadKey];
    s.factors.sums[half][kReadErase][later + 1][earlier] = sums[kReadErase];
  }
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    const float to_end = exp2_approx(rest[m]);
    s.factors.qg.put(i, c, q[m] * exp2_approx(G[m]));
    s.factors.bg.put(i, c, b[m] * exp2_approx(before[m]));
    s.factors.kr.put(i, c, k[m] * to_end);
    s.factors.ar.put(i, c, a[m] * to_end);
  }
  __syncthreads();  // the factors become visible to all warps
}

// The triangles, a thread a pair.
template <int KP>
KL_DEVICE void make_triangles(Shared<KP>& s) {
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  // `last`: the largest j that acts on i, one without a decay in between.
  const auto element = [&](Pairs pairs, int last) {
    return j < last    ? s.factors.sums[0][pairs][i][j] + s.factors.sums[1][pairs][i][j]
           : j == last ? s.neighbours[pairs][j]
                       : 0.f;
  };
  s.A_k.put(i, j, element(kQueryKey, i)), s.A_a.put(i, j, element(kQueryErase, i));
  s.B_k.put(i, j, element(kReadKey, i - 1));
  s.B_a_columns[j][i] = element(kReadErase, i - 1);
}

template <int KP>
__global__ void __launch_bounds__(kThreads, 1)
    dplr_kernel(const __grid_constant__ DplrParams p, int first_sequence) {
  follow_previous_kernel();
  extern __shared__ float4 memory[];
  auto& s = *reinterpret_cast<Shared<KP>*>(memory);
  const int head = blockIdx.y, v0 = blockIdx.x * kWidth;
  const SequenceWork work = sequence_work(p, first_sequence + blockIdx.z);
  if (work.idle()) return;

  const auto head_state = [&](int slot) {
    return static_cast<float*>(p.state) + slot * p.slot_stride + head * p.head_stride;
  };
  WarpState<KP> S = {};
  if (work.slot >= 0)
    for_each_element<KP>(S, head_state(work.slot), p.row_stride, 1, p.K, p.V, v0,
                         [](float* from, float& x) { x = *from; });

  constexpr bool kAhead = KP < 256;  // operands are loaded a chunk ahead, where registers allow it
  RawChunk<KP> raw;
  const int64_t mine = threadIdx.x / 16;  // token of the chunk that this thread loads
  const auto load = [&](int64_t row) { load_chunk(raw, p, row + mine, row + mine < work.end, head, v0); };
  if (kAhead) load(work.begin);
  for (int64_t row = work.begin; row < work.end; row += kChunk) {
    const int tokens = static_cast<int>(min(work.end - row, static_cast<int64_t>(kChunk)));
    if (!kAhead) load(row);
    prepare_inputs(s, raw, p);
    if (kAhead) load(row + kChunk);
    __syncthreads();  // the inputs become visible
    sum_decays(s);
    __syncthreads();  // sums become visible
    float sums[4];
    multiply_pairs(sums, s);
    make_factors(s, sums);
    make_triangles(s);
    WarpTokens products[2] = {};  // W, Q
    multiply_state(products, S, {&s.factors.bg, &s.factors.qg});
    __syncthreads();  // the triangles become visible; the sums of pairs have been read
    const WarpColumns values = load_columns(s.v);
    multiply_triangle(products[0], s.B_k, values);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.factors.W[token_of(n, e)][value_channel_of(e)] = products[0][n][e];
    __syncthreads();  // W becomes visible to the value channels' threads
    if (threadIdx.x < kWidth) {
      float x[kChunk];
#pragma unroll
      for (int i = 0; i < kChunk; ++i) x[i] = s.factors.W[i][threadIdx.x];
      substitute(x, s.B_a_columns, [&](int j, float x_j) { s.factors.p.put(j, threadIdx.x, x_j); });
    }
    __syncthreads();  // p becomes visible to the warps
    WarpColumns both[2] = {values, load_columns(s.factors.p)};
    negate(both[1]);
    multiply_triangle(products[1], s.A_k, both[0]);
    multiply_triangle(products[1], s.A_a, both[1]);
    store_outputs(products[1], p.out, row, tokens, head, v0, p.V);
    update_state<KP>(S, [&](int c) { return load2(s.decay + c); }, both, {&s.factors.kr, &s.factors.ar});
    __syncthreads();  // the factors have been read; the next inputs may take their place
  }
  if (work.slot_out >= 0)
    for_each_element<KP>(S, head_state(work.slot_out), p.row_stride, 1, p.K, p.V, v0,
                         [](float* to, float x) { *to = x; });
}

template <int KP>
void launch_chunks(const Ctx& ctx, const DplrParams& p) {
  static_assert(sizeof(Shared<KP>) <= 99 * 1024);
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  KL_CHECK(p.H <= 65535, "dplr: expected at most 65535 heads, found ", p.H);
  for (int first = 0; first < p.N; first += kMostSequences)
    launch(dplr_kernel<KP>,
           {.grid = dim3(static_cast<unsigned>((p.V + kWidth - 1) / kWidth), static_cast<unsigned>(p.H),
                         static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
            .block = dim3(kThreads),
            .smem = sizeof(Shared<KP>),
            .stream = static_cast<cudaStream_t>(ctx.stream),
            .overlap_previous = true},
           p, first);
}

}  // namespace

void dplr_chunks(const Ctx& ctx, const DplrArgs& a) {
  DplrParams p{};
  static_cast<PackedStates&>(p) = packed_states(a.cu_seqlens, a.state, a.slot, a.slot_out);
  p.q = operand(a.q), p.k = operand(a.k), p.a = operand(a.a), p.b = operand(a.b), p.v = operand(a.v);
  p.g = operand(a.g), p.out = operand(a.out);
  p.K = static_cast<int>(a.q.size(2)), p.V = static_cast<int>(a.v.size(2));
  p.N = static_cast<int>(a.cu_seqlens.size(0) - 1), p.H = static_cast<int>(a.q.size(1));
  p.scale = a.scale != 0.f ? a.scale : 1.f / sqrtf(static_cast<float>(p.K));
  if (p.K <= 64) return launch_chunks<64>(ctx, p);
  if (p.K <= 128) return launch_chunks<128>(ctx, p);
  launch_chunks<256>(ctx, p);
}

}  // namespace kl::cuda
