// The delta rule by chunks of 16 tokens with mma.sync: every GPU from sm_80 on, any K and V up to 256, any
// gate. Block, warps and state as in cuda/chunk.cuh: a block owns up to 128 value channels of one (sequence,
// value head) and walks over its chunks.
//
// The gate is one number per token, so it stays outside of every product: with D(j, i) the decay between two
// tokens and D(-1, i) that from the chunk's start,
//
//   L_ij = beta_i D(j, i) k_iᵀk_j, j < i        A_ij = scale D(j, i) q_iᵀk_j, j <= i
//   W_i = D(-1, i) S k_i                        Q_i = scale D(-1, i) S q_i
//   delta_i = beta_i (v_i - W_i) - Σ_{j<i} L_ij delta_j     by substitution in f32
//   o_i = Q_i + Σ_{j<=i} A_ij delta_j
//   S <- S D(-1, 15) + Σ_i (D(i, 15) delta_i) k_iᵀ
//
// Keys and queries enter the products as they come, normalisation too is a factor of the result. Every power
// is of a sum that is not positive, taken over its own interval. Tokens past the end of the sequence have k =
// q = v = beta = 0 and no decay.
#include <algorithm>

#include "cuda/chunk.cuh"
#include "cuda/launch.h"
#include "cuda/reduce.cuh"
#include "ops/delta_net/delta_net_cuda.h"

namespace kl::cuda {
namespace {

using namespace chunks;

struct DeltaNetParams : PackedStates {
  Operand q, k, v, g, beta, out;  // g.data null: no gate
  const float *A_log, *dt_bias;   // [Hv], null: 0
  DeltaNetGateKind gate_kind;
  DeltaNetBeta beta_kind;
  bool l2norm;
  float l2_eps, scale;
  int K, V, N, Hv, group;  // group: value heads per query/key head
};

KL_DEVICE float write_strength(DeltaNetBeta kind, float x) {
  return kind == DeltaNetBeta::value ? x : (kind == DeltaNetBeta::sigmoid ? 1.f : 2.f) * sigmoid(x);
}

template <int KP>
struct Shared {
  KeyRows<KP> k, q;
  float W[kChunk][kWidth + 4];                       // values first, then products of keys with the state
  alignas(16) float products[2][2][kChunk][kChunk];  // [k, q][half of the channels] x_iᵀk_j
  alignas(16) float L_columns[kChunk][kChunk];       // by columns
  Triangle A;
  ValueColumns<8> delta, kept;               // kept: D(i, 15) delta_i
  float g[kChunk], beta[kChunk];             // log2-decays
  float k_scale[kChunk], q_scale[kChunk];    // norms; of q `scale` too
  float from_start[kChunk], to_end[kChunk];  // D(-1, i), D(i, 15)
};

// What a thread loads of a chunk: of token threadIdx.x / 16 the channels threadIdx.x % 16 + 16 m.
template <int KP>
struct RawChunk {
  RawElement q[KP / 16], k[KP / 16], v[kWidth / 16], g, beta;
};
template <int KP>
KL_DEVICE void load_chunk(RawChunk<KP>& raw, const DeltaNetParams& p, int64_t row, bool valid, int head,
                          int v0) {
  raw = {};
  if (!valid) return;
  const int c0 = threadIdx.x % 16, qk_head = head / p.group;
  const int64_t q = offset_of(p.q, row, qk_head), k = offset_of(p.k, row, qk_head);
  const int64_t v = offset_of(p.v, row, head) + v0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const int c = c0 + 16 * m;
    if (c < p.K) raw.q[m] = load_raw(p.q, q + c), raw.k[m] = load_raw(p.k, k + c);
  }
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m)
    if (v0 + c0 + 16 * m < p.V) raw.v[m] = load_raw(p.v, v + c0 + 16 * m);
  raw.beta = load_raw(p.beta, offset_of(p.beta, row, head));
  if (p.g.data != nullptr) raw.g = load_raw(p.g, offset_of(p.g, row, head));
}

// Keys, queries, values, and the token's own numbers -> shared memory.
template <int KP>
KL_DEVICE void prepare_inputs(Shared<KP>& s, const RawChunk<KP>& raw, const DeltaNetParams& p, bool valid,
                              float rate, float bias) {
  const int i = threadIdx.x / 16, c0 = threadIdx.x % 16;
  float kk = 0, qq = 0;
#pragma unroll
  for (int m = 0; m < KP / 16; ++m) {
    const float k = value_of(p.k, raw.k[m]), q = value_of(p.q, raw.q[m]);
    kk = fmaf(k, k, kk), qq = fmaf(q, q, qq);
    s.k.put(i, c0 + 16 * m, k), s.q.put(i, c0 + 16 * m, q);
  }
  kk = lanes_sum<15>(kk), qq = lanes_sum<15>(qq);
#pragma unroll
  for (int m = 0; m < kWidth / 16; ++m) s.W[i][c0 + 16 * m] = value_of(p.v, raw.v[m]);
  if (c0 != 0) return;
  float g = 0;
  if (valid && p.g.data != nullptr) {
    g = value_of(p.g, raw.g);
    if (p.gate_kind == DeltaNetGateKind::softplus) g = -rate * softplus(g + bias);
  }
  s.g[i] = log2_decay(g);
  s.beta[i] = valid ? write_strength(p.beta_kind, value_of(p.beta, raw.beta)) : 0.f;
  // A token past the end has no length; without an epsilon its factor would be infinite.
  s.k_scale[i] = !valid ? 0.f : p.l2norm ? rsqrtf(kk + p.l2_eps) : 1.f;
  s.q_scale[i] = !valid ? 0.f : p.l2norm ? p.scale * rsqrtf(qq + p.l2_eps) : p.scale;
}

// Decays from the chunk's start and to its end; a thread a token.
template <int KP>
KL_DEVICE void sum_decays(Shared<KP>& s) {
  const int i = threadIdx.x;
  if (i >= kChunk) return;
  float before = 0, after = 0;
#pragma unroll
  for (int r = 0; r < kChunk; ++r) (r <= i ? before : after) += s.g[r];
  s.from_start[i] = exp2_approx(before), s.to_end[i] = exp2_approx(after);
}

// x_iᵀk_j of all pairs: a warp has eight columns j of one of the two products, over half of the channels.
template <int KP>
KL_DEVICE void multiply_pairs(Shared<KP>& s) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int of_q = warp % 2, n = warp / 2 % 2, rest = warp / 4, first = rest * (KP / 2);
  const KeyRows<KP>& x = of_q ? s.q : s.k;
  float d[4] = {};
#pragma unroll
  for (int c = 0; c < KP / 2; c += 16) {
    uint32_t a[2][4], b[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Left operand: tokens 0-7 then 8-15 of channels c, then of c + 8. Right operand: its matrices stand
      // for both n; tokens 0-7 (channels c, c + 8), then 8-15.
      ldmatrix_x4(a[half], smem_address(&x.half[half][lane % 16][first + c + lane / 16 * 8]));
      ldmatrix_x4(b[half],
                  smem_address(&s.k.half[half][lane % 8 + lane / 16 * 8][first + c + lane / 8 % 2 * 8]));
    }
    // Chosen element by element: a pointer into the array would move it out of registers.
    const uint32_t hi[2] = {n ? b[0][2] : b[0][0], n ? b[0][3] : b[0][1]},
                   lo[2] = {n ? b[1][2] : b[1][0], n ? b[1][3] : b[1][1]};
    mma_halves(d, a[0], a[1], hi, lo);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    s.products[of_q][rest][lane / 4 + e / 2 * 8][8 * n + 2 * (lane % 4) + e % 2] = d[e];
}

// The two triangles, a thread a pair.
template <int KP>
KL_DEVICE void make_triangles(Shared<KP>& s) {
  const int i = threadIdx.x / 16, j = threadIdx.x % 16;
  float between = 0;
#pragma unroll
  for (int r = 1; r < kChunk; ++r)
    if (j < r && r <= i) between += s.g[r];
  const float decay = exp2_approx(between) * s.k_scale[j];
  const float kk = s.products[0][0][i][j] + s.products[0][1][i][j],
              qk = s.products[1][0][i][j] + s.products[1][1][i][j];
  s.L_columns[j][i] = j < i ? s.beta[i] * s.k_scale[i] * decay * kk : 0.f;
  s.A.put(i, j, j <= i ? s.q_scale[i] * decay * qk : 0.f);
}

// delta of one value channel.
template <int KP>
KL_DEVICE void solve(Shared<KP>& s, const float (&values)[kChunk]) {
  const int v = threadIdx.x;
  float delta[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) delta[i] = s.beta[i] * (values[i] - s.W[i][v]);
  substitute(delta, s.L_columns, [&](int j, float x) {
    s.delta.put(j, v, x);
    s.kept.put(j, v, x * (s.to_end[j] * s.k_scale[j]));
  });
}

template <int KP>
__global__ void __launch_bounds__(kThreads, 1)
    delta_net_kernel(const __grid_constant__ DeltaNetParams p, int first_sequence) {
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
  const float rate = p.A_log != nullptr ? expf(p.A_log[head]) : 1.f;
  const float bias = p.dt_bias != nullptr ? p.dt_bias[head] : 0.f;

  RawChunk<KP> raw;
  const int64_t mine = threadIdx.x / 16;  // token of the chunk that this thread loads, a chunk ahead
  const auto load = [&](int64_t row) { load_chunk(raw, p, row + mine, row + mine < work.end, head, v0); };
  load(work.begin);
  for (int64_t row = work.begin; row < work.end; row += kChunk) {
    const int tokens = static_cast<int>(min(work.end - row, static_cast<int64_t>(kChunk)));
    prepare_inputs(s, raw, p, mine < tokens, rate, bias);
    load(row + kChunk);
    __syncthreads();  // the inputs become visible
    float values[kChunk];
    if (threadIdx.x < kWidth)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) values[i] = s.W[i][threadIdx.x];
    sum_decays(s);
    multiply_pairs(s);
    WarpTokens products[2] = {};  // W, Q
    multiply_state(products, S, {&s.k, &s.q});
    __syncthreads();  // decays and pairs become visible; the values have been taken
    make_triangles(s);
#pragma unroll
    for (int n = 0; n < 2; ++n)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = token_of(n, e);
        s.W[token][value_channel_of(e)] = products[0][n][e] * (s.from_start[token] * s.k_scale[token]);
        products[1][n][e] *= s.from_start[token] * s.q_scale[token];
      }
    __syncthreads();  // W and the triangles become visible
    if (threadIdx.x < kWidth) solve(s, values);
    __syncthreads();  // delta becomes visible to the warps
    multiply_triangle(products[1], s.A, load_columns(s.delta));
    store_outputs(products[1], p.out, row, tokens, head, v0, p.V);
    const WarpColumns kept[1] = {load_columns(s.kept)};
    const float total = s.from_start[kChunk - 1];
    update_state<KP>(S, [&](int) { return float2{total, total}; }, kept, {&s.k});
    __syncthreads();  // keys and numbers have been read; the next chunk may take their place
  }
  if (work.slot_out >= 0)
    for_each_element<KP>(S, head_state(work.slot_out), p.row_stride, 1, p.K, p.V, v0,
                         [](float* to, float x) { *to = x; });
}

template <int KP>
void launch_chunks(const Ctx& ctx, const DeltaNetParams& p) {
  constexpr int kMostSequences = 65535;  // of a launch, by the limit on grid.z
  KL_CHECK(p.Hv <= 65535, "delta_net: expected at most 65535 value heads, found ", p.Hv);
  for (int first = 0; first < p.N; first += kMostSequences)
    launch(delta_net_kernel<KP>,
           {.grid = dim3(static_cast<unsigned>((p.V + kWidth - 1) / kWidth), static_cast<unsigned>(p.Hv),
                         static_cast<unsigned>(std::min(p.N - first, kMostSequences))),
            .block = dim3(kThreads),
            .smem = sizeof(Shared<KP>),
            .stream = static_cast<cudaStream_t>(ctx.stream),
            .overlap_previous = true},
           p, first);
}

}  // namespace

void delta_net_chunks(const Ctx& ctx, const DeltaNetArgs& a) {
  DeltaNetParams p{};
  static_cast<PackedStates&>(p) = packed_states(a.cu_seqlens, a.state, a.slot, a.slot_out);
  p.q = operand(a.q), p.k = operand(a.k), p.v = operand(a.v), p.beta = operand(a.beta),
  p.out = operand(a.out);
  if (a.g) {
    p.g = operand(a.g), p.gate_kind = a.gate.kind;
    if (a.gate.kind == DeltaNetGateKind::softplus)
      p.A_log = static_cast<const float*>(a.gate.A_log.data),
      p.dt_bias = static_cast<const float*>(a.gate.dt_bias.data);
  }
  p.beta_kind = a.beta_kind, p.l2norm = a.l2norm, p.l2_eps = a.l2_eps;
  p.K = static_cast<int>(a.q.size(2)), p.V = static_cast<int>(a.v.size(2));
  p.N = static_cast<int>(a.cu_seqlens.size(0) - 1), p.Hv = static_cast<int>(a.v.size(1));
  p.group = p.Hv / static_cast<int>(a.q.size(1));
  p.scale = a.scale != 0.f ? a.scale : 1.f / sqrtf(static_cast<float>(p.K));
  if (p.K <= 64) return launch_chunks<64>(ctx, p);
  if (p.K <= 128) return launch_chunks<128>(ctx, p);
  launch_chunks<256>(ctx, p);
}

}  // namespace kl::cuda
