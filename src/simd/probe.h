// What this machine gives at best, measured: the roofline that benchmarks compare with.
#pragma once

#include <cstdint>

#include "base/parallel.h"
#include "simd/isa.h"

namespace kl {

struct Roofline {
  double bytes_per_second = 0;  // reading memory that no cache holds
  double flops_per_second = 0;  // the fastest multiply-add of the active instruction set, out of registers
};

// With all threads of the pool, for about `seconds` each; the median of several runs, because the first ones
// may be faster than the machine can go on. Takes 512 MB of memory.
Roofline measure_roofline(ThreadPool&, double seconds = 0.5);

// Adds up all 8-byte words of [data, data + bytes), bytes a multiple of 512.
// Does `rounds` rounds of multiply-adds; returns how many operations that were, a product and a sum counting
// as two. `keep` takes the result, so that it has to be computed.
KL_DECLARE_PER_ISA(uint64_t probe_read(const void* data, int64_t bytes);
                   double probe_flops(int64_t rounds, float* keep);
                   double probe_tile_flops(int64_t rounds, float* keep);)  // the same for Isa::amx

}  // namespace kl
