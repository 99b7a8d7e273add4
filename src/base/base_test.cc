// The ground floor: tensors, element types, arenas, the thread pool.
#include <gtest/gtest.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "base/context.h"
#include "testing/random.h"

namespace kl {
namespace {

TEST(Check, MessageJoinsItsParts) {
  try {
    KL_CHECK(1 == 2, "expected ", 2, " heads, found ", 0.5f, ' ', true);
    FAIL() << "KL_CHECK let a false condition pass";
  } catch (const Error& e) {
    EXPECT_STREQ(e.what(), "expected 2 heads, found 0.5 true");
  }
}

TEST(DType, Bf16RoundsToNearestEven) {
  EXPECT_EQ(bf16(1.0f).bits, 0x3f80);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808000u)).bits, 0x3f80);  // a tie goes to the even neighbour
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f818000u)).bits, 0x3f82);
  EXPECT_EQ(bf16(std::bit_cast<float>(0x3f808001u)).bits, 0x3f81);
  EXPECT_TRUE(std::isnan(static_cast<float>(bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isinf(static_cast<float>(bf16(std::numeric_limits<float>::max()))));
}

TEST(DType, F16RoundTripsEveryPattern) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    f16 h;
    h.bits = static_cast<uint16_t>(bits);
    const float value = h;
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(static_cast<float>(f16(value))));
    } else {
      ASSERT_EQ(f16(value).bits, bits);
    }
  }
  EXPECT_EQ(f16(65504.f).bits, 0x7bff);
  EXPECT_EQ(f16(65520.f).bits, 0x7c00);   // halfway to 2^16 rounds to infinity
  EXPECT_EQ(f16(0x1p-25f).bits, 0x0000);  // half the smallest subnormal: tie to even
  EXPECT_EQ(f16(0x1.8p-25f).bits, 0x0001);
}

TEST(Tensor, SlicesAndViewsKeepStrides) {
  std::vector<float> data(24);
  for (int i = 0; i < 24; ++i) data[i] = static_cast<float>(i);
  const Tensor t(data.data(), DType::f32, {2, 3, 4});
  EXPECT_EQ(*t.at<float>(1, 2, 3), 23.f);
  EXPECT_EQ(*t[1].at<float>(0, 1), 13.f);
  const Tensor columns = t.view({6, 4}).slice(1, 1, 3);
  EXPECT_EQ(columns.shape_string(), "[6, 2]");
  EXPECT_FALSE(columns.is_contiguous());
  EXPECT_EQ(*columns.at<float>(5, 0), 21.f);
  EXPECT_EQ(t.view({-1, 12}).size(0), 2);
  EXPECT_THROW(columns.view({12}), Error);
  EXPECT_THROW(t.view({5, 5}), Error);
  EXPECT_THROW(t.slice(1, 2, 4), Error);
  EXPECT_THROW(t.ptr<bf16>(), Error);
}

TEST(Arena, SameCallsGetTheSameAddresses) {
  Arena arena;
  std::vector<void*> first, second;
  for (int pass = 0; pass < 3; ++pass) {
    arena.reset();
    std::vector<void*>& seen = pass == 1 ? first : second;
    seen.clear();
    for (int i = 0; i < 40; ++i) seen.push_back(arena.alloc(DType::f32, {1000, i + 1}).data);
  }
  EXPECT_EQ(first, second);
  EXPECT_GE(arena.peak(), arena.used());
  for (void* p : first) EXPECT_EQ(reinterpret_cast<uintptr_t>(p) % 64, 0u);
}

TEST(Arena, ScopeGivesMemoryBack) {
  Arena arena;
  arena.alloc(DType::u8, {100});
  void* inside = nullptr;
  {
    const ArenaScope scope(arena);
    inside = arena.alloc(DType::f32, {1 << 20}).data;
  }
  EXPECT_EQ(arena.alloc(DType::f32, {1 << 20}).data, inside);
  EXPECT_THROW(arena.alloc(DType::f32, {int64_t{1} << 40, int64_t{1} << 40}), Error);
}

TEST(ThreadPool, EveryTaskRunsOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (const int64_t tasks : {0, 1, 2, 7, 1000}) {
      std::vector<std::atomic<int>> runs(static_cast<size_t>(tasks));
      pool.run(tasks, [&](int64_t i) { runs[static_cast<size_t>(i)].fetch_add(1); });
      for (const auto& r : runs) ASSERT_EQ(r.load(), 1);
    }
  }
}

TEST(ThreadPool, RethrowsAndStaysUsable) {
  ThreadPool pool(3);
  EXPECT_THROW(pool.run(100, [](int64_t i) { KL_CHECK(i != 50, "task ", i); }), Error);
  std::atomic<int64_t> sum{0};
  parallel_for(&pool, 1000, 7, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum += i;
  });
  EXPECT_EQ(sum.load(), 999 * 1000 / 2);
}

std::vector<int> processors_of_this_thread() {
  cpu_set_t set;
  KL_CHECK(sched_getaffinity(0, sizeof set, &set) == 0, "sched_getaffinity");
  std::vector<int> processors;
  for (int i = 0; i < CPU_SETSIZE; ++i) {
    if (CPU_ISSET(i, &set)) processors.push_back(i);
  }
  return processors;
}

TEST(ThreadPool, PinnedThreadsHaveAProcessorEach) {
  const std::vector<int> all = processors_of_this_thread();
  const int threads = std::min<int>(4, static_cast<int>(all.size()));
  ThreadPool pool(threads, true);
  std::vector<std::vector<int>> found(static_cast<size_t>(threads));
  {
    const PinnedCaller pinned(pool);
    // Every task waits for the others, so that each runs on a thread of its own.
    std::atomic<int> arrived{0};
    pool.run(threads, [&](int64_t i) {
      found[static_cast<size_t>(i)] = processors_of_this_thread();
      arrived.fetch_add(1);
      while (arrived.load() < threads) std::this_thread::yield();
    });
    EXPECT_EQ(processors_of_this_thread(), std::vector<int>{all[0]});
  }
  std::sort(found.begin(), found.end());
  for (size_t i = 0; i < found.size(); ++i) EXPECT_EQ(found[i], std::vector<int>{all[i]});
  EXPECT_EQ(processors_of_this_thread(), all);  // the caller is free again

  ThreadPool free(threads);
  const PinnedCaller nothing(free);
  EXPECT_EQ(processors_of_this_thread(), all);
}

TEST(ThreadPool, MoreThreadsThanProcessorsAreNotPinned) {
  // In a thread of its own, whose single processor is nobody else's business.
  std::thread([] {
    const std::vector<int> all = processors_of_this_thread();
    cpu_set_t last;
    CPU_ZERO(&last);
    CPU_SET(all.back(), &last);
    ASSERT_EQ(sched_setaffinity(0, sizeof last, &last), 0);
    try {
      ThreadPool pool(2, true);
      ADD_FAILURE() << "two threads were pinned to one processor";
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(),
                   "pinning threads: expected a processor for each of 2 threads, found 1 that this process "
                   "may run on");
    }
    const ThreadPool one(1, true);
    const PinnedCaller pinned(one);
    EXPECT_EQ(processors_of_this_thread(), std::vector<int>{all.back()});
  }).join();
}

}  // namespace
}  // namespace kl
