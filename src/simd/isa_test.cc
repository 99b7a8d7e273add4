#include "simd/isa.h"

#include <gtest/gtest.h>

#include "base/check.h"

namespace kl {
namespace {

TEST(Isa, TheBestIsSupportedAndIncludesTheOnesBeforeIt) {
  EXPECT_TRUE(isa_supported(best_isa()));
  for (const Isa isa : kIsas) EXPECT_EQ(isa_supported(isa), isa <= best_isa());
  EXPECT_EQ(active_isa(), best_isa());
}

TEST(Isa, ForcingASupportedOneMakesItActive) {
  force_isa(Isa::generic);
  EXPECT_EQ(active_isa(), Isa::generic);
  force_isa(best_isa());
  EXPECT_EQ(active_isa(), best_isa());
}

TEST(Isa, ForcingAnUnsupportedOneNamesBoth) {
  if (best_isa() == Isa::amx) GTEST_SKIP() << "this machine has all of them";
  try {
    force_isa(Isa::amx);
    FAIL() << "an unsupported instruction set was accepted";
  } catch (const Error& e) {
    EXPECT_EQ(std::string(e.what()),
              cat("instruction set amx is not supported here, the best is ", name_of(best_isa())));
  }
}

}  // namespace
}  // namespace kl
