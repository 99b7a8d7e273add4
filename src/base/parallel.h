// One pool of threads for all CPU operators.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace kl {

// Runs loops on a fixed number of threads, the caller being one of them. Workers spin for a few microseconds
// between loops and then sleep, so that an idle program uses no processor. One loop at a time; loops do not
// nest.
class ThreadPool {
 public:
  // `pin`: thread i stays on the i-th processor that the constructing thread may run on; throws kl::Error if
  // there are fewer of them than threads. The caller, thread 0, is pinned by PinnedCaller.
  explicit ThreadPool(int threads, bool pin = false);  // threads >= 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls body(i) once for every i in [0, tasks), in any order, on any thread; returns when all are done. The
  // first exception thrown by a body is rethrown here, after all other tasks have ended.
  void run(int64_t tasks, const std::function<void(int64_t)>& body);

 private:
  friend class PinnedCaller;
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

// Keeps the calling thread on the first processor of a pinned pool while it lives; nothing for other pools.
// For a span of many loops, such as a forward pass: a system call before and after every loop would cost a
// small model more than pinning gives. The thread may go where it could before when this ends.
class PinnedCaller {
 public:
  explicit PinnedCaller(const ThreadPool& pool);
  ~PinnedCaller();
  PinnedCaller(const PinnedCaller&) = delete;
  PinnedCaller& operator=(const PinnedCaller&) = delete;

 private:
  struct Before;
  std::unique_ptr<Before> before_;  // null: nothing was changed
};

// Processors this process may run on.
int available_processors();

// body(begin, end) over [0, n) in pieces of `grain` (the last may be shorter). Pieces depend on n and grain
// only, never on the number of threads, so results that depend on the split do not depend on the machine. A
// null pool runs here.
void parallel_for(ThreadPool* pool, int64_t n, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace kl
