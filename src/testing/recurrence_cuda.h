// The random problems of recurrence/recurrence_cases.h on the GPU: the same call on device tensors, with
// poisoned outputs that have padding, beside the f64 definition. For tests of CUDA back-ends; include under
// KL_CUDA.
#pragma once

#include "cuda/memory.h"
#include "recurrence/recurrence_cases.h"

#define KL_NEEDS_GPU() \
  if (!::kl::cuda::device_present()) GTEST_SKIP() << "no CUDA device"

namespace kl::testing {

// A problem's tensors on the device, rows as far apart as on the host.
class RecurrenceOnDevice {
 public:
  RecurrenceOnDevice(const RecurrenceProblem& problem, const RecurrenceCase& c)
      : pool_(copy_as(problem.pool(), DType::f32)) {
    const RecurrenceCall& host = problem.call;
    call_.q = rows(host.q), call_.k = rows(host.k), call_.v = rows(host.v);
    for (const Tensor& t : host.extras) call_.extras.push_back(rows(t));
    call_.cu_seqlens = contiguous(host.cu_seqlens), call_.slot = contiguous(host.slot);
    if (host.slot_out) call_.slot_out = contiguous(host.slot_out);
    out_ = cuda::device_tensor(c.dtype, {host.v.size(0), host.v.size(1), host.v.size(2) + c.out_pad});
    call_.out = out_.tensor.slice(2, 0, host.v.size(2));
  }

  // Runs `f` from the pool's first content on a poisoned output. `out` of the result has its padding.
  RecurrenceResult run(const std::function<void(Ctx&, const RecurrenceCall&)>& f) {
    if (out_.buffer.size() > 0)
      KL_CUDA_CHECK(cudaMemset(out_.tensor.data, 0xff, out_.buffer.size()), "poisoning the output");
    const cuda::DeviceTensor state = cuda::to_device(pool_.tensor);
    call_.state = state.tensor;
    Ctx ctx{.device = Device::cuda};
    f(ctx, call_);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case");
    return {cuda::to_host(out_.tensor), cuda::to_host(state.tensor)};
  }

 private:
  Tensor keep(const Tensor& host, cuda::DeviceTensor&& copy) {
    owned_.push_back(std::move(copy));
    Tensor t = host;
    t.data = owned_.back().tensor.data, t.device = Device::cuda;
    return t;
  }
  // Rows of one token with what stands between them.
  Tensor rows(const Tensor& host) {
    return keep(host, cuda::to_device(Tensor(host.data, host.dtype, {host.size(0) * host.stride[0]})));
  }
  Tensor contiguous(const Tensor& host) { return keep(host, cuda::to_device(host)); }

  OwnedTensor pool_;
  std::vector<cuda::DeviceTensor> owned_;
  cuda::DeviceTensor out_;
  RecurrenceCall call_;
};

// `f` on the device beside the definition, twice with the same bits; padding of the output and slots of
// nobody keep theirs.
inline void expect_right_on_device(const RecurrenceOp& op,
                                   const std::function<void(Ctx&, const RecurrenceCall&)>& f,
                                   const RecurrenceCase& c, uint64_t seed, double out_tolerance,
                                   double state_tolerance) {
  const RecurrenceProblem problem(op, c, seed);
  const RecurrenceResult expected = problem.definition();
  RecurrenceOnDevice device(problem, c);
  const RecurrenceResult found = device.run(f), again = device.run(f);
  EXPECT_LE(rel_rms(to_doubles(found.out.tensor.slice(2, 0, c.V)), to_doubles(expected.out.tensor)),
            out_tolerance);
  EXPECT_LE(rel_rms(problem.states_of(found), problem.states_of(expected)), state_tolerance);
  EXPECT_TRUE(same_bits(found.out.tensor, again.out.tensor)) << "outputs of a second run";
  EXPECT_TRUE(same_bits(found.state.tensor, again.state.tensor)) << "states of a second run";
  for (const double x : to_doubles(found.out.tensor.slice(2, c.V, c.V + c.out_pad)))
    if (!std::isnan(x)) ADD_FAILURE() << "padding of the output was written";
  std::vector<bool> owned(static_cast<size_t>(found.state.tensor.size(0)));
  for (size_t n = 0; n < c.lengths.size(); ++n)
    owned[static_cast<size_t>(problem.slot_of(static_cast<int64_t>(n)))] = true;
  for (size_t slot = 0; slot < owned.size(); ++slot)
    EXPECT_TRUE(owned[slot] || same_bits(found.state.tensor[static_cast<int64_t>(slot)],
                                         problem.pool()[static_cast<int64_t>(slot)]))
        << "slot " << slot << " belongs to nobody and was written";
}

// All lengths in one call beside each alone, bit for bit.
inline void expect_packed_equals_alone_on_device(const RecurrenceOp& op,
                                                 const std::function<void(Ctx&, const RecurrenceCall&)>& f,
                                                 RecurrenceCase c) {
  c.lengths = interesting_lengths();
  const RecurrenceProblem problem(op, c, 31);
  RecurrenceOnDevice device(problem, c);
  const RecurrenceResult packed = device.run(f);
  const RecurrenceResult alone = device.run([&](Ctx& ctx, const RecurrenceCall& all) {
    int64_t begin = 0;
    for (size_t n = 0; n < c.lengths.size(); begin += c.lengths[n++]) {
      int32_t cu[2] = {0, static_cast<int32_t>(c.lengths[n])};
      const cuda::DeviceTensor d_cu = cuda::to_device(Tensor(cu, DType::i32, {2}));
      RecurrenceCall one = all;
      for (Tensor* t : {&one.q, &one.k, &one.v, &one.out}) *t = t->slice(0, begin, begin + c.lengths[n]);
      for (Tensor& t : one.extras) t = t.slice(0, begin, begin + c.lengths[n]);
      const int64_t sequence = static_cast<int64_t>(n);
      one.cu_seqlens = d_cu.tensor, one.slot = all.slot.slice(0, sequence, sequence + 1);
      f(ctx, one);
      KL_CUDA_CHECK(cudaDeviceSynchronize(), "running one sequence");
    }
  });
  EXPECT_TRUE(same_bits(packed.out.tensor, alone.out.tensor));
  EXPECT_TRUE(same_bits(packed.state.tensor, alone.state.tensor));
}

}  // namespace kl::testing
