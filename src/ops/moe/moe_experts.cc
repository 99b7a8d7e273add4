// moe_experts on the CPU: tokens are sorted by expert, so that an expert's weights are read once for all who
// chose it and an expert that nobody chose costs nothing.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "ops/moe/moe_cpu.h"
#include "simd/gemm.h"
#include "simd/gemm_bf16.h"
#include "simd/scratch.h"

namespace kl {
namespace {

// Rows of an expert that are computed together, as they come and rounded: with 2304 columns, 432 and 576 KiB
// of x stay in a core's second-level cache.
constexpr int64_t kExactRows = 48;
static_assert(kExactRows <= kExpertRows);

constexpr int64_t kTokens = 1024;  // at once: bounds the scratch to top_k · kTokens · (D + I) floats

// A pair (token t, choice j) is a row of the sorted arrays.
struct Sorted {
  struct Block {
    int64_t expert, row, rows;
    int64_t packed;  // rows of the blocks before it, each filled up to whole groups of packed ones
  };
  std::vector<int32_t> row_of;    // [T · top_k]: row of pair (t, j)
  std::vector<int32_t> token_of;  // [T · top_k]: token of a row
  std::vector<Block> blocks;      // rows of one expert
  int64_t packed = 0;             // rows of all blocks, filled up
};

Sorted sort_by_expert(const Tensor& experts, int64_t E, int64_t block_rows) {
  const int64_t T = experts.size(0), top_k = experts.size(1);
  std::vector<int32_t> first(static_cast<size_t>(E) + 1);  // row where an expert begins
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < top_k; ++j) ++first[*experts.at<int32_t>(t, j) + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());

  Sorted s;
  for (int64_t e = 0; e < E; ++e)
    for (int64_t row = first[e]; row < first[e + 1]; row += block_rows) {
      const int64_t rows = std::min<int64_t>(block_rows, first[e + 1] - row);
      s.blocks.push_back({e, row, rows, s.packed});
      s.packed += packed_bf16_rows(rows);
    }
  s.row_of.resize(static_cast<size_t>(T * top_k)), s.token_of.resize(s.row_of.size());
  for (int64_t t = 0; t < T; ++t)
    for (int64_t j = 0; j < top_k; ++j) {
      const int32_t row = first[*experts.at<int32_t>(t, j)]++;
      s.row_of[t * top_k + j] = row, s.token_of[row] = static_cast<int32_t>(t);
    }
  return s;
}

// body(block, begin, end) for pieces [begin, end) of [0, n) of every block; products: multiply-adds of one of
// n for a row; task_columns(rows, products) says how many of n are worth a task.
template <class Body>
void for_each_piece(ThreadPool* pool, const std::vector<Sorted::Block>& blocks, int64_t n, int64_t products,
                    int64_t (*task_columns)(int64_t, int64_t), Body&& body) {
  struct Piece {
    const Sorted::Block* block;
    int64_t begin, end;
  };
  std::vector<Piece> pieces;
  int64_t all = 0;
  for (const Sorted::Block& b : blocks) {
    const int64_t size = task_columns(b.rows, products);
    for (int64_t i = 0; i < n; i += size) pieces.push_back({&b, i, std::min(n, i + size)});
    all += b.rows * n * products;
  }
  // Little work is done sooner than other threads wake up.
  parallel_for(all <= kGemmTask ? nullptr : pool, static_cast<int64_t>(pieces.size()), 1,
               [&](int64_t i, int64_t) { body(*pieces[i].block, pieces[i].begin, pieces[i].end); });
}

const void* row_of_weight(const Tensor& w, int64_t row) {
  return static_cast<const char*>(w.data) + row * w.stride[0] * size_of(w.dtype);
}

bool all_bf16(std::span<const ExpertWeights> experts) {
  return std::all_of(experts.begin(), experts.end(), [](const ExpertWeights& w) {
    return w.w1.dtype == DType::bf16 && w.w3.dtype == DType::bf16 && w.w2.dtype == DType::bf16;
  });
}

// The blocks' rows of a [.., columns], rounded.
const bf16* pack_blocks(Ctx& ctx, const Sorted& sorted, const float* a, int64_t columns, Scratch& scratch) {
  bf16* const packed = scratch.b16(sorted.packed * packed_bf16_columns(columns));
  parallel_for(ctx.pool, static_cast<int64_t>(sorted.blocks.size()), 1, [&](int64_t i, int64_t) {
    const Sorted::Block& b = sorted.blocks[i];
    pack_bf16(a + b.row * columns, columns, b.rows, columns,
              packed + b.packed * packed_bf16_columns(columns));
  });
  return packed;
}

void run(Ctx& ctx, const MoeExpertsArgs& a, int64_t I, bool rounded) {
  const int64_t T = a.x.size(0), D = a.x.size(1), top_k = a.experts.size(1);
  const Sorted sorted = sort_by_expert(a.experts, static_cast<int64_t>(a.weights_of.size()),
                                       rounded ? std::min(kExpertRows, gemm_bf16_most_rows()) : kExactRows);
  const auto task_columns = rounded ? gemm_bf16_task_columns : gemm_task_columns;
  Scratch scratch(ctx);
  float* const h = scratch.f32(T * top_k * I);
  float* const rows = scratch.f32(T * top_k * D);  // the experts' inputs, later their outputs

  parallel_for(ctx.pool, T * top_k, kExactRows, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      std::memcpy(rows + row * D, a.x.at<float>(sorted.token_of[row]),
                  static_cast<size_t>(D) * sizeof(float));
  });

  const bf16* const x16 = rounded ? pack_blocks(ctx, sorted, rows, D, scratch) : nullptr;
  const auto project = [&](const Sorted::Block& b, int64_t begin, int64_t end) {
    const ExpertWeights& w = a.weights_of[b.expert];
    const ExpertHidden hidden = {.x = rounded ? nullptr : rows + b.row * D,
                                 .packed = rounded ? x16 + b.packed * packed_bf16_columns(D) : nullptr,
                                 .w1 = row_of_weight(w.w1, begin),
                                 .w3 = row_of_weight(w.w3, begin),
                                 .w1_dtype = w.w1.dtype,
                                 .w3_dtype = w.w3.dtype,
                                 .h = h + b.row * I + begin,
                                 .ldh = I,
                                 .rows = b.rows,
                                 .units = end - begin,
                                 .D = D};
    KL_ACTIVE_ISA(expert_hidden)(hidden);
  };
  for_each_piece(ctx.pool, sorted.blocks, I, 2 * D, task_columns, project);

  const bf16* const h16 = rounded ? pack_blocks(ctx, sorted, h, I, scratch) : nullptr;
  const auto project_back = [&](const Sorted::Block& b, int64_t begin, int64_t end) {
    const Tensor& w2 = a.weights_of[b.expert].w2;
    float* const y = rows + b.row * D + begin;
    if (rounded)
      return gemm_nt_bf16({.a = h16 + b.packed * packed_bf16_columns(I),
                           .b = w2.at<bf16>(begin),
                           .ldb = I,
                           .c = y,
                           .ldc = D,
                           .m = b.rows,
                           .n = end - begin,
                           .k = I});
    KL_ACTIVE_ISA(gemm_nt)
    ({.a = h + b.row * I,
      .lda = I,
      .b = row_of_weight(w2, begin),
      .b_dtype = w2.dtype,
      .ldb = I,
      .c = y,
      .ldc = D,
      .m = b.rows,
      .n = end - begin,
      .k = I});
  };
  for_each_piece(ctx.pool, sorted.blocks, D, I, task_columns, project_back);

  parallel_for(ctx.pool, T, kExactRows, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const ExpertSum sum = {.y = rows,
                             .rows = sorted.row_of.data() + t * top_k,
                             .weights = a.weights.at<float>(t),
                             .top_k = top_k,
                             .D = D,
                             .out = a.out.at<float>(t)};
      KL_ACTIVE_ISA(expert_sum)(sum);
    }
  });
}

}  // namespace

int64_t moe_experts_scratch_bytes(int64_t T, int64_t top_k, int64_t D, int64_t I) {
  return std::min(T, kTokens) * top_k * (I + D) * int64_t{sizeof(float)};
}

void moe_experts_cpu(Ctx& ctx, const MoeExpertsArgs& a, int64_t I) {
  // All experts, not only the chosen ones: a token's result must not depend on what others chose.
  const bool rounded = ctx.precision == Precision::bf16 && has_gemm_bf16() && all_bf16(a.weights_of);
  for (int64_t t = 0; t < a.x.size(0); t += kTokens) {
    const int64_t end = std::min(a.x.size(0), t + kTokens);
    MoeExpertsArgs part = a;
    part.x = a.x.slice(0, t, end), part.out = a.out.slice(0, t, end);
    part.experts = a.experts.slice(0, t, end), part.weights = a.weights.slice(0, t, end);
    run(ctx, part, I, rounded);
  }
}

}  // namespace kl
