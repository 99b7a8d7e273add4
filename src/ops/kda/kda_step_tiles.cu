// The fused decode step for few sequences, on sm_90 and up: the narrow tiles of kda_decode.cu, with a head of
// 128 split over a cluster of four blocks, which exchange the sums of squares that the norm needs.
//
// Every block takes the convolutions of q and k whole, a channel a thread, and of v what its tiles need, in
// all lanes that need it. The first block moves the states of q and k on, once all have read them.
#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_step.cuh"

namespace kl::cuda {
namespace {

constexpr int D = 128, P = 2, kBlocks = D / (4 * P * kTileWarps);  // of a cluster
static_assert(kTileThreads == D);

template <bool kVFirst, class State>
__global__ void __launch_bounds__(kTileThreads, 2)
    kda_step_tiles_kernel(const __grid_constant__ StepParams p, const __grid_constant__ FusedParams f) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  __shared__ Prepared<D> prepared;
  __shared__ __align__(16) float squares[kBlocks * kTileWarps];  // of the head's outputs, from every warp
  __shared__ uint64_t arrived;                                   // counts their bytes
  if (threadIdx.x == 0) {
    mbarrier_init(smem_address(&arrived), 1);
    fence_barrier_init();
    mbarrier_arrive_expect_tx(smem_address(&arrived), sizeof squares);
  }
  __syncwarp();
  cluster_arrive_relaxed();  // others may write here
  const Place<kVFirst> at;
  const int c = threadIdx.x, warp = threadIdx.x / 32, rank = blockIdx.x, head = blockIdx.y, n = blockIdx.z;
  const int v0 = (rank * kTileWarps + warp) * 4 * P, v = v0 + P * at.vg;
  // Addresses are ready before the wait.
  const int64_t of_q = opaque(byte_of(p.q, offset_of(p.q, n, head) + c)),
                of_k = opaque(byte_of(p.k, offset_of(p.k, n, head) + c)),
                of_g = opaque(byte_of(p.g, offset_of(p.g, n, head) + c)),
                of_v = opaque(byte_of(p.v, offset_of(p.v, n, head) + v)),
                of_beta = opaque(byte_of(p.beta, offset_of(p.beta, n, head))),
                of_gate = opaque(byte_of(f.out_gate, offset_of(f.out_gate, n, head) + v)),
                of_out = opaque(byte_of(p.out, offset_of(p.out, n, head) + v));
  const int qk_channel = head * D + c, v_channel = head * D + v;
  cluster_wait();  // the others' barriers are there
  follow_previous_kernel();

  // All loads are issued before the first value is used.
  const int slot = p.slot[n];
  const RawElement raw_q = load_raw_at(p.q, of_q), raw_k = load_raw_at(p.k, of_k),
                   raw_g = load_raw_at(p.g, of_g), raw_beta = load_raw_at(p.beta, of_beta);
  const auto raw_v = load_raw_run_at<P, true>(p.v, of_v, P);
  const auto raw_gate = load_raw_run_at<P, true>(f.out_gate, of_gate, P);
  const float4 weight_q = load4(f.q.weight + 4 * qk_channel), weight_k = load4(f.k.weight + 4 * qk_channel);
  const float4 weight_v[P] = {load4(f.v.weight + 4 * v_channel), load4(f.v.weight + 4 * v_channel + 4)};
  const float2 norm_weight = load2(f.norm_weight + v);
  const float A_log = A_log_of(p.gate, head), dt_bias = dt_bias_of(p.gate, head, c);
  float* const conv_q = f.q.state + slot * f.q.slot_stride + 3 * qk_channel;
  float* const conv_k = f.k.state + slot * f.k.slot_stride + 3 * qk_channel;
  float* const conv_v = f.v.state + slot * f.v.slot_stride + 3 * v_channel;
  State* const tile =
      static_cast<State*>(p.state) + opaque(slot * p.slot_stride + head * p.head_stride +
                                            v0 * (kVFirst ? D : 1) + first_element<P, kVFirst>(D));
  float last_q[3] = {}, last_k[3] = {};
  float2 last_v[3] = {};  // two channels x 3 inputs
  LaneState<D, P> S = {};
  if (slot >= 0) {
#pragma unroll
    for (int i = 0; i < 3; ++i)
      last_q[i] = conv_q[i], last_k[i] = conv_k[i], last_v[i] = load2(conv_v + 2 * i);
    load_tile<D, P, kVFirst>(S, tile, D);
  }

  const float x_q = value_of(p.q, raw_q), x_k = value_of(p.k, raw_k);
  const float q = convolved(weight_q, last_q, x_q), k = convolved(weight_k, last_k, x_k);
  prepared.channels.k[c] = k;
  prepared.channels.q[c] = q;
  prepared.channels.a[c] = expf(log_decay(p.gate, expf(A_log), value_of(p.g, raw_g) + dt_bias));
  Squares sums;
  sums.add(k, q);
  leave_sums(prepared, sums);
  float x_v[P], o[P], gate[P];
  values_of(x_v, p.v, raw_v);
  const float of_first[3] = {last_v[0].x, last_v[0].y, last_v[1].x},
              of_second[3] = {last_v[1].y, last_v[2].x, last_v[2].y};
  const float values[P] = {convolved(weight_v[0], of_first, x_v[0]),
                           convolved(weight_v[1], of_second, x_v[1])};
  const float beta = write_strength(p.beta_kind, value_of(p.beta, raw_beta));
  __syncthreads();  // `prepared` becomes visible
  step<D, P, kVFirst>(o, S, prepared.channels, scales_of(prepared, p.l2norm, p.l2_eps, p.scale), values,
                      beta);

  constexpr int kOtherVg = 31 - Place<kVFirst>::kSameVg;
  const float square = lanes_sum<kOtherVg>(fmaf(o[0], o[0], o[1] * o[1]));
  if (threadIdx.x % 32 < kBlocks)
    store_in_cluster(smem_address(&squares[rank * kTileWarps + warp]), smem_address(&arrived),
                     threadIdx.x % 32, square);
  if (slot >= 0) {
    store_tile<D, P, kVFirst>(S, tile, D);
    if (at.kg == 0) {
      store2(conv_v, {of_first[1], of_first[2]});
      store2(conv_v + 2, {x_v[0], of_second[1]});
      store2(conv_v + 4, {of_second[2], x_v[1]});
    }
  }
  values_of(gate, f.out_gate, raw_gate);
  mbarrier_wait(smem_address(&arrived), 0);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kBlocks; ++i) sum += sum_of_four(squares + kTileWarps * i);
  const float factor = rsqrtf(sum / D + f.norm_eps);
  o[0] *= factor * norm_weight.x * sigmoid(gate[0]);
  o[1] *= factor * norm_weight.y * sigmoid(gate[1]);
  if (at.kg == 0) store_run_at<true>(p.out, of_out, o, P);
  if (rank == 0 && slot >= 0) {  // with the sums of all warps there, none has still to read these states
    conv_q[0] = last_q[1], conv_q[1] = last_q[2], conv_q[2] = x_q;
    conv_k[0] = last_k[1], conv_k[1] = last_k[2], conv_k[2] = x_k;
  }
#endif
}

template <bool kVFirst, class State>
void launch_tiles(const Ctx& ctx, const KdaStepArgs& a) {
  const StepParams p = step_params(a.kda);
  const LaunchConfig config{.grid = dim3(kBlocks, static_cast<unsigned>(p.Hv), static_cast<unsigned>(p.N)),
                            .block = dim3(kTileThreads),
                            .stream = static_cast<cudaStream_t>(ctx.stream),
                            .cluster = kBlocks,
                            .overlap_previous = true};
  launch(kda_step_tiles_kernel<kVFirst, State>, config, p, fused_params(a));
}

}  // namespace

bool kda_step_tiles_takes(const KdaStepArgs& a) { return a.kda.q.size(2) == D && a.kda.v.size(1) <= 65535; }

bool kda_step_tiles_pays(const KdaStepArgs& a) {
  return 2 * a.kda.q.size(0) * a.kda.v.size(1) <= current_device().multiprocessors && kda_step_tiles_takes(a);
}

void kda_step_tiles(const Ctx& ctx, const KdaStepArgs& a) {
  const auto with_type = [&]<bool kVFirst>() {
    a.kda.state.dtype == DType::bf16 ? launch_tiles<kVFirst, bf16>(ctx, a)
                                     : launch_tiles<kVFirst, float>(ctx, a);
  };
  a.kda.state_v_first ? with_type.template operator()<true>() : with_type.template operator()<false>();
}

}  // namespace kl::cuda
