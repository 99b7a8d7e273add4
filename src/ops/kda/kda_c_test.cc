// The C interface: the same bits as the C++ one, and every mistake answered with a code and words.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kda/kda.h"
#include "ops/kda/kda.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl {
namespace {

kda_tensor to_c(const Tensor& t) {
  kda_tensor c{};
  c.data = t.data;
  c.dtype = t.dtype == DType::f32    ? KDA_F32
            : t.dtype == DType::bf16 ? KDA_BF16
            : t.dtype == DType::i32  ? KDA_I32
                                     : KDA_I64;
  c.rank = t.rank;
  for (int d = 0; d < t.rank; ++d)
    c.shape[d] = t.shape[static_cast<size_t>(d)], c.stride[d] = t.stride[static_cast<size_t>(d)];
  return c;
}

struct Problem {
  testing::Random random{1};
  OwnedTensor q = testing::random_normal(DType::f32, {5, 2, 8}, random),
              k = testing::random_normal(DType::f32, {5, 2, 8}, random),
              v = testing::random_normal(DType::bf16, {5, 4, 6}, random),
              g = testing::random_normal(DType::f32, {5, 4, 8}, random),
              beta = testing::random_normal(DType::f32, {5, 4}, random),
              out = make_tensor(DType::f32, {5, 4, 6}),
              state = testing::random_normal(DType::f32, {3, 4, 8, 6}, random),
              A_log = testing::random_normal(DType::f32, {4}, random), cu = make_tensor(DType::i32, {3}),
              slot = make_tensor(DType::i32, {2});
  Problem() {
    testing::fill_nan(out.tensor);
    *cu.tensor.at<int32_t>(1) = 2, *cu.tensor.at<int32_t>(2) = 5;
    *slot.tensor.at<int32_t>(0) = 2, *slot.tensor.at<int32_t>(1) = -1;
  }
  KdaArgs cpp() const {
    KdaArgs a;
    a.q = q.tensor, a.k = k.tensor, a.v = v.tensor, a.g = g.tensor, a.beta = beta.tensor, a.out = out.tensor;
    a.state = state.tensor, a.cu_seqlens = cu.tensor, a.slot = slot.tensor, a.gate.A_log = A_log.tensor;
    return a;
  }
  kda_args c() const {
    kda_args a;
    kda_args_init(&a, sizeof a);
    a.q = to_c(q.tensor), a.k = to_c(k.tensor), a.v = to_c(v.tensor), a.g = to_c(g.tensor),
    a.beta = to_c(beta.tensor);
    a.out = to_c(out.tensor), a.state = to_c(state.tensor), a.cu_seqlens = to_c(cu.tensor),
    a.slot = to_c(slot.tensor);
    a.A_log = to_c(A_log.tensor);
    return a;
  }
};

TEST(KdaC, SameBitsAsCpp) {
  for (const int threads : {0, 3}) {
    Problem through_c, through_cpp;
    kda_args a = through_c.c();
    a.threads = threads;
    ASSERT_EQ(kda_prefill(&a), KDA_OK) << kda_last_error();
    ASSERT_EQ(kda_decode(&a), KDA_OK) << kda_last_error();
    Ctx ctx;
    kda_prefill(ctx, through_cpp.cpp());
    kda_decode(ctx, through_cpp.cpp());
    EXPECT_TRUE(testing::same_bits(through_c.out.tensor, through_cpp.out.tensor));
    EXPECT_TRUE(testing::same_bits(through_c.state.tensor, through_cpp.state.tensor));
  }
}

TEST(KdaC, WorkspaceOfTheCpuIsNothing) {
  const Problem problem;
  const kda_args a = problem.c();
  uint64_t bytes = 1;
  ASSERT_EQ(kda_workspace_bytes(&a, &bytes), KDA_OK) << kda_last_error();
  EXPECT_EQ(bytes, 0u);
  EXPECT_EQ(kda_workspace_bytes(&a, nullptr), KDA_REFUSED);
}

TEST(KdaC, OlderCallersKnowFewerFields) {
  Problem problem;
  kda_args a = problem.c();
  for (const size_t size : {offsetof(kda_args, workspace), offsetof(kda_args, batch_invariant)}) {
    a.struct_size = static_cast<uint32_t>(size);
    EXPECT_EQ(kda_decode(&a), KDA_OK) << kda_last_error();
  }
}

TEST(KdaC, MistakesAreRefusedInWords) {
  const Problem problem;
  const auto refuses = [&](auto&& change) {
    kda_args a = problem.c();
    change(a);
    EXPECT_EQ(kda_decode(&a), KDA_REFUSED);
    return std::string(kda_last_error());
  };
  EXPECT_EQ(::kda_decode(nullptr), KDA_REFUSED);
  EXPECT_EQ(std::string(kda_last_error()), "kda args: expected a struct, found NULL");
  EXPECT_NE(refuses([](kda_args& a) { a.struct_size = 8; }).find("struct_size: expected"), std::string::npos);
  EXPECT_NE(refuses([](kda_args& a) { a.struct_size = sizeof(kda_args) + 8; }).find("found"),
            std::string::npos);
  EXPECT_EQ(refuses([](kda_args& a) { a.device = 7; }), "kda device: expected KDA_CPU or KDA_CUDA, found 7");
  EXPECT_EQ(refuses([](kda_args& a) { a.gate = 3; }), "kda gate: expected 0 to 2, found 3");
  EXPECT_EQ(refuses([](kda_args& a) { a.q.dtype = 9; }), "kda q.dtype: expected a kda_dtype, found 9");
  EXPECT_EQ(refuses([](kda_args& a) { a.v.rank = 5; }), "kda v.rank: expected 1 to 4, found 5");
  EXPECT_EQ(refuses([](kda_args& a) { a.g.shape[0] = -1; }), "kda g.shape[0]: expected at least 0, found -1");
  EXPECT_EQ(refuses([](kda_args& a) { a.threads = -1; }), "kda threads: expected 0 to 1024, found -1");
  EXPECT_EQ(refuses([](kda_args& a) { a.k.data = static_cast<char*>(a.k.data) + 2; }),
            "kda k.data: expected an address aligned to 4 bytes, found one that is 2 past it");
  EXPECT_EQ(refuses([](kda_args& a) { a.k.shape[2] = 4; }),
            "kda k: expected shape [5, 2, 8], found [5, 2, 4]");
}

}  // namespace
}  // namespace kl
