// Replay decode: the definition beside the plain recurrence over many steps and foldings; the GPU beside the
// definition.
#include "ops/kda/kda_replay.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <string>

#include "testing/compare.h"
#include "testing/random.h"
#ifdef KL_CUDA
#include "cuda/memory.h"
#include "ops/kda/kda_cuda.h"
#endif

namespace kl {
namespace {

using testing::random_normal;

// Some sequences that are decoded step by step, their states and records.
struct Replay {
  int64_t N, H, Hv, K, V, L;
  bool v_first;
  KdaGateKind gate;
  OwnedTensor state, keys, decays, deltas, slot, fill, A_log;

  Replay(int64_t N, int64_t H, int64_t Hv, int64_t K, int64_t V, int64_t L, bool v_first, KdaGateKind gate,
         testing::Random& random)
      : N(N), H(H), Hv(Hv), K(K), V(V), L(L), v_first(v_first), gate(gate) {
    const int64_t slots = 2 * N + 1;
    state = v_first ? random_normal(DType::f32, {slots, Hv, V, K}, random, 0.5)
                    : random_normal(DType::f32, {slots, Hv, K, V}, random, 0.5);
    keys = make_tensor(DType::f32, {slots, Hv, L, K}), decays = make_tensor(DType::f32, {slots, Hv, L, K});
    deltas = make_tensor(DType::f32, {slots, Hv, L, V});
    for (OwnedTensor* t : {&keys, &decays, &deltas}) testing::fill_nan(t->tensor);
    slot = make_tensor(DType::i32, {N}), fill = make_tensor(DType::i32, {N});
    for (int64_t n = 0; n < N; ++n)
      *slot.tensor.at<int32_t>(n) = n % 4 == 2 ? -1 : static_cast<int32_t>(2 * n + 1);
    A_log = random_normal(DType::f32, {Hv}, random);
  }
  // Sequence n begins with n modulo L records.
  void begin_with_records(testing::Random& random) {
    for (int64_t n = 0; n < N; ++n) {
      const int32_t at = *slot.tensor.at<int32_t>(n), records = static_cast<int32_t>(n % L);
      *fill.tensor.at<int32_t>(n) = records;
      for (int64_t h = 0; at >= 0 && h < Hv; ++h)
        for (int64_t j = 0; j < records; ++j) {
          for (int64_t c = 0; c < K; ++c) {
            *keys.tensor.at<float>(at, h, j, c) = static_cast<float>(0.1 * random.normal());
            *decays.tensor.at<float>(at, h, j, c) =
                (j > 0 ? *decays.tensor.at<float>(at, h, j - 1, c) : 0.f) -
                static_cast<float>(random.uniform(0, 0.3));
          }
          for (int64_t c = 0; c < V; ++c)
            *deltas.tensor.at<float>(at, h, j, c) = static_cast<float>(random.normal());
        }
    }
  }
  void count() {
    for (int64_t n = 0; n < N; ++n) {
      int32_t& records = *fill.tensor.at<int32_t>(n);
      records = records + 1 == L ? 0 : records + 1;
    }
  }
};

struct Rows {
  OwnedTensor q, k, v, g, beta, out;
  Rows(const Replay& r, int64_t T, DType type, testing::Random& random) {
    q = random_normal(type, {T, r.H, r.K}, random), k = random_normal(type, {T, r.H, r.K}, random);
    v = random_normal(type, {T, r.Hv, r.V}, random), g = make_tensor(type, {T, r.Hv, r.K});
    beta = random_normal(type, {T, r.Hv}, random), out = make_tensor(type, {T, r.Hv, r.V});
    testing::fill_nan(out.tensor);
    // Given log-decays are mild, steep or -inf; the other gates read numbers around zero.
    testing::fill(g.tensor, [&](int64_t) {
      if (r.gate != KdaGateKind::log_decay) return random.normal();
      const double kind = random.uniform();
      return kind < 0.02  ? -std::numeric_limits<double>::infinity()
             : kind < 0.1 ? random.uniform(-90, 0)
                          : -0.1 * random.uniform();
    });
  }
};

KdaArgs rows_of(const Replay& r, const Rows& rows, int64_t begin, int64_t end) {
  KdaArgs a;
  a.q = rows.q.tensor.slice(0, begin, end), a.k = rows.k.tensor.slice(0, begin, end);
  a.v = rows.v.tensor.slice(0, begin, end), a.g = rows.g.tensor.slice(0, begin, end);
  a.beta = rows.beta.tensor.slice(0, begin, end), a.out = rows.out.tensor.slice(0, begin, end);
  a.gate.kind = r.gate;
  a.gate.A_log = r.A_log.tensor;
  a.state_v_first = r.v_first;
  return a;
}

KdaReplayArgs replay_args(const Replay& r, const Rows& rows, int64_t begin, int64_t end) {
  KdaReplayArgs a;
  a.kda = rows_of(r, rows, begin, end);
  a.kda.state = r.state.tensor, a.kda.slot = r.slot.tensor;
  a.keys = r.keys.tensor, a.decays = r.decays.tensor, a.deltas = r.deltas.tensor, a.fill = r.fill.tensor;
  return a;
}

TEST(KdaReplay, PlaysTheRecurrence) {
  for (const KdaGateKind gate : {KdaGateKind::log_decay, KdaGateKind::softplus, KdaGateKind::bounded})
    for (const int64_t L : {1, 3, 16})
      for (const bool v_first : {false, true}) {
        SCOPED_TRACE(cat("gate ", static_cast<int>(gate), ", ", L, " records"));
        testing::Random random(static_cast<uint64_t>(L));
        Replay r(1, 1, 2, 12, 6, L, v_first, gate, random);
        const int64_t T = 2 * L;  // ends with everything in the state
        const Rows rows(r, T, DType::f32, random);
        OwnedTensor state = make_tensor(DType::f64, {3, 2, v_first ? 6 : 12, v_first ? 12 : 6}),
                    out = make_tensor(DType::f64, {T, 2, 6}), cu = make_tensor(DType::i32, {2});
        const std::vector<double> start = testing::to_doubles(r.state.tensor);
        std::copy(start.begin(), start.end(), state.tensor.ptr<double>());
        *cu.tensor.at<int32_t>(1) = static_cast<int32_t>(T);
        KdaArgs whole = rows_of(r, rows, 0, T);
        whole.state = state.tensor, whole.out = out.tensor, whole.cu_seqlens = cu.tensor,
        whole.slot = r.slot.tensor;
        kda_recurrent_ref(whole, KdaPrecision::f64);
        Ctx ctx;
        for (int64_t t = 0; t < T; ++t) {
          kda_replay(ctx, replay_args(r, rows, t, t + 1));
          r.count();
        }
        // States and records are kept in f32.
        EXPECT_LE(testing::rel_rms(rows.out.tensor, out.tensor), 1e-5);
        EXPECT_LE(testing::rel_rms(r.state.tensor, state.tensor), 1e-5);
      }
}

TEST(KdaReplay, SaysWhatDoesNotFit) {
  testing::Random random(1);
  const Replay r(1, 1, 1, 8, 8, 4, false, KdaGateKind::softplus, random);
  const Rows rows(r, 1, DType::f32, random);
  Ctx ctx;
  KdaReplayArgs a = replay_args(r, rows, 0, 1);
  a.deltas = a.deltas.slice(2, 0, 3);
  try {
    kda_replay(ctx, a);
    FAIL() << "took rings of different lengths";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "kda_replay deltas: expected shape [3, 1, 4, 8], found [3, 1, 3, 8]");
  }
}

#ifdef KL_CUDA
// T steps on the GPU by one of its ways, beside the definition.
void expect_right_on_gpu(Replay& r, int64_t T, DType type, testing::Random& random,
                         void (*replay)(const Ctx&, const KdaReplayArgs&)) {
  const Rows rows(r, T * r.N, type, random);
  const cuda::DeviceTensor q = cuda::to_device(rows.q.tensor), k = cuda::to_device(rows.k.tensor),
                           v = cuda::to_device(rows.v.tensor), g = cuda::to_device(rows.g.tensor),
                           beta = cuda::to_device(rows.beta.tensor), out = cuda::to_device(rows.out.tensor),
                           state = cuda::to_device(r.state.tensor), keys = cuda::to_device(r.keys.tensor),
                           decays = cuda::to_device(r.decays.tensor),
                           deltas = cuda::to_device(r.deltas.tensor), slot = cuda::to_device(r.slot.tensor),
                           A_log = cuda::to_device(r.A_log.tensor);
  Ctx host, device;
  device.device = Device::cuda;
  for (int64_t t = 0; t < T; ++t) {
    const cuda::DeviceTensor fill = cuda::to_device(r.fill.tensor);
    KdaReplayArgs a = replay_args(r, rows, t * r.N, (t + 1) * r.N);
    const auto step = [&](const cuda::DeviceTensor& x) { return x.tensor.slice(0, t * r.N, (t + 1) * r.N); };
    a.kda.q = step(q), a.kda.k = step(k), a.kda.v = step(v), a.kda.g = step(g), a.kda.beta = step(beta);
    a.kda.out = step(out), a.kda.state = state.tensor, a.kda.slot = slot.tensor,
    a.kda.gate.A_log = A_log.tensor;
    a.keys = keys.tensor, a.decays = decays.tensor, a.deltas = deltas.tensor, a.fill = fill.tensor;
    replay(device, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "replaying");
    kda_replay(host, replay_args(r, rows, t * r.N, (t + 1) * r.N));
    r.count();
  }
  // bf16 outputs are rounded like the definition's; next to a boundary they may fall to its other side.
  EXPECT_LE(testing::rel_rms(cuda::to_host(out.tensor).tensor, rows.out.tensor),
            type == DType::bf16 ? 5e-4 : 1e-5);
  EXPECT_LE(testing::rel_rms(cuda::to_host(state.tensor).tensor, r.state.tensor), 1e-5);
  EXPECT_LE(testing::rel_rms(cuda::to_host(keys.tensor).tensor, r.keys.tensor), 1e-5);
  EXPECT_LE(testing::rel_rms(cuda::to_host(decays.tensor).tensor, r.decays.tensor), 1e-5);
  EXPECT_LE(testing::rel_rms(cuda::to_host(deltas.tensor).tensor, r.deltas.tensor), 2e-5);
}

TEST(KdaReplayCuda, BesideTheDefinition) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  struct Shape {
    int64_t K, V, L;
  };
  for (const Shape& shape :
       {Shape{64, 64, 16}, Shape{128, 128, 5}, Shape{128, 64, 1}, Shape{128, 128, 1}, Shape{128, 128, 16}})
    for (const bool v_first : {false, true})
      for (const KdaGateKind gate : {KdaGateKind::log_decay, KdaGateKind::softplus, KdaGateKind::bounded})
        for (const bool pipeline : {false, true}) {
          // The pipeline takes heads of 128 only.
          if (pipeline && (shape.K != 128 || shape.V != 128 || cuda::current_device().arch < 90)) continue;
          SCOPED_TRACE(cat(shape.K, " x ", shape.V, ", ", shape.L, " records, gate ", static_cast<int>(gate),
                           v_first ? ", V first" : "", pipeline ? ", pipeline" : ", tiles"));
          testing::Random random(static_cast<uint64_t>(shape.L));
          Replay r(3, 1, 2, shape.K, shape.V, shape.L, v_first, gate, random);
          expect_right_on_gpu(r, shape.L + 2, v_first ? DType::bf16 : DType::f32, random,
                              pipeline ? cuda::kda_replay_pipeline : cuda::kda_replay_tiles);
        }
}

TEST(KdaReplayCuda, ManySequencesWithRingsOfEveryFill) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  // Several items for each block of the pipeline, which fold and do not fold by turns.
  const int64_t N = 4 + std::min(132, cuda::current_device().multiprocessors) / 2;
  for (const int64_t L : {3, 16})
    for (const bool v_first : {false, true}) {
      SCOPED_TRACE(cat(L, " records", v_first ? ", V first" : ""));
      testing::Random random(static_cast<uint64_t>(L));
      Replay r(N, 4, 8, 128, 128, L, v_first, KdaGateKind::softplus, random);
      r.begin_with_records(random);
      expect_right_on_gpu(r, 2, DType::f32, random, cuda::kda_replay);
    }
}

TEST(KdaReplayCuda, ManyItemsABlock) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  if (cuda::current_device().arch < 90) GTEST_SKIP() << "the pipeline needs sm_90";
  // Some thirty items for each block, twice round the ring, beside the other way: too many for the
  // definition. What can go wrong here is a hand-over that depends on time.
  testing::Random random(7);
  const int64_t H = 16, D = 128, L = 4;
  const int64_t N = std::min(256, 2 * cuda::current_device().multiprocessors);
  Replay r(1, H, H, D, D, L, false, KdaGateKind::softplus, random);
  const Rows rows(r, N, DType::f32, random);
  const cuda::DeviceTensor q = cuda::to_device(rows.q.tensor), k = cuda::to_device(rows.k.tensor),
                           v = cuda::to_device(rows.v.tensor), g = cuda::to_device(rows.g.tensor),
                           beta = cuda::to_device(rows.beta.tensor), A_log = cuda::to_device(r.A_log.tensor);
  OwnedTensor slots = make_tensor(DType::i32, {N});
  for (int64_t n = 0; n < N; ++n) *slots.tensor.at<int32_t>(n) = static_cast<int32_t>(n * 127 % N);
  const cuda::DeviceTensor slot = cuda::to_device(slots.tensor);
  Ctx ctx;
  ctx.device = Device::cuda;
  const auto run = [&](void (*replay)(const Ctx&, const KdaReplayArgs&)) {
    const cuda::DeviceTensor state = cuda::device_tensor(DType::f32, {N, H, D, D}, 0x3c),
                             keys = cuda::device_tensor(DType::f32, {N, H, L, D}),
                             decays = cuda::device_tensor(DType::f32, {N, H, L, D}),
                             deltas = cuda::device_tensor(DType::f32, {N, H, L, D}),
                             out = cuda::to_device(rows.out.tensor);
    OwnedTensor fill = make_tensor(DType::i32, {N});
    KdaReplayArgs a = replay_args(r, rows, 0, N);
    a.kda.q = q.tensor, a.kda.k = k.tensor, a.kda.v = v.tensor, a.kda.g = g.tensor, a.kda.beta = beta.tensor;
    a.kda.out = out.tensor, a.kda.state = state.tensor, a.kda.slot = slot.tensor;
    a.kda.gate.A_log = A_log.tensor;
    a.keys = keys.tensor, a.decays = decays.tensor, a.deltas = deltas.tensor;
    for (int64_t t = 0; t < 2 * L; ++t) {
      std::fill_n(fill.tensor.ptr<int32_t>(), N, static_cast<int32_t>(t % L));
      const cuda::DeviceTensor records = cuda::to_device(fill.tensor);
      a.fill = records.tensor;
      replay(ctx, a);
      KL_CUDA_CHECK(cudaDeviceSynchronize(), "replaying");
    }
    return cuda::to_host(out.tensor);
  };
  const OwnedTensor reference = run(cuda::kda_replay_tiles);
  for (int repetition = 0; repetition < 3; ++repetition)
    EXPECT_LE(testing::rel_rms(run(cuda::kda_replay_pipeline).tensor, reference.tensor), 1e-5);
}
#endif  // KL_CUDA

}  // namespace
}  // namespace kl
