// The C interface of include/kda/kda.h: views become Tensors, exceptions become codes. No arithmetic.
#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <string>

#include "kda/kda.h"
#include "ops/kda/kda.h"

namespace kl {
namespace {

thread_local std::string last_error;

DType dtype_from_c(const char* name, int32_t dtype) {
  switch (dtype) {
    case KDA_F32: return DType::f32;
    case KDA_BF16: return DType::bf16;
    case KDA_I32: return DType::i32;
    case KDA_I64: return DType::i64;
    default: detail::fail(cat("kda ", name, ".dtype: expected a kda_dtype, found ", dtype));
  }
}

Tensor tensor_from_c(const char* name, const kda_tensor& c, Device device) {
  // A tensor without elements may have no memory; one without a rank is absent.
  if (c.rank == 0 && c.data == nullptr) return {};
  KL_CHECK(c.rank >= 1 && c.rank <= kMaxRank, "kda ", name, ".rank: expected 1 to ", kMaxRank, ", found ",
           c.rank);
  Tensor t;
  t.data = c.data;
  t.dtype = dtype_from_c(name, c.dtype);
  t.device = device;
  t.rank = c.rank;
  const size_t past = reinterpret_cast<uintptr_t>(c.data) % size_of(t.dtype);
  KL_CHECK(past == 0, "kda ", name, ".data: expected an address aligned to ", size_of(t.dtype),
           " bytes, found one that is ", past, " past it");
  for (int d = 0; d < c.rank; ++d) {
    const size_t i = static_cast<size_t>(d);
    KL_CHECK(c.shape[d] >= 0, "kda ", name, ".shape[", d, "]: expected at least 0, found ", c.shape[d]);
    t.shape[i] = c.shape[d], t.stride[i] = c.stride[d];
  }
  return t;
}

template <class Enum>
Enum enum_from_c(const char* name, int32_t value, int32_t last) {
  KL_CHECK(value >= 0 && value <= last, "kda ", name, ": expected 0 to ", last, ", found ", value);
  return static_cast<Enum>(value);
}

Device device_from_c(int32_t device) {
  KL_CHECK(device == KDA_CPU || device == KDA_CUDA, "kda device: expected KDA_CPU or KDA_CUDA, found ",
           device);
  return device == KDA_CPU ? Device::cpu : Device::cuda;
}

KdaArgs args_from_c(const kda_args& c) {
  const Device device = device_from_c(c.device);
  KdaArgs a;
  a.q = tensor_from_c("q", c.q, device), a.k = tensor_from_c("k", c.k, device);
  a.v = tensor_from_c("v", c.v, device), a.g = tensor_from_c("g", c.g, device);
  a.beta = tensor_from_c("beta", c.beta, device), a.out = tensor_from_c("out", c.out, device);
  a.cu_seqlens = tensor_from_c("cu_seqlens", c.cu_seqlens, device);
  a.state = tensor_from_c("state", c.state, device);
  a.slot = tensor_from_c("slot", c.slot, device), a.slot_out = tensor_from_c("slot_out", c.slot_out, device);
  a.checkpoint_row = tensor_from_c("checkpoint_row", c.checkpoint_row, device);
  a.checkpoint_slot = tensor_from_c("checkpoint_slot", c.checkpoint_slot, device);
  a.gate = {.kind = enum_from_c<KdaGateKind>("gate", c.gate, KDA_GATE_BOUNDED),
            .A_log = tensor_from_c("A_log", c.A_log, device),
            .dt_bias = tensor_from_c("dt_bias", c.dt_bias, device),
            .lower_bound = c.lower_bound};
  a.beta_kind = enum_from_c<KdaBeta>("beta_kind", c.beta_kind, KDA_BETA_SIGMOID2);
  a.state_v_first = c.state_v_first != 0;
  a.l2norm = c.l2norm != 0;
  a.l2_eps = c.l2_eps, a.scale = c.scale;
  a.batch_invariant = c.batch_invariant != 0;
  if (c.workspace != nullptr)
    a.workspace = Tensor(c.workspace, DType::u8, {static_cast<int64_t>(c.workspace_bytes)}, device);
  return a;
}
static_assert(static_cast<int>(KdaGateKind::bounded) == KDA_GATE_BOUNDED);
static_assert(static_cast<int>(KdaBeta::sigmoid2) == KDA_BETA_SIGMOID2);

// The caller's struct as this library knows it: what the caller does not know yet is zero.
kda_args known(const kda_args* args) {
  KL_CHECK(args != nullptr, "kda args: expected a struct, found NULL");
  KL_CHECK(args->struct_size >= offsetof(kda_args, workspace) && args->struct_size <= sizeof(kda_args),
           "kda args.struct_size: expected ", offsetof(kda_args, workspace), " to ", sizeof(kda_args),
           ", found ", args->struct_size,
           " (call kda_args_init() first, with a header no newer than the library)");
  kda_args copy{};
  std::memcpy(&copy, args, args->struct_size);
  return copy;
}

// One pool, made anew when a call asks for another number of threads. Held for the length of a call.
class SharedPool {
 public:
  explicit SharedPool(int32_t threads) {
    if (threads <= 1) return;
    lock_ = std::unique_lock(mutex);
    if (!pool || pool->threads() != threads) pool = std::make_unique<ThreadPool>(threads);
    chosen_ = pool.get();
  }
  ThreadPool* get() const { return chosen_; }

 private:
  static inline std::mutex mutex;
  static inline std::unique_ptr<ThreadPool> pool;
  std::unique_lock<std::mutex> lock_;
  ThreadPool* chosen_ = nullptr;
};

void run(void (*op)(Ctx&, const KdaArgs&), const kda_args* args) {
  const kda_args c = known(args);
  const KdaArgs a = args_from_c(c);
  KL_CHECK(c.threads >= 0 && c.threads <= 1024, "kda threads: expected 0 to 1024, found ", c.threads);
  const SharedPool pool(c.device == KDA_CPU ? c.threads : 0);
  Ctx ctx;
  ctx.device = device_from_c(c.device);
  ctx.pool = pool.get();
  ctx.stream = c.stream;
  op(ctx, a);
}

template <class F>
kda_status guarded(F&& f) noexcept {
  try {
    f();
    return KDA_OK;
  } catch (const std::bad_alloc&) {
    last_error.assign("out of memory");  // fits where every string keeps short text
    return KDA_NO_MEMORY;
  } catch (const Error& e) {
    last_error = e.what();
    return KDA_REFUSED;
  } catch (const std::exception& e) {
    last_error = e.what();
    return KDA_INTERNAL;
  } catch (...) {
    last_error.assign("unknown error");
    return KDA_INTERNAL;
  }
}

}  // namespace
}  // namespace kl

extern "C" {

uint32_t kda_abi_version(void) { return KDA_ABI_MAJOR << 16 | KDA_ABI_MINOR; }

const char* kda_last_error(void) { return kl::last_error.c_str(); }

void kda_args_init(kda_args* args, size_t size) {
  kda_args defaults{};
  defaults.struct_size = static_cast<uint32_t>(size);
  defaults.gate = KDA_GATE_SOFTPLUS;
  defaults.beta_kind = KDA_BETA_SIGMOID;
  defaults.l2norm = 1;
  defaults.l2_eps = 1e-6f;
  defaults.lower_bound = -5.f;
  std::memset(args, 0, size);
  std::memcpy(args, &defaults, std::min(size, sizeof defaults));
}

kda_status kda_prefill(const kda_args* args) {
  return kl::guarded([&] { kl::run(kl::kda_prefill, args); });
}

kda_status kda_decode(const kda_args* args) {
  return kl::guarded([&] { kl::run(kl::kda_decode, args); });
}

kda_status kda_workspace_bytes(const kda_args* args, uint64_t* bytes) {
  return kl::guarded([&] {
    KL_CHECK(bytes != nullptr, "kda_workspace_bytes: expected a place for the answer, found NULL");
    const kl::KdaArgs a = kl::args_from_c(kl::known(args));
    kl::kda_check(a);
    *bytes = static_cast<uint64_t>(kl::kda_workspace_bytes(a));
  });
}

}  // extern "C"
