// What a launch on the CPU (machine.h) is made of: blocks, warps, barriers, and whose turn it is. For the
// files of this folder.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <semaphore>
#include <string>
#include <vector>

#include "testing/cuda_on_cpu/machine.h"

namespace kl::cuda_on_cpu {

constexpr uint32_t kFirstAddress = 1024;  // of dynamic shared memory, as on the device

struct Random {
  uint64_t state;
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 20);
  }
  uint32_t below(size_t n) { return next() % static_cast<uint32_t>(n); }
  bool one_in(uint32_t n) { return next() % n == 0; }
};

extern Random random_numbers;

// The next lane of the warp that can go on; if there is none, its turn is over.
void leave_lane();
// Until the scheduler finds that it is over.
void wait_for(Wait wait);

// An mbarrier: a word of shared memory, as on the device.
struct Barrier {
  bool phase;
  uint32_t pending, arrivals;
  int32_t bytes;  // expected and not yet there

  static constexpr uint64_t kMark = 0xb42;
  static Barrier at(const char* p) {
    uint64_t x;
    std::memcpy(&x, p, sizeof x);
    if (x >> 52 != kMark) fail("a word of shared memory is taken for an mbarrier and is none");
    return {(x >> 51 & 1) != 0, static_cast<uint32_t>(x >> 38 & 0x1fff),
            static_cast<uint32_t>(x >> 25 & 0x1fff), static_cast<int32_t>(x & 0x1ffffff) - (1 << 24)};
  }
  void put(char* p) const {
    const uint64_t x = kMark << 52 | static_cast<uint64_t>(phase) << 51 |
                       static_cast<uint64_t>(pending) << 38 | static_cast<uint64_t>(arrivals) << 25 |
                       static_cast<uint32_t>(bytes + (1 << 24));
    std::memcpy(p, &x, sizeof x);
  }
  void end_phase_if_complete() {
    if (pending == 0 && bytes == 0) phase = !phase, pending = arrivals;
  }
};

// ---- What a block is made of ----

// An instruction of a warp's quarter of a warpgroup.
struct Wgmma {
  float* d[32];
  uint32_t a[32][4];
  uint64_t b;
  int n, group;
  bool transposed_b;
};
// What the lanes' accumulators were before instructions that are under way; until those take place they are
// NaN.
struct Accumulators {
  float* d[32];
  int count;  // of a lane
  std::vector<float> before;
};

struct Warp {
  Lane* lanes;
  uint32_t all = 0, done = 0;
  uint32_t ready = 0;       // may go on in this turn of the warp
  uint32_t next = 0;        // may go on in its next turn
  uint32_t polling = 0;     // wait for something that the scheduler looks at
  uint64_t held_until = 0;  // Run::progress; or when nobody else can go on
  Meeting meetings[4];
  std::vector<Wgmma> products;
  std::vector<Accumulators> accumulators;
  int product_group = 0, products_issued = 0;

  uint32_t live() const { return all & ~done; }
};

struct NamedBarrier {
  int arrived = 0, threads = 0;
  int generation = 0;
};
struct Cluster {
  int arrived = 0, threads = 0, generation = 0;
};

// Copies that land together, then count at a barrier.
struct Landing {
  std::vector<Copy> copies;
  char* barrier;
  uint32_t bytes;  // to count
  bool late;       // when nobody in the block can go on without it
};

struct Block {
  Launch* launch;
  Index3 index;
  unsigned number, slot;  // slot: which of the blocks that run at a time
  char* window;           // where shared address 0 would be
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  NamedBarrier barriers[16];
  std::vector<Landing> landings;
  Cluster* cluster = nullptr;
  char* stacks = nullptr;
  void* scheduler = nullptr;
  int live = 0;                   // threads
  size_t slow = 0;                // a warp
  uint64_t idle_at = UINT64_MAX;  // Run::progress when nothing could go on

  void start(unsigned n);
  void work();
  bool turn();
  void finish();
  void land(size_t i);
  std::string report() const;
};

// A launch under way.
struct Run {
  Launch& launch;
  std::vector<std::unique_ptr<Block>> blocks;  // by slot
  std::vector<std::unique_ptr<std::binary_semaphore>> turns;
  std::vector<bool> live;
  std::vector<Cluster> clusters;  // by slot / size of a cluster
  std::binary_semaphore over{0};
  uint64_t progress = 0;
  int stalls = 0;  // since there was any
  std::string error;

  explicit Run(Launch& l) : launch(l) {}

  unsigned count() const { return launch.grid.x * launch.grid.y * launch.grid.z; }
  // To another block's thread, and back some time.
  void pass(unsigned from, bool in_order) {
    const size_t n = live.size();
    size_t to = in_order ? (from + 1) % n : random_numbers.below(n);
    while (!live[to]) to = (to + 1) % n;
    if (to == from) return;
    turns[to]->release();
    turns[from]->acquire();
  }
  void leave(unsigned from) {
    live[from] = false;
    for (size_t i = 1; i < live.size(); ++i)
      if (const size_t to = (from + i) % live.size(); live[to]) return turns[to]->release();
    over.release();
  }
  bool all_idle() const {
    for (size_t i = 0; i < live.size(); ++i)
      if (live[i] && blocks[i]->idle_at != progress) return false;
    return true;
  }
};
extern Run* run_now;

}  // namespace kl::cuda_on_cpu
