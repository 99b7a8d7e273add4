// Ctx: where and with what an operator runs. Passed first to every operator.
#pragma once

#include <cstdint>

#include "base/buffer.h"
#include "base/parallel.h"
#include "base/tensor.h"
#include "base/trace.h"

namespace kl {

// How exactly products with weights, and those of KDA's chunks, are computed. `exact`: factors as they are.
// `bf16`: activations may be rounded to bf16 where the processor is faster so (with weights: where these are
// bf16 too); each operator says what that costs.
enum class Precision : uint8_t { exact, bf16 };

struct Ctx {
  Device device = Device::cpu;
  ThreadPool* pool = nullptr;  // null: the calling thread alone
  Arena* scratch = nullptr;  // memory an operator may use until it returns; null where an operator needs none
  void* stream = nullptr;    // cudaStream_t
  Trace* trace = nullptr;    // null: nothing is recorded
  Precision precision = Precision::exact;
};

}  // namespace kl
