#include "base/parallel.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstring>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

#include "base/check.h"

namespace kl {

namespace {
constexpr int kSpins = 2000;  // about 50 us of pause instructions before a worker goes to sleep

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Where the calling thread may run.
cpu_set_t allowed_processors() {
  cpu_set_t set;
  const int error = pthread_getaffinity_np(pthread_self(), sizeof set, &set);
  KL_CHECK(error == 0, "pinning threads: cannot ask for this process's processors: ", std::strerror(error));
  return set;
}

void pin_thread(pthread_t thread, int processor) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(processor, &set);
  const int error = pthread_setaffinity_np(thread, sizeof set, &set);
  KL_CHECK(error == 0, "pinning threads: cannot use processor ", processor, ": ", std::strerror(error));
}
}  // namespace

struct ThreadPool::Shared {
  std::vector<std::thread> workers;
  std::vector<int> processors;  // of thread i; empty: not pinned
  std::mutex run_mutex;         // one loop at a time

  // A loop is published under `mutex` by raising `epoch` and opening it. Workers that wake in time join it,
  // also under `mutex`, take indices from `next` and count themselves out through `active`. The caller closes
  // the loop when no index is left and waits for those who joined: a worker that slept through a short loop
  // delays nobody.
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> epoch{0};
  bool open = false;
  bool stop = false;

  const std::function<void(int64_t)>* body = nullptr;
  int64_t tasks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> active{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  ~Shared() {
    {
      const std::lock_guard lock(mutex);
      stop = true;
      epoch.fetch_add(1);
    }
    wake.notify_all();
    for (std::thread& t : workers) t.join();
  }

  void choose_processors(size_t threads) {
    const cpu_set_t allowed = allowed_processors();
    for (int i = 0; i < CPU_SETSIZE && processors.size() < threads; ++i) {
      if (CPU_ISSET(i, &allowed)) processors.push_back(i);
    }
    KL_CHECK(processors.size() == threads, "pinning threads: expected a processor for each of ", threads,
             " threads, found ", processors.size(), " that this process may run on");
  }

  void work() {
    for (;;) {
      const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
      if (i >= tasks) return;
      try {
        (*body)(i);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
    }
  }

  void worker() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < kSpins && epoch.load(std::memory_order_acquire) == seen; ++spin) pause();
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return stop || epoch.load(std::memory_order_relaxed) != seen; });
        if (stop) return;
        seen = epoch.load(std::memory_order_relaxed);
        if (!open) continue;
        active.fetch_add(1, std::memory_order_relaxed);
      }
      work();
      active.fetch_sub(1, std::memory_order_release);  // makes this worker's results visible to the caller
    }
  }
};

ThreadPool::ThreadPool(int threads, bool pin) : shared_(std::make_unique<Shared>()) {
  KL_CHECK(threads >= 1 && threads <= 4096, "number of threads: expected 1 to 4096, found ", threads);
  if (pin) shared_->choose_processors(static_cast<size_t>(threads));
  for (int i = 1; i < threads; ++i) {
    shared_->workers.emplace_back([s = shared_.get()] { s->worker(); });
    if (pin) pin_thread(shared_->workers.back().native_handle(), shared_->processors[static_cast<size_t>(i)]);
  }
}

ThreadPool::~ThreadPool() = default;

int ThreadPool::threads() const { return static_cast<int>(shared_->workers.size()) + 1; }

void ThreadPool::run(int64_t tasks, const std::function<void(int64_t)>& body) {
  Shared& s = *shared_;
  if (tasks <= 1 || s.workers.empty()) {
    for (int64_t i = 0; i < tasks; ++i) body(i);
    return;
  }
  const std::lock_guard one_loop(s.run_mutex);
  {
    const std::lock_guard lock(s.mutex);
    s.body = &body;
    s.tasks = tasks;
    s.next.store(0, std::memory_order_relaxed);
    s.error = nullptr;
    s.open = true;
    s.epoch.fetch_add(1, std::memory_order_release);
  }
  s.wake.notify_all();
  s.work();
  {
    const std::lock_guard lock(s.mutex);
    s.open = false;
  }
  for (int spin = 0; s.active.load(std::memory_order_acquire) != 0; ++spin) {
    if (spin < kSpins)
      pause();
    else
      std::this_thread::yield();
  }
  if (s.error) std::rethrow_exception(s.error);
}

struct PinnedCaller::Before {
  cpu_set_t allowed;
};

PinnedCaller::PinnedCaller(const ThreadPool& pool) {
  if (pool.shared_->processors.empty()) return;
  before_ = std::make_unique<Before>(Before{allowed_processors()});
  pin_thread(pthread_self(), pool.shared_->processors[0]);
}

PinnedCaller::~PinnedCaller() {
  if (before_) pthread_setaffinity_np(pthread_self(), sizeof before_->allowed, &before_->allowed);
}

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

void parallel_for(ThreadPool* pool, int64_t n, int64_t grain,
                  const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t pieces = (n + grain - 1) / grain;
  const auto piece = [&](int64_t i) { body(i * grain, std::min(n, (i + 1) * grain)); };
  if (pool) {
    pool->run(pieces, piece);
  } else {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
  }
}

}  // namespace kl
