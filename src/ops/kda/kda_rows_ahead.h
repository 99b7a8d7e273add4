// Rows that a kernel of KDA will want soon. Only for x_cpu.cc files.
#pragma once

#include "ops/kda/kda_vec.h"

namespace kl::KL_ISA {

// Asks for the rows of the tokens that come next, a few at a time while the current ones are computed. The
// rows of a token lie far from those of the next one, mostly on a page of their own: without this, a quarter
// of the time went into waiting for them. Into the second-level cache: the first one is full of the state.
class RowsAhead {
 public:
  enum Tensors { kInputs, kOutput, kAll };

  // Of tokens [begin, end), in so many steps.
  RowsAhead(const KdaCpuHead& h, Tensors tensors, int64_t begin, int64_t end, int64_t steps)
      : rows_{&h.q, &h.k, &h.g, &h.v, &h.out},
        bytes_{bytes(h.q, h.K), bytes(h.k, h.K), bytes(h.g, h.K), bytes(h.v, h.V), bytes(h.out, h.V)},
        row_(begin),
        end_(end),
        first_(tensors == kOutput ? kInputTensors : 0),
        last_(tensors == kInputs ? kInputTensors : kTensors),
        per_step_((end - begin) * (last_ - first_) / steps + 1),
        tensor_(first_) {}

  void step() {
    for (int64_t i = 0; i < per_step_ && row_ < end_; ++i) {
      const KdaHeadRows& rows = *rows_[tensor_];
      const char* const row = rows.data + row_ * rows.stride;
      for (int64_t byte = 0; byte < bytes_[tensor_]; byte += 64) __builtin_prefetch(row + byte, 0, 2);
      if (++tensor_ == last_) tensor_ = first_, ++row_;
    }
  }

 private:
  static constexpr int kTensors = 5, kInputTensors = 4;
  static int64_t bytes(const KdaHeadRows& rows, int64_t n) {
    return n * (rows.dtype == DType::bf16 ? 2 : rows.dtype == DType::f32 ? 4 : 8);
  }

  const KdaHeadRows* rows_[kTensors];
  int64_t bytes_[kTensors];
  int64_t row_;
  const int64_t end_;
  const int first_, last_;
  const int64_t per_step_;
  int tensor_;
};

}  // namespace kl::KL_ISA
