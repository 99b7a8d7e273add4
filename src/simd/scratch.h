// Memory that a CPU operator uses until it returns, as a whole and for each of its threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <functional>

#include "base/context.h"

namespace kl {

// From ctx.scratch where there is one, else from an arena of its own; given back at the end of the scope.
class Scratch {
 public:
  explicit Scratch(const Ctx& ctx) : arena_(ctx.scratch ? *ctx.scratch : own_), scope_(arena_) {}

  float* f32(int64_t n) { return arena_.alloc(DType::f32, {n}).ptr<float>(); }
  bf16* b16(int64_t n) { return arena_.alloc(DType::bf16, {n}).ptr<bf16>(); }
  int32_t* i32(int64_t n) { return arena_.alloc(DType::i32, {n}).ptr<int32_t>(); }

 private:
  Arena own_;
  Arena& arena_;
  ArenaScope scope_;
};

// body(item, memory) for every item in [0, items), in parallel; `memory` is `floats` f32 that no other body
// uses at the same time. What is in them is left over from other items.
inline void for_each_with_scratch(ThreadPool* pool, int64_t items, Scratch& scratch, int64_t floats,
                                  const std::function<void(int64_t, float*)>& body) {
  const int64_t workers = std::min<int64_t>(pool ? pool->threads() : 1, items);
  if (workers <= 0) return;
  floats = (floats + 15) / 16 * 16;  // no cache line belongs to two threads
  float* const memory = scratch.f32(workers * floats);
  std::atomic<int64_t> next{0};
  parallel_for(pool, workers, 1, [&](int64_t worker, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;)
      body(item, memory + worker * floats);
  });
}

}  // namespace kl
