// Times KDA beside its relatives on the GPU. First all of them through the portable chunkwise kernels, which
// are built alike (cuda/chunk.cuh): what a per-channel gate costs over a scalar one, and a general transition
// over one whose vectors are the key. Then KDA and DPLR through their Hopper kernels, which share all but
// their producers (cuda/prefill_sm90.cuh), on one problem: DPLR gets the vectors with which it is that KDA,
// and the outputs are compared. bf16 rows, f32 states, D = 128; medians of CUDA-graph replays over rotating
// inputs.
//
//   relatives_cuda_bench [a part of a row's name, to run only such rows]
#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "ops/delta_net/delta_net_cuda.h"
#include "ops/dplr/dplr_cuda.h"
#include "ops/kda/kda_cuda.h"
#include "ops/linear_attention/linear_attention_cuda.h"
#include "testing/compare.h"
#include "testing/cuda_bench.h"
#include "testing/random.h"

namespace kl {
namespace {

constexpr int64_t D = 128;
constexpr std::pair<int64_t, int64_t> kShapes[] = {{4096, 16}, {8192, 16}, {16384, 16}, {8192, 96}};  // T, H

// How KDA makes a log-decay of a logit z, here of unit variance.
struct Gate {
  const char* name;
  KdaGateKind kind;
  double A, bias;  // softplus: -A softplus(z + bias)
  double log_decay(double z) const {
    return kind == KdaGateKind::bounded ? -5 / (1 + std::exp(-z)) : -A * std::log1p(std::exp(z + bias));
  }
};
constexpr Gate kBounded{"bounded -5", KdaGateKind::bounded, 1, 0};
constexpr Gate kSoftplus{"softplus", KdaGateKind::softplus, 4, -4.6};  // about -0.06 a token

// [T, H, width] in bf16: value(row, i), the same every kRows rows.
constexpr int64_t kRows = 8192;
template <class F>
cuda::DeviceTensor repeated_rows(int64_t T, int64_t H, int64_t width, F&& value) {
  const OwnedTensor block = make_tensor(DType::bf16, {kRows, width});
  testing::fill(block.tensor, [&](int64_t i) { return value(i / width, i % width); });
  cuda::DeviceTensor t =
      width == 1 ? cuda::device_tensor(DType::bf16, {T, H}) : cuda::device_tensor(DType::bf16, {T, H, width});
  const size_t step = static_cast<size_t>(block.tensor.bytes());
  for (size_t at = 0; at < t.buffer.size(); at += step)
    KL_CUDA_CHECK(cudaMemcpy(static_cast<char*>(t.buffer.data()) + at, block.tensor.data,
                             std::min(step, t.buffer.size() - at), cudaMemcpyHostToDevice),
                  "filling rows");
  return t;
}

double rounded(double x) { return static_cast<float>(bf16(static_cast<float>(x))); }

// Normally distributed numbers that a bf16 row holds exactly; scaled to rows of length 1 before, if asked
// for.
struct Numbers {
  int64_t width;
  std::vector<double> x;
  Numbers(testing::Random& random, int64_t n, bool length_1 = false)
      : width(n), x(static_cast<size_t>(kRows * n)) {
    for (double& e : x) e = random.normal();
    for (auto row = x.begin(); row != x.end(); row += n) {
      const double length = std::sqrt(std::inner_product(row, row + n, row, 0.));
      std::transform(row, row + n, row, [&](double e) { return rounded(length_1 ? e / length : e); });
    }
  }
  double operator()(int64_t row, int64_t i) const { return x[static_cast<size_t>(row * width + i)]; }
};

// Inputs of one of several calls that take turns. a, b and written (for k) make DPLR the KDA of k, beta and
// log_decay.
struct Rows {
  cuda::DeviceTensor q, k, v, a, b, written, z, log_decay, log_decay_of_head, beta_logit, out;

  Rows(const Gate& gate, int64_t T, int64_t H) {
    testing::Random random(7);
    const Numbers queries(random, D, true), keys(random, D, true), values(random, D), logits(random, D),
        strengths(random, 1);
    const auto write = [&](int64_t row, int64_t i) {
      return keys(row, i) / (1 + std::exp(-strengths(row, 0)));
    };
    const auto decay = [&](int64_t row, int64_t i) { return rounded(gate.log_decay(logits(row, i))); };
    const auto read = [&](int64_t row, int64_t i) { return std::exp(decay(row, i)) * keys(row, i); };
    q = repeated_rows(T, H, D, queries), k = repeated_rows(T, H, D, keys);
    v = repeated_rows(T, H, D, values);
    a = repeated_rows(T, H, D, write), b = repeated_rows(T, H, D, read);
    written = repeated_rows(T, H, D, write);
    z = repeated_rows(T, H, D, logits), log_decay = repeated_rows(T, H, D, decay);
    log_decay_of_head = repeated_rows(T, H, 1, decay);
    beta_logit = repeated_rows(T, H, 1, strengths);
    out = cuda::device_tensor(DType::bf16, {T, H, D});
  }
};

// One shape: inputs that do not fit into the L2 together, states, and how a call is timed.
class Bench {
 public:
  Bench(const Gate& gate, int64_t T, int64_t H) : gate_(gate) {
    const double bytes = 2. * static_cast<double>(T * H * D) * 8;
    const double l2 = static_cast<double>(cuda::current_device().l2_bytes);
    const int turns = static_cast<int>(std::clamp(2 * l2 / bytes + 1, 2., 8.));
    for (int i = 0; i < turns; ++i) rows_.emplace_back(gate, T, H);
    state_ = cuda::device_tensor(DType::f32, {1, H, D, D}, 0);
    int32_t cu[2] = {0, static_cast<int32_t>(T)}, slot[1] = {0};
    cu_ = cuda::to_device(Tensor(cu, DType::i32, {2})),
    slot_ = cuda::to_device(Tensor(slot, DType::i32, {1}));
    std::vector<float> logs(static_cast<size_t>(H), static_cast<float>(std::log(gate.A))),
        biases(static_cast<size_t>(H * D), static_cast<float>(gate.bias));
    A_log_ = cuda::to_device(Tensor(logs.data(), DType::f32, {H}));
    dt_bias_ = cuda::to_device(Tensor(biases.data(), DType::f32, {H, D}));
    ctx_.device = Device::cuda;
  }

  template <class Call>
  double milliseconds(Call&& call) {
    const int turns = static_cast<int>(rows_.size());
    return 1e3 * testing::time_graph(turns, 9, [&](int i, cudaStream_t stream) {
                   ctx_.stream = stream;
                   call(ctx_, rows_[static_cast<size_t>(i % turns)]);
                 }).median;
  }
  // The last outputs of one call, from a state of zeros.
  template <class Call>
  std::vector<double> outputs(Call&& call) {
    ctx_.stream = nullptr;
    KL_CUDA_CHECK(cudaMemset(state_.tensor.data, 0, state_.buffer.size()), "clearing the state");
    call(ctx_, rows_[0]);
    const OwnedTensor out = cuda::to_host(rows_[0].out.tensor);
    return testing::to_doubles(out.tensor.slice(0, out.tensor.size(0) - 2048, out.tensor.size(0)));
  }

  KdaArgs kda(const Rows& r, bool raw_gate) {
    KdaArgs a;
    a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.beta = r.beta_logit.tensor;
    a.g = raw_gate ? r.z.tensor : r.log_decay.tensor;
    a.cu_seqlens = cu_.tensor, a.out = r.out.tensor, a.state = state_.tensor, a.slot = slot_.tensor;
    a.scale = 1;
    a.l2norm = true;
    a.gate.kind = raw_gate ? gate_.kind : KdaGateKind::log_decay;
    if (raw_gate) a.gate.A_log = A_log_.tensor, a.gate.dt_bias = dt_bias_.tensor;
    give_workspace(a, cuda::kda_prefill_sm90_workspace);
    return a;
  }
  DplrArgs dplr(const Rows& r) {
    DplrArgs a{.q = r.q.tensor,
               .k = r.written.tensor,
               .a = r.a.tensor,
               .b = r.b.tensor,
               .v = r.v.tensor,
               .g = r.log_decay.tensor,
               .cu_seqlens = cu_.tensor,
               .out = r.out.tensor,
               .state = state_.tensor,
               .slot = slot_.tensor};
    a.scale = 1;
    give_workspace(a, cuda::dplr_prefill_sm90_workspace);
    return a;
  }
  DeltaNetArgs delta_net(const Rows& r) {
    DeltaNetArgs a;
    a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.g = r.log_decay_of_head.tensor;
    a.beta = r.beta_logit.tensor, a.cu_seqlens = cu_.tensor, a.out = r.out.tensor;
    a.state = state_.tensor, a.slot = slot_.tensor, a.gate.kind = DeltaNetGateKind::log_decay;
    return a;
  }
  LinearAttentionArgs linear_attention(const Rows& r) {
    LinearAttentionArgs a;
    a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.g = r.log_decay.tensor;
    a.cu_seqlens = cu_.tensor, a.out = r.out.tensor, a.state = state_.tensor, a.slot = slot_.tensor;
    return a;
  }

 private:
  template <class Args>
  void give_workspace(Args& a, int64_t (*bytes)(const Args&)) {
    if (cuda::current_device().arch != 90) return;
    if (static_cast<int64_t>(workspace_.buffer.size()) < bytes(a))
      workspace_ = cuda::device_tensor(DType::u8, {bytes(a)});
    a.workspace = workspace_.tensor;
  }

  Gate gate_;
  Ctx ctx_;
  std::vector<Rows> rows_;
  cuda::DeviceTensor state_, cu_, slot_, A_log_, dt_bias_, workspace_;
};

bool wanted(const std::string& name, const char* filter) {
  return std::strstr(name.c_str(), filter) != nullptr;
}

void portable_kernels(const char* filter) {
  std::printf("portable kernels\n%-14s %12s %12s %12s %12s %12s\n", "shape", "KDA ms", "DPLR", "delta net",
              "linear", "DPLR / KDA");
  for (const auto& [T, H] : kShapes) {
    const std::string name = cat("T", T, " H", H);
    if (!wanted(name, filter)) continue;
    Bench b(kSoftplus, T, H);
    const double kda = b.milliseconds(
        [&](const Ctx& ctx, const Rows& r) { cuda::kda_prefill_chunks(ctx, b.kda(r, false)); });
    const double dplr =
        b.milliseconds([&](const Ctx& ctx, const Rows& r) { cuda::dplr_chunks(ctx, b.dplr(r)); });
    const double delta_net =
        b.milliseconds([&](const Ctx& ctx, const Rows& r) { cuda::delta_net_chunks(ctx, b.delta_net(r)); });
    const double linear = b.milliseconds(
        [&](const Ctx& ctx, const Rows& r) { cuda::linear_attention_chunks(ctx, b.linear_attention(r)); });
    std::printf("%-14s %12.3f %12.3f %12.3f %12.3f %12.2f\n", name.c_str(), kda, dplr, delta_net, linear,
                dplr / kda);
    std::fflush(stdout);
  }
}

// KDA is timed with the log-decays that DPLR is given, and with the logits from which it makes them itself.
void hopper_kernels(const char* filter) {
  std::printf("\nHopper kernels\n%-26s %12s %12s %12s %12s %12s %12s\n", "gate and shape", "KDA ms",
              "from logits", "DPLR", "DPLR / KDA", "/ from log.", "difference");
  for (const Gate& gate : {kBounded, kSoftplus})
    for (const auto& [T, H] : kShapes) {
      const std::string name = cat("T", T, " H", H, " ", gate.name);
      if (!wanted(name, filter)) continue;
      Bench b(gate, T, H);
      const auto call_kda = [&](const Ctx& ctx, const Rows& r) {
        cuda::kda_prefill_sm90(ctx, b.kda(r, false));
      };
      const auto call_dplr = [&](const Ctx& ctx, const Rows& r) { cuda::dplr_prefill_sm90(ctx, b.dplr(r)); };
      const double difference = testing::rel_rms(b.outputs(call_dplr), b.outputs(call_kda));
      const double kda = b.milliseconds(call_kda), dplr = b.milliseconds(call_dplr);
      const double logits =
          b.milliseconds([&](const Ctx& ctx, const Rows& r) { cuda::kda_prefill_sm90(ctx, b.kda(r, true)); });
      std::printf("%-26s %12.3f %12.3f %12.3f %12.2f %12.2f %12.1e\n", name.c_str(), kda, logits, dplr,
                  dplr / kda, dplr / logits, difference);
      std::fflush(stdout);
    }
}

int run(const char* filter) {
  std::printf("%s, one sequence, D %d, bf16 rows\n", testing::device_name().c_str(), static_cast<int>(D));
  portable_kernels(filter);
  if (cuda::current_device().arch == 90) hopper_kernels(filter);
  return 0;
}

}  // namespace
}  // namespace kl

int main(int argc, char** argv) {
  try {
    return kl::run(argc > 1 ? argv[1] : "");
  } catch (const kl::Error& e) {
    std::fprintf(stderr, "%s\n", e.what());
    return 1;
  }
}
