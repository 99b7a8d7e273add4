// What mla_append writes, and what the doors of MLA refuse.
#include <gtest/gtest.h>

#include <cstring>

#include "ops/mla/mla_test.h"

namespace kl {
namespace {

using testing::MlaBatch;

class AppendTest : public ::testing::TestWithParam<DType> {};

TEST_P(AppendTest, WritesItsRowsAndNothingElse) {
  constexpr int64_t kPages = 7, kPageSize = 4, kWidth = 5;
  testing::Random random(1);
  OwnedTensor rows = testing::random_normal(GetParam(), {kPages, kPageSize, kWidth}, random);
  OwnedTensor expected = make_tensor(GetParam(), {kPages, kPageSize, kWidth});
  std::memcpy(expected.tensor.data, rows.tensor.data, static_cast<size_t>(rows.tensor.bytes()));
  int32_t pages[3][3] = {{5, 0, 3}, {-1, -1, -1}, {6, 2, -1}}, context[3] = {3, 8, 0}, cu[4] = {0, 6, 6, 8};
  OwnedTensor wide = testing::random_normal(DType::f32, {8, kWidth + 2}, random);
  const Tensor latent = wide.tensor.slice(1, 1, kWidth + 1);

  // Sequence 0: positions 3 ... 8, sequence 2: positions 0, 1.
  const int64_t places[8][2] = {{5, 3}, {0, 0}, {0, 1}, {0, 2}, {0, 3}, {3, 0}, {6, 0}, {6, 1}};
  for (int64_t t = 0; t < 8; ++t)
    testing::fill(expected.tensor[places[t][0]][places[t][1]],
                  [&](int64_t i) { return latent.at<float>(t)[i]; });

  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    Ctx ctx{.pool = &pool};
    mla_append(ctx, {.latent = latent,
                     .cu_seqlens = Tensor(cu, DType::i32, {4}),
                     .cache = {.rows = rows.tensor,
                               .page_table = Tensor(pages, DType::i32, {3, 3}),
                               .context = Tensor(context, DType::i32, {3})}});
    EXPECT_TRUE(testing::same_bits(rows.tensor, expected.tensor));
  }
}

INSTANTIATE_TEST_SUITE_P(All, AppendTest, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& info) { return std::string(name_of(info.param)); });

std::string error_of(const MlaArgs& a, bool decode = false) {
  try {
    Ctx ctx;
    decode ? mla_decode(ctx, a) : mla_prefill(ctx, a);
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}

TEST(MlaDoor, ErrorsOfShapes) {
  MlaBatch batch({}, {{20, 5}, {0, 2}});  // A 3, Nk 24, P 8, R 40, V 20
  MlaArgs a = batch.args();
  a.out = a.out.slice(0, 0, 6);
  EXPECT_EQ(error_of(a), "mla_prefill: out: expected shape [7, 3, any], found [6, 3, 20]");
  a = batch.args();
  a.kv_b_proj = a.kv_b_proj.slice(0, 0, 131);
  EXPECT_EQ(error_of(a, true),
            "mla_decode: kv_b_proj: expected 3 heads of 20 value rows and up to 32 key rows, found 131 rows");
  a = batch.args();
  a.q = a.q.slice(2, 0, 31);
  EXPECT_EQ(error_of(a), "mla_prefill: cache.rows: expected shape [any, any, 47], found [6, 16, 48]");
  a = batch.args();
  a.cache.context = a.cache.context.slice(0, 0, 1);
  EXPECT_EQ(error_of(a), "mla_prefill: cache.context: expected shape [2], found [1]");
  a = batch.args();
  a.cache.rows.dtype = DType::f16;
  EXPECT_EQ(error_of(a), "mla_prefill: cache.rows: expected F32 or BF16, found F16");
}

TEST(MlaDoor, ErrorsOfSequences) {
  MlaBatch batch({}, {{20, 5}, {0, 2}});
  const MlaArgs a = batch.args();
  int32_t* const cu = a.cu_seqlens.ptr<int32_t>();
  cu[2] = 8;
  EXPECT_EQ(error_of(a), "mla_prefill: cu_seqlens: expected to run from 0 to 7, found 0 to 8");
  cu[2] = 7, cu[1] = 9;
  EXPECT_EQ(error_of(a), "mla_prefill: cu_seqlens: expected ascending numbers, found 9 before 7");
  cu[1] = 5;
  int32_t* const context = a.cache.context.ptr<int32_t>();
  context[0] = -3;
  EXPECT_EQ(error_of(a), "mla_prefill: context[0]: expected at least 0, found -3");
  context[0] = 60;
  EXPECT_EQ(error_of(a),
            "mla_prefill: sequence 0: 65 rows need 5 pages of 16, but the page table has room for 3");
  context[0] = 28;
  EXPECT_EQ(error_of(a, true), "mla_decode: page_table[0, 2]: expected 0 to 5, found -1");
  context[0] = 20;
  *a.cache.page_table.at<int32_t>(1, 0) = 6;
  EXPECT_EQ(error_of(a), "mla_prefill: page_table[1, 0]: expected 0 to 5, found 6");
  const OwnedTensor latent = make_tensor(DType::f32, {7, 48});
  Ctx ctx;
  EXPECT_THROW(mla_append(ctx, {.latent = latent.tensor, .cu_seqlens = a.cu_seqlens, .cache = a.cache}),
               Error);
}

}  // namespace
}  // namespace kl
