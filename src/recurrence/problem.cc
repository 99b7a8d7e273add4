// Do the tensors of a call fit together? Shapes, types, strides and places of all of them, and what the index
// tensors hold.
#include "recurrence/problem.h"

#include <cmath>

namespace kl::recurrence {
namespace {

std::string full_name(const Problem& p, std::string_view name) { return cat(p.op, " ", name); }

// Device, type and a contiguous innermost dimension, once the shape is known to fit.
void check_memory(const Problem& p, std::string_view name, const Tensor& t,
                  std::initializer_list<DType> types) {
  KL_CHECK(t.data != nullptr || t.numel() == 0, name, ": expected a tensor, found none");
  KL_CHECK(t.device == p.q.device, name, ": expected a tensor on the ", name_of(p.q.device),
           " like q, found one on the ", name_of(t.device));
  check_dtype(name, t, types);
  kl::check_rows(name, t);
}

void check_heads(const Problem& p) {
  check_input(p, "q", p.q, {-1, -1, -1});
  check_shape(full_name(p, "v"), p.v, {-1, -1, -1});
  const int64_t T = p.q.size(0), H = p.q.size(1), K = p.q.size(2), Hv = p.v.size(1), V = p.v.size(2);
  KL_CHECK(1 <= K && K <= kMaxDim, p.op, " q: expected a key dimension of 1 to ", kMaxDim, ", found ", K);
  KL_CHECK(1 <= V && V <= kMaxDim, p.op, " v: expected a value dimension of 1 to ", kMaxDim, ", found ", V);
  KL_CHECK(H >= 1 && Hv >= 1 && Hv % H == 0, p.op, " v: expected a multiple of the ", H,
           " query/key heads as value heads, found ", Hv);
  check_input(p, "k", p.k, {T, H, K});
  check_input(p, "v", p.v, {T, Hv, V});
  check_input(p, "out", p.out, {T, Hv, V});
  KL_CHECK(std::isfinite(p.scale), p.op, " scale: expected a finite number, found ", p.scale);
  if (p.state) check_parameter(p, "state", p.state, {-1, Hv, K, V});
}

void check_index_tensors(const Problem& p) {
  check_shape(full_name(p, "cu_seqlens"), p.cu_seqlens, {-1});
  check_memory(p, full_name(p, "cu_seqlens"), p.cu_seqlens, {DType::i32, DType::i64});
  const int64_t N = p.cu_seqlens.size(0) - 1;
  KL_CHECK(N >= 0, p.op, " cu_seqlens: expected at least one element, found none");
  check_shape(full_name(p, "slot"), p.slot, {N});
  check_memory(p, full_name(p, "slot"), p.slot, {DType::i32});
  if (!p.slot_out) return;
  check_shape(full_name(p, "slot_out"), p.slot_out, {N});
  check_memory(p, full_name(p, "slot_out"), p.slot_out, {DType::i32});
}

void check_cu_seqlens(const Problem& p) {
  const int64_t N = p.cu_seqlens.size(0) - 1, T = p.q.size(0);
  const auto at = [&](int64_t n) { return index_at(p.cu_seqlens, n); };
  KL_CHECK(at(0) == 0, p.op, " cu_seqlens[0]: expected 0, found ", at(0));
  for (int64_t n = 0; n < N; ++n)
    KL_CHECK(at(n) <= at(n + 1), p.op, " cu_seqlens[", n + 1, "]: expected at least ", at(n),
             " as before it, found ", at(n + 1));
  KL_CHECK(at(N) == T, p.op, " cu_seqlens[", N, "]: expected the ", T, " rows of q, found ", at(N));
}

// No slot is written twice, or read by one sequence and written by another: heads run in any order.
void check_slots(const Problem& p) {
  const int64_t N = p.cu_seqlens.size(0) - 1, slots = p.state ? p.state.size(0) : 0;
  constexpr int64_t kNobody = -1;
  std::vector<int64_t> writer(static_cast<size_t>(slots), kNobody);
  const auto check_range = [&](std::string_view name, int64_t n, int64_t slot) {
    KL_CHECK(slot < slots, p.op, " ", name, "[", n, "]: expected a slot below ", slots,
             ", the number of states, found ", slot);
    return slot >= 0;
  };
  const std::string_view name = p.slot_out ? "slot_out" : "slot";
  for (int64_t n = 0; n < N; ++n) {
    const int64_t slot = index_at(p.slot_out ? p.slot_out : p.slot, n);
    if (!check_range(name, n, slot)) continue;
    int64_t& owner = writer[static_cast<size_t>(slot)];
    KL_CHECK(owner == kNobody, p.op, " ", name, "[", n, "]: expected a slot of its own, found slot ", slot,
             " that sequence ", owner, " writes too");
    owner = n;
  }
  for (int64_t n = 0; n < N; ++n) {
    const int64_t slot = index_at(p.slot, n);
    if (!check_range("slot", n, slot)) continue;
    const int64_t owner = writer[static_cast<size_t>(slot)];
    KL_CHECK(owner == kNobody || owner == n, p.op, " slot[", n,
             "]: expected a slot that no other sequence writes, found slot ", slot, " of sequence ", owner);
  }
}

}  // namespace

void check_input(const Problem& p, std::string_view name, const Tensor& t,
                 std::initializer_list<int64_t> shape) {
  check_shape(full_name(p, name), t, shape);
  p.q.device == Device::cpu ? check_memory(p, full_name(p, name), t, {DType::f32, DType::bf16, DType::f64})
                            : check_memory(p, full_name(p, name), t, {DType::f32, DType::bf16});
}

void check_parameter(const Problem& p, std::string_view name, const Tensor& t,
                     std::initializer_list<int64_t> shape) {
  if (!t) return;
  check_shape(full_name(p, name), t, shape);
  p.q.device == Device::cpu ? check_memory(p, full_name(p, name), t, {DType::f32, DType::f64})
                            : check_memory(p, full_name(p, name), t, {DType::f32});
}

void check_problem(const Problem& p) {
  check_heads(p);
  check_index_tensors(p);
  if (p.q.device != Device::cpu) return;
  check_cu_seqlens(p);
  check_slots(p);
}

void check_device(const Problem& p, Device expected) {
  KL_CHECK(p.q.device == expected, p.op, " q: expected a tensor on the ", name_of(expected),
           ", found one on the ", name_of(p.q.device));
}

void fail_without_cuda(std::string_view op) {
  detail::fail(
      cat(op, ": the tensors are on a GPU, but this build has no CUDA kernels (configure with KL_CUDA=ON)"));
}

double bytes_moved(const Problem& p, std::initializer_list<Tensor> gates) {
  double bytes = 0;
  for (const Tensor& t : {p.q, p.k, p.v, p.out}) bytes += static_cast<double>(t.bytes());
  for (const Tensor& t : gates) bytes += t ? static_cast<double>(t.bytes()) : 0.;
  const int64_t heads = p.slot.size(0) * p.v.size(1);
  return bytes + 2 * static_cast<double>(heads * p.q.size(2) * p.v.size(2) * size_of(p.state.dtype));
}

Head head_of(const Problem& p, int64_t sequence, int64_t head) {
  const int64_t K = p.q.size(2), slot = index_at(p.slot, sequence);
  return {.head = head,
          .qk_head = head / (p.v.size(1) / p.q.size(1)),
          .begin = index_at(p.cu_seqlens, sequence),
          .end = index_at(p.cu_seqlens, sequence + 1),
          .read_slot = slot,
          .write_slot = p.slot_out ? index_at(p.slot_out, sequence) : slot,
          .K = K,
          .V = p.v.size(2),
          .scale = p.scale != 0 ? p.scale : 1 / std::sqrt(static_cast<double>(K)),
          .pool = p.state};
}

}  // namespace kl::recurrence
