// Times KDA decode, its fused step, replay decode and the portable prefill on the GPU and prints one table:
// time of one step, bandwidth, and its share of the copy bandwidth measured in the same run. Inputs in bf16,
// softplus gate, all fusions on; state pools rotate through more memory than the L2 cache holds, slots are in
// a random order.
//
//   kda_decode_cuda_bench [a part of a row's name, to run only such rows]
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>

#include "ops/kda/kda_cuda.h"
#include "testing/cuda_bench.h"
#include "testing/random.h"

namespace kl {
namespace {

// Data of one launch out of several that take turns.
struct Step {
  cuda::DeviceTensor q, k, v, g, beta, out, out_gate, slot;
};

// bf16 normal numbers, repeated every million elements: making gigabytes of them takes longer than the
// benchmark.
cuda::DeviceTensor random_rows(std::initializer_list<int64_t> dims) {
  static const OwnedTensor block = [] {
    testing::Random random(7);
    return testing::random_normal(DType::bf16, {1 << 20}, random);
  }();
  cuda::DeviceTensor t = cuda::device_tensor(DType::bf16, dims);
  const size_t step = static_cast<size_t>(block.tensor.bytes());
  for (size_t at = 0; at < t.buffer.size(); at += step)
    KL_CUDA_CHECK(cudaMemcpy(static_cast<char*>(t.buffer.data()) + at, block.tensor.data,
                             std::min(step, t.buffer.size() - at), cudaMemcpyHostToDevice),
                  "filling rows");
  return t;
}

struct DecodeBench {
  int B, H, D, tokens;
  bool v_first;
  DType state;
  std::vector<Step> steps;
  cuda::DeviceTensor pool, cu, A_log, dt_bias, norm_weight;
  cuda::DeviceTensor conv_weight[3], conv_state[3];  // of q, k, v
  cuda::DeviceTensor keys, decays, deltas, fill;     // of replay decode; fill: a row for each count

  DecodeBench(int B, int H, int D, int tokens, bool v_first, DType state)
      : B(B), H(H), D(D), tokens(tokens), v_first(v_first), state(state) {
    testing::Random random(1);
    const int64_t per_step = int64_t(B) * H * D * D * size_of(state);
    const int64_t T = int64_t(B) * tokens, of_rows = 5 * T * H * D * 2;
    const int64_t turns = std::max<int64_t>(2, (int64_t(1) << 30) / (per_step + of_rows));
    const int64_t slots = turns * B;
    // The pool is filled on the device by a repeated copy of one random slot: generating gigabytes takes too
    // long.
    const OwnedTensor slot_content = testing::random_normal(state, {H, D, D}, random);
    pool = cuda::device_tensor(state, {slots, H, D, D});
    for (int64_t s = 0; s < slots; ++s)
      KL_CUDA_CHECK(cudaMemcpy(pool.tensor.slice(0, s, s + 1).data, slot_content.tensor.data,
                               static_cast<size_t>(slot_content.tensor.bytes()), cudaMemcpyHostToDevice),
                    "filling the pool");
    std::vector<int32_t> order(static_cast<size_t>(slots));
    std::iota(order.begin(), order.end(), 0);
    for (int64_t i = slots - 1; i > 0; --i)
      std::swap(order[static_cast<size_t>(i)], order[static_cast<size_t>(random.integer(0, i))]);
    std::vector<int32_t> rows(static_cast<size_t>(B) + 1);
    for (size_t n = 0; n < rows.size(); ++n) rows[n] = static_cast<int32_t>(n) * tokens;
    cu = cuda::to_device(Tensor(rows.data(), DType::i32, {B + 1}));
    A_log = cuda::to_device(testing::random_normal(DType::f32, {H}, random).tensor);
    dt_bias = cuda::to_device(testing::random_normal(DType::f32, {H, D}, random, 1, -4).tensor);
    norm_weight = cuda::to_device(testing::random_normal(DType::f32, {D}, random).tensor);
    for (int i = 0; i < 3; ++i) {
      conv_weight[i] =
          cuda::to_device(testing::random_normal(DType::f32, {H * D, kStepTaps}, random, 0.5).tensor);
      conv_state[i] = cuda::device_tensor(DType::f32, {slots, H * D, kStepTaps - 1}, 0x3c);
    }
    for (cuda::DeviceTensor* t : {&keys, &decays, &deltas})  // every element 0.0115
      *t = cuda::device_tensor(DType::f32, {slots, H, kMostRecords, D}, 0x3c);
    std::vector<int32_t> counts(static_cast<size_t>(kMostRecords * B));
    for (size_t i = 0; i < counts.size(); ++i) counts[i] = static_cast<int32_t>(i) / B;
    fill = cuda::to_device(Tensor(counts.data(), DType::i32, {kMostRecords, B}));
    for (int64_t i = 0; i < turns; ++i) {
      Step s;
      s.q = random_rows({T, H, D});
      s.k = random_rows({T, H, D});
      s.v = random_rows({T, H, D});
      s.g = random_rows({T, H, D});
      s.beta = random_rows({T, H});
      s.out_gate = random_rows({T, H, D});
      s.out = cuda::device_tensor(DType::bf16, {T, H, D});
      s.slot = cuda::to_device(Tensor(order.data() + i * B, DType::i32, {B}));
      steps.push_back(std::move(s));
    }
  }

  KdaArgs args(int turn) const {
    const Step& s = steps[static_cast<size_t>(turn) % steps.size()];
    KdaArgs a;
    a.q = s.q.tensor, a.k = s.k.tensor, a.v = s.v.tensor, a.g = s.g.tensor, a.beta = s.beta.tensor;
    a.out = s.out.tensor, a.slot = s.slot.tensor, a.cu_seqlens = cu.tensor, a.state = pool.tensor;
    a.gate = {.kind = KdaGateKind::softplus, .A_log = A_log.tensor, .dt_bias = dt_bias.tensor};
    a.state_v_first = v_first;
    return a;
  }

  KdaStepArgs step_args(int turn) const {
    KdaStepArgs a;
    a.kda = args(turn);
    a.kda.cu_seqlens = Tensor();
    StepConv* const convs[] = {&a.q, &a.k, &a.v};
    for (int i = 0; i < 3; ++i) *convs[i] = {conv_weight[i].tensor, conv_state[i].tensor};
    a.out_gate = steps[static_cast<size_t>(turn) % steps.size()].out_gate.tensor;
    a.norm_weight = norm_weight.tensor;
    return a;
  }
  // Every slot's ring moves on by one record each time that its turn comes.
  KdaReplayArgs replay_args(int i) const {
    KdaReplayArgs a;
    a.kda = args(i);
    a.kda.cu_seqlens = Tensor();
    a.keys = keys.tensor, a.decays = decays.tensor, a.deltas = deltas.tensor;
    a.fill = fill.tensor[static_cast<int64_t>(static_cast<size_t>(i) / steps.size()) % kMostRecords];
    return a;
  }
  // Beside bytes(): convolution states twice, their weights and the output gate once.
  double bytes_of_fusion() const {
    return 2. * B * 3 * H * D * 3 * 4 + 3. * H * D * kStepTaps * 4 + 2. * B * H * D;
  }

  // The least that has to move: the state twice, each operand once.
  double bytes() const {
    const double rows = 5. * B * tokens * H * D * 2 + 2. * B * tokens * H;
    return 2. * B * H * D * D * size_of(state) + rows;
  }
};

void print_row(const std::string& name, const DecodeBench& bench, double bytes, double bandwidth,
               const std::function<void(const Ctx&, int)>& decode, int rounds = 1) {
  Ctx ctx;
  ctx.device = Device::cuda;
  const int turns = static_cast<int>(bench.steps.size());
  // Whole rounds of all turns, some 200 steps or more.
  const int least = bench.tokens > 100 ? 1 : 200, round = turns * rounds;
  const int repetitions = (least + round - 1) / round * round;
  const testing::Timing t = testing::time_graph(repetitions, 15, [&](int i, cudaStream_t stream) {
    ctx.stream = stream;
    decode(ctx, i);
  });
  const double rate = bytes / t.median;
  std::printf("%-36s %9.2f us  (%.2f .. %.2f)  %7.1f GB/s  %5.1f %% of copy\n", name.c_str(), t.median * 1e6,
              t.low * 1e6, t.high * 1e6, rate * 1e-9, 100 * rate / bandwidth);
  std::fflush(stdout);
}

int run(const char* filter) {
  const double bandwidth = testing::copy_bandwidth();
  std::printf("%s, copy %.1f GB/s (read and written bytes)\n", testing::device_name().c_str(),
              bandwidth * 1e-9);
  struct Row {
    int B, H, D, tokens;
    bool v_first;
    DType state;
  };
  std::vector<Row> rows;
  for (const int B : {1, 2, 4, 8, 16, 64, 256})
    for (const bool v_first : {false, true}) rows.push_back({B, 32, 128, 1, v_first, DType::f32});
  for (const int H : {12, 96}) rows.push_back({1, H, 128, 1, false, DType::f32});
  for (const bool v_first : {false, true}) rows.push_back({256, 32, 128, 1, v_first, DType::bf16});
  for (const int tokens : {2, 4, 8}) rows.push_back({64, 32, 128, tokens, false, DType::f32});
  rows.push_back({64, 32, 64, 1, false, DType::f32});
  for (const Row& r : rows) {
    char name[80];
    std::snprintf(name, sizeof name, "B%d H%d D%d T%d %s %s", r.B, r.H, r.D, r.tokens,
                  r.v_first ? "[V,K]" : "[K,V]", r.state == DType::bf16 ? "bf16" : "f32");
    if (std::strstr(name, filter) == nullptr) continue;
    const DecodeBench bench(r.B, r.H, r.D, r.tokens, r.v_first, r.state);
    print_row(std::string(name) + " tiles", bench, bench.bytes(), bandwidth,
              [&](const Ctx& ctx, int i) { cuda::kda_decode_tiles(ctx, bench.args(i)); });
    if (!cuda::kda_decode_pipeline_takes(bench.args(0))) continue;
    print_row(std::string(name) + " pipeline", bench, bench.bytes(), bandwidth,
              [&](const Ctx& ctx, int i) { cuda::kda_decode_pipeline(ctx, bench.args(i)); });
    if (r.tokens > 1) continue;
    print_row(std::string(name) + " fused step", bench, bench.bytes() + bench.bytes_of_fusion(), bandwidth,
              [&](const Ctx& ctx, int i) { cuda::kda_step_pipeline(ctx, bench.step_args(i)); });
    if (r.B <= 8 && cuda::kda_step_tiles_takes(bench.step_args(0)))
      print_row(std::string(name) + " fused step, tiles", bench, bench.bytes() + bench.bytes_of_fusion(),
                bandwidth, [&](const Ctx& ctx, int i) { cuda::kda_step_tiles(ctx, bench.step_args(i)); });
    // Beside the bytes of plain decode: 100 % would be its floor. A mean over a whole cycle of the ring,
    // every fill from 0 to L - 1, the step that folds included.
    if (r.state == DType::f32 && r.B >= 8) {
      const auto replay = [&](const char* way, void (*kernel)(const Ctx&, const KdaReplayArgs&)) {
        print_row(
            std::string(name) + way, bench, bench.bytes(), bandwidth,
            [&](const Ctx& ctx, int i) { kernel(ctx, bench.replay_args(i)); },
            static_cast<int>(kMostRecords));
      };
      replay(" replay tiles", cuda::kda_replay_tiles);
      if (cuda::kda_replay_pipeline_takes(bench.replay_args(0)))
        replay(" replay pipeline", cuda::kda_replay_pipeline);
    }
  }
  for (const int H : {32, 96}) {
    const std::string name = "B1 H" + std::to_string(H) + " D128 T8192 [K,V] f32 portable prefill";
    if (std::strstr(name.c_str(), filter) == nullptr) continue;
    const DecodeBench bench(1, H, 128, 8192, false, DType::f32);
    print_row(name, bench, bench.bytes(), bandwidth,
              [&](const Ctx& ctx, int i) { cuda::kda_prefill_chunks(ctx, bench.args(i)); });
  }
  std::printf("copy again %.1f GB/s\n", testing::copy_bandwidth() * 1e-9);
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
