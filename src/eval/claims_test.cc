// Every claim holds on this machine, and the table can say that one does not.
#include "eval/claims.h"

#include <gtest/gtest.h>

#include <cmath>

#include "model/state.h"

namespace kl {
namespace {

void expect_all_hold(const std::vector<Claim>& claims, size_t rows) {
  EXPECT_EQ(claims.size(), rows);
  for (const Claim& c : claims)
    EXPECT_TRUE(c.pass()) << c.id << " " << c.what << ": measured " << c.measured << ", required at "
                          << (c.bound == ClaimBound::at_most ? "most " : "least ") << c.required;
}

class Claims : public ::testing::Test {
 protected:
  ThreadPool pool_{2};
};

TEST_F(Claims, ChunkForm) { expect_all_hold(chunk_form_claims(&pool_), 5); }
TEST_F(Claims, Overwrite) { expect_all_hold(overwrite_claims(&pool_), 3); }
TEST_F(Claims, Reductions) { expect_all_hold(reduction_claims(&pool_), 24); }
TEST_F(Claims, LongRun) { expect_all_hold(long_run_claims(&pool_), 3); }

TEST(CacheClaims, Hold) { expect_all_hold(cache_claims(kimi_linear_48b_attention()), 4); }

// Bytes of Kimi-Linear-48B by hand: 2 MiB of f32 states a KDA layer, 576 bf16 a token and MLA layer.
TEST(CacheClaims, CountTheModelsBytes) {
  const Config c = kimi_linear_48b_attention();
  EXPECT_EQ(c.kda_layer_count(), 20);
  EXPECT_EQ(c.mla_layer_count(), 7);
  const StateBytes b = state_bytes(c, 131072, {.latent_dtype = DType::bf16});
  EXPECT_EQ(b.kda, int64_t{20} * 32 * 128 * 128 * 4);
  EXPECT_EQ(b.latent, int64_t{7} * 131072 * 576 * 2);
  EXPECT_NEAR(cache_claims(c)[3].measured, 1820.4, 0.1);
}

TEST(CacheClaims, AModelWithFewerKdaLayersMisses) {
  Config c = kimi_linear_48b_attention();
  for (int layer = 0; layer < 10; ++layer) c.kda_[static_cast<size_t>(layer)] = false;
  EXPECT_FALSE(cache_claims(c)[0].pass());
}

TEST(Claim, PassesOrMisses) {
  Claim c{.measured = 2, .bound = ClaimBound::at_most, .required = 2};
  EXPECT_TRUE(c.pass());
  c.measured = 2.1;
  EXPECT_FALSE(c.pass());
  c.bound = ClaimBound::at_least;
  EXPECT_TRUE(c.pass());
  c.measured = std::nan("");
  EXPECT_FALSE(c.pass());
  c.bound = ClaimBound::at_most;
  EXPECT_FALSE(c.pass());
}

}  // namespace
}  // namespace kl
