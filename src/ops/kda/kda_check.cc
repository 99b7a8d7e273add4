// Do the tensors of a KdaArgs fit together? Shapes, types, strides and places of all of them; on the CPU also
// what the index tensors hold. On a GPU those values are not looked at: that would cost a synchronisation.
#include <cmath>
#include <string_view>
#include <vector>

#include "ops/kda/kda_head.h"

namespace kl {
namespace {

constexpr int64_t kCheckpointStep = 16;  // tokens

// Memory, device, type and a contiguous innermost dimension, once the shape is known to fit.
void check_memory(const KdaArgs& args, std::string_view name, const Tensor& t,
                  std::initializer_list<DType> types) {
  KL_CHECK(t.data != nullptr || t.numel() == 0, name, ": expected a tensor, found none");
  KL_CHECK(t.device == args.q.device, name, ": expected a tensor on the ", name_of(args.q.device),
           " like q, found one on the ", name_of(t.device));
  check_dtype(name, t, types);
  KL_CHECK(t.size(-1) <= 1 || t.stride[static_cast<size_t>(t.rank - 1)] == 1, name,
           ": expected a contiguous innermost dimension, found a stride of ",
           t.stride[static_cast<size_t>(t.rank - 1)]);
}

// The CPU code computes in any float type and takes f64 where f32 may stand.
void check_floats(const KdaArgs& args, std::string_view name, const Tensor& t,
                  std::initializer_list<int64_t> shape) {
  check_shape(name, t, shape);
  if (args.q.device == Device::cpu)
    check_memory(args, name, t, {DType::f32, DType::bf16, DType::f64});
  else
    check_memory(args, name, t, {DType::f32, DType::bf16});
}

void check_indices(const KdaArgs& args, std::string_view name, const Tensor& t, int64_t n) {
  check_shape(name, t, {n});
  check_memory(args, name, t, {DType::i32});
}

void check_rows(const KdaArgs& args) {
  check_floats(args, "kda q", args.q, {-1, -1, -1});
  check_shape("kda v", args.v, {-1, -1, -1});
  const int64_t T = args.q.size(0), H = args.q.size(1), K = args.q.size(2);
  const int64_t Hv = args.v.size(1), V = args.v.size(2);
  KL_CHECK(1 <= K && K <= kda::kMaxDim, "kda q: expected a key dimension of 1 to ", kda::kMaxDim, ", found ",
           K);
  KL_CHECK(1 <= V && V <= kda::kMaxDim, "kda v: expected a value dimension of 1 to ", kda::kMaxDim,
           ", found ", V);
  KL_CHECK(H >= 1 && Hv >= 1 && Hv % H == 0, "kda v: expected a multiple of the ", H,
           " query/key heads as value heads, found ", Hv);
  check_floats(args, "kda k", args.k, {T, H, K});
  check_floats(args, "kda v", args.v, {T, Hv, V});
  check_floats(args, "kda g", args.g, {T, Hv, K});
  check_floats(args, "kda beta", args.beta, {T, Hv});
  check_floats(args, "kda out", args.out, {T, Hv, V});
}

void check_parameters(const KdaArgs& args) {
  const KdaGate& gate = args.gate;
  const int64_t Hv = args.v.size(1), K = args.q.size(2);
  const auto check_f32 = [&](std::string_view name, const Tensor& t, std::initializer_list<int64_t> shape) {
    if (!t) return;
    check_shape(name, t, shape);
    args.q.device == Device::cpu ? check_memory(args, name, t, {DType::f32, DType::f64})
                                 : check_memory(args, name, t, {DType::f32});
  };
  check_f32("kda gate.A_log", gate.A_log, {Hv});
  check_f32("kda gate.dt_bias", gate.dt_bias, {Hv, K});
  KL_CHECK(gate.kind != KdaGateKind::bounded || (gate.lower_bound < 0 && std::isfinite(gate.lower_bound)),
           "kda gate.lower_bound: expected a number below 0, found ", gate.lower_bound);
  KL_CHECK(std::isfinite(args.scale), "kda scale: expected a finite number, found ", args.scale);
  KL_CHECK(!args.l2norm || (args.l2_eps >= 0 && std::isfinite(args.l2_eps)),
           "kda l2_eps: expected a number of at least 0, found ", args.l2_eps);
}

void check_state(const KdaArgs& args) {
  const int64_t Hv = args.v.size(1), K = args.q.size(2), V = args.v.size(2);
  if (!args.state) {
    // No slot is in range then, which only the CPU can see: sequences start at zero and keep nothing.
    KL_CHECK(args.q.device == Device::cpu, "kda state: expected a tensor, found none");
    return;
  }
  args.state_v_first ? check_shape("kda state", args.state, {-1, Hv, V, K})
                     : check_shape("kda state", args.state, {-1, Hv, K, V});
  args.q.device == Device::cpu ? check_memory(args, "kda state", args.state, {DType::f32, DType::f64})
                               : check_memory(args, "kda state", args.state, {DType::f32, DType::bf16});
}

void check_index_tensors(const KdaArgs& args) {
  check_shape("kda cu_seqlens", args.cu_seqlens, {-1});
  check_memory(args, "kda cu_seqlens", args.cu_seqlens, {DType::i32, DType::i64});
  const int64_t N = args.cu_seqlens.size(0) - 1;
  KL_CHECK(N >= 0, "kda cu_seqlens: expected at least one element, found none");
  check_indices(args, "kda slot", args.slot, N);
  if (args.slot_out) check_indices(args, "kda slot_out", args.slot_out, N);
  KL_CHECK(static_cast<bool>(args.checkpoint_row) == static_cast<bool>(args.checkpoint_slot),
           "kda checkpoint_row, checkpoint_slot: expected both or none, found only checkpoint_",
           args.checkpoint_row ? "row" : "slot");
  if (!args.checkpoint_row) return;
  check_indices(args, "kda checkpoint_row", args.checkpoint_row, -1);
  check_indices(args, "kda checkpoint_slot", args.checkpoint_slot, args.checkpoint_row.size(0));
}

void check_cu_seqlens(const KdaArgs& args) {
  const Tensor& cu = args.cu_seqlens;
  const int64_t N = cu.size(0) - 1, T = args.q.size(0);
  KL_CHECK(kda::index_at(cu, 0) == 0, "kda cu_seqlens[0]: expected 0, found ", kda::index_at(cu, 0));
  for (int64_t n = 0; n < N; ++n)
    KL_CHECK(kda::index_at(cu, n) <= kda::index_at(cu, n + 1), "kda cu_seqlens[", n + 1,
             "]: expected at least ", kda::index_at(cu, n), " as before it, found ",
             kda::index_at(cu, n + 1));
  KL_CHECK(kda::index_at(cu, N) == T, "kda cu_seqlens[", N, "]: expected the ", T, " rows of q, found ",
           kda::index_at(cu, N));
}

// Who uses each slot of the pool, so that no slot is written twice, or read by one sequence and written by
// another: heads run in any order.
class SlotUse {
 public:
  explicit SlotUse(const KdaArgs& args)
      : writer_(static_cast<size_t>(args.state ? args.state.size(0) : 0), kNobody) {}

  void write(std::string_view name, int64_t i, int64_t slot, int64_t sequence) {
    if (!in_range(name, i, slot)) return;
    int64_t& writer = writer_[static_cast<size_t>(slot)];
    KL_CHECK(writer == kNobody, "kda ", name, "[", i, "]: expected a slot of its own, found slot ", slot,
             " that sequence ", writer, " writes too");
    writer = sequence;
  }
  // After all writes.
  void read(std::string_view name, int64_t i, int64_t slot, int64_t sequence) {
    if (!in_range(name, i, slot)) return;
    const int64_t writer = writer_[static_cast<size_t>(slot)];
    KL_CHECK(writer == kNobody || writer == sequence, "kda ", name, "[", i,
             "]: expected a slot that no other sequence writes, found slot ", slot, " of sequence ", writer);
  }

 private:
  static constexpr int64_t kNobody = -1;
  bool in_range(std::string_view name, int64_t i, int64_t slot) const {
    KL_CHECK(slot < static_cast<int64_t>(writer_.size()), "kda ", name, "[", i, "]: expected a slot below ",
             writer_.size(), ", the number of states, found ", slot);
    return slot >= 0;
  }
  std::vector<int64_t> writer_;  // [slots] the sequence that writes it
};

// The sequence that owns row `row` - 1.
int64_t owner_of(const Tensor& cu_seqlens, int64_t row) {
  int64_t n = 0;
  while (kda::index_at(cu_seqlens, n + 1) < row) ++n;
  return n;
}

void check_slots(const KdaArgs& args) {
  const int64_t N = args.cu_seqlens.size(0) - 1, T = args.q.size(0);
  SlotUse use(args);
  const Tensor& written = args.slot_out ? args.slot_out : args.slot;
  for (int64_t n = 0; n < N; ++n)
    use.write(args.slot_out ? "slot_out" : "slot", n, kda::index_at(written, n), n);

  const int64_t M = args.checkpoint_row ? args.checkpoint_row.size(0) : 0;
  for (int64_t m = 0, last = 0; m < M; ++m) {
    const int64_t row = kda::index_at(args.checkpoint_row, m), slot = kda::index_at(args.checkpoint_slot, m);
    KL_CHECK(row >= last, "kda checkpoint_row[", m, "]: expected at least ", last, " as before it, found ",
             row);
    last = row;
    if (slot < 0) continue;
    KL_CHECK(1 <= row && row <= T, "kda checkpoint_row[", m, "]: expected a row from 1 to ", T, ", found ",
             row);
    const int64_t n = owner_of(args.cu_seqlens, row), begin = kda::index_at(args.cu_seqlens, n);
    KL_CHECK((row - begin) % kCheckpointStep == 0, "kda checkpoint_row[", m, "]: expected a multiple of ",
             kCheckpointStep, " tokens after row ", begin, ", where sequence ", n, " starts, found ", row);
    use.write("checkpoint_slot", m, slot, n);
  }
  for (int64_t n = 0; n < N; ++n) use.read("slot", n, kda::index_at(args.slot, n), n);
}

}  // namespace

void kda_check(const KdaArgs& args) {
  KL_CHECK(args.segment >= 0 && args.segment % kCheckpointStep == 0, "kda segment: expected a multiple of ",
           kCheckpointStep, " tokens or 0, found ", args.segment);
  check_rows(args);
  check_parameters(args);
  check_state(args);
  check_index_tensors(args);
  if (args.q.device != Device::cpu) return;
  check_cu_seqlens(args);
  check_slots(args);
}

}  // namespace kl
