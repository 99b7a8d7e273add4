// Replay decode for many sequences, on sm_90 and up: as in kda_decode_pipeline.cu the copy engine carries
// states through a ring of slots (kda_decode_ring.cuh), and the records of each with it. Nothing goes back
// but a step's record, so a slot is free as soon as its state is in registers. Heads of 128. Roles of a
// block's warps:
//
//   loader (1 thread)    index tables -> bulk loads of an item's records into a stage, its state into a slot
//   preparers (3 warps)  records and the token's operands -> two numbers a record, decayed k and q; they
//                        write the key and the decays of the new record. Each has a stage
//   steppers (8 warps)   16 value channels each: state from the slot to registers, output and delta; a full
//                        ring goes into the state, which they write from registers
//
// Barriers, each with the write that it makes visible:
//   recorded[stage]  copy engine's records and the loader's item  -> preparers, steppers
//   ready[stage]     preparers' operands                          -> steppers
//   used[stage]      records and operands have been read          -> loader, and so preparers
//   loaded[slot]     copy engine's state                          -> steppers
//   free[slot]       the state is in registers                    -> loader
#include "cuda/launch.h"
#include "ops/kda/kda_cuda.h"
#include "ops/kda/kda_decode_ring.cuh"
#include "ops/kda/kda_replay_tile.cuh"

namespace kl::cuda {
namespace {

constexpr int D = 128, kSlots = 2, kStages = 3;
// A preparer has a stage of its own: whoever waits for a barrier has to see every phase of it, and the
// barrier must not run ahead of him.
constexpr int kPreparers = kStages;
constexpr int kLoader = kSteppers + kPreparers, kThreads = 32 * (kLoader + 1);  // warps, threads

// One item's records and its token's operands.
struct alignas(128) Stage {
  float keys[kRecords][D], decays[kRecords][D], deltas[kRecords][D];
  Channels<D> channels;  // k and q under the decay since the state was written; a: that decay
  float v[D];
  float with_k[kRecords], with_q[kRecords];  // the decayed keys' products with the token's raw k and q
  Scales scales;
  float beta;
  int item, slot, fill;  // item -1: there are no more
};

template <bool kVFirst>
struct Ring {
  using Slot = StateSlot<D, kVFirst, float>;
  Slot states[kSlots];
  Stage stages[kStages];
  uint64_t loaded[kSlots], free[kSlots];
  uint64_t recorded[kStages], ready[kStages], used[kStages];
};

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

template <bool kVFirst>
KL_DEVICE void run_loader(Ring<kVFirst>& ring, const StepParams& p, const ReplayParams& r) {
  using Slot = typename Ring<kVFirst>::Slot;
  Turn<kStages> stage;
  Turn<kSlots> turn;
  const auto announce = [&](int item, int slot, int fill) {
    mbarrier_wait(smem_address(&ring.used[stage.place]), stage.phase ^ 1);
    Stage& to = ring.stages[stage.place];
    to.item = item, to.slot = slot, to.fill = fill;
    const uint32_t recorded = smem_address(&ring.recorded[stage.place]);
    if (fill > 0) {
      const uint32_t bytes = static_cast<uint32_t>(fill) * D * sizeof(float);
      const int64_t from = first_record(p, r, slot, first_head(p, 1, item)) * D;
      mbarrier_arrive_expect_tx(recorded, 3 * bytes);
      bulk_load(smem_address(to.keys), r.keys + from, bytes, recorded);
      bulk_load(smem_address(to.decays), r.decays + from, bytes, recorded);
      bulk_load(smem_address(to.deltas), r.deltas + from, bytes, recorded);
    } else {
      mbarrier_arrive(recorded);
    }
    stage.next();
  };
  for_each_item(p, 1, [&](int item, const SequenceWork& work) {
    announce(item, work.slot, work.slot >= 0 ? r.fill[work.begin] : 0);
    mbarrier_wait(smem_address(&ring.free[turn.place]), turn.phase ^ 1);
    const uint32_t loaded = smem_address(&ring.loaded[turn.place]);
    if (work.slot >= 0)
      load_item(ring.states[turn.place], Slot::in_pool(p, item, work.slot), loaded);
    else
      mbarrier_arrive(loaded);
    turn.next();
  });
  announce(-1, -1, 0);
}

// A lane has four channels.
template <bool kVFirst>
KL_DEVICE void run_preparer(Ring<kVFirst>& ring, const StepParams& p, const ReplayParams& r, int mine) {
  const int lane = threadIdx.x % 32, c = 4 * lane;
  Turn<kStages> next;
  for_each_item(p, 1, [&](int item, const SequenceWork& work) {
    const Turn<kStages> turn = next;
    next.next();
    if (turn.place != mine) return;
    const int head = first_head(p, 1, item);
    // All loads are issued before the first value is used.
    const int64_t row = work.begin, qk = qk_head(p, head);
    const auto raw_q = load_raw_run<4, true>(p.q, offset_of(p.q, row, qk) + c, 4);
    const auto raw_k = load_raw_run<4, true>(p.k, offset_of(p.k, row, qk) + c, 4);
    const auto raw_g = load_raw_run<4, true>(p.g, offset_of(p.g, row, head) + c, 4);
    const auto raw_v = load_raw_run<4, true>(p.v, offset_of(p.v, row, head) + c, 4);
    const RawElement raw_beta = load_raw(p.beta, offset_of(p.beta, row, head));
    const float A_log = A_log_of(p.gate, head);
    float bias[4], q[4], k[4], g[4], v[4], G[4], written[4] = {};
#pragma unroll
    for (int e = 0; e < 4; ++e) bias[e] = dt_bias_of(p.gate, head, c + e);

    mbarrier_wait(smem_address(&ring.recorded[turn.place]), turn.phase);
    Stage& stage = ring.stages[turn.place];
    const int slot = stage.slot, fill = stage.fill;
    const bool full = slot >= 0 && fill + 1 == r.L;
    if (fill > 0) load_channels(written, stage.decays[fill - 1], c);
    values_of(q, p.q, raw_q), values_of(k, p.k, raw_k), values_of(g, p.g, raw_g), values_of(v, p.v, raw_v);
    const float factor = expf(A_log);
    float kk = 0, qq = 0, kq = 0, a[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      kk = fmaf(k[e], k[e], kk), qq = fmaf(q[e], q[e], qq), kq = fmaf(k[e], q[e], kq);
      G[e] = summed_decay(p.gate, factor, g[e] + bias[e], written[e]);
      a[e] = exp2f(G[e]);
    }
    const Scales scales = scales_of(warp_sum(kk), warp_sum(qq), warp_sum(kq), p.l2norm, p.l2_eps, p.scale);

    float products[2 * kRecords];
#pragma unroll
    for (int j = 0; j < kRecords; ++j) {
      float with_k = 0, with_q = 0;
      if (j < fill) {
        float key[4], decay[4];
        load_channels(key, stage.keys[j], c), load_channels(decay, stage.decays[j], c);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          key[e] *= exp2f(G[e] - decay[e]);
          with_k = fmaf(key[e], k[e], with_k), with_q = fmaf(key[e], q[e], with_q);
        }
        if (full) store4(stage.keys[j] + c, {key[0], key[1], key[2], key[3]});
      }
      products[j] = with_k, products[kRecords + j] = with_q;
    }
    (lane < kRecords ? stage.with_k : stage.with_q)[lane % kRecords] = transposed_sum(products);

    store4(stage.channels.k + c, {k[0] * a[0], k[1] * a[1], k[2] * a[2], k[3] * a[3]});
    store4(stage.channels.q + c, {q[0] * a[0], q[1] * a[1], q[2] * a[2], q[3] * a[3]});
    store4(stage.v + c, {v[0], v[1], v[2], v[3]});
    if (lane == 0) {
      stage.scales = scales;
      stage.beta = write_strength(p.beta_kind, value_of(p.beta, raw_beta));
    }
    const float4 key{k[0] * scales.k, k[1] * scales.k, k[2] * scales.k, k[3] * scales.k};
    if (full) {
      store4(stage.channels.a + c, {a[0], a[1], a[2], a[3]});
      store4(stage.keys[fill] + c, key);
    }
    fence_proxy_async();  // the copy engine writes over records and keys when its turn comes
    mbarrier_arrive(smem_address(&ring.ready[turn.place]));
    if (slot >= 0) {
      const int64_t record = first_record(p, r, slot, head) + fill;
      store4(r.keys + record * D + c, key);
      store4(r.decays + record * D + c, {G[0], G[1], G[2], G[3]});
    }
  });
}

template <bool kVFirst>
KL_DEVICE void run_stepper(Ring<kVFirst>& ring, const StepParams& p, const ReplayParams& r, int warp) {
  using Slot = typename Ring<kVFirst>::Slot;
  const Place<kVFirst> at;
  const int v0 = 16 * warp, v = v0 + 4 * at.vg;
  Turn<kStages> stage;
  for (Turn<kSlots> turn;; turn.next(), stage.next()) {
    mbarrier_wait(smem_address(&ring.recorded[stage.place]), stage.phase);
    const Stage& from = ring.stages[stage.place];
    const int item = from.item, slot = from.slot, fill = from.fill, head = first_head(p, 1, item);
    if (item < 0) return;
    mbarrier_wait(smem_address(&ring.loaded[turn.place]), turn.phase);
    LaneState<D, 4> S = {};
    if (slot >= 0) load_lanes(S, ring.states[turn.place], warp);
    fence_proxy_async();  // read before the copy engine writes over it
    mbarrier_arrive_warp(smem_address(&ring.free[turn.place]));

    mbarrier_wait(smem_address(&ring.ready[stage.place]), stage.phase);
    float u[4] = {}, y[4] = {}, values[4], delta[4], o[4];
    load_channels(values, from.v, v);
#pragma unroll
    for (int j = at.kg; j < kRecords; j += 8)
      if (j < fill) add_record(u, y, from.with_k[j], from.with_q[j], load4(from.deltas[j] + v));
    replay_step<D, kVFirst>(o, delta, u, y, S, from.channels, from.scales, values, from.beta);
    const bool full = slot >= 0 && fill + 1 == r.L;
    if (full) fold<D, kVFirst>(S, from.channels.a, from.keys, from.deltas[0] + v, D, fill, delta);
    fence_proxy_async();
    mbarrier_arrive_warp(smem_address(&ring.used[stage.place]));

    if (at.kg == 0) {
      store_run<true>(p.out, offset_of(p.out, item / p.Hv, head) + v, o, 4);
      if (slot >= 0)
        store4(r.deltas + (first_record(p, r, slot, head) + fill) * D + v,
               {delta[0], delta[1], delta[2], delta[3]});
    }
    if (full)
      store_tile<D, 4, kVFirst>(
          S, Slot::in_pool(p, item, slot) + v0 * (kVFirst ? D : 1) + first_element<4, kVFirst>(D), D);
  }
}
#endif

template <bool kVFirst>
__global__ void __launch_bounds__(kThreads, 1)
    kda_replay_pipeline_kernel(const __grid_constant__ StepParams p, const __grid_constant__ ReplayParams r) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) float4 shared[];  // for the copy engine 16 bytes, for the banks 128
  auto& ring = *reinterpret_cast<Ring<kVFirst>*>(shared);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    for (int s = 0; s < kSlots; ++s) {
      mbarrier_init(smem_address(&ring.loaded[s]), 1);
      mbarrier_init(smem_address(&ring.free[s]), kSteppers * kWarpArrivals);
    }
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(smem_address(&ring.recorded[s]), 1);
      mbarrier_init(smem_address(&ring.ready[s]), 32);
      mbarrier_init(smem_address(&ring.used[s]), kSteppers * kWarpArrivals);
    }
    fence_barrier_init();
  }
  __syncthreads();  // the barriers are initialised
  follow_previous_kernel();
  if (warp < kSteppers) {
    run_stepper(ring, p, r, warp);
  } else if (warp < kLoader) {
    run_preparer(ring, p, r, warp - kSteppers);
  } else if (threadIdx.x % 32 == 0) {
    run_loader(ring, p, r);
  }
#endif
}

template <bool kVFirst>
void launch_pipeline(const Ctx& ctx, const KdaReplayArgs& a) {
  const StepParams p = step_params(a.kda);
  const int items = p.N * p.Hv, blocks = current_device().multiprocessors;
  const LaunchConfig config{.grid = dim3(static_cast<unsigned>(items < blocks ? items : blocks)),
                            .block = dim3(kThreads),
                            .smem = sizeof(Ring<kVFirst>),
                            .stream = static_cast<cudaStream_t>(ctx.stream),
                            .overlap_previous = true};
  launch(kda_replay_pipeline_kernel<kVFirst>, config, p, replay_params(a));
}

}  // namespace

bool kda_replay_pipeline_takes(const KdaReplayArgs& a) {
  for (const Tensor* t : {&a.keys, &a.decays, &a.deltas})
    if (reinterpret_cast<uintptr_t>(t->data) % 16 != 0) return false;
  return a.kda.q.size(2) == D && kda_decode_pipeline_takes(a.kda) &&
         current_device().max_smem >= sizeof(Ring<false>);
}

bool kda_replay_pipeline_pays(const KdaReplayArgs& a) {
  return 2 * a.kda.v.size(0) * a.kda.v.size(1) >= 3 * current_device().multiprocessors &&
         kda_replay_pipeline_takes(a);
}

void kda_replay_pipeline(const Ctx& ctx, const KdaReplayArgs& a) {
  a.kda.state_v_first ? launch_pipeline<true>(ctx, a) : launch_pipeline<false>(ctx, a);
}

}  // namespace kl::cuda
