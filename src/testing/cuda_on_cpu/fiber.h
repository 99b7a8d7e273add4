// Fibers: stacks that one thread of the system goes from and back to.
#pragma once

#include <cstddef>

namespace kl::cuda_on_cpu {

constexpr size_t kStackBytes = 64 * 1024;

// A fiber that runs entry(), which must not return, when it is first gone to.
void* new_fiber(char* stack, void (*entry)());
// Saves where the running fiber stands in `from`, and goes on at `to`.
void switch_fiber(void** from, void* to);

}  // namespace kl::cuda_on_cpu
