// The machine that CUDA kernels run on inside tests: an sm_90 of a few multiprocessors, on the CPU. The
// threads of a block are fibers of one thread of the system, whose thread-local variables are the block's
// shared memory; of all blocks one runs at a time. Warps run in an order drawn from a seed, copies land late,
// and a launch in which nothing can go on ends with an error that says who waits for what.
//
// Instructions stand behind the names of cuda/ptx.cuh and CUDA's own, in this folder's cuda/ptx.cuh and
// cuda_runtime.h, which a test program finds before the real ones. Here is what they are made of.
//
// Not shown: time, alignment, registers, and races that no order of the warps brings to light (ordinary
// accesses are seen at once by everybody, with or without fences).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kl::cuda_on_cpu {

struct Block;
struct Warp;

struct Index3 {
  unsigned x = 0, y = 0, z = 0;
};

// What a lane waits for before it goes on.
enum class Wait : int {
  none,
  meeting,   // the other lanes of its warp
  mbarrier,  // that the phase of parity `value` ends
  word,      // that *word is not `value`
  poll       // the same, but it looks again when nobody else can go on
};

// A copy out of or into shared memory that has been asked for.
struct Copy {
  char* to;
  const char* from;
  uint32_t bytes, zeros;  // zeros behind the bytes
  int group;
};

// A thread of a kernel.
struct Lane {
  Index3 thread;
  Block* block;
  Warp* warp;
  int lane;  // of the warp
  void* stack_pointer;
  Wait wait = Wait::none;
  const int* word = nullptr;
  uint64_t* barrier = nullptr;
  int value = 0;
  const int* last_word = nullptr;  // what load_acquire() has found last
  int last_value = 0;
  int cluster_generation = 0;
  int store_group = 0;
  std::vector<Copy> stores;
};

// The thread that is running.
extern thread_local Lane* current;

Index3 block_index();
Index3 block_size();
Index3 grid_size();

// ---- What lanes do together ----

// Lanes of a warp that come to the same operation; each brings what it has and where it wants the result.
struct Meeting {
  uint32_t mask = 0, arrived = 0;
  const char* operation = nullptr;
  void* brought[32];
};
// Waits until all lanes of `mask` are here; the last one performs the operation for all.
void meet(uint32_t mask, const char* operation, void* brought, void (*perform)(Meeting&));
// perform: a lambda without captures.
template <class T, class F>
void meet_with(uint32_t mask, const char* operation, T& brought, F) {
  meet(mask, operation, &brought, [](Meeting& m) { F{}(m); });
}

// All threads of a block, or some of its warps. It is an error if others are asked for than those who wait.
void block_barrier(int id, int threads);

// ---- Waiting ----

int load_word(const int* p);  // of global memory; a lane that reads it again and again lets others go on
void sleep();
void cluster_arrive();
void cluster_wait();

// ---- Shared memory ----

char* shared_memory(uint32_t address);
char* shared_memory(uint32_t address, uint32_t rank);  // of a block of the cluster
uint32_t shared_address(const void* p);

void mbarrier_init(uint32_t address, uint32_t arrivals);
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes = 0);
void mbarrier_complete(char* barrier, uint32_t bytes);
bool mbarrier_try_wait(uint32_t address, uint32_t parity);

// ---- The copy engine ----

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier);
void box_load(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier);
void bulk_store(void* to, uint32_t from, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending);

// ---- Matrix instructions of a warpgroup, which take place when they are waited for ----

void wgmma(float* d, int n, const uint32_t (&a)[4], uint64_t b, bool transposed_b);
void wgmma_commit();
void wgmma_wait(int pending);

// ---- Launches ----

struct Launch {
  Index3 grid, block;
  size_t shared_bytes = 0;
  unsigned cluster = 1;
  virtual void thread() = 0;  // what one thread does

 protected:
  ~Launch() = default;
};
// Runs all blocks; throws kl::Error if they cannot come to an end, or have done what they must not.
void run(Launch& launch);

// What has been written outside of device memory, if anything.
std::string device_memory_damage();

// Ends the launch.
[[noreturn]] void fail(const std::string& why);

// Dynamic shared memory of the running block under a kernel's own name for it.
struct DynamicMemory {
  explicit DynamicMemory(char* (*of_this_thread)());
};

}  // namespace kl::cuda_on_cpu

namespace kl::testing {

// Orders of warps and copies from here on are drawn from it.
void cuda_on_cpu_seed(uint64_t seed);
// Of the device that the host sees.
void cuda_on_cpu_multiprocessors(int count);
int cuda_on_cpu_multiprocessors();

}  // namespace kl::testing
