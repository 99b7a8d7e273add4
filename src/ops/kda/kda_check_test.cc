// Wrong arguments: every message names the tensor, what was found and what was expected.
#include <gtest/gtest.h>

#include "ops/kda/kda_problem.h"

namespace kl {
namespace {

using testing::KdaIndices;
using testing::KdaProblem;

// T 70 of two sequences (20 and 50 tokens), H 2, Hv 4, K 8, V 16, 5 slots.
class KdaCheck : public ::testing::Test {
 protected:
  KdaCheck() : problem_({.lengths = {20, 50}, .H = 2, .Hv = 4, .K = 8, .V = 16}, 1) {}

  std::string message(const std::function<void(KdaArgs&)>& change) const {
    std::string found;
    problem_.run([&](KdaArgs args) {
      change(args);
      try {
        kda_check(args);
      } catch (const Error& e) {
        found = e.what();
      }
    });
    return found;
  }
  static Tensor reshaped(Tensor t, std::initializer_list<int64_t> shape) {
    t = Tensor(t.data, t.dtype, shape, t.device);
    return t;
  }
  static Tensor as(Tensor t, DType dtype) {
    t.dtype = dtype;
    return t;
  }

  KdaProblem problem_;
};

TEST_F(KdaCheck, RightArgumentsPass) {
  EXPECT_EQ(message([](KdaArgs&) {}), "");
}

TEST_F(KdaCheck, Shapes) {
  const auto expect = [&](const char* text, const std::function<void(KdaArgs&)>& change) {
    EXPECT_EQ(message(change), text);
  };
  expect("kda q: expected shape [any, any, any], found [70, 16]", [](KdaArgs& a) {
    a.q = reshaped(a.q, {70, 16});
  });
  expect("kda k: expected shape [70, 2, 8], found [70, 4, 4]", [](KdaArgs& a) {
    a.k = reshaped(a.k, {70, 4, 4});
  });
  expect("kda v: expected a multiple of the 2 query/key heads as value heads, found 1", [](KdaArgs& a) {
    a.v = reshaped(a.v, {70, 1, 64});
  });
  expect("kda v: expected shape [70, 4, 16], found [69, 4, 16]",
         [](KdaArgs& a) { a.v = a.v.slice(0, 0, 69); });
  expect("kda g: expected shape [70, 4, 8], found [70, 2, 16]", [](KdaArgs& a) {
    a.g = reshaped(a.g, {70, 2, 16});
  });
  expect("kda beta: expected shape [70, 4], found [70, 4, 1]", [](KdaArgs& a) {
    a.beta = reshaped(a.beta, {70, 4, 1});
  });
  expect("kda out: expected shape [70, 4, 16], found [35, 8, 16]", [](KdaArgs& a) {
    a.out = reshaped(a.out, {35, 8, 16});
  });
  expect("kda state: expected shape [any, 4, 16, 8], found [5, 4, 8, 16]",
         [](KdaArgs& a) { a.state_v_first = true; });
  expect("kda state: expected shape [any, 4, 8, 16], found [5, 4, 16, 8]", [](KdaArgs& a) {
    a.state = reshaped(a.state, {5, 4, 16, 8});
  });
  expect("kda gate.A_log: expected shape [4], found [2]",
         [](KdaArgs& a) { a.gate.A_log = a.gate.A_log.slice(0, 0, 2); });
  expect("kda gate.dt_bias: expected shape [4, 8], found [32]",
         [](KdaArgs& a) { a.gate.dt_bias = reshaped(a.gate.dt_bias, {32}); });
  expect("kda slot: expected shape [2], found [1]", [](KdaArgs& a) { a.slot = a.slot.slice(0, 0, 1); });
  expect("kda slot_out: expected shape [2], found [1]",
         [](KdaArgs& a) { a.slot_out = a.slot.slice(0, 0, 1); });
  expect("kda checkpoint_slot: expected shape [1], found [2]",
         [](KdaArgs& a) { a.checkpoint_row = a.slot.slice(0, 0, 1), a.checkpoint_slot = a.slot; });
  expect("kda checkpoint_row, checkpoint_slot: expected both or none, found only checkpoint_row",
         [](KdaArgs& a) { a.checkpoint_row = a.slot; });
  expect("kda cu_seqlens: expected at least one element, found none",
         [](KdaArgs& a) { a.cu_seqlens = a.cu_seqlens.slice(0, 0, 0); });
  expect("kda q: expected a key dimension of 1 to 256, found 257", [](KdaArgs& a) { a.q.shape[2] = 257; });
  expect("kda v: expected a value dimension of 1 to 256, found 0", [](KdaArgs& a) { a.v.shape[2] = 0; });
}

TEST_F(KdaCheck, MemoryTypesAndStrides) {
  const auto expect = [&](const char* text, const std::function<void(KdaArgs&)>& change) {
    EXPECT_EQ(message(change), text);
  };
  expect("kda v: expected a tensor, found none", [](KdaArgs& a) { a.v.data = nullptr; });
  expect("kda out: expected a tensor, found none", [](KdaArgs& a) { a.out.data = nullptr; });
  expect("kda slot: expected a tensor, found none", [](KdaArgs& a) { a.slot.data = nullptr; });
  expect("kda g: expected F32 or BF16 or F64, found F16", [](KdaArgs& a) { a.g = as(a.g, DType::f16); });
  expect("kda state: expected F32 or F64, found BF16",
         [](KdaArgs& a) { a.state = as(a.state, DType::bf16); });
  expect("kda cu_seqlens: expected I32 or I64, found F32",
         [](KdaArgs& a) { a.cu_seqlens = as(a.cu_seqlens, DType::f32); });
  expect("kda slot: expected I32, found I64", [](KdaArgs& a) { a.slot = as(a.slot, DType::i64); });
  expect("kda k: expected a tensor on the cpu like q, found one on the cuda",
         [](KdaArgs& a) { a.k.device = Device::cuda; });
  expect("kda k: expected a contiguous innermost dimension, found a stride of 2",
         [](KdaArgs& a) { a.k.stride[2] = 2; });
  expect("kda state: expected a contiguous innermost dimension, found a stride of 16",
         [](KdaArgs& a) { std::swap(a.state.stride[2], a.state.stride[3]); });
}

TEST_F(KdaCheck, Numbers) {
  const auto expect = [&](const char* text, const std::function<void(KdaArgs&)>& change) {
    EXPECT_EQ(message(change), text);
  };
  expect("kda gate.lower_bound: expected a number below 0, found 5",
         [](KdaArgs& a) { a.gate.kind = KdaGateKind::bounded, a.gate.lower_bound = 5; });
  expect("kda scale: expected a finite number, found inf",
         [](KdaArgs& a) { a.scale = std::numeric_limits<float>::infinity(); });
  expect("kda l2_eps: expected a number of at least 0, found -1", [](KdaArgs& a) { a.l2_eps = -1; });
  expect("kda segment: expected a multiple of 16 tokens or 0, found 40", [](KdaArgs& a) { a.segment = 40; });
}

TEST_F(KdaCheck, SequencesAndSlots) {
  const auto expect = [&](const char* text, std::vector<int32_t> cu, std::vector<int32_t> slot,
                          std::vector<int32_t> slot_out = {}) {
    KdaIndices c{cu}, s{slot}, o{slot_out};
    EXPECT_EQ(message([&](KdaArgs& a) {
                a.cu_seqlens = c.tensor(), a.slot = s.tensor();
                if (!slot_out.empty()) a.slot_out = o.tensor();
              }),
              text);
  };
  expect("", {0, 0, 70}, {4, 0});
  expect("kda cu_seqlens[0]: expected 0, found 1", {1, 20, 70}, {0, 1});
  expect("kda cu_seqlens[2]: expected at least 80 as before it, found 70", {0, 80, 70}, {0, 1});
  expect("kda cu_seqlens[2]: expected the 70 rows of q, found 69", {0, 20, 69}, {0, 1});
  expect("kda slot[1]: expected a slot below 5, the number of states, found 5", {0, 20, 70}, {0, 5});
  expect("kda slot[1]: expected a slot of its own, found slot 3 that sequence 0 writes too", {0, 20, 70},
         {3, 3});
  expect("", {0, 20, 70}, {-1, -1});
  expect("", {0, 20, 70}, {3, 3}, {-1, 2});
  expect("kda slot_out[1]: expected a slot of its own, found slot 2 that sequence 0 writes too", {0, 20, 70},
         {0, 1}, {2, 2});
  expect("kda slot_out[0]: expected a slot below 5, the number of states, found 7", {0, 20, 70}, {0, 1},
         {7, 2});
  expect("kda slot[1]: expected a slot that no other sequence writes, found slot 0 of sequence 0",
         {0, 20, 70}, {1, 0}, {0, 2});
}

TEST_F(KdaCheck, Checkpoints) {
  const auto expect = [&](const char* text, std::vector<int32_t> row, std::vector<int32_t> slot) {
    KdaIndices r{row}, s{slot};
    EXPECT_EQ(message([&](KdaArgs& a) {
                KdaIndices own{{0, 1}};
                std::memcpy(a.slot.data, own.values.data(), 2 * sizeof(int32_t));
                a.checkpoint_row = r.tensor(), a.checkpoint_slot = s.tensor();
              }),
              text);
  };
  expect("", {16, 36, 68}, {2, 3, 4});
  expect("kda checkpoint_row[0]: expected a row from 1 to 70, found 0", {0}, {2});
  expect("kda checkpoint_row[1]: expected a row from 1 to 70, found 71", {16, 71}, {2, 3});
  expect("kda checkpoint_row[1]: expected at least 36 as before it, found 16", {36, 16}, {2, 3});
  expect(
      "kda checkpoint_row[0]: expected a multiple of 16 tokens after row 20, where sequence 1 starts, found "
      "32",
      {32}, {2});
  expect("kda checkpoint_slot[1]: expected a slot below 5, the number of states, found 5", {16, 36}, {2, 5});
  expect("kda checkpoint_slot[0]: expected a slot of its own, found slot 1 that sequence 1 writes too", {16},
         {1});
  expect("", {3, 71}, {-1, -1});  // skipped
}

TEST_F(KdaCheck, DevicesOfCallAndBuild) {
  problem_.run([](KdaArgs args) {
    Ctx ctx{.device = Device::cuda};
    try {
      kda_prefill(ctx, args);
      ADD_FAILURE() << "cpu tensors went through a cuda context";
    } catch (const Error& e) {
      EXPECT_STREQ(e.what(), "kda q: expected a tensor on the cuda like the context, found one on the cpu");
    }
  });
}

// Of tensors on a GPU only the shapes are looked at.
TEST_F(KdaCheck, GpuValuesAreNotRead) {
  const auto on_gpu = [](KdaArgs& a) {
    for (Tensor* t : {&a.q, &a.k, &a.v, &a.g, &a.beta, &a.cu_seqlens, &a.out, &a.state, &a.slot,
                      &a.gate.A_log, &a.gate.dt_bias}) {
      t->device = Device::cuda;
      t->data = reinterpret_cast<void*>(16);  // must not be touched
    }
  };
  EXPECT_EQ(message(on_gpu), "");
  EXPECT_EQ(message([&](KdaArgs& a) {
              on_gpu(a);
              a.state = {};
            }),
            "kda state: expected a tensor, found none");
  EXPECT_EQ(message([&](KdaArgs& a) {
              on_gpu(a);
              a.q.dtype = DType::f64;
            }),
            "kda q: expected F32 or BF16, found F64");
#ifndef KL_CUDA
  problem_.run([&](KdaArgs args) {
    on_gpu(args);
    Ctx ctx{.device = Device::cuda};
    for (const auto kda : {kda_prefill, kda_decode}) {
      try {
        kda(ctx, args);
        ADD_FAILURE() << "a build without CUDA ran on a GPU";
      } catch (const Error& e) {
        EXPECT_NE(std::string(e.what()).find("no CUDA kernels"), std::string::npos) << e.what();
      }
    }
  });
#endif
}

}  // namespace
}  // namespace kl
