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
  explicit ThreadPool(int threads);  // >= 1
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // Calls body(i) once for every i in [0, tasks), in any order, on any thread; returns when all are done. The
  // first exception thrown by a body is rethrown here, after all other tasks have ended.
  void run(int64_t tasks, const std::function<void(int64_t)>& body);

 private:
  struct Shared;
  std::unique_ptr<Shared> shared_;
};

// Processors this process may run on.
int available_processors();

// body(begin, end) over [0, n) in pieces of `grain` (the last may be shorter). Pieces depend on n and grain
// only, never on the number of threads, so results that depend on the split do not depend on the machine. A
// null pool runs here.
void parallel_for(ThreadPool* pool, int64_t n, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body);

}  // namespace kl
