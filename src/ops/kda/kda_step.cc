// The door of the fused decode step: what must fit together, and which back-end runs.
#include "ops/kda/kda_step.h"

#ifdef KL_CUDA
#include "ops/kda/kda_cuda.h"
#endif

namespace kl {
namespace {

void check_operand(std::string_view name, const Tensor& t, std::initializer_list<int64_t> shape,
                   std::initializer_list<DType> types, Device device) {
  check_shape(name, t, shape);
  check_dtype(name, t, types);
  KL_CHECK(t.data != nullptr || t.numel() == 0, name, ": expected a tensor, found none");
  KL_CHECK(t.device == device, name, ": expected a tensor on the ", name_of(device), ", found one on the ",
           name_of(t.device));
}

void check_conv(std::string_view name, const StepConv& conv, int64_t slots, int64_t channels, Device device) {
  check_operand(cat(name, ".weight"), conv.weight, {channels, kStepTaps}, {DType::f32}, device);
  check_operand(cat(name, ".state"), conv.state, {slots, channels, kStepTaps - 1}, {DType::f32}, device);
  KL_CHECK(conv.weight.is_contiguous(), name, ".weight: expected a contiguous tensor");
  KL_CHECK(slots == 0 || conv.state[0].is_contiguous(), name, ".state: expected contiguous slots");
}

}  // namespace

void kda_step_check(const KdaStepArgs& a) {
  const KdaArgs& kda = a.kda;
  check_shape("kda_step q", kda.q, {-1, -1, -1});
  check_shape("kda_step v", kda.v, {kda.q.size(0), kda.q.size(1), -1});
  KL_CHECK(!kda.cu_seqlens, "kda_step cu_seqlens: expected none (row n is sequence n), found ",
           kda.cu_seqlens.shape_string());
  KL_CHECK(!kda.checkpoint_row && !kda.slot_out, "kda_step: expected neither checkpoints nor slot_out");
  KL_CHECK(static_cast<bool>(kda.state), "kda_step state: expected a pool, found none");
  const int64_t N = kda.q.size(0), H = kda.q.size(1), K = kda.q.size(2), V = kda.v.size(2);
  const Device device = kda.q.device;
  check_operand("kda_step q", kda.q, {N, H, K}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step k", kda.k, {N, H, K}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step v", kda.v, {N, H, V}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step g", kda.g, {N, H, K}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step beta", kda.beta, {N, H}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step out", kda.out, {N, H, V}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step slot", kda.slot, {N}, {DType::i32}, device);
  check_operand("kda_step out_gate", a.out_gate, {N, H, V}, {DType::f32, DType::bf16}, device);
  check_operand("kda_step norm_weight", a.norm_weight, {V}, {DType::f32}, device);
  check_operand("kda_step state", kda.state, {-1, H, kda.state_v_first ? V : K, kda.state_v_first ? K : V},
                {DType::f32, DType::bf16}, device);
  const int64_t slots = kda.state.size(0);
  check_conv("kda_step q", a.q, slots, H * K, device);
  check_conv("kda_step k", a.k, slots, H * K, device);
  check_conv("kda_step v", a.v, slots, H * V, device);
  if (kda.gate.A_log) check_operand("kda_step A_log", kda.gate.A_log, {H}, {DType::f32}, device);
  if (kda.gate.dt_bias) check_operand("kda_step dt_bias", kda.gate.dt_bias, {H, K}, {DType::f32}, device);
  KL_CHECK(a.norm_eps > 0 && a.norm_eps < 1, "kda_step norm_eps: expected a number between 0 and 1, found ",
           a.norm_eps);
}

bool kda_step_takes(const KdaStepArgs& a) {
  if (a.kda.q.device == Device::cpu) return true;
#ifdef KL_CUDA
  return cuda::kda_step_takes(a);
#else
  return false;
#endif
}

void kda_step(Ctx& ctx, const KdaStepArgs& a) {
  KL_CHECK(ctx.device == a.kda.q.device, "kda_step q: expected a tensor on the ", name_of(ctx.device),
           " like the context, found one on the ", name_of(a.kda.q.device));
  kda_step_check(a);
  switch (ctx.device) {
    case Device::cpu: return kda_step_ref(a, KdaPrecision::f32);
    case Device::cuda:
#ifdef KL_CUDA
      KL_CHECK(cuda::kda_step_takes(a),
               "kda_step: expected sm_90 or newer and K = V of 64 or 128, found K = ", a.kda.q.size(2),
               ", V = ", a.kda.v.size(2), " (run the operators one by one)");
      return cuda::kda_step(ctx, a);
#else
      KL_CHECK(false, "kda_step: asked to run on cuda, but this program was built without CUDA");
#endif
  }
}

}  // namespace kl
