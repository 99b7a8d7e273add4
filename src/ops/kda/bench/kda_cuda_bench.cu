// Checks the Hopper prefill against the definition in f64 and times it, on a machine with nothing but a
// driver:  kda_cuda_bench [check|time|all|race] [part of a case's name]
// Checks: bench/kda_bench_checks.cuh. Times: medians of CUDA-graph replays over rotating inputs that together
// exceed the L2 cache. race: a kernel with a race, and nothing else.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "ops/kda/bench/kda_bench_checks.cuh"

namespace kl::bench {
namespace {

// ---- Times ----

struct Timing {
  double median, low, high;  // ms
};
Timing time(const Case& c) {
  std::vector<Problem> sets;
  sets.emplace_back(c, 1);
  const double l2 = static_cast<double>(cuda::current_device().l2_bytes);
  const int count = static_cast<int>(std::clamp(std::ceil(3 * l2 / sets[0].bytes()), 2., 24.));
  for (int i = 1; i < count; ++i) sets.emplace_back(c, 1, i);
  cudaStream_t stream;
  KL_CUDA_CHECK(cudaStreamCreate(&stream), "a stream");
  Ctx ctx;
  ctx.device = Device::cuda, ctx.stream = stream;
  for (Problem& p : sets) cuda::kda_prefill_sm90(ctx, p.args);
  KL_CUDA_CHECK(cudaStreamSynchronize(stream), "warming up ", c.name);
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  KL_CUDA_CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  for (Problem& p : sets) cuda::kda_prefill_sm90(ctx, p.args);
  KL_CUDA_CHECK(cudaStreamEndCapture(stream, &graph), "capture");
  KL_CUDA_CHECK(cudaGraphInstantiate(&exec, graph, 0), "graph");
  cudaEvent_t begin, end;
  KL_CUDA_CHECK(cudaEventCreate(&begin), "event");
  KL_CUDA_CHECK(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < 33; ++i) {
    KL_CUDA_CHECK(cudaEventRecord(begin, stream), "event");
    KL_CUDA_CHECK(cudaGraphLaunch(exec, stream), "graph");
    KL_CUDA_CHECK(cudaEventRecord(end, stream), "event");
    KL_CUDA_CHECK(cudaEventSynchronize(end), "timing ", c.name);
    float ms = 0;
    KL_CUDA_CHECK(cudaEventElapsedTime(&ms, begin, end), "event");
    if (i >= 3) times.push_back(static_cast<double>(ms) / count);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec), cudaGraphDestroy(graph), cudaStreamDestroy(stream);
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return {times[times.size() / 2], times[times.size() / 10], times[times.size() * 9 / 10]};
}

std::vector<int64_t> equal(int n, int64_t length) {
  return std::vector<int64_t>(static_cast<size_t>(n), length);
}

struct Target {
  Case c;
  double must, aim;  // ms, bounded gate
};
std::vector<Target> targets() {
  const std::vector<int64_t> pack{1300, 547, 2048, 963, 271, 3063};
  std::vector<Target> all{{{"B1 T1024 H32", {1024}, 32, 32, 128}, 0.060, 0.035},
                          {{"B1 T8192 H32", {8192}, 32, 32, 128}, 0.22, 0.14},
                          {{"B1 T8192 H64", {8192}, 64, 64, 128}, 0.42, 0.27},
                          {{"B1 T8192 H96", {8192}, 96, 96, 128}, 0.60, 0.40},
                          {{"B1 T65536 H32", {65536}, 32, 32, 128}, 1.8, 1.1},
                          {{"B1 T65536 H8", {65536}, 8, 8, 128}, 0.55, 0.35},
                          {{"B8 T1024 H32", equal(8, 1024), 32, 32, 128}, 0.22, 0.14},
                          {{"pack of 6 H96", pack, 96, 96, 128}, 0.60, 0.40}};
  const auto small = [&](int64_t T, int H, int N) {  // T tokens in all
    all.push_back({{"T" + std::to_string(T) + " H" + std::to_string(H) + " N" + std::to_string(N),
                    equal(N, T / N), H, H, 128},
                   0,
                   0});
  };
  small(2048, 12, 1), small(2048, 16, 1), small(4096, 8, 1), small(4096, 12, 1), small(8192, 12, 4);
  small(8192, 16, 1), small(1024, 4, 1), small(3072, 10, 1), small(8192, 24, 1), small(16384, 16, 8);
  return all;
}

// A race for what looks for races to find: one warp reads what the other writes, and no barrier between them.
__global__ void planted_race_kernel(int* out) {
  __shared__ int words[64];
  const int i = static_cast<int>(threadIdx.x);
  words[i] = i;
  out[i] = words[63 - i];
}
int plant_race() {
  const DeviceTensor out = cuda::device_tensor(DType::i32, {64});
  cuda::launch(planted_race_kernel, {.grid = 1, .block = 64}, static_cast<int*>(out.tensor.data));
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a kernel with a race");
  return 0;
}

int run(const std::string& mode, const std::string& only) {
  if (mode == "race") return plant_race();
  const auto wanted = [&](const std::string& name) {
    return only.empty() || name.find(only) != std::string::npos;
  };
  int failed = 0;
  if (mode != "time") {
    for (const Case& c : checks())
      if (wanted(c.name)) failed += !check(c);
    if (wanted("slots and checkpoints")) failed += !check_slots();
    for (const Case& c : invariant_checks())
      if (wanted("alone or in a pack, " + c.name)) failed += !check_invariant(c);
    for (int gate = 0; gate <= static_cast<int>(Gate::none); ++gate)
      if (wanted(std::string("T 1048576, ") + name_of(static_cast<Gate>(gate))))
        failed += !check_million(static_cast<Gate>(gate));
  }
  if (mode != "check") {
    double logs[3] = {};
    std::printf("%-18s %8s %8s | ms: %10s %10s %10s | GB/s (bounded) | must  aim\n", "shape", "GB", "",
                "bounded -5", "softplus", "weak -0.1");
    const std::vector<Target> all = targets();
    for (size_t i = 0; i < all.size(); ++i) {
      if (!wanted(all[i].c.name)) continue;
      double ms[3];
      for (int gate = 0; gate < 3; ++gate) {
        Case c = all[i].c;
        c.gate = static_cast<Gate>(gate);
        ms[gate] = time(c).median;
        if (i >= all.size() - 10) logs[gate] += std::log(ms[gate]) / 10;
      }
      const Case& c = all[i].c;
      double tokens = 0;
      for (const int64_t n : c.lengths) tokens += static_cast<double>(n);
      const double gb =
          (tokens * c.H * (10 * 128 + 2) + 8. * static_cast<double>(c.lengths.size()) * c.H * 128 * 128) *
          1e-9;
      std::printf("%-18s %8.3f %8s |     %10.4f %10.4f %10.4f | %8.0f | %.3f %.3f\n", c.name.c_str(), gb, "",
                  ms[0], ms[1], ms[2], gb / ms[0] * 1e3, all[i].must, all[i].aim);
      std::fflush(stdout);
    }
    std::printf("%-18s %8s %8s |     %10.4f %10.4f %10.4f |\n", "ten, geomean", "", "", std::exp(logs[0]),
                std::exp(logs[1]), std::exp(logs[2]));
  }
  if (mode != "time") std::printf("%d checks failed\n", failed);
  return failed != 0;
}

}  // namespace
}  // namespace kl::bench

int main(int argc, char** argv) {
  try {
    return kl::bench::run(argc > 1 ? argv[1] : "all", argc > 2 ? argv[2] : "");
  } catch (const kl::Error& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
