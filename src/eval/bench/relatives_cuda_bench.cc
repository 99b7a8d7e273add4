// Times KDA beside its relatives on the GPU, all through the portable chunkwise kernels, which are built
// alike (cuda/chunk.cuh): what a per-channel gate costs over a scalar one, and a general transition over one
// whose vectors are the key. bf16 rows, f32 states, D = 128; medians of CUDA-graph replays over rotating
// inputs.
//
//   relatives_cuda_bench [a part of a row's name, to run only such rows]
#include <cstdio>
#include <cstring>

#include "ops/delta_net/delta_net_cuda.h"
#include "ops/dplr/dplr_cuda.h"
#include "ops/kda/kda_cuda.h"
#include "ops/linear_attention/linear_attention_cuda.h"
#include "testing/cuda_bench.h"
#include "testing/random.h"

namespace kl {
namespace {

// bf16 numbers, repeated every million elements.
cuda::DeviceTensor random_rows(std::initializer_list<int64_t> dims, double deviation, double mean) {
  static const std::vector<double> normals = [] {
    testing::Random random(7);
    std::vector<double> x(1 << 20);
    for (double& e : x) e = random.normal();
    return x;
  }();
  const OwnedTensor block = make_tensor(DType::bf16, {1 << 20});
  testing::fill(block.tensor, [&](int64_t i) { return mean + deviation * normals[static_cast<size_t>(i)]; });
  cuda::DeviceTensor t = cuda::device_tensor(DType::bf16, dims);
  const size_t step = static_cast<size_t>(block.tensor.bytes());
  for (size_t at = 0; at < t.buffer.size(); at += step)
    KL_CUDA_CHECK(cudaMemcpy(static_cast<char*>(t.buffer.data()) + at, block.tensor.data,
                             std::min(step, t.buffer.size() - at), cudaMemcpyHostToDevice),
                  "filling rows");
  return t;
}

// Inputs of one of several calls that take turns.
struct Rows {
  cuda::DeviceTensor q, k, v, a, b, g, log_decay, log_decay_of_head, beta, out;
  Rows(int64_t T, int64_t H, int64_t D)
      : q(random_rows({T, H, D}, 0.09, 0)),
        k(random_rows({T, H, D}, 0.09, 0)),
        v(random_rows({T, H, D}, 1, 0)),
        a(random_rows({T, H, D}, 0.06, 0)),
        b(random_rows({T, H, D}, 0.06, 0)),
        g(random_rows({T, H, D}, 1, 0)),
        log_decay(random_rows({T, H, D}, 0.01, -0.2)),
        log_decay_of_head(random_rows({T, H}, 0.01, -0.2)),
        beta(random_rows({T, H}, 1, 0)),
        out(cuda::device_tensor(DType::bf16, {T, H, D})) {}
};

int run(const char* filter) {
  constexpr int64_t D = 128;
  std::printf("%s, portable kernels, one sequence, D 128, bf16 rows\n%-14s %12s %12s %12s %12s %12s\n",
              testing::device_name().c_str(), "shape", "KDA ms", "DPLR", "delta net", "linear", "DPLR / KDA");
  for (const auto& [T, H] : {std::pair<int64_t, int64_t>{4096, 16}, {8192, 16}, {16384, 16}, {8192, 96}}) {
    const std::string name = cat("T", T, " H", H);
    if (std::strstr(name.c_str(), filter) == nullptr) continue;
    std::vector<Rows> rows;
    const double bytes = 2. * static_cast<double>(T * H * D) * 8;
    const double l2 = static_cast<double>(cuda::current_device().l2_bytes);
    const int turns = static_cast<int>(std::clamp(2 * l2 / bytes + 1, 2., 8.));
    for (int i = 0; i < turns; ++i) rows.emplace_back(T, H, D);
    const cuda::DeviceTensor state = cuda::device_tensor(DType::f32, {1, H, D, D}, 0),
                             A_log = cuda::device_tensor(DType::f32, {H}, 0);
    int32_t cu_host[2] = {0, static_cast<int32_t>(T)}, slot_host[1] = {0};
    const cuda::DeviceTensor cu = cuda::to_device(Tensor(cu_host, DType::i32, {2})),
                             slot = cuda::to_device(Tensor(slot_host, DType::i32, {1}));
    Ctx ctx;
    ctx.device = Device::cuda;
    const auto time = [&](auto&& call) {
      return 1e3 * testing::time_graph(turns, 9, [&](int i, cudaStream_t stream) {
                     ctx.stream = stream;
                     call(rows[static_cast<size_t>(i % turns)]);
                   }).median;
    };
    const double kda = time([&](const Rows& r) {
      KdaArgs a;
      a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.g = r.log_decay.tensor, a.beta = r.beta.tensor;
      a.cu_seqlens = cu.tensor, a.out = r.out.tensor, a.state = state.tensor, a.slot = slot.tensor;
      a.gate.kind = KdaGateKind::log_decay;  // as DPLR has it
      cuda::kda_prefill_chunks(ctx, a);
    });
    const double dplr = time([&](const Rows& r) {
      cuda::dplr_chunks(ctx, {.q = r.q.tensor,
                              .k = r.k.tensor,
                              .a = r.a.tensor,
                              .b = r.b.tensor,
                              .v = r.v.tensor,
                              .g = r.log_decay.tensor,
                              .cu_seqlens = cu.tensor,
                              .out = r.out.tensor,
                              .state = state.tensor,
                              .slot = slot.tensor});
    });
    const double delta_net = time([&](const Rows& r) {
      DeltaNetArgs a;
      a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.g = r.log_decay_of_head.tensor;
      a.beta = r.beta.tensor, a.cu_seqlens = cu.tensor, a.out = r.out.tensor;
      a.state = state.tensor, a.slot = slot.tensor, a.gate.kind = DeltaNetGateKind::log_decay;
      cuda::delta_net_chunks(ctx, a);
    });
    const double linear = time([&](const Rows& r) {
      LinearAttentionArgs a;
      a.q = r.q.tensor, a.k = r.k.tensor, a.v = r.v.tensor, a.g = r.log_decay.tensor;
      a.cu_seqlens = cu.tensor, a.out = r.out.tensor, a.state = state.tensor, a.slot = slot.tensor;
      cuda::linear_attention_chunks(ctx, a);
    });
    std::printf("%-14s %12.3f %12.3f %12.3f %12.3f %12.2f\n", name.c_str(), kda, dplr, delta_net, linear,
                dplr / kda);
    std::fflush(stdout);
  }
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
