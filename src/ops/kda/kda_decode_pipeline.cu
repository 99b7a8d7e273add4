// KDA decode for many sequences, and the fused decode step, on sm_90 and up: the copy engine carries whole
// states through a ring of slots in shared memory, so that memory is never idle while a step is computed.
//
// What a block walks over, and its slots: kda_decode_ring.cuh. Roles of its warps:
//
//   loader (1 thread)    index tables -> bulk load of the item's state into a free slot
//   preparers (2 warps)  operands of the tokens ahead -> shared memory, a stage per token;
//                        in the fused step through their convolutions
//   steppers (8 warps)   16 value channels each: state from the slot to registers, the steps, back
//   storer (1 warp)      bulk store of finished slots, then the slot is free;
//                        in the fused step also norm and gate of the outputs
//
// Barriers, each with the write that it makes visible:
//   loaded[slot]    copy engine's state and the loader's `work`  -> steppers, storer
//   stepped[slot]   steppers' new state                          -> storer (copy engine)
//   free[slot]      copy engine has read the slot                -> loader
//   ready[stage]    preparers' operands                          -> steppers
//   used[stage]     the operands have been read                  -> preparers
//   finished[stage] steppers' outputs (fused step)               -> storer
#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_decode_ring.cuh"
#include "ops/kda/kda_step.cuh"

namespace kl::cuda {
namespace {

constexpr int kPreparers = 2, kStages = 8;
static_assert(kStages % kPreparers == 0);  // a preparer sees every phase of its stages' barriers
constexpr int kLoader = kSteppers + kPreparers, kStorer = kLoader + 1;  // warps
constexpr int kThreads = 32 * (kStorer + 1);

// One token's operands of one head.
template <int D>
struct alignas(16) Operands {
  Channels<D> channels;
  float v[D];
  float o[D];  // fused step: what the steppers put out
  Scales scales;
  float beta;
};

template <int D, bool kVFirst, class State>
struct Ring {
  using Slot = StateSlot<D, kVFirst, State>;
  static constexpr int kHeads = Slot::kHeads;
  static constexpr int kSlots = 192 * 1024 / (Slot::kItem * static_cast<int>(sizeof(State)));

  Slot states[kSlots];
  Operands<D> operands[kStages][kHeads];
  SequenceWork work[kSlots];
  int item[kSlots];  // -1: there are no more
  uint64_t loaded[kSlots], stepped[kSlots], free[kSlots];
  uint64_t ready[kStages], used[kStages], finished[kStages];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <int D, bool kVFirst, class State>
KL_DEVICE void run_loader(Ring<D, kVFirst, State>& ring, const StepParams& p) {
  using R = Ring<D, kVFirst, State>;
  Turn<R::kSlots> turn;
  const auto take_slot = [&] { mbarrier_wait(smem_address(&ring.free[turn.place]), turn.phase ^ 1); };
  for_each_item(p, R::kHeads, [&](int item, const SequenceWork& work) {
    take_slot();
    ring.work[turn.place] = work;
    ring.item[turn.place] = item;
    const uint32_t loaded = smem_address(&ring.loaded[turn.place]);
    if (work.slot >= 0) {
      load_item(ring.states[turn.place], R::Slot::in_pool(p, item, work.slot), loaded);
    } else {
      mbarrier_arrive(loaded);
    }
    turn.next();
  });
  take_slot();
  ring.item[turn.place] = -1;
  mbarrier_arrive(smem_address(&ring.loaded[turn.place]));
}

// Norm and gate of one token's outputs; a lane has four channels of the item's heads.
template <int D, bool kVFirst, class State>
KL_DEVICE void finish_token(const Ring<D, kVFirst, State>& ring, const StepParams& p, const FusedParams& f,
                            int64_t row, int first_head, const Turn<kStages>& stage) {
  const int c = 4 * (threadIdx.x % 32) % D, h = 4 * (threadIdx.x % 32) / D;
  const auto raw_gate = load_raw_run<4, true>(f.out_gate, offset_of(f.out_gate, row, first_head + h) + c, 4);
  float o[4], weight[4], gate[4];
  load_channels(weight, f.norm_weight, c);
  mbarrier_wait(smem_address(&ring.finished[stage.place]), stage.phase);
  load_channels(o, ring.operands[stage.place][h].o, c);
  float squares = 0;
#pragma unroll
  for (int e = 0; e < 4; ++e) squares = fmaf(o[e], o[e], squares);
  const float factor = rsqrtf(lanes_sum<D / 4 - 1>(squares) / D + f.norm_eps);
  values_of(gate, f.out_gate, raw_gate);
#pragma unroll
  for (int e = 0; e < 4; ++e) o[e] *= factor * weight[e] * sigmoid(gate[e]);
  store_run<true>(p.out, offset_of(p.out, row, first_head + h) + c, o, 4);
}

template <bool kFused, int D, bool kVFirst, class State>
KL_DEVICE void run_storer(Ring<D, kVFirst, State>& ring, const StepParams& p, const FusedParams& f) {
  using R = Ring<D, kVFirst, State>;
  const bool elected = threadIdx.x % 32 == 0;
  Turn<kStages> stage;
  for (Turn<R::kSlots> turn;; turn.next()) {
    if constexpr (kFused) {
      mbarrier_wait(smem_address(&ring.loaded[turn.place]), turn.phase);
      const int item = ring.item[turn.place];
      if (item < 0) break;
      finish_token(ring, p, f, ring.work[turn.place].begin, first_head(p, R::kHeads, item), stage);
      mbarrier_arrive_warp(smem_address(&ring.used[stage.place]));
      stage.next();
    }
    mbarrier_wait(smem_address(&ring.stepped[turn.place]), turn.phase);
    const int item = ring.item[turn.place];
    if (item < 0) break;
    const int slot = ring.work[turn.place].slot_out;
    if (elected && slot >= 0) {
      store_item(R::Slot::in_pool(p, item, slot), ring.states[turn.place]);
      bulk_commit();
      bulk_wait_read<0>();  // the slot may be written again; the block may end
    }
    mbarrier_arrive_warp(smem_address(&ring.free[turn.place]));  // all lanes have read item and work
  }
}

// silu(conv(x)) of four neighbouring channels; their state moves on by one input.
struct ConvInputs {
  float4 weight[4];  // a channel's taps
  float4 state[3];   // 4 channels x 3 inputs, oldest first
};
KL_DEVICE ConvInputs load_conv(const Conv& conv, int slot, int channel) {
  ConvInputs in;
#pragma unroll
  for (int e = 0; e < 4; ++e) in.weight[e] = load4(conv.weight + 4 * (channel + e));
#pragma unroll
  for (int e = 0; e < 3; ++e)
    in.state[e] = slot >= 0 ? load4(conv.state + slot * conv.slot_stride + 3 * channel + 4 * e) : float4{};
  return in;
}
KL_DEVICE void convolve(float (&x)[4], const Conv& conv, const ConvInputs& in, int slot, int channel) {
  const float s[12] = {in.state[0].x, in.state[0].y, in.state[0].z, in.state[0].w,
                       in.state[1].x, in.state[1].y, in.state[1].z, in.state[1].w,
                       in.state[2].x, in.state[2].y, in.state[2].z, in.state[2].w};
  if (slot >= 0) {
    float* state = conv.state + slot * conv.slot_stride + 3 * channel;
    store4(state, {s[1], s[2], x[0], s[4]});
    store4(state + 4, {s[5], x[1], s[7], s[8]});
    store4(state + 8, {x[2], s[10], s[11], x[3]});
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = convolved(in.weight[e], s + 3 * e, x[e]);
}

// A warp takes every kPreparers-th token; its lanes have four channels of the item's heads each.
template <bool kFused, int D, bool kVFirst, class State>
KL_DEVICE void run_preparer(Ring<D, kVFirst, State>& ring, const StepParams& p, const FusedParams& f,
                            int mine) {
  constexpr int kHeads = Ring<D, kVFirst, State>::kHeads;
  const int c = 4 * (threadIdx.x % 32) % D, h = 4 * (threadIdx.x % 32) / D;
  Turn<kStages> turn;
  int count = 0;
  for_each_item(p, kHeads, [&](int item, const SequenceWork& work) {
    const int head = first_head(p, kHeads, item) + h;
    for (int64_t row = work.begin; row < work.end; ++row, turn.next()) {
      if (count++ % kPreparers != mine) continue;
      // All loads are issued before the first value is used.
      const int64_t qk = qk_head(p, head);
      const auto raw_q = load_raw_run<4, true>(p.q, offset_of(p.q, row, qk) + c, 4);
      const auto raw_k = load_raw_run<4, true>(p.k, offset_of(p.k, row, qk) + c, 4);
      const auto raw_g = load_raw_run<4, true>(p.g, offset_of(p.g, row, head) + c, 4);
      const auto raw_v = load_raw_run<4, true>(p.v, offset_of(p.v, row, head) + c, 4);
      const RawElement raw_beta = load_raw(p.beta, offset_of(p.beta, row, head));
      const float A_log = A_log_of(p.gate, head);
      ConvInputs conv_q, conv_k, conv_v;
      if constexpr (kFused) {
        conv_q = load_conv(f.q, work.slot, head * D + c);
        conv_k = load_conv(f.k, work.slot, head * D + c);
        conv_v = load_conv(f.v, work.slot, head * D + c);
      }
      float bias[4], q[4], k[4], g[4], v[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) bias[e] = dt_bias_of(p.gate, head, c + e);
      values_of(q, p.q, raw_q), values_of(k, p.k, raw_k), values_of(g, p.g, raw_g), values_of(v, p.v, raw_v);
      if constexpr (kFused) {
        convolve(q, f.q, conv_q, work.slot, head * D + c);
        convolve(k, f.k, conv_k, work.slot, head * D + c);
        convolve(v, f.v, conv_v, work.slot, head * D + c);
      }
      const float factor = expf(A_log);
      float kk = 0, qq = 0, kq = 0, a[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        kk = fmaf(k[e], k[e], kk), qq = fmaf(q[e], q[e], qq), kq = fmaf(k[e], q[e], kq);
        a[e] = expf(log_decay(p.gate, factor, g[e] + bias[e]));
      }
      constexpr int kLanes = D / 4 - 1;  // bits in which the lanes of one head differ
      kk = lanes_sum<kLanes>(kk), qq = lanes_sum<kLanes>(qq), kq = lanes_sum<kLanes>(kq);

      mbarrier_wait(smem_address(&ring.used[turn.place]), turn.phase ^ 1);
      Operands<D>& to = ring.operands[turn.place][h];
      store4(to.channels.k + c, {k[0], k[1], k[2], k[3]});
      store4(to.channels.q + c, {q[0], q[1], q[2], q[3]});
      store4(to.channels.a + c, {a[0], a[1], a[2], a[3]});
      store4(to.v + c, {v[0], v[1], v[2], v[3]});
      if (c == 0) {
        to.scales = scales_of(kk, qq, kq, p.l2norm, p.l2_eps, p.scale);
        to.beta = write_strength(p.beta_kind, value_of(p.beta, raw_beta));
      }
      mbarrier_arrive(smem_address(&ring.ready[turn.place]));
    }
  });
}

template <bool kFused, int D, bool kVFirst, class State>
KL_DEVICE void run_stepper(Ring<D, kVFirst, State>& ring, const StepParams& p, int warp) {
  using R = Ring<D, kVFirst, State>;
  const Place<kVFirst> at;
  const int h = warp * 16 / D, v = warp * 16 % D + 4 * at.vg;
  Turn<kStages> stage;
  for (Turn<R::kSlots> turn;; turn.next()) {
    mbarrier_wait(smem_address(&ring.loaded[turn.place]), turn.phase);
    const int item = ring.item[turn.place];
    if (item >= 0) {
      const SequenceWork work = ring.work[turn.place];
      const int head = first_head(p, R::kHeads, item) + h;
      LaneState<D, 4> S = {};
      if (work.slot >= 0) load_lanes(S, ring.states[turn.place], warp);
      for (int64_t row = work.begin; row < work.end; ++row, stage.next()) {
        mbarrier_wait(smem_address(&ring.ready[stage.place]), stage.phase);
        Operands<D>& operands = ring.operands[stage.place][h];
        float values[4], o[4];
        load_channels(values, operands.v, v);
        step<D, 4, kVFirst>(o, S, operands.channels, operands.scales, values, operands.beta);
        if constexpr (kFused) {
          if (at.kg == 0) store4(operands.o + v, {o[0], o[1], o[2], o[3]});
          mbarrier_arrive_warp(smem_address(&ring.finished[stage.place]));
        } else {
          mbarrier_arrive_warp(smem_address(&ring.used[stage.place]));
          if (at.kg == 0) store_run<true>(p.out, offset_of(p.out, row, head) + v, o, 4);
        }
      }
      if (work.slot_out >= 0) store_lanes(S, ring.states[turn.place], warp);
      fence_proxy_async();  // for the copy engine, which reads the slot and then writes over it
    }
    mbarrier_arrive_warp(smem_address(&ring.stepped[turn.place]));
    if (item < 0) return;
  }
}
#endif

template <int D, bool kVFirst, bool kFused, class State>
__global__ void __launch_bounds__(kThreads, 1)
    kda_decode_pipeline_kernel(const __grid_constant__ StepParams p, const __grid_constant__ FusedParams f) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float4 shared[];  // for the copy engine 16 bytes, for the banks 128
  using R = Ring<D, kVFirst, State>;
  auto& ring = *reinterpret_cast<R*>(shared);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < R::kSlots; ++s) {
      mbarrier_init(smem_address(&ring.loaded[s]), 1);
      mbarrier_init(smem_address(&ring.stepped[s]), kSteppers * kWarpArrivals);
      mbarrier_init(smem_address(&ring.free[s]), kWarpArrivals);
    }
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(smem_address(&ring.ready[s]), 32);
      mbarrier_init(smem_address(&ring.used[s]), (kFused ? 1 : kSteppers) * kWarpArrivals);
      mbarrier_init(smem_address(&ring.finished[s]), kSteppers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  follow_previous_kernel();
  if (warp < kSteppers) {
    run_stepper<kFused>(ring, p, warp);
  } else if (warp < kLoader) {
    run_preparer<kFused>(ring, p, f, warp - kSteppers);
  } else if (warp == kStorer) {
    run_storer<kFused>(ring, p, f);
  } else if (threadIdx.x % 32 == 0) {
    run_loader(ring, p);
  }
#endif
}

template <int D, bool kVFirst, bool kFused, class State>
void launch_pipeline(const Ctx& ctx, const StepParams& p, const FusedParams& f) {
  using R = Ring<D, kVFirst, State>;
  const int items = p.N * (p.Hv / R::kHeads), blocks = current_device().multiprocessors;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(items < blocks ? items : blocks)),
                            .block = dim3(kThreads),
                            .smem = sizeof(R),
                            .stream = static_cast<cudaStream_t>(ctx.stream),
                            .overlap_previous = true};
  launch(kda_decode_pipeline_kernel<D, kVFirst, kFused, State>, config, p, f);
}

template <bool kFused>
void launch_variant(const Ctx& ctx, const KdaArgs& a, const FusedParams& f) {
  const StepParams p = step_params(a);
  const auto with_type = [&]<int D, bool kVFirst>() {
    a.state.dtype == DType::bf16 ? launch_pipeline<D, kVFirst, kFused, bf16>(ctx, p, f)
                                 : launch_pipeline<D, kVFirst, kFused, float>(ctx, p, f);
  };
  if (p.K == 128)
    a.state_v_first ? with_type.template operator()<128, true>()
                    : with_type.template operator()<128, false>();
  else
    a.state_v_first ? with_type.template operator()<64, true>() : with_type.template operator()<64, false>();
}

}  // namespace

bool kda_decode_pipeline_takes(const KdaArgs& a) {
  const int64_t K = a.q.size(2), V = a.v.size(2), Hv = a.v.size(1);
  if (!a.state || K != V || (K != 64 && K != 128) || (K == 64 && Hv % 2 != 0) || a.checkpoint_row)
    return false;
  for (const Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.out})
    if (!in_fours(*t)) return false;
  // An item's state is one run of memory that the copy engine can take.
  if (a.state.stride[2] != K || a.state.stride[1] != K * V ||
      a.state.stride[0] * size_of(a.state.dtype) % 16 != 0 ||
      reinterpret_cast<uintptr_t>(a.state.data) % 16 != 0)
    return false;
  const DeviceInfo& device = current_device();
  return device.arch >= 90 && device.max_smem >= sizeof(Ring<128, false, float>) &&
         a.slot.size(0) * Hv <= (1 << 30);
}

bool kda_decode_pipeline_pays(const KdaArgs& a) {
  // Measured on an H200: as fast as tiles from 256 heads on, and up to four tokens a sequence.
  const int64_t N = a.slot.size(0), heads = N * a.v.size(1);
  return 2 * heads >= 3 * current_device().multiprocessors && a.q.size(0) <= 4 * N &&
         kda_decode_pipeline_takes(a);
}

void kda_decode_pipeline(const Ctx& ctx, const KdaArgs& a) { launch_variant<false>(ctx, a, {}); }

bool kda_step_takes(const KdaStepArgs& a) {
  const auto aligned = [](const StepConv& conv) {
    return reinterpret_cast<uintptr_t>(conv.weight.data) % 16 == 0 &&
           reinterpret_cast<uintptr_t>(conv.state.data) % 16 == 0 && conv.state.stride[0] % 4 == 0;
  };
  return kda_decode_pipeline_takes(a.kda) && aligned(a.q) && aligned(a.k) && aligned(a.v) &&
         in_fours(a.out_gate) && in_fours(a.norm_weight);
}

void kda_step_pipeline(const Ctx& ctx, const KdaStepArgs& a) {
  launch_variant<true>(ctx, a.kda, fused_params(a));
}

void kda_step(const Ctx& ctx, const KdaStepArgs& a) {
  !a.kda.batch_invariant&& kda_step_tiles_pays(a) ? kda_step_tiles(ctx, a) : kda_step_pipeline(ctx, a);
}

}  // namespace kl::cuda
