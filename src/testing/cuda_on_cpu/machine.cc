// Whose turn it is: threads, meetings, barriers, waiting, blocks (machine.h).
#include <signal.h>
#include <sys/mman.h>

#include <bit>
#include <exception>
#include <thread>

#include "base/check.h"
#include "testing/cuda_on_cpu/fiber.h"
#include "testing/cuda_on_cpu/machine_state.h"

namespace kl::cuda {
// Dynamic shared memory of kernels in headers (cuda/prefill_sm90.cuh). What a device of 9.0 lets a block
// have.
alignas(1024) thread_local char memory[232448];
}  // namespace kl::cuda

namespace kl::cuda_on_cpu {

thread_local Lane* current = nullptr;
Random random_numbers{0x9e3779b97f4a7c15};
Run* run_now = nullptr;

namespace {

constexpr size_t kGuardBytes = 4096;  // behind shared memory, that stay as they are
constexpr int kPoison = 0xff, kGuard = 0xa5;
constexpr uint64_t kStackEnd = 0x5eed5eed5eed5eed;

std::vector<char* (*)()>& dynamic_memories() {
  static std::vector<char* (*)()> all{[] { return ::kl::cuda::memory; }};
  return all;
}

struct Failure {};  // of the launch, on the stack of a scheduler

void to_scheduler() {
  Lane* self = current;
  switch_fiber(&self->stack_pointer, self->block->scheduler);
}

}  // namespace

void leave_lane() {
  Lane* self = current;
  Warp& w = *self->warp;
  if (w.ready == 0) return to_scheduler();
  const int from = (self->lane + 1) & 31;
  const int lane = (std::countr_zero(std::rotr(w.ready, from)) + from) & 31;
  w.ready &= ~(1u << lane);
  Lane& to = w.lanes[lane];
  if (&to == self) return;
  current = &to;
  switch_fiber(&self->stack_pointer, to.stack_pointer);
}

void wait_for(Wait wait) {
  Lane& self = *current;
  self.wait = wait;
  self.warp->polling |= 1u << self.lane;
  leave_lane();
}

namespace {

bool is_over(const Lane& lane) {
  if (lane.wait == Wait::mbarrier)
    return Barrier::at(reinterpret_cast<const char*>(lane.barrier)).phase != (lane.value != 0);
  return lane.word != nullptr && *lane.word != lane.value;
}

std::string where(const Block& b) { return cat("block ", b.index.x, ", ", b.index.y, ", ", b.index.z); }

void lane_ends(Warp& w);

void lane_main() {
  Lane* self = current;
  self->block->launch->thread();
  if (*reinterpret_cast<uint64_t*>(self->block->stacks +
                                   kStackBytes * static_cast<size_t>(self - self->block->lanes.data())) !=
      kStackEnd)
    fail("a thread's stack was too small");
  bulk_commit(), bulk_wait(0);
  self->wait = Wait::none;
  self->warp->done |= 1u << self->lane;
  --self->block->live;
  lane_ends(*self->warp);
  leave_lane();
  std::terminate();  // nobody goes on with it
}

}  // namespace

// ---- Failing ----

void fail(const std::string& why) {
  if (run_now->error.empty()) {
    run_now->error = why;
    if (current != nullptr)
      run_now->error +=
          cat(" (", where(*current->block), ", thread ", current - current->block->lanes.data(), ")");
  }
  if (current == nullptr) throw Failure{};
  to_scheduler();
  std::terminate();
}

std::string Block::report() const {
  std::string s;
  for (size_t i = 0; i < warps.size(); ++i) {
    const Warp& w = warps[i];
    std::string waits;
    uint32_t left = w.live();
    while (left != 0) {
      const Lane& first = w.lanes[std::countr_zero(left)];
      uint32_t same = 0;
      for (int l = 0; l < 32; ++l) {
        const Lane& lane = w.lanes[l];
        if ((left >> l & 1) && lane.wait == first.wait && lane.word == first.word &&
            lane.barrier == first.barrier)
          same |= 1u << l;
      }
      left &= ~same;
      std::string what;
      switch (first.wait) {
        case Wait::none: what = "nothing"; break;
        case Wait::meeting:
          what = "other lanes";
          for (const Meeting& m : w.meetings)
            if (m.arrived & same) what = cat("other lanes at ", m.operation);
          break;
        case Wait::mbarrier: {
          const Barrier b = Barrier::at(reinterpret_cast<const char*>(first.barrier));
          what =
              cat("the mbarrier at ", reinterpret_cast<const char*>(first.barrier) - window - kFirstAddress,
                  " (", b.pending, " of ", b.arrivals, " arrivals and ", b.bytes, " bytes to come)");
          break;
        }
        case Wait::word: what = "a barrier"; break;
        case Wait::poll: what = cat("a word in memory, which is ", first.value); break;
      }
      waits += cat(waits.empty() ? "" : "; ", std::popcount(same), " lanes for ", what);
    }
    if (!waits.empty()) s += cat("\n  ", where(*this), ", warp ", i, ": ", waits);
  }
  return s;
}

Index3 block_index() { return current->block->index; }
Index3 block_size() { return current->block->launch->block; }
Index3 grid_size() { return current->block->launch->grid; }

// ---- Meetings ----

namespace {

void release_meeting(Warp& w, Meeting& m, void (*perform)(Meeting&)) {
  if (perform != nullptr) perform(m);
  const uint32_t here = m.arrived;
  m.arrived = 0, m.mask = 0, m.operation = nullptr;
  for (int l = 0; l < 32; ++l)
    if (here >> l & 1) w.lanes[l].wait = Wait::none;
  // Now and then another warp comes in between.
  (random_numbers.one_in(8) ? w.next : w.ready) |= here;
}

// Those who are left may be all that a __syncwarp() or a block's barrier waits for.
void lane_ends(Warp& w) {
  for (Meeting& m : w.meetings)
    if (m.arrived != 0 && m.arrived == (m.mask & w.live())) {
      if (m.operation != std::string_view("__syncwarp"))
        fail(cat("a thread ended that others wait for at ", m.operation));
      release_meeting(w, m, nullptr);
    }
  Block& b = *current->block;
  NamedBarrier& all = b.barriers[0];
  if (all.arrived > 0 && all.arrived >= b.live) all.arrived = 0, ++all.generation;
}

}  // namespace

void meet(uint32_t mask, const char* operation, void* brought, void (*perform)(Meeting&)) {
  Lane& self = *current;
  Warp& w = *self.warp;
  if (!(mask >> self.lane & 1)) fail(cat("a thread is not in its own mask at ", operation));
  Meeting* at = nullptr;
  for (Meeting& m : w.meetings)
    if (m.arrived != 0 && m.mask == mask) at = &m;
  if (at == nullptr)
    for (Meeting& m : w.meetings)
      if (m.arrived == 0) at = &m;
  if (at == nullptr) fail("a warp's lanes have come apart to more than four places");
  if (at->arrived == 0)
    at->mask = mask, at->operation = operation;
  else if (at->operation != operation && std::strcmp(at->operation, operation) != 0)
    fail(cat("lanes of a warp meet at ", operation, " and at ", at->operation));
  at->arrived |= 1u << self.lane, at->brought[self.lane] = brought;
  self.wait = Wait::meeting;
  if (at->arrived == (mask & w.live())) release_meeting(w, *at, perform);
  leave_lane();
}

void block_barrier(int id, int threads) {
  Lane& self = *current;
  Block& b = *self.block;
  NamedBarrier& at = b.barriers[id];
  const int all = id == 0 ? b.live : threads;
  if (at.arrived == 0) at.threads = threads;
  if (at.threads != threads || threads % 32 != 0)
    fail(cat("barrier ", id, " is asked for with ", threads, " threads and with ", at.threads));
  const int generation = at.generation;
  if (++at.arrived >= all) at.arrived = 0, ++at.generation;
  self.word = &at.generation, self.value = generation;
  wait_for(Wait::word);
}

int load_word(const int* p) {
  Lane& self = *current;
  if (p == self.last_word && *p == self.last_value) {
    self.word = p, self.value = *p;
    wait_for(Wait::poll);
  }
  self.last_word = p, self.last_value = *p;
  return self.last_value;
}

void sleep() {
  Lane& self = *current;
  self.word = self.last_word, self.value = self.last_value;
  self.last_word = nullptr;
  wait_for(Wait::poll);
}

void cluster_arrive() {
  Cluster& c = *current->block->cluster;
  current->cluster_generation = c.generation;
  if (++c.arrived == c.threads) c.arrived = 0, ++c.generation;
}
void cluster_wait() {
  current->word = &current->block->cluster->generation, current->value = current->cluster_generation;
  wait_for(Wait::word);
}

// ---- Blocks ----

void Block::start(unsigned n) {
  const Index3 grid = launch->grid, size = launch->block;
  number = n, index = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
  window = reinterpret_cast<char*>(reinterpret_cast<uintptr_t>(::kl::cuda::memory) - kFirstAddress);
  for (char* (*memory)() : dynamic_memories()) {
    char* const p = memory();
    std::memset(p, kPoison, launch->shared_bytes);
    std::memset(p + launch->shared_bytes, kGuard,
                std::min(kGuardBytes, sizeof ::kl::cuda::memory - launch->shared_bytes));
  }
  live = static_cast<int>(size.x * size.y * size.z);
  const size_t threads = static_cast<size_t>(live);
  lanes.assign(threads, Lane{});
  warps.assign((threads + 31) / 32, Warp{});
  std::fill(std::begin(barriers), std::end(barriers), NamedBarrier{});
  landings.clear();
  slow = random_numbers.below(warps.size());
  for (size_t i = 0; i < threads; ++i) {
    Lane& lane = lanes[i];
    const auto t = static_cast<unsigned>(i);
    lane.thread = {t % size.x, t / size.x % size.y, t / size.x / size.y};
    lane.block = this, lane.warp = &warps[i / 32], lane.lane = static_cast<int>(i % 32);
    char* const stack = stacks + i * kStackBytes;
    *reinterpret_cast<uint64_t*>(stack) = kStackEnd;
    lane.stack_pointer = new_fiber(stack, lane_main);
    Warp& w = *lane.warp;
    if (lane.lane == 0) w.lanes = &lane;
    w.all |= 1u << lane.lane, w.next |= 1u << lane.lane;
  }
}

// One warp goes as far as it can, or one copy lands; false if there is neither.
bool Block::turn() {
  size_t can[64], count = 0;
  for (size_t i = 0; i < warps.size(); ++i) {
    Warp& w = warps[i];
    uint32_t left = w.polling;
    while (left != 0) {
      const int l = std::countr_zero(left);
      left &= left - 1;
      if (!is_over(w.lanes[l])) continue;
      w.lanes[l].wait = Wait::none;
      w.polling &= ~(1u << l), w.next |= 1u << l;
    }
    if (w.next != 0 && w.held_until <= run_now->progress) can[count++] = i;
  }
  if (!landings.empty() && (count == 0 || random_numbers.one_in(6))) {
    const size_t i = random_numbers.below(landings.size());
    if (count == 0 || !landings[i].late) return land(i), true;
  }
  if (count == 0) return false;
  size_t chosen = can[random_numbers.below(count)];
  if (chosen == slow && !random_numbers.one_in(8)) chosen = can[random_numbers.below(count)];
  Warp& w = warps[chosen];
  if (random_numbers.one_in(200)) {  // a long time, in which other blocks come far
    w.held_until = run_now->progress + random_numbers.below(5000);
    return true;
  }
  w.ready = w.next, w.next = 0;
  const int from = static_cast<int>(random_numbers.below(32));
  const int lane = (std::countr_zero(std::rotr(w.ready, from)) + from) & 31;
  w.ready &= ~(1u << lane);
  current = &w.lanes[lane];
  switch_fiber(&scheduler, current->stack_pointer);
  current = nullptr;
  return true;
}

void Block::work() {
  Run& run = *run_now;
  while (live > 0 && run.error.empty()) {
    if (turn()) {
      ++run.progress, run.stalls = 0;
      if (random_numbers.one_in(64)) run.pass(slot, false);
      continue;
    }
    idle_at = run.progress;
    if (run.all_idle()) {
      // Nobody's wait is over: who sleeps or looks at a word again and again does so once more.
      const int blocks = static_cast<int>(run.live.size());
      bool polls = false;
      for (const auto& b : run.blocks)
        for (const Lane& lane : b->lanes) polls = polls || lane.wait == Wait::poll;
      if (++run.stalls > (polls ? 10000 : 4) * blocks) {
        std::string all;
        for (size_t i = 0; i < run.blocks.size(); ++i)
          if (run.live[i]) all += run.blocks[i]->report();
        fail(cat("nothing goes on:", all));
      }
      for (Warp& w : warps) {
        w.held_until = 0;
        uint32_t left = w.polling;
        while (left != 0) {
          const int l = std::countr_zero(left);
          left &= left - 1;
          if (w.lanes[l].wait != Wait::poll) continue;  // which it stays until it has looked
          w.polling &= ~(1u << l), w.next |= 1u << l;
        }
      }
      // Their turn does not count as progress.
      const uint64_t before = run.progress;
      const int stalls = run.stalls;
      const auto woken = [&] {
        return std::any_of(warps.begin(), warps.end(), [](const Warp& w) { return w.next != 0; });
      };
      for (size_t i = 0; i < 4 * warps.size() && live > 0 && run.error.empty() && woken(); ++i) turn();
      run.progress = before, run.stalls = stalls;
    }
    if (live > 0) run.pass(slot, true);
  }
}

void Block::finish() {
  while (!landings.empty()) land(landings.size() - 1);
  for (char* (*memory)() : dynamic_memories()) {
    const char* p = memory() + launch->shared_bytes;
    const size_t bytes = std::min(kGuardBytes, sizeof ::kl::cuda::memory - launch->shared_bytes);
    for (size_t i = 0; i < bytes; ++i)
      if (static_cast<unsigned char>(p[i]) != kGuard)
        fail(cat("byte ", i, " behind shared memory was written"));
  }
  for (size_t i = 0; i < warps.size(); ++i)
    if (warps[i].products_issued != warps[i / 4 * 4].products_issued || !warps[i].products.empty())
      fail("warps of a warpgroup have issued different products, or not waited for them");
}

namespace {

void run_slot(Run& run, unsigned slot, unsigned slots) {
  run.turns[slot]->acquire();
  Block& b = *run.blocks[slot];
  const size_t bytes = kStackBytes * run.launch.block.x * run.launch.block.y * run.launch.block.z;
  void* const stacks =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  try {
    if (stacks == MAP_FAILED) fail("there is no memory for the threads' stacks");
    b.stacks = static_cast<char*>(stacks);
    for (unsigned n = slot; n < run.count() && run.error.empty(); n += slots) {
      b.start(n);
      b.work();
      if (run.error.empty()) b.finish();
    }
  } catch (const Failure&) {
  }
  b.idle_at = UINT64_MAX;
  for (Lane& lane : b.lanes) lane.wait = Wait::none;
  if (stacks != MAP_FAILED) munmap(stacks, bytes);
  run.leave(slot);
}

// A kernel's fault ends its launch, on the stack of the thread that it came up in.
class FaultsEndTheLaunch {
 public:
  FaultsEndTheLaunch() {
    struct sigaction action {};
    action.sa_flags = SA_NODEFER;  // it does not return
    action.sa_handler = [](int signal) {
      if (current != nullptr)
        fail(signal == SIGFPE                        ? "a number was divided by zero"
             : signal == SIGILL || signal == SIGTRAP ? "an access is not aligned to its type"
                                                     : "a thread touched memory that is not there");
      ::signal(signal, SIG_DFL);  // the machine's own
    };
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~FaultsEndTheLaunch() {
    for (size_t i = 0; i < std::size(kSignals); ++i) sigaction(kSignals[i], &before_[i], nullptr);
  }
  FaultsEndTheLaunch(const FaultsEndTheLaunch&) = delete;
  FaultsEndTheLaunch& operator=(const FaultsEndTheLaunch&) = delete;

 private:
  static constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
  struct sigaction before_[5];
};

uint64_t launches = 0, seed = 1;
int multiprocessors = 8;

}  // namespace

void run(Launch& launch) {
  if (launch.shared_bytes > sizeof ::kl::cuda::memory) throw Error("cuda_on_cpu: too much shared memory");
  Run run(launch);
  random_numbers.state = (seed * 0x9e3779b97f4a7c15 + ++launches * 0xbf58476d1ce4e5b9) | 1;
  for (int i = 0; i < 8; ++i) random_numbers.next();
  const unsigned cluster = launch.cluster;
  unsigned slots = std::min<unsigned>(run.count(), static_cast<unsigned>(multiprocessors));
  slots = (slots + cluster - 1) / cluster * cluster;
  run.clusters.resize(slots / cluster);
  for (unsigned i = 0; i < slots; ++i) {
    auto b = std::make_unique<Block>();
    b->launch = &launch, b->slot = i, b->cluster = &run.clusters[i / cluster];
    b->cluster->threads += static_cast<int>(launch.block.x * launch.block.y * launch.block.z);
    run.blocks.push_back(std::move(b));
    run.turns.push_back(std::make_unique<std::binary_semaphore>(0));
    run.live.push_back(true);
  }
  run_now = &run;
  const FaultsEndTheLaunch faults;
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < slots; ++i) threads.emplace_back([&run, i, slots] { run_slot(run, i, slots); });
  run.turns[0]->release();
  run.over.acquire();
  for (std::thread& t : threads) t.join();
  run_now = nullptr;
  if (run.error.empty()) run.error = device_memory_damage();
  if (!run.error.empty()) throw Error("cuda_on_cpu: " + run.error);
}

DynamicMemory::DynamicMemory(char* (*of_this_thread)()) { dynamic_memories().push_back(of_this_thread); }

}  // namespace kl::cuda_on_cpu

namespace kl::testing {

void cuda_on_cpu_seed(uint64_t seed) { cuda_on_cpu::seed = seed, cuda_on_cpu::launches = 0; }
void cuda_on_cpu_multiprocessors(int count) { cuda_on_cpu::multiprocessors = count; }
int cuda_on_cpu_multiprocessors() { return cuda_on_cpu::multiprocessors; }

}  // namespace kl::testing
