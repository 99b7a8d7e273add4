#include "simd/probe.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "base/buffer.h"

namespace kl {

namespace {

constexpr int64_t kBytes = int64_t{512} << 20;  // more than any cache
constexpr int64_t kPiece = int64_t{1} << 20;
constexpr int64_t kRounds = 1 << 15;  // of one task: some 100 us
constexpr int kRuns = 7;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Work per second: the median of kRuns runs, each long enough that together they take `seconds`. `work` does
// a share of it and returns how much that was.
template <class Work>
double median_rate(double seconds, Work&& work) {
  std::vector<double> rates;
  for (int run = 0; run < kRuns; ++run) {
    double done = 0;
    const double start = now();
    do done += work();
    while (now() - start < seconds / kRuns);
    rates.push_back(done / (now() - start));
  }
  std::sort(rates.begin(), rates.end());
  return rates[kRuns / 2];
}

}  // namespace

Roofline measure_roofline(ThreadPool& pool, double seconds) {
  const Buffer memory = Buffer::host(kBytes);
  parallel_for(&pool, kBytes, kPiece, [&](int64_t begin, int64_t end) {
    std::memset(memory.data() + begin, 1, static_cast<size_t>(end - begin));  // pages of its own
  });
  std::atomic<uint64_t> sink{0};
  Roofline r;
  r.bytes_per_second = median_rate(seconds, [&]() -> double {
    parallel_for(&pool, kBytes, kPiece, [&](int64_t begin, int64_t end) {
      sink += KL_ACTIVE_ISA(probe_read)(memory.data() + begin, end - begin);
    });
    return kBytes;
  });
  std::vector<float> keep(static_cast<size_t>(pool.threads()));
  r.flops_per_second = median_rate(seconds, [&] {
    std::vector<double> flops(keep.size());
    pool.run(pool.threads(), [&](int64_t i) {
      const auto at = static_cast<size_t>(i);
      flops[at] = active_isa() == Isa::amx ? KL_ACTIVE_ISA(probe_tile_flops)(kRounds / 8, &keep[at])
                                           : KL_ACTIVE_ISA(probe_flops)(kRounds, &keep[at]);
    });
    double all = 0;
    for (const double f : flops) all += f;
    return all;
  });
  return r;
}

}  // namespace kl
