// The CPU kernels on every instruction set of this machine: each against the recurrence in f64, and each with
// the same bits however the work is cut. (What depends on no instruction set is in the other tests.)
#include <gtest/gtest.h>

#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_problem.h"
#include "ops/kda/kda_sweeps.h"
#include "testing/isa.h"

namespace kl {
namespace {

using testing::decode;
using testing::for_each_isa;
using testing::kda_rows;
using testing::KdaCase;
using testing::KdaIndices;
using testing::KdaProblem;
using testing::KdaResult;
using testing::prefill;
using testing::Random;
using testing::recurrence_f64;
using testing::same_bits;

constexpr double kInf = std::numeric_limits<double>::infinity();

// 5e-6: the bound of kda_test.cc, which says where it comes from.
void expect_accurate(const KdaCase& c, uint64_t seed) {
  const KdaProblem problem(c, seed);
  const KdaResult expected = problem.run(recurrence_f64, DType::f64);
  for_each_isa([&] {
    for (const auto kda : {prefill, decode}) {
      const KdaResult found = problem.run(kda);
      EXPECT_LE(problem.error(found, expected), 5e-6);
      EXPECT_TRUE(problem.others_untouched(found));
    }
  });
}

TEST(KdaIsa, GatesFromNoneToTotal) {
  const double log_decays[] = {0, -1e-4, -0.05, -0.4999, -0.5001, -5, -60, -160, -kInf};
  for (const double spread : {1., 1e-3})
    for (const double x : log_decays) {
      SCOPED_TRACE(cat("log-decay ", x, ", key spread ", spread));
      KdaCase c{.lengths = {500}, .K = 32, .V = 16, .key_spread = spread, .gate = KdaGateKind::log_decay};
      c.g = [x](Random&, int64_t, int64_t) { return x; };
      c.beta = [](Random& r, int64_t) { return 8 + r.normal(); };
      expect_accurate(c, 1);
      c.g = [&](Random& r, int64_t, int64_t) { return log_decays[r.integer(0, 8)]; };
      expect_accurate(c, 2);
    }
}

TEST(KdaIsa, GateFormulas) {
  for (const KdaGateKind kind : {KdaGateKind::softplus, KdaGateKind::bounded})
    for (const double center : {-30., -12., -4., 0., 4., 30., 200.}) {
      SCOPED_TRACE(cat(kind == KdaGateKind::softplus ? "softplus" : "bounded", " around ", center));
      KdaCase c{.lengths = {300}, .K = 40, .V = 24, .gate = kind};
      c.g = [center](Random& r, int64_t, int64_t) { return center + r.normal(); };
      expect_accurate(c, 3);
    }
}

// Dimensions and lengths around a register, a tile and a chunk of every instruction set.
TEST(KdaIsa, Sizes) {
  for (const int64_t n : {1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 64, 65, 80, 127, 129, 250, 256}) {
    SCOPED_TRACE(n);
    expect_accurate({.lengths = {n, 35}, .K = n, .V = 20}, 4);
    expect_accurate({.lengths = {50, n}, .Hv = 2, .K = 20, .V = n}, 5);
  }
}

TEST(KdaIsa, RowsOfEveryType) {
  for (const DType dtype : {DType::f32, DType::bf16, DType::f64}) {
    SCOPED_TRACE(name_of(dtype));
    KdaCase c{.lengths = {37, 5}, .H = 2, .Hv = 4, .K = 33, .V = 21, .dtype = dtype, .fused_rows = true};
    expect_accurate(c, 6);
    c.state_v_first = true, c.initial_state = false;
    expect_accurate(c, 7);
  }
}

TEST(KdaIsa, Bf16OutputsAreTheRoundedOnes) {
  const KdaProblem problem({.lengths = {37}, .K = 24, .V = 37}, 8);
  const OwnedTensor v = make_tensor(DType::f32, {37, 1, 37}), out = make_tensor(DType::bf16, {37, 1, 37});
  std::memcpy(v.tensor.data, problem.args.v.data, static_cast<size_t>(v.tensor.bytes()));
  testing::fill_nan(v.tensor.slice(0, 30, 31));
  for_each_isa([&] {
    for (const auto kda : {prefill, decode}) {
      const KdaResult f32 = problem.run([&](KdaArgs args) {
        args.v = v.tensor;
        kda(args);
      });
      testing::fill_nan(out.tensor);
      problem.run([&](KdaArgs args) {
        args.v = v.tensor, args.out = out.tensor;
        kda(args);
      });
      for (int64_t i = 0; i < out.tensor.numel(); ++i) {
        const float x = f32.out.tensor.ptr<float>()[i];
        ASSERT_EQ(out.tensor.ptr<bf16>()[i].bits, bf16(x).bits) << i;
        ASSERT_EQ(std::isnan(x), i >= 30 * 37) << i;
      }
    }
  });
}

TEST(KdaIsa, SameBitsOnAnyThreadsPackedOrAlone) {
  const KdaProblem problem({.lengths = {70, 0, 16, 33}, .H = 11, .Hv = 11, .K = 24, .V = 40}, 9);
  for_each_isa([&] {
    for (const auto kda : {kda_prefill, kda_decode}) {
      const auto on = [&](int threads) {
        return problem.run([&](const KdaArgs& args) {
          ThreadPool pool(threads);
          Ctx ctx{.pool = &pool};
          kda(ctx, args);
        });
      };
      const KdaResult alone = problem.run([&](const KdaArgs& args) {
        const int32_t* cu = args.cu_seqlens.ptr<int32_t>();
        for (int64_t n = 0; n < args.slot.size(0); ++n) {
          KdaIndices one{{0, cu[n + 1] - cu[n]}};
          KdaArgs a = kda_rows(args, cu[n], cu[n + 1]);
          a.cu_seqlens = one.tensor(), a.slot = args.slot.slice(0, n, n + 1);
          Ctx ctx;
          kda(ctx, a);
        }
      });
      for (const int threads : {1, 2, 5}) {
        const KdaResult packed = on(threads);
        EXPECT_TRUE(same_bits(packed.out.tensor, alone.out.tensor)) << threads;
        EXPECT_TRUE(same_bits(packed.state.tensor, alone.state.tensor)) << threads;
      }
    }
  });
}

// In the pool, and through scratch because checkpoints are asked for.
TEST(KdaIsa, DecodeHasTheSameBitsWhereverTheStateIs) {
  const KdaProblem problem({.lengths = {3, 1}, .Hv = 2, .K = 24, .V = 37}, 10);
  KdaIndices row{{1}}, skipped{{-1}};
  for_each_isa([&] {
    const KdaResult in_pool = problem.run(decode);
    const KdaResult in_scratch = problem.run([&](KdaArgs args) {
      args.checkpoint_row = row.tensor(), args.checkpoint_slot = skipped.tensor();
      decode(args);
    });
    EXPECT_TRUE(same_bits(in_pool.out.tensor, in_scratch.out.tensor));
    EXPECT_TRUE(same_bits(in_pool.state.tensor, in_scratch.state.tensor));
  });
}

void prefill_pairs(Ctx& ctx, const KdaArgs& args) { kda_prefill_cpu_with(KdaProducts::pairs, ctx, args); }
void prefill_tiles(Ctx& ctx, const KdaArgs& args) { kda_prefill_cpu_with(KdaProducts::tiles, ctx, args); }

// With more threads than heads, the columns of V are shared out; checkpoints and layouts go with them.
TEST(KdaIsa, SameBitsHoweverColumnsAreCut) {
  for (const bool v_first : {false, true}) {
    const KdaProblem problem({.lengths = {70, 20}, .K = 24, .V = 150, .state_v_first = v_first}, 11);
    KdaIndices row{{32}}, slot{{problem.slot_of(1)}};
    KdaIndices states{{problem.slot_of(0), -1}};
    for_each_isa([&] {
      for (const auto kda : {kda_prefill, kda_decode, prefill_pairs, prefill_tiles}) {
        if (kda == prefill_tiles && active_isa() == Isa::avx512_bf16) continue;  // has them or nothing
        const auto on = [&](int threads) {
          return problem.run([&](KdaArgs args) {
            args.slot = states.tensor();
            args.checkpoint_row = row.tensor(), args.checkpoint_slot = slot.tensor();
            ThreadPool pool(threads);
            Ctx ctx{.pool = &pool};
            kda(ctx, args);
          });
        };
        const KdaResult one = on(1);
        for (const int threads : {2, 3, 4, 16}) {
          const KdaResult many = on(threads);
          EXPECT_TRUE(same_bits(many.out.tensor, one.out.tensor)) << threads;
          EXPECT_TRUE(same_bits(many.state.tensor, one.state.tensor)) << threads;
        }
      }
    });
  }
}

TEST(KdaIsa, SegmentsHaveTheSameBitsOnAnyThreads) {
  KdaProblem problem({.lengths = {200, 31}, .H = 2, .Hv = 2, .K = 24, .V = 40}, 12);
  problem.args.segment = 48;
  KdaIndices row{{64}}, slot{{problem.slot_of(0)}}, slot_out{{-1, problem.slot_of(1)}};
  problem.args.checkpoint_row = row.tensor(), problem.args.checkpoint_slot = slot.tensor();
  problem.args.slot_out = slot_out.tensor();
  for_each_isa([&] {
    const auto on = [&](int threads) {
      return problem.run([&](const KdaArgs& args) {
        ThreadPool pool(threads);
        Ctx ctx{.pool = &pool};
        kda_prefill(ctx, args);
      });
    };
    const KdaResult one = on(1), unsplit = problem.run([](KdaArgs args) {
      args.segment = 0;
      prefill(args);
    });
    EXPECT_LE(problem.error(one, unsplit), 1e-5);  // both within 5e-6 of the definition
    for (const int threads : {2, 5}) {
      const KdaResult many = on(threads);
      EXPECT_TRUE(same_bits(many.out.tensor, one.out.tensor)) << threads;
      EXPECT_TRUE(same_bits(many.state.tensor, one.state.tensor)) << threads;
    }
  });
}

// Rounded products only where the caller allows them and the processor has them.
TEST(KdaIsa, PrecisionIsHonouredWhereTheProcessorHasBf16) {
  const KdaProblem problem({.lengths = {70}}, 13);
  for_each_isa([&] {
    const KdaResult exact = problem.run(prefill), allowed = problem.run([](const KdaArgs&args) {
      Ctx ctx{.precision = Precision::bf16};
      kda_prefill(ctx, args);
    });
    EXPECT_EQ(same_bits(exact.out.tensor, allowed.out.tensor),
              kda_products(Precision::bf16) == KdaProducts::f32);
    EXPECT_EQ(kda_products(Precision::bf16) == KdaProducts::tiles, active_isa() == Isa::amx);
    EXPECT_TRUE(kda_products(Precision::bf16) == KdaProducts::f32 || active_isa() >= Isa::avx512_bf16);
    EXPECT_LE(problem.error(allowed, exact), 4e-3);
  });
}

// The yardstick of the benchmarks does what it is compared with.
TEST(KdaIsa, ThreeSweepsAreTheRecurrence) {
  KdaCase c{.lengths = {40}, .K = 24, .V = 37, .gate = KdaGateKind::log_decay, .beta_kind = KdaBeta::value};
  c.g = [](Random& r, int64_t, int64_t) { return -r.uniform(); };
  c.beta = [](Random& r, int64_t) { return r.uniform(); };
  KdaProblem problem(c, 14);
  problem.args.l2norm = false, problem.args.scale = 1;
  for (int64_t i = 0; i < problem.args.k.numel(); ++i) problem.args.k.ptr<float>()[i] *= 0.1f;
  const KdaResult expected = problem.run(recurrence_f64, DType::f64);
  for_each_isa([&] {
    const KdaResult found = problem.run([&](const KdaArgs& a) {
      const auto rows = [](const Tensor& t) { return KdaSweeps::Rows{t.ptr<float>(), t.stride[0]}; };
      KL_ACTIVE_ISA(kda_three_sweeps)
      ({.q = rows(a.q),
        .k = rows(a.k),
        .g = rows(a.g),
        .v = rows(a.v),
        .out = rows(a.out),
        .beta = rows(a.beta),
        .T = 40,
        .K = 24,
        .V = 37,
        .state = a.state.at<float>(problem.slot_of(0), 0)});
    });
    EXPECT_LE(problem.error(found, expected), 5e-6);
  });
}

}  // namespace
}  // namespace kl
