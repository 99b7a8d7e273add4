// Ctx: where and with what an operator runs. Passed first to every operator.
#pragma once

#include "base/buffer.h"
#include "base/parallel.h"
#include "base/tensor.h"
#include "base/trace.h"

namespace kl {

struct Ctx {
  Device device = Device::cpu;
  ThreadPool* pool = nullptr;  // null: the calling thread alone
  Arena* scratch = nullptr;  // memory an operator may use until it returns; null where an operator needs none
  void* stream = nullptr;    // cudaStream_t
  Trace* trace = nullptr;    // null: nothing is recorded
};

}  // namespace kl
