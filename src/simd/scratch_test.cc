#include "simd/scratch.h"

#include <gtest/gtest.h>

#include <vector>

namespace kl {
namespace {

TEST(Scratch, GoesBackToTheArenaOfTheContext) {
  Arena arena;
  Ctx ctx{.scratch = &arena};
  float* first = nullptr;
  for (int call = 0; call < 2; ++call) {
    Scratch scratch(ctx);
    float* const p = scratch.f32(100);
    EXPECT_GE(arena.used(), 400u);
    EXPECT_TRUE(!first || p == first) << "the second call got other memory";
    first = p;
  }
  EXPECT_EQ(arena.used(), 0u);
}

TEST(Scratch, WorksWithoutAnArena) {
  Scratch scratch(Ctx{});
  scratch.i32(1000)[999] = 1;
  scratch.f32(1 << 20)[(1 << 20) - 1] = 1;
}

TEST(Scratch, EachItemRunsOnceWithMemoryOfItsOwn) {
  for (const int threads : {1, 3}) {
    ThreadPool pool(threads);
    Scratch scratch(Ctx{});
    std::vector<int> runs(500);
    std::atomic<int> disturbed{0};
    for_each_with_scratch(&pool, 500, scratch, 7, [&](int64_t item, float* memory) {
      for (int i = 0; i < 7; ++i) memory[i] = static_cast<float>(item);
      ++runs[item];
      for (int i = 0; i < 7; ++i) disturbed += memory[i] != static_cast<float>(item);
    });
    EXPECT_EQ(runs, std::vector<int>(500, 1));
    EXPECT_EQ(disturbed, 0);
  }
}

TEST(Scratch, NoItemsAndNoPool) {
  Scratch scratch(Ctx{});
  int runs = 0;
  for_each_with_scratch(nullptr, 0, scratch, 5, [&](int64_t, float*) { ++runs; });
  EXPECT_EQ(runs, 0);
  for_each_with_scratch(nullptr, 3, scratch, 0, [&](int64_t, float*) { ++runs; });
  EXPECT_EQ(runs, 3);
}

}  // namespace
}  // namespace kl
