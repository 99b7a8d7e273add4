// Linear attention by chunks of 16 tokens with mma.sync: every GPU from sm_80 on, any K and V up to 256, any
// gate. Block, warps and state as in cuda/chunk.cuh: a block owns up to 128 value channels of one (sequence,
// value head) and walks over its chunks. With G the sums of log2-decays inside the chunk,
//
//   A_ij = scale Σ_c q_i k_j 2^(G_i - G_j), j <= i
//   o_i = scale S (q_i 2^G_i) + Σ_{j<=i} A_ij v_j
//   S <- S 2^G_15 + Σ_i v_i (k_i 2^(G_15 - G_i))ᵀ
//
// A decay per head is one per channel with the same number in all of them. Every power is of a sum that is
// not positive. Tokens past the end of the sequence have q = k = v = 0 and no decay.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "ops/linear_attention/linear_attention_cuda.h"

namespace kl::cuda {
namespace {

using namespace chunks;

struct LinearAttentionParams : PackedStates {
  Operand q, k, v, g, out;  // g.data null: no decay
  int g_channels;           // 1: a decay per channel, 0: one per head
  float scale;
  int K, V, N, Hv, group;  // group: value heads per query/key head
};

template <int KP>
struct Shared {
  static constexpr int kRow = KP + 4;  // floats
  struct Inputs {
    float q[kChunk][kRow], k[kChunk][kRow],
        G[kChunk][kRow];  // q holds `scale`; G: log2-decays, then their sums
  };
  struct Factors {
    KeyRows<KP> qg, kr;
  };
  union alignas(16) {
    Inputs in;
    Factors factors;  // after the pairs are done
  };
  ValueColumns<8> v;
  Triangle A;
  float sums[2][kChunk][kChunk];  // [half of the channels]; A_ii: all, in the first
  float decay[KP];                // 2^G_15
};

// What a thread loads of a chunk: of token threadIdx.x / 16 the channels threadIdx.x % 16 + 16 m.
template <int KP>
struct RawChunk {
  RawElement q[KP / 16], k[KP / 16], g[KP / 16], v[kWidth / 16];
};
template <int KP>
KL_DEVICE void load_chunk(RawChunk<KP>& raw, const LinearAttentionParams& p, int64_t row, bool valid,
                          int head, int v0) {
  raw = {};
  if (!valid) return;
  const int c0 = threadIdx.x % 16, qk_head = head / p.group;
  const int64_t q = offset_of(p.q, row, qk_head), k = offset_of(p.k, row, qk_head);
  const int64_t g = offset_of(p.g, row, head), v = offset_of(p.v, row, head) + v0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    if (c >= p.K) continue;
    raw.q[m] = load_raw(p.q, q + c), raw.k[m] = load_raw(p.k, k + c);
    if (p.g.data != nullptr) raw.g[m] = load_raw(p.g, g + c * p.g_channels);
  }
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m)
    if (v0 + c0 + 16 * m < p.V) raw.v[m] = load_raw(p.v, v + c0 + 16 * m);
}

// Operands, log2-decays and values of a chunk -> shared memory.
template <int KP>
KL_DEVICE void prepare_inputs(Shared<KP>& s, const RawChunk<KP>& raw, const LinearAttentionParams& p) {
  const int i = threadIdx.x / 16, c0 = threadIdx.x % 16;
  float qk = 0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    const float q = value_of(p.q, raw.q[m]) * p.scale, k = value_of(p.k, raw.k[m]);
    s.in.q[i][c] = q, s.in.k[i][c] = k, s.in.G[i][c] = log2_decay(value_of(p.g, raw.g[m]));
    qk = fmaf(q, k, qk);
  }
  qk = lanes_sum<15>(qk);
  if (c0 == 0) s.sums[0][i][i] = qk;
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m) s.v.put(i, c0 + 16 * m, value_of(p.v, raw.v[m]));
}

// Log2-decays -> their sums from the chunk's first token on.
template <int KP>
KL_DEVICE void sum_decays(Shared<KP>& s) {
  for (int c = threadIdx.x; c < KP; c += kThreads) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kChunk; ++i) s.in.G[i][c] = sum += s.in.G[i][c];
    s.decay[c] = exp2_approx(sum);
  }
}

// A below its diagonal. A pair (i, j < i) is shared by the threads (i, j), first half of the channels, and
// (j, i), second half.
template <int KP>
KL_DEVICE void multiply_pairs(Shared<KP>& s) {
  const int x = threadIdx.x / 16, y = threadIdx.x % 16, i = max(x, y), j = min(x, y);
  if (i == j) return;
  const int begin = x < y ? KP / 2 : 0, end = begin + KP / 2;
  float qk = 0;
  for (int c = begin; c < end; c += 4) {
    float Gi[4], Gj[4], kj[4], qi[4];
    load_channels(Gi, s.in.G[i], c), load_channels(Gj, s.in.G[j], c);
    load_channels(kj, s.in.k[j], c), load_channels(qi, s.in.q[i], c);
#pragma unroll
    for (int e = 0; e < 4; ++e) qk = fmaf(qi[e], kj[e] * exp2_approx(Gi[e] - Gj[e]), qk);
  }
  s.sums[x < y][i][j] = qk;
}

// Keys and queries with the decays of their tokens, in the place of the inputs; the triangle complete. All
// threads enter and leave together.
template <int KP>
KL_DEVICE void make_factors(Shared<KP>& s) {
  const int i = threadIdx.x / 16, c0 = threadIdx.x % 16;
  float q[KP / 16], k[KP / 16], G[KP / 16], rest[KP / 16];
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    q[m] = s.in.q[i][c], k[m] = s.in.k[i][c], G[m] = s.in.G[i][c];
    rest[m] = s.in.G[kChunk - 1][c] - G[m];
  }
  __syncthreads();  // the inputs have been read; their place may be written. The pairs become visible
  s.A.put(i, c0, c0 < i ? s.sums[0][i][c0] + s.sums[1][i][c0] : c0 == i ? s.sums[0][i][i] : 0.f);
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    s.factors.qg.put(i, c, q[m] * exp2_approx(G[m]));
    s.factors.kr.put(i, c, k[m] * exp2_approx(rest[m]));
  }
  __syncthreads();  // the factors become visible to all warps
}

template <int KP>
__global__ void __launch_bounds__(kThreads, 1)
    linear_attention_kernel(const __grid_constant__ LinearAttentionParams p, int first_sequence) {
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
    multiply_pairs(s);
    make_factors(s);
    const WarpColumns values[1] = {load_columns(s.v)};
    WarpTokens Q[1] = {};
    multiply_state(Q, S, {&s.factors.qg});
    multiply_triangle(Q[0], s.A, values[0]);
    store_outputs(Q[0], p.out, row, tokens, head, v0, p.V);
    update_state<KP>(S, [&](int c) { return load2(s.decay + c); }, values, {&s.factors.kr});
    __syncthreads();  // the factors have been read; the next inputs may take their place
  }
  if (work.slot_out >= 0)
    for_each_element<KP>(S, head_state(work.slot_out), p.row_stride, 1, p.K, p.V, v0,
                         [](float* to, float x) { *to = x; });
}

template <int KP>
void launch_chunks(const Ctx& ctx, const LinearAttentionParams& p) {
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  KL_CHECK(p.Hv <= 65535, "linear_attention: expected at most 65535 value heads, found ", p.Hv);
  for (int first = 0; first < p.N; first += kMostSequences)
    launch(linear_attention_kernel<KP>,
           {.grid = dim3(static_cast<unsigned>((p.V + kWidth - 1) / kWidth), static_cast<unsigned>(p.Hv),
                         static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
            .block = dim3(kThreads),
            .smem = sizeof(Shared<KP>),
            .stream = static_cast<cudaStream_t>(ctx.stream),
            .overlap_previous = true},
           p, first);
}

}  // namespace

void linear_attention_chunks(const Ctx& ctx, const LinearAttentionArgs& a) {
  LinearAttentionParams p{};
  static_cast<PackedStates&>(p) = packed_states(a.cu_seqlens, a.state, a.slot, a.slot_out);
  p.q = operand(a.q), p.k = operand(a.k), p.v = operand(a.v), p.out = operand(a.out);
  if (a.g) p.g = operand(a.g), p.g_channels = a.g.rank == 3;
  p.K = static_cast<int>(a.q.size(2)), p.V = static_cast<int>(a.v.size(2));
  p.N = static_cast<int>(a.cu_seqlens.size(0) - 1), p.Hv = static_cast<int>(a.v.size(1));
  p.group = p.Hv / static_cast<int>(a.q.size(1));
  p.scale = a.scale != 0.f ? a.scale : 1.f / sqrtf(static_cast<float>(p.K));
  if (p.K <= 64) return launch_chunks<64>(ctx, p);
  if (p.K <= 128) return launch_chunks<128>(ctx, p);
  launch_chunks<256>(ctx, p);
}

}  // namespace kl::cuda
