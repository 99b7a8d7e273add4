// The Hopper prefill of KDA beside the f64 definition: every way that its items take, in cases small enough
// for the emulation (testing/cuda_on_cpu). bench/kda_bench_checks.cuh has long ones. Skipped without a GPU of
// architecture 9.0.
#ifdef KL_CUDA
#include <gtest/gtest.h>

#include "ops/kda/kda_cuda_case.h"

namespace kl {
namespace {

using testing::gpu::Decay;
using testing::gpu::KdaCase;
using testing::gpu::KdaProblem;

#define KL_NEEDS_HOPPER()                                           \
  if (!cuda::device_present() || cuda::current_device().arch != 90) \
  GTEST_SKIP() << "no GPU of architecture 9.0"

// Rows, triangles and the state are rounded to bf16 where they enter products, outputs once more.
constexpr double kHopper = 5e-3;

enum class Cut { yes, no, any };

// Right, and twice the same bits, whatever the workspace held.
void expect_right(const KdaCase& c, Cut cut, double tolerance = kHopper) {
  SCOPED_TRACE(c.name());
  KdaProblem problem(c);
  KdaArgs a = problem.device_args();
  kda_check(a);
  ASSERT_TRUE(cuda::kda_prefill_sm90_takes(a));
  const int64_t bytes = cuda::kda_prefill_sm90_workspace(a);
  if (cut != Cut::any) {
    EXPECT_EQ(bytes > 4 * c.K * c.K, cut == Cut::yes) << bytes << " bytes of workspace";
  }
  const cuda::DeviceTensor workspace = cuda::device_tensor(DType::u8, {bytes});
  a.workspace = workspace.tensor;
  const auto run = [&] {
    Ctx ctx;
    ctx.device = Device::cuda;
    cuda::kda_prefill_sm90(ctx, a);
    KL_CUDA_CHECK(cudaDeviceSynchronize(), "running a case");
  };
  run();
  const testing::gpu::KdaErrors e = compare(problem, problem.reference());
  EXPECT_LE(e.out, tolerance);
  EXPECT_LE(e.state, tolerance);
  EXPECT_TRUE(e.guards_intact);
  const OwnedTensor out = cuda::to_host(problem.out.device_memory.tensor);
  const OwnedTensor pool = cuda::to_host(problem.state.device_memory.tensor);
  problem.reset_device();
  run();
  EXPECT_TRUE(testing::same_bits(out.tensor, cuda::to_host(problem.out.device_memory.tensor).tensor));
  EXPECT_TRUE(testing::same_bits(pool.tensor, cuda::to_host(problem.state.device_memory.tensor).tensor));
}

TEST(KdaHopperCuda, EveryLength) {
  KL_NEEDS_HOPPER();
  for (const int T : {0, 1, 15, 16, 17, 33, 130})
    for (const int D : {64, 128}) {
      const KdaCase c{.lengths = {T}, .H = 1, .Hv = 1, .K = D, .V = D, .v_first = T % 2 == 1};
      expect_right(c, T < 100 ? Cut::no : Cut::any);
    }
}

// One sequence and few heads are cut. Bounded gates have probes: with the usual ones these close, with weak
// ones they are left open and somebody follows the transitions to their ends. Of the others transitions are
// items of their own.
TEST(KdaHopperCuda, CutSequences) {
  KL_NEEDS_HOPPER();
  for (const int D : {64, 128})
    for (const KdaGateKind gate : {KdaGateKind::softplus, KdaGateKind::bounded})
      for (const Decay decay : {Decay::production, Decay::weak, Decay::steep}) {
        KdaCase c{.lengths = {600}, .H = 1, .Hv = 2, .K = D, .V = D, .gate = gate, .decay = decay};
        c.gates = decay == Decay::weak ? DType::f32 : DType::bf16, c.v_first = D == 64;
        expect_right(c, Cut::yes, decay == Decay::weak ? 2 * kHopper : kHopper);
      }
}

// Segments long enough that heads are put in the order in which they are expected to forget.
TEST(KdaHopperCuda, HeadsInTheOrderOfTheirGates) {
  KL_NEEDS_HOPPER();
  const KdaCase c{.lengths = {1300}, .H = 3, .Hv = 3, .K = 64, .V = 64};
  expect_right(c, Cut::yes);
}

TEST(KdaHopperCuda, LogDecays) {
  KL_NEEDS_HOPPER();
  for (const Decay decay :
       {Decay::production, Decay::steep, Decay::none, Decay::infinite, Decay::alternating}) {
    KdaCase c{.lengths = {300}, .H = 1, .Hv = 1, .gate = KdaGateKind::log_decay, .decay = decay};
    c.gates = decay == Decay::infinite || decay == Decay::steep ? DType::f32 : DType::bf16;
    expect_right(c, Cut::any, decay == Decay::none ? 2 * kHopper : kHopper);
  }
}

TEST(KdaHopperCuda, SeveralSequencesAndSlots) {
  KL_NEEDS_HOPPER();
  for (const KdaGateKind gate : {KdaGateKind::softplus, KdaGateKind::bounded})
    for (const bool slot_out : {false, true}) {
      const KdaCase c{.lengths = {200, 0, 330, 17},
                      .H = 1,
                      .Hv = 2,
                      .gate = gate,
                      .v_first = slot_out,
                      .pad = 8,
                      .i64 = slot_out,
                      .slot_out = slot_out,
                      .no_state_sometimes = true};
      expect_right(c, Cut::any);
    }
}

// With checkpoints sequences stay whole.
TEST(KdaHopperCuda, Checkpoints) {
  KL_NEEDS_HOPPER();
  const KdaCase c{
      .lengths = {100, 48}, .slot_out = true, .checkpoints = {{0, 16}, {0, 32}, {0, 96}, {1, 16}, {1, 48}}};
  expect_right(c, Cut::no);
}

TEST(KdaHopperCuda, BetaScaleNormAndBf16Pool) {
  KL_NEEDS_HOPPER();
  for (const KdaBeta beta : {KdaBeta::value, KdaBeta::sigmoid, KdaBeta::sigmoid2})
    for (const bool l2norm : {false, true}) {
      KdaCase c{.lengths = {50}, .K = 64, .V = 64, .beta = beta, .l2norm = l2norm, .scale = 0.25f};
      c.gate_tensors = l2norm;
      if (beta == KdaBeta::value) c.state = DType::bf16;
      expect_right(c, Cut::no);
    }
}

}  // namespace
}  // namespace kl
#endif  // KL_CUDA
