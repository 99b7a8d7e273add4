// The door of short_conv: what must fit together, and which back-end runs.
#include "ops/conv/conv.h"

#include <algorithm>

#include "ops/conv/conv_cpu.h"

namespace kl {
namespace {

constexpr int64_t kElementsPerTask = 16384;  // 5 to 10 us in f32: enough to be worth waking a thread for
constexpr int64_t kMinChannels = 64;         // of a task: whole cache lines of a row

void check_operand(std::string_view name, const Tensor& t, Device device) {
  check_dtype(name, t, {DType::f32, DType::bf16});
  check_device(name, t, device);
  check_rows(name, t);
}

void check_i32(std::string_view name, const Tensor& t, int64_t n, Device device) {
  check_shape(name, t, {n});
  check_dtype(name, t, {DType::i32});
  check_device(name, t, device);
  check_rows(name, t);
}

// The last two dimensions lie in one piece: rows of `width` elements.
void check_dense_rows(std::string_view name, const Tensor& t, int64_t width) {
  check_rows(name, t);
  KL_CHECK(t.size(-2) <= 1 || t.stride[t.rank - 2] == width, name,
           ": expected channels in one piece, a stride of ", width, ", found ", t.stride[t.rank - 2]);
}

void check_args(const ShortConvArgs& a, Device device) {
  check_shape("short_conv: x", a.x, {-1, -1});
  const int64_t T = a.x.size(0), C = a.x.size(1);
  check_shape("short_conv: weight", a.weight, {C, -1});
  const int64_t W = a.weight.size(1);
  KL_CHECK(W >= 2 && W <= 4, "short_conv: weight: expected a width of 2 to 4, found ", W);
  check_dtype("short_conv: weight", a.weight, {DType::f32});
  check_device("short_conv: weight", a.weight, device);
  check_dense_rows("short_conv: weight", a.weight, W);
  check_shape("short_conv: out", a.out, {T, C});
  check_operand("short_conv: x", a.x, device);
  check_operand("short_conv: out", a.out, device);
  KL_CHECK(T == 0 || a.out.data != a.x.data, "short_conv: out: expected other memory than that of x");
  check_shape("short_conv: state", a.state, {-1, C, W - 1});
  check_dtype("short_conv: state", a.state, {DType::f32});
  check_device("short_conv: state", a.state, device);
  check_dense_rows("short_conv: state", a.state, W - 1);
  check_shape("short_conv: cu_seqlens", a.cu_seqlens, {-1});
  const int64_t N = a.cu_seqlens.size(0) - 1;
  KL_CHECK(N >= 0, "short_conv: cu_seqlens: expected at least one element, found none");
  check_i32("short_conv: cu_seqlens", a.cu_seqlens, N + 1, device);
  check_i32("short_conv: slot", a.slot, N, device);
}

// What is in the index tensors; only where the host can read them.
void check_sequences(const ShortConvArgs& a) {
  const int64_t N = a.slot.size(0), T = a.x.size(0), slots = a.state.size(0);
  const int32_t* cu = a.cu_seqlens.ptr<int32_t>();
  KL_CHECK(cu[0] == 0 && cu[N] == T, "short_conv: cu_seqlens: expected to run from 0 to ", T, ", found ",
           cu[0], " to ", cu[N]);
  for (int64_t n = 0; n < N; ++n) {
    KL_CHECK(cu[n] <= cu[n + 1], "short_conv: cu_seqlens: expected ascending numbers, found ", cu[n],
             " before ", cu[n + 1]);
    const int32_t slot = *a.slot.at<int32_t>(n);
    KL_CHECK(slot < slots, "short_conv: slot[", n, "]: expected less than ", slots, ", found ", slot);
  }
}

void conv_channels(const ShortConvArgs& a) {
  if (a.x.dtype != DType::f32 || a.out.dtype != DType::f32) return short_conv_ref(a);
  KL_ACTIVE_ISA(conv_channels)
  ({.x = a.x.ptr<float>(),
    .weight = a.weight.ptr<float>(),
    .out = a.out.ptr<float>(),
    .state = a.state.ptr<float>(),
    .x_stride = a.x.stride[0],
    .out_stride = a.out.stride[0],
    .state_stride = a.state.stride[0],
    .cu_seqlens = a.cu_seqlens.ptr<int32_t>(),
    .slot = a.slot.ptr<int32_t>(),
    .N = a.slot.size(0),
    .channels = a.x.size(1),
    .W = a.weight.size(1)});
}

ShortConvArgs channels_of(const ShortConvArgs& a, int64_t begin, int64_t end) {
  ShortConvArgs part = a;
  part.x = a.x.slice(1, begin, end);
  part.weight = a.weight.slice(0, begin, end);
  part.state = a.state.slice(1, begin, end);
  part.out = a.out.slice(1, begin, end);
  return part;
}

// Channels do not know each other, so threads share them out.
void short_conv_cpu(ThreadPool* pool, const ShortConvArgs& a) {
  const int64_t T = a.x.size(0), C = a.x.size(1);
  // Whole vectors: how a channel's bits come out must not depend on where the tokens of others make a cut.
  const int64_t wanted = kElementsPerTask / std::max<int64_t>(T, 1) / kMinChannels * kMinChannels;
  const int64_t channels = std::max(kMinChannels, wanted);
  parallel_for(pool, C, channels, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += kConvChannels)
      conv_channels(channels_of(a, c, std::min(end, c + kConvChannels)));
  });
}

}  // namespace

void short_conv(Ctx& ctx, const ShortConvArgs& a) {
  check_args(a, ctx.device);
  if (ctx.device == Device::cpu) check_sequences(a);
  const double elements = static_cast<double>(a.x.numel()), W = static_cast<double>(a.weight.size(1));
  const TraceScope trace(ctx.trace, "short_conv", static_cast<double>(a.x.bytes() + a.out.bytes()),
                         elements * (2 * W + 4));
  switch (ctx.device) {
    case Device::cpu: return short_conv_cpu(ctx.pool, a);
    case Device::cuda: KL_CHECK(false, "short_conv: asked to run on cuda, where it has no kernel");
  }
}

}  // namespace kl
