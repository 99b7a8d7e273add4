// The fused decode step: the definition beside convolution, recurrence and norm of a whole sequence; the GPU
// beside the definition.
#include "ops/kda/kda_step.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "testing/compare.h"
#include "testing/random.h"
#ifdef KL_CUDA
#include "cuda/memory.h"
#include "ops/kda/kda_cuda.h"
#endif

namespace kl {
namespace {

using testing::random_normal;

// Weights of one layer and the state of some slots.
struct Layer {
  int64_t H, K, V, slots;
  OwnedTensor weight[3], conv[3], state, A_log, dt_bias, norm_weight;

  Layer(int64_t H, int64_t K, int64_t V, int64_t slots, bool v_first, DType state_type,
        testing::Random& random)
      : H(H), K(K), V(V), slots(slots) {
    for (int i = 0; i < 3; ++i) {
      const int64_t C = H * (i < 2 ? K : V);
      weight[i] = random_normal(DType::f32, {C, kStepTaps}, random, 0.5);
      conv[i] = random_normal(DType::f32, {slots, C, kStepTaps - 1}, random);
    }
    state = v_first ? random_normal(state_type, {slots, H, V, K}, random, 0.5)
                    : random_normal(state_type, {slots, H, K, V}, random, 0.5);
    A_log = random_normal(DType::f32, {H}, random);
    dt_bias = random_normal(DType::f32, {H, K}, random, 1, -3);
    norm_weight = random_normal(DType::f32, {V}, random, 0.1, 1);
  }
};

// Rows of N tokens.
struct Rows {
  OwnedTensor q, k, v, g, beta, out_gate, out, slot;
  Rows(const Layer& layer, int64_t N, DType type, testing::Random& random) {
    q = random_normal(type, {N, layer.H, layer.K}, random),
    k = random_normal(type, {N, layer.H, layer.K}, random);
    v = random_normal(type, {N, layer.H, layer.V}, random),
    g = random_normal(type, {N, layer.H, layer.K}, random);
    beta = random_normal(type, {N, layer.H}, random),
    out_gate = random_normal(type, {N, layer.H, layer.V}, random);
    out = make_tensor(type, {N, layer.H, layer.V}), slot = make_tensor(DType::i32, {N});
    testing::fill_nan(out.tensor);
  }
};

// The arguments, every tensor through `place` (identity, or to the device).
template <class Place>
KdaStepArgs step_args(const Layer& layer, const Rows& rows, bool v_first, Place&& place) {
  KdaStepArgs a;
  a.kda.q = place(rows.q.tensor), a.kda.k = place(rows.k.tensor), a.kda.v = place(rows.v.tensor);
  a.kda.g = place(rows.g.tensor), a.kda.beta = place(rows.beta.tensor), a.kda.out = place(rows.out.tensor);
  a.kda.state = place(layer.state.tensor), a.kda.slot = place(rows.slot.tensor);
  a.kda.gate.A_log = place(layer.A_log.tensor), a.kda.gate.dt_bias = place(layer.dt_bias.tensor);
  a.kda.state_v_first = v_first;
  StepConv* const convs[] = {&a.q, &a.k, &a.v};
  for (int i = 0; i < 3; ++i) *convs[i] = {place(layer.weight[i].tensor), place(layer.conv[i].tensor)};
  a.out_gate = place(rows.out_gate.tensor), a.norm_weight = place(layer.norm_weight.tensor);
  return a;
}

Tensor itself(const Tensor& t) { return t; }

TEST(KdaStep, StepsAddUpToTheWholeSequence) {
  testing::Random random(3);
  const int64_t T = 9, H = 2, K = 8, V = 6;
  Layer layer(H, K, V, 1, false, DType::f32, random);
  for (OwnedTensor* t : {&layer.conv[0], &layer.conv[1], &layer.conv[2], &layer.state})
    testing::fill(t->tensor, [](int64_t) { return 0; });
  Rows rows(layer, T, DType::f32, random);
  Ctx ctx;
  for (int64_t t = 0; t < T; ++t) {
    KdaStepArgs a = step_args(layer, rows, false, itself);
    for (Tensor* x :
         {&a.kda.q, &a.kda.k, &a.kda.v, &a.kda.g, &a.kda.beta, &a.kda.out, &a.kda.slot, &a.out_gate})
      *x = x->slice(0, t, t + 1);
    kda_step(ctx, a);
  }

  // Convolution over the whole sequence, by its formula.
  const auto convolve = [&](const Tensor& x, const Tensor& weight) {
    const int64_t D = x.size(2);
    OwnedTensor y = make_tensor(DType::f64, {T, H, D});
    for (int64_t t = 0; t < T; ++t)
      for (int64_t c = 0; c < H * D; ++c) {
        double sum = 0;
        for (int64_t j = 0; j < kStepTaps; ++j)
          if (t - 3 + j >= 0)
            sum += static_cast<double>(*weight.at<float>(c, j)) * *x.at<float>(t - 3 + j, c / D, c % D);
        *y.tensor.at<double>(t, c / D, c % D) = sum / (1 + std::exp(-sum));
      }
    return y;
  };
  const OwnedTensor q = convolve(rows.q.tensor, layer.weight[0].tensor),
                    k = convolve(rows.k.tensor, layer.weight[1].tensor),
                    v = convolve(rows.v.tensor, layer.weight[2].tensor);
  OwnedTensor state = make_tensor(DType::f64, {1, H, K, V}), o = make_tensor(DType::f64, {T, H, V}),
              cu = make_tensor(DType::i32, {2}), slot = make_tensor(DType::i32, {1});
  *cu.tensor.at<int32_t>(1) = static_cast<int32_t>(T);
  KdaArgs whole = step_args(layer, rows, false, itself).kda;
  whole.q = q.tensor, whole.k = k.tensor, whole.v = v.tensor, whole.state = state.tensor,
  whole.out = o.tensor;
  whole.cu_seqlens = cu.tensor, whole.slot = slot.tensor;
  kda_recurrent_ref(whole, KdaPrecision::f64);
  std::vector<double> expected;
  for (int64_t t = 0; t < T; ++t)
    for (int64_t h = 0; h < H; ++h) {
      double squares = 0;
      for (int64_t i = 0; i < V; ++i)
        squares += *o.tensor.at<double>(t, h, i) * *o.tensor.at<double>(t, h, i);
      for (int64_t i = 0; i < V; ++i)
        expected.push_back(*o.tensor.at<double>(t, h, i) / std::sqrt(squares / V + 1e-5) *
                           *layer.norm_weight.tensor.at<float>(i) /
                           (1 + std::exp(-*rows.out_gate.tensor.at<float>(t, h, i))));
    }
  EXPECT_LE(testing::rel_rms(testing::to_doubles(rows.out.tensor), expected), 1e-5);  // nine f32 steps
  EXPECT_LE(testing::rel_rms(layer.state.tensor, state.tensor), 1e-5);
}

TEST(KdaStep, SaysWhatDoesNotFit) {
  testing::Random random(4);
  const Layer layer(2, 8, 8, 2, false, DType::f32, random);
  const Rows rows(layer, 2, DType::f32, random);
  Ctx ctx;
  KdaStepArgs a = step_args(layer, rows, false, itself);
  a.k.weight = a.k.weight.slice(0, 0, 15);
  try {
    kda_step(ctx, a);
    FAIL() << "took a weight of the wrong shape";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "kda_step k.weight: expected shape [16, 4], found [15, 4]");
  }
}

#ifdef KL_CUDA
OwnedTensor as_f32(const Tensor& t) {
  OwnedTensor copy{Buffer::host(static_cast<size_t>(t.numel()) * 4), t};
  copy.tensor.data = copy.buffer.data();
  copy.tensor.dtype = DType::f32;
  const std::vector<double> values = testing::to_doubles(t);
  testing::fill(copy.tensor, [&](int64_t i) { return values[static_cast<size_t>(i)]; });
  return copy;
}

void expect_right_on_gpu(void (*step)(const Ctx&, const KdaStepArgs&), int64_t N, int64_t H, int64_t D,
                         bool v_first, DType rows_type, DType state_type) {
  SCOPED_TRACE(cat(N, " sequences, ", H, " heads of ", D, v_first ? ", V first, " : ", ", name_of(rows_type),
                   " rows, ", name_of(state_type), " states"));
  testing::Random random(static_cast<uint64_t>(N * H + D));
  const Layer layer(H, D, D, 2 * N + 1, v_first, state_type, random);
  Rows rows(layer, N, rows_type, random);
  for (int64_t n = 0; n < N; ++n)
    *rows.slot.tensor.at<int32_t>(n) = n % 5 == 3 ? -1 : static_cast<int32_t>(2 * (N - 1 - n) + 1);
  std::vector<cuda::DeviceTensor> on_device;
  const KdaStepArgs device_args = step_args(layer, rows, v_first, [&](const Tensor& t) {
    on_device.push_back(cuda::to_device(t));
    return on_device.back().tensor;
  });
  Ctx ctx;
  ctx.device = Device::cuda;
  step(ctx, device_args);
  const auto back = [](const Tensor& t) { return cuda::to_host(t); };
  const OwnedTensor out = back(device_args.kda.out), state = back(device_args.kda.state);
  const OwnedTensor q = back(device_args.q.state), k = back(device_args.k.state),
                    v = back(device_args.v.state);
  // The definition keeps the state in f32; the pool's bf16 are the values it starts from.
  const OwnedTensor pool = state_type == DType::bf16 ? as_f32(layer.state.tensor) : OwnedTensor{};
  KdaStepArgs host_args = step_args(layer, rows, v_first, itself);
  if (state_type == DType::bf16) host_args.kda.state = pool.tensor;
  kda_step_ref(host_args, KdaPrecision::f64);
  // Rounds to bf16 like the definition, but a result next to a boundary may fall to its other side. A bf16
  // pool is rounded once, at the end: 1.7e-3.
  EXPECT_LE(testing::rel_rms(out.tensor, rows.out.tensor), rows_type == DType::bf16 ? 5e-4 : 1e-5);
  EXPECT_LE(testing::rel_rms(state.tensor, host_args.kda.state), state_type == DType::bf16 ? 2e-3 : 1e-5);
  EXPECT_TRUE(testing::same_bits(q.tensor, layer.conv[0].tensor));
  EXPECT_TRUE(testing::same_bits(k.tensor, layer.conv[1].tensor));
  EXPECT_TRUE(testing::same_bits(v.tensor, layer.conv[2].tensor));
}

TEST(KdaStepCuda, BesideTheDefinition) {
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device";
  if (cuda::current_device().arch < 90) GTEST_SKIP() << "the fused step needs sm_90";
  const int64_t several = 4 + std::min(132, cuda::current_device().multiprocessors) / 2;  // items a block
  for (const bool v_first : {false, true})
    for (const DType rows : {DType::f32, DType::bf16})
      for (const DType state : {DType::f32, DType::bf16}) {
        for (const int64_t D : {64, 128}) {
          expect_right_on_gpu(cuda::kda_step_pipeline, 1, 2, D, v_first, rows, state);
          expect_right_on_gpu(cuda::kda_step, several, 8, D, v_first, rows, state);
        }
        expect_right_on_gpu(cuda::kda_step_tiles, 9, 3, 128, v_first, rows, state);
      }
  expect_right_on_gpu(cuda::kda_step, 0, 2, 128, false, DType::f32, DType::f32);
}
#endif  // KL_CUDA

}  // namespace
}  // namespace kl
