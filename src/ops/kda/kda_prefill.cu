// KDA by chunks of 16 tokens with mma.sync: every GPU from sm_80 on, any K and V up to 256, any gate. Made to
// be right first: products with the state run as three bf16 products of halves (hi·hi + hi·lo + lo·hi, an
// error near 2^-16), everything inside a chunk in f32, so results stand within 1e-4 of the definition for f32
// and bf16 inputs alike.
//
// A block owns up to 128 value channels of one (sequence, value head) and walks over its chunks; a warp keeps
// 16 of them as a transposed state S[v][k] in accumulator registers, which are also the left operand of the
// products with the state. With G the sums of log2-decays inside the chunk (spec of the recurrence: kda.h):
//
//   L_ij = beta_i Σ_k k_i k_j 2^(G_i - G_j), j < i
//   A_ij = scale Σ_k q_i k_j 2^(G_i - G_j), j <= i
//   W_i = S (k_i 2^G_i)        Q_i = scale S (q_i 2^G_i)
//   delta_i = beta_i (v_i - W_i) - Σ_{j<i} L_ij delta_j     by substitution in f32
//   o_i = Q_i + Σ_{j<=i} A_ij delta_j
//   S <- S 2^G_15 + Σ_i delta_i (k_i 2^(G_15 - G_i))ᵀ
//
// Every power is of a sum that is not positive: nothing overflows for any gate, and what underflows is really
// 0. A log2-decay is held at -150 first, where 2^x is 0 in f32 already: so that sums stay finite and
// differences exact enough behind a step of -inf. Tokens past the end of the sequence have k = q = v = beta =
// 0 and no decay.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_tile.cuh"

namespace kl::cuda {
namespace {

using namespace chunks;

template <int KP>
struct Shared {
  static constexpr int kRow = KP + 4;  // floats
  struct Inputs {
    float q[kChunk][kRow], k[kChunk][kRow],
        G[kChunk][kRow];  // q holds `scale`; G: log2-decays, then their sums
  };
  struct Factors {
    KeyRows<KP> kg, qg, kr;
  };
  union alignas(16) {
    Inputs in;
    Factors factors;  // after the triangles are done
  };
  float decay[KP];                             // 2^G_15
  float W[kChunk][kWidth + 4];                 // values first, then products of keys with the state
  float L[kChunk][kChunk], A[kChunk][kChunk];  // sums over the first half of the channels; A_ii: all
  float L_rest[kChunk][kChunk], A_rest[kChunk][kChunk];  // ... the second half
  alignas(16) float L_columns[kChunk][kChunk];           // beta L, by columns
  Triangle A_halves;
  ValueColumns<8> delta;
  float beta[kChunk];
};

// What a thread loads of a chunk: of token threadIdx.x / 16 the channels threadIdx.x % 16 + 16 m.
template <int KP>
struct RawChunk {
  RawElement q[KP / 16], k[KP / 16], g[KP / 16], v[kWidth / 16], beta;
};
template <int KP>
KL_DEVICE void load_chunk(RawChunk<KP>& raw, const StepParams& p, int64_t row, bool valid, int head, int v0) {
  raw = {};
  if (!valid) return;
  const int c0 = threadIdx.x % 16;
  const int64_t qk = qk_head(p, head), q = offset_of(p.q, row, qk), k = offset_of(p.k, row, qk);
  const int64_t g = offset_of(p.g, row, head), v = offset_of(p.v, row, head) + v0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    if (c < p.K)
      raw.q[m] = load_raw(p.q, q + c), raw.k[m] = load_raw(p.k, k + c), raw.g[m] = load_raw(p.g, g + c);
  }
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m)
    if (v0 + c0 + 16 * m < p.V) raw.v[m] = load_raw(p.v, v + c0 + 16 * m);
  raw.beta = load_raw(p.beta, offset_of(p.beta, row, head));
}

// Normalised keys and queries, log2-decays, values and beta of a chunk -> shared memory. The values stand in
// the place of W until their channels' threads have taken them.
template <int KP>
KL_DEVICE void prepare_inputs(Shared<KP>& s, const RawChunk<KP>& raw, const StepParams& p, bool valid,
                              float factor, const float* dt_bias) {
  const int i = threadIdx.x / 16, c0 = threadIdx.x % 16;
  float kk = 0, qq = 0, kq = 0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const float k = value_of(p.k, raw.k[m]), q = value_of(p.q, raw.q[m]);
    kk = fmaf(k, k, kk), qq = fmaf(q, q, qq), kq = fmaf(k, q, kq);
  }
  const Scales scales =
      scales_of(lanes_sum<15>(kk), lanes_sum<15>(qq), lanes_sum<15>(kq), p.l2norm, p.l2_eps, p.scale);
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    // A token past the end has no length; without an epsilon its scale is infinite.
    s.in.k[i][c] = valid ? value_of(p.k, raw.k[m]) * scales.k : 0.f;
    s.in.q[i][c] = valid ? value_of(p.q, raw.q[m]) * scales.q : 0.f;
    const float g = log_decay(p.gate, factor,
                              value_of(p.g, raw.g[m]) + (dt_bias == nullptr || c >= p.K ? 0.f : dt_bias[c]));
    s.in.G[i][c] = valid ? log2_decay(g) : 0.f;
  }
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m) s.W[i][c0 + 16 * m] = value_of(p.v, raw.v[m]);
  if (c0 == 0) {
    s.beta[i] = valid ? write_strength(p.beta_kind, value_of(p.beta, raw.beta)) : 0.f;
    s.A[i][i] = valid ? scales.kq : 0.f;
  }
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

// The two triangles below their diagonals. A pair (i, j < i) is shared by the threads (i, j), first half of
// the channels, and (j, i), second half.
template <int KP>
KL_DEVICE void triangles(Shared<KP>& s) {
  const int x = threadIdx.x / 16, y = threadIdx.x % 16, i = max(x, y), j = min(x, y);
  if (i == j) return;
  const int begin = x < y ? KP / 2 : 0, end = begin + KP / 2;
  float kk = 0, qk = 0;
  for (int c = begin; c < end; c += 4) {
    float Gi[4], Gj[4], ki[4], kj[4], qi[4];
    load_channels(Gi, s.in.G[i], c), load_channels(Gj, s.in.G[j], c);
    load_channels(ki, s.in.k[i], c), load_channels(kj, s.in.k[j], c), load_channels(qi, s.in.q[i], c);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float decayed = kj[e] * exp2_approx(Gi[e] - Gj[e]);
      kk = fmaf(ki[e], decayed, kk), qk = fmaf(qi[e], decayed, qk);
    }
  }
  (x < y ? s.L_rest : s.L)[i][j] = kk;
  (x < y ? s.A_rest : s.A)[i][j] = qk;
}

// Keys and queries with the decays of their tokens, in the place of the inputs; the triangles complete. All
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
  __syncthreads();  // the inputs have been read; their place may be written
  s.L_columns[c0][i] = c0 < i ? s.beta[i] * (s.L[i][c0] + s.L_rest[i][c0]) : 0.f;
  s.A_halves.put(i, c0, c0 < i ? s.A[i][c0] + s.A_rest[i][c0] : c0 == i ? s.A[i][i] : 0.f);
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    const float decay = exp2_approx(G[m]);
    s.factors.kg.put(i, c, k[m] * decay);
    s.factors.qg.put(i, c, q[m] * decay);
    s.factors.kr.put(i, c, k[m] * exp2_approx(rest[m]));
  }
  __syncthreads();  // the factors become visible to all warps
}

// delta of one value channel.
template <int KP>
KL_DEVICE void solve(Shared<KP>& s, const float (&values)[kChunk]) {
  const int v = threadIdx.x;
  float delta[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) delta[i] = s.beta[i] * (values[i] - s.W[i][v]);
  substitute(delta, s.L_columns, [&](int j, float x) { s.delta.put(j, v, x); });
}

template <int KP, class State>
__global__ void __launch_bounds__(kThreads, 1)
    kda_prefill_kernel(const __grid_constant__ StepParams p, bool v_first, int first_sequence) {
  follow_previous_kernel();
  extern __shared__ float4 memory[];
  auto& s = *reinterpret_cast<Shared<KP>*>(memory);
  const int head = blockIdx.y, v0 = blockIdx.x * kWidth;
  const SequenceWork work = sequence_work(p, first_sequence + blockIdx.z);
  if (work.idle()) return;

  const auto head_state = [&](int slot) {
    return static_cast<State*>(p.state) + slot * p.slot_stride + head * p.head_stride;
  };
  WarpState<KP> S = {};
  const int64_t k_stride = v_first ? 1 : p.row_stride, v_stride = v_first ? p.row_stride : 1;
  const auto leave_state = [&](int slot) {
    if (slot >= 0)
      for_each_element<KP>(S, head_state(slot), k_stride, v_stride, p.K, p.V, v0,
                           [](State* to, float x) { *to = from_float<State>(x); });
  };
  if (work.slot >= 0)
    for_each_element<KP>(S, head_state(work.slot), k_stride, v_stride, p.K, p.V, v0,
                         [](State* from, float& x) { x = to_float(*from); });

  const float factor = expf(A_log_of(p.gate, head));
  const bool biased = p.gate.dt_bias != nullptr && p.gate.kind != KdaGateKind::log_decay;
  const float* dt_bias = biased ? p.gate.dt_bias + head * p.gate.dt_stride : nullptr;
  int checkpoint = first_checkpoint(p, work.begin);

  constexpr bool kAhead = KP < 256;  // operands are loaded a chunk ahead, where registers allow it
  RawChunk<KP> raw;
  const int64_t mine = threadIdx.x / 16;  // token of the chunk that this thread loads
  const auto load = [&](int64_t row) { load_chunk(raw, p, row + mine, row + mine < work.end, head, v0); };
  if (kAhead) load(work.begin);
  for (int64_t row = work.begin; row < work.end; row += kChunk) {
    const int tokens = static_cast<int>(min(work.end - row, static_cast<int64_t>(kChunk)));
    if (!kAhead) load(row);
    prepare_inputs(s, raw, p, mine < tokens, factor, dt_bias);
    if (kAhead) load(row + kChunk);
    __syncthreads();  // inputs and values become visible
    float values[kChunk];
    if (threadIdx.x < kWidth)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = s.W[i][threadIdx.x];
    sum_decays(s);
    __syncthreads();  // sums become visible; the values have been taken
    triangles(s);
    __syncthreads();  // the triangles are done with the inputs
    make_factors(s);
    WarpTokens products[2] = {};  // W, Q
    multiply_state(products, S, {&s.factors.kg, &s.factors.qg});
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) s.W[token_of(n, e)][value_channel_of(e)] = products[0][n][e];
    __syncthreads();  // W becomes visible to the value channels' threads
    if (threadIdx.x < kWidth) solve(s, values);
    __syncthreads();  // delta becomes visible to the warps
    const WarpColumns delta[1] = {load_columns(s.delta)};
    multiply_triangle(products[1], s.A_halves, delta[0]);
    store_outputs(products[1], p.out, row, tokens, head, v0, p.V);
    update_state<KP>(S, [&](int c) { return load2(s.decay + c); }, delta, {&s.factors.kr});
    while (checkpoint < p.checkpoints && p.checkpoint_row[checkpoint] <= row + tokens) {
      if (p.checkpoint_row[checkpoint] == row + tokens) leave_state(p.checkpoint_slot[checkpoint]);
      ++checkpoint;
    }
    __syncthreads();  // the factors have been read; the next inputs may take their place
  }
  leave_state(work.slot_out);
}

template <int KP>
void launch_prefill(const Ctx& ctx, const KdaArgs& a, const StepParams& p) {
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  KL_CHECK(p.Hv <= 65535, "kda: expected at most 65535 value heads, found ", p.Hv);
  for (int first = 0; first < p.N; first += kMostSequences) {
    const LaunchConfig config{
        .grid = dim3(static_cast<unsigned>((p.V + kWidth - 1) / kWidth), static_cast<unsigned>(p.Hv),
                     static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
        .block = dim3(kThreads),
        .smem = sizeof(Shared<KP>),
        .stream = static_cast<cudaStream_t>(ctx.stream),
        .overlap_previous = true};
    if (a.state && a.state.dtype == DType::bf16)
      launch(kda_prefill_kernel<KP, bf16>, config, p, a.state_v_first, first);
    else
      launch(kda_prefill_kernel<KP, float>, config, p, a.state_v_first, first);
  }
}

}  // namespace

void kda_prefill(const Ctx& ctx, const KdaArgs& a) {
  const StepParams p = step_params(a);
  // Sequences of less than a chunk or two go faster token by token, if that may be asked of the whole batch.
  if (!a.batch_invariant && a.q.size(0) < 2 * kChunk * int64_t(p.N)) return kda_decode(ctx, a);
  kda_prefill_chunks(ctx, a);
}

void kda_prefill_chunks(const Ctx& ctx, const KdaArgs& a) {
  const StepParams p = step_params(a);
  if (p.K <= 64) return launch_prefill<64>(ctx, a, p);
  if (p.K <= 128) return launch_prefill<128>(ctx, a, p);
  launch_prefill<256>(ctx, a, p);
}

}  // namespace kl::cuda
