// The door of replay decode: what must fit together, and which back-end runs.
#include "ops/kda/kda_replay.h"

#ifdef KL_CUDA
#include "ops/kda/kda_cuda.h"
#endif

namespace kl {
namespace {

void check(std::string_view name, const Tensor& t, std::initializer_list<int64_t> shape,
           std::initializer_list<DType> types, Device device) {
  check_shape(name, t, shape);
  check_dtype(name, t, types);
  KL_CHECK(t.data != nullptr || t.numel() == 0, name, ": expected a tensor, found none");
  KL_CHECK(t.device == device, name, ": expected a tensor on the ", name_of(device), ", found one on the ",
           name_of(t.device));
}

}  // namespace

void kda_replay_check(const KdaReplayArgs& a) {
  const KdaArgs& kda = a.kda;
  check_shape("kda_replay q", kda.q, {-1, -1, -1});
  check_shape("kda_replay v", kda.v, {kda.q.size(0), -1, -1});
  KL_CHECK(!kda.cu_seqlens, "kda_replay cu_seqlens: expected none (row n is sequence n), found ",
           kda.cu_seqlens.shape_string());
  KL_CHECK(!kda.checkpoint_row && !kda.slot_out, "kda_replay: expected neither checkpoints nor slot_out");
  KL_CHECK(static_cast<bool>(kda.state), "kda_replay state: expected a pool, found none");
  const int64_t N = kda.q.size(0), H = kda.q.size(1), K = kda.q.size(2), Hv = kda.v.size(1),
                V = kda.v.size(2);
  KL_CHECK(H >= 1 && Hv % H == 0, "kda_replay v: expected a multiple of the ", H, " query/key heads, found ",
           Hv);
  const Device device = kda.q.device;
  const std::initializer_list<DType> floats = {DType::f32, DType::bf16};
  check("kda_replay q", kda.q, {N, H, K}, floats, device);
  check("kda_replay k", kda.k, {N, H, K}, floats, device);
  check("kda_replay v", kda.v, {N, Hv, V}, floats, device);
  check("kda_replay g", kda.g, {N, Hv, K}, floats, device);
  check("kda_replay beta", kda.beta, {N, Hv}, floats, device);
  check("kda_replay out", kda.out, {N, Hv, V}, floats, device);
  check("kda_replay slot", kda.slot, {N}, {DType::i32}, device);
  check("kda_replay fill", a.fill, {N}, {DType::i32}, device);
  check("kda_replay state", kda.state, {-1, Hv, kda.state_v_first ? V : K, kda.state_v_first ? K : V},
        {DType::f32}, device);
  check_shape("kda_replay keys", a.keys, {kda.state.size(0), Hv, -1, K});
  const int64_t slots = kda.state.size(0), L = a.keys.size(2);
  KL_CHECK(L >= 1 && L <= kMostRecords, "kda_replay keys: expected 1 to ", kMostRecords, " records, found ",
           L);
  check("kda_replay keys", a.keys, {slots, Hv, L, K}, {DType::f32}, device);
  check("kda_replay decays", a.decays, {slots, Hv, L, K}, {DType::f32}, device);
  check("kda_replay deltas", a.deltas, {slots, Hv, L, V}, {DType::f32}, device);
  for (const Tensor* t : {&a.keys, &a.decays, &a.deltas})
    KL_CHECK(t->is_contiguous(), "kda_replay: expected contiguous records, found strides");
  if (kda.gate.A_log) check("kda_replay A_log", kda.gate.A_log, {Hv}, {DType::f32}, device);
  if (kda.gate.dt_bias) check("kda_replay dt_bias", kda.gate.dt_bias, {Hv, K}, {DType::f32}, device);
}

void kda_replay(Ctx& ctx, const KdaReplayArgs& a) {
  KL_CHECK(ctx.device == a.kda.q.device, "kda_replay q: expected a tensor on the ", name_of(ctx.device),
           " like the context, found one on the ", name_of(a.kda.q.device));
  kda_replay_check(a);
  switch (ctx.device) {
    case Device::cpu: return kda_replay_ref(a);
    case Device::cuda:
#ifdef KL_CUDA
      return cuda::kda_replay(ctx, a);
#else
      KL_CHECK(false, "kda_replay: asked to run on cuda, but this program was built without CUDA");
#endif
  }
}

}  // namespace kl
