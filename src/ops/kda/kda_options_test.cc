// What the options of a KdaArgs do: element types, strides, layouts of states, norm, scale, absent tensors.
#include <gtest/gtest.h>

#include <list>

#include "ops/kda/kda_problem.h"

namespace kl {
namespace {

using testing::decode;
using testing::KdaCase;
using testing::KdaProblem;
using testing::KdaResult;
using testing::prefill;
using testing::recurrence_f64;
using testing::rel_rms;
using testing::same_bits;

TEST(KdaOptions, Bf16OutputIsTheRoundedOne) {
  const KdaProblem problem({.lengths = {70}}, 7);
  const KdaResult f32 = problem.run(prefill);
  const OwnedTensor out = make_tensor(DType::bf16, {70, 1, 64});
  testing::fill_nan(out.tensor);
  problem.run([&](KdaArgs args) {
    args.out = out.tensor;
    prefill(args);
  });
  for (int64_t i = 0; i < out.tensor.numel(); ++i)
    ASSERT_EQ(out.tensor.ptr<bf16>()[i].bits, bf16(f32.out.tensor.ptr<float>()[i]).bits);
}

TEST(KdaOptions, StridedRowsGiveTheSameBits) {
  for (const DType dtype : {DType::f32, DType::bf16}) {
    KdaCase c{.lengths = {40, 70}, .H = 2, .Hv = 4, .K = 24, .V = 40, .dtype = dtype};
    const KdaProblem apart(c, 8);
    c.fused_rows = true;
    const KdaProblem fused(c, 8);
    ASSERT_NE(fused.args.q.stride[0], apart.args.q.stride[0]);
    for (const auto kda : {prefill, decode, recurrence_f64}) {
      const KdaResult a = apart.run(kda), b = fused.run(kda);
      EXPECT_TRUE(same_bits(a.out.tensor, b.out.tensor));
      EXPECT_TRUE(same_bits(a.state.tensor, b.state.tensor));
    }
  }
}

// Value head h reads query/key head h / (Hv / H): the results are those of q and k repeated for every value
// head.
TEST(KdaOptions, ValueHeadsShareQueryAndKeyHeadsInOrder) {
  KdaProblem problem({.lengths = {40, 30}, .H = 2, .Hv = 6, .K = 24, .V = 40}, 14);
  const KdaArgs shared = problem.args;
  const OwnedTensor q = make_tensor(DType::f32, {70, 6, 24}), k = make_tensor(DType::f32, {70, 6, 24});
  for (int64_t t = 0; t < 70; ++t)
    for (int64_t head = 0; head < 6; ++head) {
      std::copy_n(shared.q.at<float>(t, head / 3), 24, q.tensor.at<float>(t, head));
      std::copy_n(shared.k.at<float>(t, head / 3), 24, k.tensor.at<float>(t, head));
    }
  for (const auto kda : {prefill, decode, recurrence_f64}) {
    problem.args.q = shared.q, problem.args.k = shared.k;
    const KdaResult a = problem.run(kda);
    problem.args.q = q.tensor, problem.args.k = k.tensor;
    const KdaResult b = problem.run(kda);
    EXPECT_TRUE(same_bits(a.out.tensor, b.out.tensor));
    EXPECT_TRUE(same_bits(a.state.tensor, b.state.tensor));
  }
}

TEST(KdaOptions, SequenceBoundsOfEitherType) {
  KdaProblem problem({.lengths = {40, 0, 30}}, 15);
  const KdaResult i32 = problem.run(prefill);
  std::vector<int64_t> cu = {0, 40, 40, 70};
  problem.args.cu_seqlens = Tensor(cu.data(), DType::i64, {4});
  const KdaResult i64 = problem.run(prefill);
  EXPECT_TRUE(same_bits(i32.out.tensor, i64.out.tensor));
  EXPECT_TRUE(same_bits(i32.state.tensor, i64.state.tensor));
}

// A pool [slots, Hv, V, K] holds the transposed states; arithmetic does not change.
TEST(KdaOptions, ValueFirstStatesAreTheTransposedOnes) {
  const KdaProblem problem({.lengths = {40, 70}, .Hv = 2, .K = 24, .V = 40}, 9);
  const auto transposed = [](const Tensor& pool) {
    OwnedTensor t = make_tensor(pool.dtype, {pool.size(0), pool.size(1), pool.size(3), pool.size(2)});
    for (int64_t s = 0; s < pool.size(0); ++s)
      for (int64_t h = 0; h < pool.size(1); ++h)
        for (int64_t i = 0; i < pool.size(2); ++i)
          for (int64_t j = 0; j < pool.size(3); ++j)
            *t.tensor.at<float>(s, h, j, i) = *pool.at<float>(s, h, i, j);
    return t;
  };
  for (const auto kda : {prefill, decode, recurrence_f64}) {
    const KdaResult expected = problem.run(kda);
    const OwnedTensor state = transposed(problem.pool());
    const KdaResult found = problem.run([&](KdaArgs args) {
      args.state_v_first = true, args.state = state.tensor;
      kda(args);
    });
    EXPECT_TRUE(same_bits(found.out.tensor, expected.out.tensor));
    EXPECT_TRUE(same_bits(transposed(state.tensor).tensor, expected.state.tensor));
  }
}

TEST(KdaOptions, L2NormDividesByTheLength) {
  // Without l2norm and with keys divided beforehand (f64), the results are those with l2norm.
  KdaProblem problem({.lengths = {70}, .K = 24, .V = 40}, 10);
  const KdaResult expected = problem.run(recurrence_f64, DType::f64);
  std::list<OwnedTensor> rows;
  for (Tensor* t : {&problem.args.q, &problem.args.k}) {
    const Tensor& normed = rows.emplace_back(make_tensor(DType::f64, {70, 1, 24})).tensor;
    for (int64_t i = 0; i < 70; ++i) {
      double squares = 1e-6f;
      for (int64_t d = 0; d < 24; ++d) squares += std::pow(double{t->at<float>(i, 0)[d]}, 2);
      for (int64_t d = 0; d < 24; ++d)
        normed.at<double>(i, 0)[d] = t->at<float>(i, 0)[d] / std::sqrt(squares);
    }
    *t = normed;
  }
  problem.args.l2norm = false;
  EXPECT_LE(problem.error(problem.run(recurrence_f64, DType::f64), expected), 1e-14);
  EXPECT_LE(problem.error(problem.run(prefill), expected), 5e-6);
  EXPECT_LE(problem.error(problem.run(decode), expected), 5e-6);
}

TEST(KdaOptions, ScaleMultipliesTheOutput) {
  KdaProblem problem({.lengths = {70}}, 11);
  const KdaResult standard = problem.run(prefill);  // 64^-0.5 = 1/8
  problem.args.scale = 0.5f;                        // four times that: the same bits but for the exponent
  const KdaResult larger = problem.run(prefill);
  for (int64_t i = 0; i < standard.out.tensor.numel(); ++i)
    ASSERT_EQ(larger.out.tensor.ptr<float>()[i], 4 * standard.out.tensor.ptr<float>()[i]);
  EXPECT_TRUE(same_bits(standard.state.tensor, larger.state.tensor));
}

TEST(KdaOptions, AbsentGateParametersAreZeros) {
  for (const KdaGateKind kind : {KdaGateKind::softplus, KdaGateKind::bounded}) {
    KdaProblem absent({.lengths = {70}, .Hv = 3, .gate = kind, .gate_parameters = false}, 12);
    const KdaResult expected = absent.run(prefill);
    const OwnedTensor A_log = make_tensor(DType::f32, {3}), dt_bias = make_tensor(DType::f32, {3, 64});
    absent.args.gate.A_log = A_log.tensor, absent.args.gate.dt_bias = dt_bias.tensor;
    const KdaResult found = absent.run(prefill);
    EXPECT_TRUE(same_bits(expected.out.tensor, found.out.tensor));
    EXPECT_TRUE(same_bits(expected.state.tensor, found.state.tensor));
  }
}

// Nothing of a later token reaches an earlier one, not even through a product with zero.
TEST(KdaOptions, NanStaysBehindItsToken) {
  KdaProblem problem({.lengths = {70}, .K = 24, .V = 40}, 13);
  const KdaResult clean = problem.run(prefill);
  for (const int64_t row : {0, 5, 20, 69}) {
    const OwnedTensor v = make_tensor(DType::f32, {70, 1, 40});
    std::memcpy(v.tensor.data, problem.args.v.data, static_cast<size_t>(v.tensor.bytes()));
    testing::fill_nan(v.tensor.slice(0, row, row + 1));
    for (const auto kda : {prefill, decode}) {
      const KdaResult found = problem.run([&](KdaArgs args) {
        args.v = v.tensor;
        kda(args);
      });
      for (int64_t t = 0; t < 70; ++t)
        for (int64_t i = 0; i < 40; ++i)
          ASSERT_EQ(std::isnan(found.out.tensor.at<float>(t, 0)[i]), t >= row) << t;
      EXPECT_LE(rel_rms(found.out.tensor.slice(0, 0, row), clean.out.tensor.slice(0, 0, row)), 5e-6);
    }
  }
}

}  // namespace
}  // namespace kl
