#include "testing/cuda_on_cpu/machine.h"

#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <functional>
#include <memory>
#include <semaphore>
#include <thread>

#include "base/check.h"
#include "testing/cuda_on_cpu/cuda.h"
#include "testing/cuda_on_cpu/fiber.h"

namespace kl::cuda {
// Dynamic shared memory of kernels in headers (cuda/prefill_sm90.cuh). What a device of 9.0 lets a block
// have.
alignas(1024) thread_local char memory[232448];
}  // namespace kl::cuda

namespace kl::cuda_on_cpu {

thread_local Lane* current = nullptr;

namespace {

constexpr uint32_t kFirstAddress = 1024;  // of dynamic shared memory, as on the device
constexpr size_t kGuardBytes = 4096;      // behind it, that stay as they are
constexpr int kPoison = 0xff, kGuard = 0xa5;
constexpr uint64_t kStackEnd = 0x5eed5eed5eed5eed;

std::vector<char* (*)()>& dynamic_memories() {
  static std::vector<char* (*)()> all{[] { return ::kl::cuda::memory; }};
  return all;
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<uint32_t>(state >> 20);
  }
  uint32_t below(size_t n) { return next() % static_cast<uint32_t>(n); }
  bool one_in(uint32_t n) { return next() % n == 0; }
};
Random random_numbers{0x9e3779b97f4a7c15};

struct Failure {};  // of the launch, on the stack of a scheduler

// ---- An mbarrier is a word of shared memory, as on the device ----

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

}  // namespace

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

namespace {

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
  uint32_t bytes;  // to count; 0: it is an arrival
  bool late;       // when nobody in the block can go on without it
};

}  // namespace

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

namespace {

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
Run* run_now = nullptr;

void to_scheduler() {
  Lane* self = current;
  switch_fiber(&self->stack_pointer, self->block->scheduler);
}

// The next lane of the warp that can go on; if there is none, its turn is over.
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

// Until the scheduler finds that it is over.
void wait_for(Wait wait) {
  Lane& self = *current;
  self.wait = wait;
  self.warp->polling |= 1u << self.lane;
  leave_lane();
}

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
  async_wait(0), bulk_commit(), bulk_wait(0);
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

void block_barrier(int id, int threads, bool wait) {
  Lane& self = *current;
  Block& b = *self.block;
  NamedBarrier& at = b.barriers[id];
  const int all = id == 0 ? b.live : threads;
  if (at.arrived == 0) at.threads = threads;
  if (at.threads != threads || threads % 32 != 0)
    fail(cat("barrier ", id, " is asked for with ", threads, " threads and with ", at.threads));
  const int generation = at.generation;
  if (++at.arrived >= all) at.arrived = 0, ++at.generation;
  if (!wait) return;
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

// ---- Shared memory ----

char* shared_memory(uint32_t address) { return current->block->window + static_cast<int32_t>(address); }
char* shared_memory(uint32_t address, uint32_t rank) {
  const unsigned first = current->block->slot / run_now->launch.cluster * run_now->launch.cluster;
  return run_now->blocks[first + rank]->window + static_cast<int32_t>(address);
}
uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const char*>(p) - current->block->window);
}

namespace {
char* barrier_memory(uint32_t address) {
  if (address % 8 != 0) fail("an mbarrier does not stand at a multiple of 8 bytes");
  return shared_memory(address);
}
char* copied_memory(uint32_t address, const void* global, uint32_t bytes) {
  if (address % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0 || bytes % 16 != 0)
    fail("a bulk copy is not of pieces of 16 bytes");
  return shared_memory(address);
}
}  // namespace

void mbarrier_init(uint32_t address, uint32_t arrivals) {
  Barrier{false, arrivals, arrivals, 0}.put(barrier_memory(address));
}
void mbarrier_arrive(uint32_t address, uint32_t expected_bytes) {
  char* p = barrier_memory(address);
  Barrier b = Barrier::at(p);
  if (b.pending == 0) fail(cat("an arrival too many at the mbarrier at ", address - kFirstAddress));
  --b.pending, b.bytes += static_cast<int32_t>(expected_bytes);
  b.end_phase_if_complete();
  b.put(p);
}
void mbarrier_complete(char* p, uint32_t bytes) {
  Barrier b = Barrier::at(p);
  b.bytes -= static_cast<int32_t>(bytes);
  b.end_phase_if_complete();
  b.put(p);
}
bool mbarrier_try_wait(uint32_t address, uint32_t parity) {
  char* p = barrier_memory(address);
  if (Barrier::at(p).phase != (parity != 0)) return true;
  Lane& self = *current;
  if (random_numbers.one_in(16)) {  // it may give up at any time
    self.warp->next |= 1u << self.lane;
    leave_lane();
    return false;
  }
  self.barrier = reinterpret_cast<uint64_t*>(p), self.value = parity != 0;
  wait_for(Wait::mbarrier);
  return true;
}

// ---- Copies ----

namespace {

void perform(const Copy& c) {
  std::memcpy(c.to, c.from, c.bytes);
  std::memset(c.to + c.bytes, 0, c.zeros);
}
void add_landing(Landing landing) {
  landing.late = random_numbers.one_in(4);
  current->block->landings.push_back(std::move(landing));
}
// Performs those of the groups before `group`.
void perform_before(std::vector<Copy>& copies, int group) {
  size_t kept = 0;
  for (const Copy& c : copies)
    if (c.group < group)
      perform(c);
    else
      copies[kept++] = c;
  copies.resize(kept);
}

}  // namespace

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier) {
  char* p = copied_memory(to, from, bytes);
  add_landing({{{p, static_cast<const char*>(from), bytes, 0, 0}}, barrier_memory(barrier), bytes, false});
}

void box_load(uint32_t to, const void* map, int x, int y, int z, uint32_t barrier) {
  const CUtensorMap& m = *static_cast<const CUtensorMap*>(map);
  const uint32_t row = m.box[0] * m.element;
  if (row != 128 || m.box[1] != 1 || to % 1024 != 0)
    fail("only boxes of rows of 128 bytes at multiples of 1024 are known here");
  const int64_t at[3] = {x, y, z};
  Landing landing{{}, barrier_memory(barrier), row * m.box[2], false};
  for (uint32_t r = 0; r < m.box[2]; ++r)
    for (uint32_t piece = 0; piece < row / 16; ++piece) {
      const uint32_t address = to + r * row + piece * 16;
      Copy c{shared_memory(address ^ (address >> 7 & 7) << 4), nullptr, 0, 16, 0};
      const int64_t first = at[0] + piece * 16 / m.element, rows = at[2] + r;
      const auto inside = [&](int d, int64_t i) { return i >= 0 && i < static_cast<int64_t>(m.size[d]); };
      if (inside(0, first) && inside(1, at[1]) && inside(2, rows)) {
        const auto elements = std::min<uint64_t>(16 / m.element, m.size[0] - static_cast<uint64_t>(first));
        c.from = m.data + static_cast<uint64_t>(first) * m.element +
                 static_cast<uint64_t>(at[1]) * m.stride[1] + static_cast<uint64_t>(rows) * m.stride[2];
        c.bytes = static_cast<uint32_t>(elements * m.element), c.zeros = 16 - c.bytes;
      } else {
        c.from = c.to;
      }
      landing.copies.push_back(c);
    }
  add_landing(std::move(landing));
}

void bulk_store(void* to, uint32_t from, uint32_t bytes) {
  const char* p = copied_memory(from, to, bytes);
  current->stores.push_back({static_cast<char*>(to), p, bytes, 0, current->store_group});
}
void bulk_commit() { ++current->store_group; }
void bulk_wait(int pending) { perform_before(current->stores, current->store_group - pending); }

void async_copy(uint32_t to, const void* from, uint32_t bytes) {
  if (to % 16 != 0 || (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("cp.async is not aligned");
  char* p = shared_memory(to);
  current->copies.push_back(
      {p, bytes > 0 ? static_cast<const char*>(from) : p, bytes, 16 - bytes, current->copy_group});
}
void async_commit() { ++current->copy_group; }
void async_wait(int pending) {
  // At the end of a thread also those that nobody has committed.
  perform_before(current->copies, pending == 0 ? current->copy_group + 1 : current->copy_group - pending);
}
void async_arrive(uint32_t barrier) {
  add_landing({std::move(current->copies), barrier_memory(barrier), 0, false});
  current->copies.clear();
}

void Block::land(size_t i) {
  const Landing landing = std::move(landings[i]);
  landings[i] = std::move(landings.back());
  landings.pop_back();
  for (const Copy& c : landing.copies) perform(c);
  if (landing.bytes > 0) return mbarrier_complete(landing.barrier, landing.bytes);
  Barrier b = Barrier::at(landing.barrier);
  if (b.pending == 0) fail("an arrival of cp.async too many at an mbarrier");
  --b.pending;
  b.end_phase_if_complete();
  b.put(landing.barrier);
}

// ---- Matrix instructions ----

namespace {

struct WgmmaOperands {
  float* d;
  uint32_t a[4];
  uint64_t b;
  int n;
  bool transposed_b;
};

float from_bf16(uint32_t bits) { return std::bit_cast<float>(bits << 16); }

// Element (k, n) of the right operand, whose descriptor has 18 bits of addresses.
template <int kN>
void read_right(const Block& block, const Wgmma& w, float (&B)[16][kN]) {
  const auto field = [&](int bit) { return static_cast<uint32_t>(w.b >> bit & 0x3fff) << 4; };
  const uint32_t start = field(0), leading = field(16), stride = field(32);
  const bool swizzled = w.b >> 62 == 1;
  for (uint32_t k = 0; k < 16; ++k)
    for (uint32_t n = 0; n < kN; ++n) {
      uint32_t at = start;
      if (!swizzled)
        at += n / 8 * stride + k / 8 * leading + n % 8 * 16 + k % 8 * 2;
      else if (w.transposed_b)
        at += n / 64 * leading + k / 8 * stride + k % 8 * 128 + n % 64 * 2;
      else
        at += n / 8 * stride + n % 8 * 128 + k * 2;
      if (swizzled) at ^= (at >> 7 & 7) << 4;
      uint16_t bits;
      std::memcpy(&bits, block.window + at, sizeof bits);
      B[k][n] = from_bf16(bits);
    }
}

template <int kN>
void perform(const Block& block, const Wgmma& w) {
  float A[16][16], B[16][kN];
  read_right(block, w, B);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int e = 0; e < 2; ++e)
        A[lane / 4 + i % 2 * 8][2 * (lane % 4) + i / 2 * 8 + e] = from_bf16(w.a[lane][i] >> 16 * e & 0xffff);
  for (int row = 0; row < 16; ++row) {
    float sum[kN] = {};
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < kN; ++n) sum[n] += A[row][k] * B[k][n];
    for (int n = 0; n < kN; ++n) w.d[row % 8 * 4 + n % 8 / 2][n / 8 * 4 + row / 8 * 2 + n % 2] += sum[n];
  }
}

// Products before that group take place; what they write is what it was, plus them.
void perform_products(const Block& block, Warp& w, int group) {
  size_t count = 0;
  while (count < w.products.size() && w.products[count].group < group) ++count;
  for (size_t i = 0; i < count; ++i) {
    const Wgmma& p = w.products[i];
    const auto under_way = std::find_if(w.accumulators.begin(), w.accumulators.end(),
                                        [&](const Accumulators& a) { return a.d[0] == p.d[0]; });
    if (under_way != w.accumulators.end()) {
      const float* from = under_way->before.data();
      for (float* d : under_way->d) {
        std::copy(from, from + under_way->count, d);
        from += under_way->count;
      }
      w.accumulators.erase(under_way);
    }
    switch (p.n) {
      case 16: perform<16>(block, p); break;
      case 32: perform<32>(block, p); break;
      case 64: perform<64>(block, p); break;
      default: perform<128>(block, p); break;
    }
  }
  w.products.erase(w.products.begin(), w.products.begin() + static_cast<std::ptrdiff_t>(count));
}

}  // namespace

void wgmma(float* d, int n, const uint32_t (&a)[4], uint64_t b, bool transposed_b) {
  WgmmaOperands own{d, {a[0], a[1], a[2], a[3]}, b, n, transposed_b};
  meet_with(0xffffffffu, "wgmma", own, [](Meeting& m) {
    const auto& first = *static_cast<const WgmmaOperands*>(m.brought[0]);
    Warp& w = *current->warp;
    Wgmma p{{}, {}, first.b, first.n, w.product_group, first.transposed_b};
    if (first.transposed_b && first.b >> 62 != 1)
      fail("a transposed operand without swizzle is not known here");
    for (int l = 0; l < 32; ++l) {
      const auto& lane = *static_cast<const WgmmaOperands*>(m.brought[l]);
      if (lane.b != first.b || lane.n != first.n) fail("lanes of a warp ask for different products");
      p.d[l] = lane.d;
      std::copy(std::begin(lane.a), std::end(lane.a), p.a[l]);
    }
    const bool under_way = std::any_of(w.products.begin(), w.products.end(),
                                       [&](const Wgmma& other) { return other.d[0] == p.d[0]; });
    if (!under_way) {
      Accumulators a{{}, p.n / 2, {}};
      for (int l = 0; l < 32; ++l) {
        a.d[l] = p.d[l];
        a.before.insert(a.before.end(), p.d[l], p.d[l] + a.count);
        std::fill_n(p.d[l], a.count, std::bit_cast<float>(0x7fffffffu));
      }
      w.accumulators.push_back(std::move(a));
    }
    w.products.push_back(p);
    ++w.products_issued;
  });
}
void wgmma_commit() {
  int none = 0;
  meet_with(0xffffffffu, "wgmma_commit", none, [](Meeting&) { ++current->warp->product_group; });
}
void wgmma_wait(int pending) {
  meet_with(0xffffffffu, "wgmma_wait", pending, [](Meeting& m) {
    Warp& w = *current->warp;
    perform_products(*current->block, w, w.product_group - *static_cast<const int*>(m.brought[0]));
  });
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
