// Shared memory, mbarriers and the copy engine (machine.h).
#include "base/check.h"
#include "testing/cuda_on_cpu/cuda.h"
#include "testing/cuda_on_cpu/machine_state.h"

namespace kl::cuda_on_cpu {

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

void Block::land(size_t i) {
  const Landing landing = std::move(landings[i]);
  landings[i] = std::move(landings.back());
  landings.pop_back();
  for (const Copy& c : landing.copies) perform(c);
  mbarrier_complete(landing.barrier, landing.bytes);
}

}  // namespace kl::cuda_on_cpu
