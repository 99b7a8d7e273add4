// The CUDA back-end of the delta rule beside the f64 definition. Without a GPU every test here is skipped.
#ifdef KL_CUDA
#include "ops/delta_net/delta_net.h"
#include "testing/recurrence_cuda.h"

namespace kl {
namespace {

using namespace testing;

// Products of bf16 halves leave 2^-16 of each term, and chunks add up; a bf16 output is rounded to nearest,
// which costs 1.7e-3.
constexpr double kF32 = 1e-4, kBf16 = 2e-3;

struct Options {
  bool gate = true;
  DeltaNetGateKind kind = DeltaNetGateKind::log_decay;
  bool gate_tensors = false;
  DeltaNetBeta beta = DeltaNetBeta::sigmoid;
  bool l2norm = true;
  float l2_eps = 1e-6f, scale = 0;
  double beta_mean = 0;
};

class DeltaNetOnDevice {
 public:
  explicit DeltaNetOnDevice(const Options& options, std::function<double(Random&, int64_t)> log_decay)
      : o_(options) {
    Random random(3);
    A_log_ = random_normal(DType::f32, {kMostHeads}, random, 0.5);
    dt_bias_ = random_normal(DType::f32, {kMostHeads}, random, 1, -3);
    if (o_.gate_tensors) {
      d_A_log_ = cuda::to_device(A_log_.tensor), d_dt_bias_ = cuda::to_device(dt_bias_.tensor);
    }
    const double mean = o_.beta_mean;
    const bool value = o_.beta == DeltaNetBeta::value;
    op.extras = {{false, [=](Random& r, int64_t) { return value ? r.uniform() : mean + r.normal(); }}};
    if (o_.gate) op.extras.push_back({false, std::move(log_decay)});
    op.prefill = [this](Ctx& ctx, const RecurrenceCall& c) { delta_net_prefill(ctx, args_of(c)); };
    op.decode = [this](Ctx& ctx, const RecurrenceCall& c) { delta_net_decode(ctx, args_of(c)); };
    op.definition = [this](const RecurrenceCall& c) {
      delta_net_recurrent_ref(args_of(c), recurrence::Precision::f64);
    };
  }

  void expect_right(const RecurrenceCase& c, uint64_t seed) const {
    const bool bf16_rows = c.dtype == DType::bf16;
    for (const auto& f : {op.prefill, op.decode})
      expect_right_on_device(op, f, c, seed, bf16_rows ? kBf16 : kF32, kF32);
  }

  RecurrenceOp op;

 private:
  static constexpr int64_t kMostHeads = 8;

  DeltaNetArgs args_of(const RecurrenceCall& c) const {
    DeltaNetArgs a{.q = c.q, .k = c.k, .v = c.v};
    if (o_.gate) a.g = c.extras[1];
    a.beta = c.extras[0], a.cu_seqlens = c.cu_seqlens, a.out = c.out;
    a.state = c.state, a.slot = c.slot, a.slot_out = c.slot_out;
    a.gate.kind = o_.kind;
    if (o_.gate_tensors) {
      const bool device = c.q.device == Device::cuda;
      a.gate.A_log = (device ? d_A_log_.tensor : A_log_.tensor).slice(0, 0, c.v.size(1));
      a.gate.dt_bias = (device ? d_dt_bias_.tensor : dt_bias_.tensor).slice(0, 0, c.v.size(1));
    }
    a.beta_kind = o_.beta, a.l2norm = o_.l2norm, a.l2_eps = o_.l2_eps, a.scale = o_.scale;
    return a;
  }

  Options o_;
  OwnedTensor A_log_, dt_bias_;
  cuda::DeviceTensor d_A_log_, d_dt_bias_;
};

double mild(Random& r, int64_t) { return r.uniform(-0.2, 0); }

TEST(DeltaNetCuda, EveryGateFamily) {
  KL_NEEDS_GPU();
  for (const GateFamily& family : gate_families())
    for (const DType dtype : {DType::f32, DType::bf16}) {
      SCOPED_TRACE(cat("g ", family.name, ", ", name_of(dtype)));
      const DeltaNetOnDevice net({}, family.log_decay);
      net.expect_right({.lengths = {70, 16, 1, 33}, .H = 2, .Hv = 2, .K = 128, .V = 128, .dtype = dtype}, 1);
    }
}

TEST(DeltaNetCuda, EveryLength) {
  KL_NEEDS_GPU();
  const DeltaNetOnDevice net({}, mild);
  for (const int64_t T : {0, 1, 15, 16, 17, 63, 64, 65, 300})
    for (const bool initial_state : {false, true}) {
      SCOPED_TRACE(cat("T ", T, ", state ", initial_state));
      net.expect_right({.lengths = {T}, .K = 64, .V = 40, .initial_state = initial_state}, 2);
    }
  net.expect_right({.lengths = {0, 5, 0, 0, 40, 0}, .H = 1, .Hv = 3}, 3);
}

TEST(DeltaNetCuda, EveryWidth) {
  KL_NEEDS_GPU();
  const DeltaNetOnDevice net({}, mild);
  const int64_t widths[][2] = {{64, 64}, {256, 256}, {128, 256}, {256, 64}, {100, 100},
                               {1, 1},   {7, 250},   {250, 7},   {192, 130}};
  for (const auto& [K, V] : widths) {
    SCOPED_TRACE(cat(K, " x ", V));
    net.expect_right({.lengths = {37, 16}, .H = 2, .Hv = 6, .K = K, .V = V}, 4);
  }
}

TEST(DeltaNetCuda, Options) {
  KL_NEEDS_GPU();
  const RecurrenceCase c{.lengths = {50, 3}, .H = 2, .Hv = 4, .K = 128, .V = 128};
  for (const DeltaNetBeta beta : {DeltaNetBeta::value, DeltaNetBeta::sigmoid, DeltaNetBeta::sigmoid2})
    for (const bool l2norm : {false, true}) {
      RecurrenceCase small = c;
      small.key_size = l2norm ? 1 : 0.07;  // keys of length 0.8, or the state grows
      DeltaNetOnDevice({.beta = beta, .l2norm = l2norm, .scale = 0.25f}, mild).expect_right(small, 5);
    }
  DeltaNetOnDevice({.gate = false}, mild).expect_right(c, 6);
  const auto normal = [](Random& r, int64_t) { return r.normal(); };
  for (const bool tensors : {false, true})
    DeltaNetOnDevice({.kind = DeltaNetGateKind::softplus, .gate_tensors = tensors}, normal)
        .expect_right(c, 7);
  // Lengths that are no multiple of a chunk, and no epsilon: the tokens past the end have no length.
  DeltaNetOnDevice({.l2_eps = 0}, mild).expect_right(c, 8);
}

// The state forgets only through its keys: no decay, strengths near 1, over many chunks.
TEST(DeltaNetCuda, LongSequenceWithoutDecay) {
  KL_NEEDS_GPU();
  DeltaNetOnDevice({.gate = false, .beta_mean = 6}, mild)
      .expect_right({.lengths = {2000}, .K = 64, .V = 64}, 9);
}

TEST(DeltaNetCuda, PackedEqualsAlone) {
  KL_NEEDS_GPU();
  const DeltaNetOnDevice net({}, mild);
  expect_packed_equals_alone_on_device(net.op, net.op.prefill, {.H = 1, .Hv = 2, .dtype = DType::bf16});
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
