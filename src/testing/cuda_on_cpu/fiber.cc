#include "testing/cuda_on_cpu/fiber.h"

#include <cstdint>

#if defined(__x86_64__)

// What a function keeps for its caller goes on the stack; the stack pointer is the fiber. Signal masks and
// the modes of the floating point units are the same in all of them, so nothing asks the system.
asm(R"(
  .text
  .type kl_cuda_on_cpu_switch, @function
kl_cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size kl_cuda_on_cpu_switch, . - kl_cuda_on_cpu_switch
)");
extern "C" void kl_cuda_on_cpu_switch(void** from, void* to);

namespace kl::cuda_on_cpu {

void* new_fiber(char* stack, void (*entry)()) {
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStackBytes);
  *--top = 0;  // where entry() would return to; a function finds its stack 8 bytes off a multiple of 16
  *--top = reinterpret_cast<uintptr_t>(entry);  // where the switch returns to
  for (int i = 0; i < 6; ++i) *--top = 0;
  return top;
}

void switch_fiber(void** from, void* to) { kl_cuda_on_cpu_switch(from, to); }

}  // namespace kl::cuda_on_cpu

#else

#include <ucontext.h>

namespace kl::cuda_on_cpu {

// The context stands at the start of the fiber's stack; of a thread's own stack, in the function that left
// it.
void* new_fiber(char* stack, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(stack + 64);
  getcontext(context);
  const size_t used = (64 + sizeof *context + 63) / 64 * 64;
  context->uc_stack.ss_sp = stack + used;
  context->uc_stack.ss_size = kStackBytes - used;
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}

void switch_fiber(void** from, void* to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, static_cast<ucontext_t*>(to));
}

}  // namespace kl::cuda_on_cpu

#endif
