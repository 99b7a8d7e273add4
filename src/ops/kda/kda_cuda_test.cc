// The CUDA back-ends of KDA beside the f64 definition. Without a GPU every test here is skipped.
#ifdef KL_CUDA
#include <gtest/gtest.h>

#include "ops/kda/kda_cuda_case.h"

namespace kl {
namespace {

using testing::gpu::Decay;
using testing::gpu::KdaCase;
using testing::gpu::KdaProblem;
using BackEnd = void (*)(const Ctx&, const KdaArgs&);

#define KL_NEEDS_GPU() \
  if (!cuda::device_present()) GTEST_SKIP() << "no CUDA device"

Ctx cuda_ctx() {
  Ctx ctx;
  ctx.device = Device::cuda;
  return ctx;
}

// Runs twice from the same start: right, and the same bits.
void expect_right(BackEnd back_end, const KdaCase& c, double out_tolerance, double state_tolerance) {
  SCOPED_TRACE(c.name());
  KdaProblem problem(c);
  kda_check(problem.device_args());
  const KdaProblem::Reference reference = problem.reference();
  back_end(cuda_ctx(), problem.device_args());
  KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case");
  const testing::gpu::KdaErrors e = compare(problem, reference);
  EXPECT_LE(e.out, out_tolerance);
  EXPECT_LE(e.state, state_tolerance);
  EXPECT_TRUE(e.guards_intact);
  const OwnedTensor out = cuda::to_host(problem.out.device_memory.tensor);
  const OwnedTensor pool = cuda::to_host(problem.state.device_memory.tensor);
  problem.reset_device();
  back_end(cuda_ctx(), problem.device_args());
  EXPECT_TRUE(testing::same_bits(out.tensor, cuda::to_host(problem.out.device_memory.tensor).tensor));
  EXPECT_TRUE(testing::same_bits(pool.tensor, cuda::to_host(problem.state.device_memory.tensor).tensor));
}

// kda_decode() and, where it takes the case, each of its two ways.
void expect_decode_right(const KdaCase& c, double out_tolerance, double state_tolerance) {
  expect_right(cuda::kda_decode_tiles, c, out_tolerance, state_tolerance);
  if (cuda::kda_decode_pipeline_takes(KdaProblem(c).device_args()))
    expect_right(cuda::kda_decode_pipeline, c, out_tolerance, state_tolerance);
}

// Rounding a bf16 output to nearest costs 1.7e-3; the f32 recurrence adds some 1e-6 a few times over.
constexpr double kBf16Out = 2e-3, kF32 = 1e-5;

// Every gate family, with the two layouts of the state and both element types of the rows.
std::vector<KdaCase> gate_families(const KdaCase& base) {
  std::vector<KdaCase> cases;
  const auto add = [&](KdaGateKind gate, Decay decay) {
    KdaCase c = base;
    c.gate = gate, c.decay = decay, c.v_first = cases.size() % 2, c.seed = cases.size() + 1;
    c.gate_tensors = cases.size() % 4 != 3;
    cases.push_back(c);
  };
  for (const KdaGateKind gate : {KdaGateKind::softplus, KdaGateKind::bounded})
    for (const Decay decay : {Decay::production, Decay::weak, Decay::steep}) add(gate, decay);
  for (const Decay decay :
       {Decay::production, Decay::weak, Decay::steep, Decay::none, Decay::infinite, Decay::alternating})
    add(KdaGateKind::log_decay, decay);
  return cases;
}

TEST(KdaDecodeCuda, EveryGateFamily) {
  KL_NEEDS_GPU();
  for (KdaCase& c : gate_families({.lengths = {1, 1, 1, 1, 1}, .H = 3, .Hv = 3})) {
    expect_decode_right(c, kBf16Out, kF32);
    c.rows = c.gates = DType::f32;
    expect_decode_right(c, kF32, kF32);
  }
}

TEST(KdaDecodeCuda, SeveralTokens) {
  KL_NEEDS_GPU();
  for (KdaCase& c : gate_families({.lengths = {2, 0, 8, 1, 5}, .H = 2, .Hv = 2}))
    expect_decode_right(c, kBf16Out, kF32);
}

TEST(KdaDecodeCuda, EveryWidth) {
  KL_NEEDS_GPU();
  const int widths[][2] = {{64, 64}, {64, 128}, {128, 64}, {256, 256}, {256, 128}, {128, 256}, {100, 100},
                           {60, 36}, {1, 1},    {7, 250},  {33, 16},   {192, 192}, {250, 7},   {128, 40}};
  for (const auto& [K, V] : widths)
    for (const bool v_first : {false, true})
      for (const int pad : {0, 1, 8}) {
        const KdaCase c{.lengths = {1, 3, 1},
                        .K = K,
                        .V = V,
                        .gate = KdaGateKind::log_decay,
                        .rows = DType::f32,
                        .gates = DType::f32,
                        .v_first = v_first,
                        .pad = pad};
        expect_decode_right(c, kF32, kF32);
      }
}

TEST(KdaDecodeCuda, SlotsHeadsAndIndices) {
  KL_NEEDS_GPU();
  for (const bool slot_out : {false, true})
    for (const bool v_first : {false, true})
      for (const std::vector<int>& lengths : {std::vector<int>{1, 1, 1, 1, 1, 1, 1}, {0, 1, 0, 2, 0}, {}}) {
        const KdaCase c{.lengths = lengths,
                        .H = 2,
                        .Hv = 6,
                        .gates = DType::f32,
                        .v_first = v_first,
                        .pad = 4,
                        .i64 = true,
                        .slot_out = slot_out,
                        .no_state_sometimes = true};
        expect_decode_right(c, kBf16Out, kF32);
      }
}

TEST(KdaDecodeCuda, BetaScaleAndNormOptions) {
  KL_NEEDS_GPU();
  for (const KdaBeta beta : {KdaBeta::value, KdaBeta::sigmoid, KdaBeta::sigmoid2})
    for (const bool l2norm : {false, true}) {
      const KdaCase c{.lengths = {1, 4}, .beta = beta, .l2norm = l2norm, .scale = 0.25f};
      expect_decode_right(c, kBf16Out, kF32);
    }
}

TEST(KdaDecodeCuda, Bf16Pool) {
  KL_NEEDS_GPU();
  for (const bool v_first : {false, true})
    for (const int K : {64, 100, 128, 256}) {
      // The pool is rounded to bf16 once, at the end.
      const KdaCase c{.lengths = {1, 1, 4}, .K = K, .state = DType::bf16, .v_first = v_first};
      expect_decode_right(c, kBf16Out, kBf16Out);
    }
}

TEST(KdaDecodeCuda, LongSequencesAndCheckpoints) {
  KL_NEEDS_GPU();
  const KdaCase c{.lengths = {40, 3, 100},
                  .slot_out = true,
                  .checkpoints = {{0, 16}, {0, 32}, {2, 16}, {2, 48}, {2, 64}, {2, 96}}};
  expect_decode_right(c, kBf16Out, kF32);
}

TEST(KdaDecodeCuda, ManySequencesKeepTheirBits) {
  KL_NEEDS_GPU();
  // A sequence alone and the same sequence in company: narrow tiles, wide tiles.
  KdaProblem many({.lengths = std::vector<int>(200, 1), .H = 4, .Hv = 4, .seed = 5});
  cuda::kda_decode_tiles(cuda_ctx(), many.device_args());
  const OwnedTensor together = cuda::to_host(many.out.device_memory.tensor);
  many.reset_device();
  KdaArgs one = many.device_args();
  const int64_t row = 123;
  for (Tensor* t : {&one.q, &one.k, &one.v, &one.g, &one.beta, &one.out}) *t = t->slice(0, row, row + 1);
  one.cu_seqlens = one.cu_seqlens.slice(0, 0, 2);
  one.slot = one.slot.slice(0, row, row + 1);
  cuda::kda_decode(cuda_ctx(), one);
  const OwnedTensor alone = cuda::to_host(many.out.device_memory.tensor);
  EXPECT_TRUE(testing::same_bits(together.tensor[row], alone.tensor[row]));
}

TEST(KdaDecodeCuda, PipelineWithManyItemsABlock) {
  KL_NEEDS_GPU();
  // Every block goes around its ring several times, over idle sequences and such without a state.
  for (const int D : {64, 128})
    for (const bool v_first : {false, true}) {
      KdaCase c{.H = 2, .Hv = 4, .K = D, .V = D, .v_first = v_first, .no_state_sometimes = true};
      // 7 and 4 items a block, for rings of 6 and 3 slots.
      const int blocks = std::min(132, cuda::current_device().multiprocessors);
      c.lengths.assign(static_cast<size_t>((D == 64 ? 15 : 4) * blocks / 4), 1);
      for (size_t n = 0; n < c.lengths.size(); n += 11) c.lengths[n] = static_cast<int>(n % 5);
      const KdaProblem problem(c);
      ASSERT_TRUE(cuda::kda_decode_pipeline_takes(problem.device_args()) || cuda::current_device().arch < 90);
      expect_decode_right(c, kBf16Out, kF32);
    }
}

// By chunks: three bf16 products of halves leave 2^-16, and every chunk adds to it.
constexpr double kChunked = 1e-4;

TEST(KdaPrefillCuda, EveryGateFamily) {
  KL_NEEDS_GPU();
  for (KdaCase& c : gate_families({.lengths = {70, 16, 1, 33}, .H = 2, .Hv = 2})) {
    expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kChunked);
    c.rows = c.gates = DType::f32;
    expect_right(cuda::kda_prefill_chunks, c, kChunked, kChunked);
  }
}

TEST(KdaPrefillCuda, EveryWidthAndLayout) {
  KL_NEEDS_GPU();
  const int widths[][2] = {{64, 64}, {256, 256}, {128, 256}, {256, 64}, {100, 100},
                           {1, 1},   {7, 250},   {250, 7},   {192, 130}};
  for (const auto& [K, V] : widths)
    for (const bool v_first : {false, true}) {
      const KdaCase c{.lengths = {37, 16},
                      .K = K,
                      .V = V,
                      .gate = KdaGateKind::log_decay,
                      .rows = DType::f32,
                      .gates = DType::f32,
                      .v_first = v_first,
                      .pad = 3};
      expect_right(cuda::kda_prefill_chunks, c, kChunked, kChunked);
    }
}

TEST(KdaPrefillCuda, SlotsHeadsAndCheckpoints) {
  KL_NEEDS_GPU();
  for (const bool slot_out : {false, true})
    for (const std::vector<int>& lengths : {std::vector<int>{0, 1, 15, 16, 17, 0, 31, 32, 33}, {}}) {
      KdaCase c{.lengths = lengths,
                .H = 2,
                .Hv = 6,
                .pad = 4,
                .i64 = true,
                .slot_out = slot_out,
                .no_state_sometimes = true};
      expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kChunked);
      if (lengths.empty()) continue;
      c.checkpoints = {{3, 16}, {4, 16}, {7, 16}, {7, 32}, {8, 16}, {8, 32}};
      expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kChunked);
    }
}

TEST(KdaPrefillCuda, BetaScaleNormAndBf16Pool) {
  KL_NEEDS_GPU();
  for (const KdaBeta beta : {KdaBeta::value, KdaBeta::sigmoid, KdaBeta::sigmoid2})
    for (const bool l2norm : {false, true}) {
      KdaCase c{.lengths = {50}, .beta = beta, .l2norm = l2norm, .scale = 0.25f};
      expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kChunked);
      c.state = DType::bf16, c.v_first = true;
      expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kBf16Out);
    }
}

TEST(KdaPrefillCuda, NoEpsilon) {
  KL_NEEDS_GPU();
  // Tokens past the end of the last chunk are 0 and have no length to be divided by.
  expect_right(cuda::kda_prefill_chunks, {.lengths = {37, 5}, .l2_eps = 0}, kBf16Out, kChunked);
}

TEST(KdaPrefillCuda, EqualKeysWithoutDecay) {
  KL_NEEDS_GPU();
  // The state forgets only through the keys, all equal, with beta near 1: an inverse in half precision fails
  // here.
  const KdaCase c{.lengths = {2000},
                  .H = 1,
                  .Hv = 1,
                  .gate = KdaGateKind::log_decay,
                  .decay = testing::gpu::Decay::none,
                  .equal_keys = true};
  expect_right(cuda::kda_prefill_chunks, c, kBf16Out, kChunked);
}

TEST(KdaPrefillCuda, LongSequenceWithWeakDecay) {
  KL_NEEDS_GPU();
  const KdaCase c{.lengths = {3000}, .H = 1, .Hv = 1, .decay = testing::gpu::Decay::weak, .rows = DType::f32};
  expect_right(cuda::kda_prefill_chunks, c, 2 * kChunked, 2 * kChunked);
}

TEST(KdaPrefillCuda, AHeadOfNansLeavesTheOthersAlone) {
  KL_NEEDS_GPU();
  // Where sequences are cut, heads are taken in the order of their gates' parameters.
  constexpr int64_t kTokens = 4096, kHeads = 16, kBad = 5, kV = 128;
  KdaProblem problem({.lengths = {kTokens}, .H = kHeads, .Hv = kHeads});
  KdaArgs a = problem.device_args();
  const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {kda_workspace_bytes(a)});
  a.workspace = workspace.tensor;
  Ctx ctx = cuda_ctx();
  const auto run = [&] {
    kda_prefill(ctx, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case");
    return std::pair(cuda::to_host(problem.out.device_memory.tensor),
                     cuda::to_host(problem.state.device_memory.tensor));
  };
  const auto [right, right_states] = run();
  problem.reset_device();
  const float nan = std::nanf("");
  KL_CUDA_CHECK(
      cudaMemcpy(static_cast<float*>(a.gate.A_log.data) + kBad, &nan, sizeof nan, cudaMemcpyHostToDevice),
      "spoiling a head");
  const auto [spoilt, spoilt_states] = run();
  ASSERT_EQ(right.tensor.bytes(), kTokens * kHeads * kV * 2);
  for (int64_t t = 0; t < kTokens; ++t)
    for (int64_t h = 0; h < kHeads; ++h) {
      if (h == kBad) continue;
      ASSERT_TRUE(testing::same_bits(right.tensor[t][h], spoilt.tensor[t][h]))
          << "token " << t << " head " << h;
    }
  for (int64_t slot = 0; slot < right_states.tensor.size(0); ++slot)
    for (int64_t h = 0; h < kHeads; ++h)
      EXPECT_TRUE(h == kBad ||
                  testing::same_bits(right_states.tensor[slot][h], spoilt_states.tensor[slot][h]))
          << "state of slot " << slot << " head " << h;
}

// With batch_invariant, through the doors: each sequence of a pack alone, bit for bit.
void expect_packed_equals_alone(void (*door)(Ctx&, const KdaArgs&), const KdaCase& c) {
  SCOPED_TRACE(c.name());
  KdaProblem problem(c);
  Ctx ctx = cuda_ctx();
  const auto run = [&](KdaArgs a) {
    a.batch_invariant = true;
    const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {kda_workspace_bytes(a)});
    a.workspace = workspace.tensor;
    door(ctx, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case");
  };
  run(problem.device_args());
  const OwnedTensor out = cuda::to_host(problem.out.device_memory.tensor);
  const OwnedTensor pool = cuda::to_host(problem.state.device_memory.tensor);
  problem.reset_device();
  int64_t begin = 0;
  for (size_t n = 0; n < c.lengths.size(); begin += c.lengths[n++]) {
    int32_t ends[2] = {0, c.lengths[n]};
    const cuda::DeviceTensor cu = cuda::to_device(Tensor(ends, DType::i32, {2}));
    KdaArgs a = problem.device_args();
    for (Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.out}) *t = t->slice(0, begin, begin + c.lengths[n]);
    const int64_t sequence = static_cast<int64_t>(n);
    a.cu_seqlens = cu.tensor, a.slot = a.slot.slice(0, sequence, sequence + 1);
    run(a);
  }
  EXPECT_TRUE(testing::same_bits(out.tensor, cuda::to_host(problem.out.device_memory.tensor).tensor));
  EXPECT_TRUE(testing::same_bits(pool.tensor, cuda::to_host(problem.state.device_memory.tensor).tensor));
}

TEST(KdaBatchInvariantCuda, PrefillAloneEqualsPacked) {
  KL_NEEDS_GPU();
  for (const KdaGateKind gate : {KdaGateKind::softplus, KdaGateKind::bounded})
    for (const int K : {128, 100}) {  // the Hopper kernel and the portable one
      KdaCase c{.lengths = {2100, 1, 0, 17, 700, 5000}, .K = K, .V = K, .gate = gate};
      expect_packed_equals_alone(kda_prefill, c);
      c.H = c.Hv = 17, c.lengths = {1500, 1, 0, 17, 300};  // weak gates are not cut with so many heads
      expect_packed_equals_alone(kda_prefill, c);
    }
}

TEST(KdaBatchInvariantCuda, ShortSequencesAloneEqualPacked) {
  KL_NEEDS_GPU();
  // Enough of them that the batch as a whole would be stepped through, a long one alone would not; and that
  // decode would take the pipeline.
  std::vector<int> lengths(150, 1);
  lengths[40] = 100;
  for (const int K : {128, 100})
    expect_packed_equals_alone(kda_prefill, {.lengths = lengths, .H = 4, .Hv = 4, .K = K, .V = K});
  expect_packed_equals_alone(kda_decode, {.lengths = std::vector<int>(150, 1), .H = 4, .Hv = 4});
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
