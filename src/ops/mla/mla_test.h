// Test data of MLA: packed sequences over a paged cache in which everything that nobody may read is NaN.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "ops/mla/mla.h"
#include "testing/compare.h"
#include "testing/random.h"

namespace kl::testing {

// A sequence's tokens depend on its seed and their position alone, so that it can be split and repacked.
struct MlaSequence {
  int64_t context, length;
  uint64_t seed = 1;
};

struct MlaSizes {
  int64_t A = 3, Nk = 24, P = 8, R = 40, V = 20;
  int64_t page_size = 16;
  DType cache = DType::f32, weight = DType::f32;
  double q_deviation = 2;  // peaked, but not a single key
};

class MlaBatch {
 public:
  MlaBatch(const MlaSizes& sizes, std::vector<MlaSequence> sequences)
      : s(sizes), sequences_(std::move(sequences)) {
    fill_weight();
    make_pages();
    for (const MlaSequence& sequence : sequences_) context_.push_back(static_cast<int32_t>(sequence.context));
    append();
    fill_queries();
  }

  MlaArgs args() {
    return {.q = q_, .kv_b_proj = weight_.tensor, .cu_seqlens = cu_tensor(), .cache = cache(), .out = out_};
  }
  MlaCache cache() {
    const int64_t n = static_cast<int64_t>(sequences_.size());
    return {.rows = rows_.tensor,
            .page_table = pages_.tensor,
            .context = Tensor(context_.data(), DType::i32, {n})};
  }
  Tensor cu_tensor() { return Tensor(cu_.data(), DType::i32, {static_cast<int64_t>(cu_.size())}); }
  float* row(int64_t n, int64_t position) {  // only with an f32 cache
    return rows_.tensor.at<float>(*pages_.tensor.at<int32_t>(n, position / s.page_size),
                                  position % s.page_size);
  }
  int64_t first_row(int64_t n) const { return cu_[n]; }

  // out [T, A, V] of f(args), which begins as NaN; what lies between its rows must stay as it is.
  template <class F>
  std::vector<double> result(F&& f) {
    fill_nan(wide_out_.tensor);
    f(args());
    for (int64_t t = 0; t < out_.size(0); ++t)
      for (int64_t h = 0; h < s.A; ++h)
        for (int64_t v = s.V; v < s.V + 2; ++v)
          EXPECT_TRUE(std::isnan(wide_out_.tensor.at<float>(t, h)[v])) << "wrote beside out";
    return to_doubles(out_);
  }
  std::vector<double> prefill(ThreadPool* pool = nullptr) {
    return result([&](const MlaArgs& a) {
      Ctx ctx{.pool = pool};
      mla_prefill(ctx, a);
    });
  }
  std::vector<double> decode(ThreadPool* pool = nullptr) {
    return result([&](const MlaArgs& a) {
      Ctx ctx{.pool = pool};
      mla_decode(ctx, a);
    });
  }
  std::vector<double> ref() { return result(mla_ref); }
  // The rows of sequence n in such a result.
  std::vector<double> of_sequence(const std::vector<double>& result, int64_t n) const {
    return {result.begin() + cu_[n] * s.A * s.V, result.begin() + cu_[n + 1] * s.A * s.V};
  }

  const MlaSizes s;

 private:
  static Random random_of(uint64_t seed, int64_t position) {
    return Random(seed * 1000003 + static_cast<uint64_t>(position));
  }

  void fill_weight() {
    Random random(99);
    weight_ = random_normal(s.weight, {s.A * (s.Nk + s.V), s.R}, random, 1 / std::sqrt(s.R));
  }

  // Every sequence gets pages of its own in a shuffled order; some pages are nobody's.
  void make_pages() {
    int64_t most = 1, pages = 3;
    for (const MlaSequence& q : sequences_) {
      const int64_t needed = (q.context + q.length + s.page_size - 1) / s.page_size;
      most = std::max(most, needed), pages += needed;
    }
    std::vector<int32_t> free(pages);
    std::iota(free.begin(), free.end(), 0);
    Random random(7);
    for (size_t i = free.size(); i > 1; --i) std::swap(free[i - 1], free[random.integer(0, i - 1)]);
    rows_ = make_tensor(s.cache, {pages, s.page_size, s.R + s.P});
    fill_nan(rows_.tensor);
    pages_ = make_tensor(DType::i32, {static_cast<int64_t>(sequences_.size()), most + 1});
    std::fill_n(pages_.tensor.ptr<int32_t>(), pages_.tensor.numel(), -1);
    for (size_t n = 0; n < sequences_.size(); ++n)
      for (int64_t i = 0; i * s.page_size < sequences_[n].context + sequences_[n].length; ++i)
        *pages_.tensor.at<int32_t>(n, i) = free.back(), free.pop_back();
  }

  // Rows of all tokens, those of the batch too, appended as if there were no context.
  void append() {
    const std::vector<int32_t> context = context_;
    std::fill(context_.begin(), context_.end(), 0);
    cu_ = {0};
    for (const MlaSequence& q : sequences_)
      cu_.push_back(cu_.back() + static_cast<int32_t>(q.context + q.length));
    OwnedTensor latent = make_tensor(DType::f32, {cu_.back(), s.R + s.P});
    for (size_t n = 0; n < sequences_.size(); ++n)
      for (int64_t i = 0; i < cu_[n + 1] - cu_[n]; ++i) {
        Random random = random_of(sequences_[n].seed, i);
        fill_normal(latent.tensor.slice(0, cu_[n] + i, cu_[n] + i + 1), random);
      }
    Ctx ctx;
    mla_append(ctx, {.latent = latent.tensor, .cu_seqlens = cu_tensor(), .cache = cache()});
    context_ = context;
  }

  void fill_queries() {
    cu_ = {0};
    for (const MlaSequence& q : sequences_) cu_.push_back(cu_.back() + static_cast<int32_t>(q.length));
    const int64_t width = s.Nk + s.P;
    wide_q_ = make_tensor(DType::f32, {cu_.back(), s.A, width + 3});
    wide_out_ = make_tensor(DType::f32, {cu_.back(), s.A, s.V + 2});
    fill_nan(wide_q_.tensor);
    q_ = wide_q_.tensor.slice(2, 0, width), out_ = wide_out_.tensor.slice(2, 0, s.V);
    for (size_t n = 0; n < sequences_.size(); ++n)
      for (int64_t i = 0; i < sequences_[n].length; ++i) {
        Random random = random_of(sequences_[n].seed + 500, sequences_[n].context + i);
        for (int64_t h = 0; h < s.A; ++h)
          for (int64_t d = 0; d < width; ++d)
            q_.at<float>(cu_[n] + i, h)[d] = static_cast<float>(s.q_deviation * random.normal());
      }
  }

  std::vector<MlaSequence> sequences_;
  OwnedTensor weight_, rows_, pages_, wide_q_, wide_out_;
  Tensor q_, out_;
  std::vector<int32_t> cu_, context_;
};

}  // namespace kl::testing
