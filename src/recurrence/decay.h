// The decays inside one chunk of a chunkwise recurrence: with g_r <= 0 the log-decay of token r,
//
//   D(j, i) = exp(sum of g_r over j < r <= i),
//
// one number per pair of tokens (TokenDecay) or one per pair and channel (ChannelDecay). D(-1, i) counts from
// the chunk's start.
//
// Every factor is the exponential of a sum over its own interval, all terms <= 0: nothing overflows, -inf is
// a value like any other, and no large prefix sums are subtracted (after a step of -160 a prefix has lost the
// bits of the mild steps that follow, and -inf - -inf is NaN).
#pragma once

#include "recurrence/vector.h"

namespace kl::recurrence {

constexpr int64_t kChunk = 64;  // C, the most tokens of a chunk
constexpr int64_t kSub = 16;    // B, tokens of a sub-chunk

// One log-decay per token. The sums are few and taken in double.
template <class Real>
class TokenDecay {
 public:
  void set(const double* g, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      double sum = 0;
      for (int64_t j = i; j >= 0; sum += g[j], --j) between_[i][j] = static_cast<Real>(std::exp(sum));
      from_start_[i] = static_cast<Real>(std::exp(sum));
      log_total_ = sum;
    }
    double sum = 0;
    for (int64_t j = n - 1; j >= 0; sum += g[j], --j) to_end_[j] = static_cast<Real>(std::exp(sum));
  }
  Real between(int64_t j, int64_t i) const { return between_[i][j]; }  // D(j, i), j <= i
  Real from_start(int64_t i) const { return from_start_[i]; }          // D(-1, i)
  Real to_end(int64_t j) const { return to_end_[j]; }                  // D(j, n - 1)
  Real log_total() const { return static_cast<Real>(log_total_); }     // of the whole chunk

 private:
  Real between_[kChunk][kChunk], from_start_[kChunk], to_end_[kChunk];
  double log_total_ = 0;
};

// One log-decay per token and channel. Between two sub-chunks an interval is cut at their boundaries,
//
//   D(j, i) = (j to the end of its sub-chunk J) · (J to I) · (start of sub-chunk I to i),
//
// which turns the pair into a matrix product; inside one sub-chunk each pair has its own sum. The visitors
// hand out factors of all channels, so that a caller with several matrices pays for an exponential once.
template <class Real>
class ChannelDecay {
 public:
  ChannelDecay(int64_t tokens, int64_t width) : width_(width) {
    matrices_.allocate({{g_, tokens, width}, {span_, (tokens + kSub - 1) / kSub, width}});
  }

  Rows<Real> g() const { return g_; }  // [C, K] log-decays, for the caller to fill
  void set(int64_t n) {                // once the first n are there
    n_ = n;
    for (int64_t I = 0; I < subs(); ++I) {
      std::fill(span_[I], span_[I] + width_, Real(0));
      for (int64_t i = first_of(I); i < end_of(I); ++i) add_scaled(span_[I], Real(1), g_[i], width_);
    }
  }

  int64_t subs() const { return (n_ + kSub - 1) / kSub; }
  int64_t first_of(int64_t I) const { return I * kSub; }
  int64_t end_of(int64_t I) const { return std::min(first_of(I) + kSub, n_); }

  // factor = decay of the whole sub-chunks strictly between J and I; J = -1 is the chunk's start, I = subs()
  // its end. `log_between` is its logarithm.
  void between(int64_t J, int64_t I, Real* factor) const {
    log_between(J, I, factor);
    for (int64_t d = 0; d < width_; ++d) factor[d] = std::exp(factor[d]);
  }
  void log_between(int64_t J, int64_t I, Real* sum) const {
    std::fill(sum, sum + width_, Real(0));
    for (int64_t M = J + 1; M < I; ++M) add_scaled(sum, Real(1), span_[M], width_);
  }

  // f(i, factor): from the start of its sub-chunk to the end of token i.
  template <class F>
  void for_each_from_boundary(F&& f) const {
    Real sum[kMaxDim], factor[kMaxDim];
    for (int64_t i = 0; i < n_; ++i) {
      if (i % kSub == 0) std::fill(sum, sum + width_, Real(0));
      add_scaled(sum, Real(1), g_[i], width_);
      for (int64_t d = 0; d < width_; ++d) factor[d] = std::exp(sum[d]);
      f(i, factor);
    }
  }
  // f(j, factor): from the end of token j to the end of its sub-chunk.
  template <class F>
  void for_each_to_boundary(F&& f) const {
    Real sum[kMaxDim], factor[kMaxDim];
    for (int64_t I = 0; I < subs(); ++I) {
      std::fill(sum, sum + width_, Real(0));
      for (int64_t j = end_of(I) - 1; j >= first_of(I); --j) {
        for (int64_t d = 0; d < width_; ++d) factor[d] = std::exp(sum[d]);
        f(j, factor);
        add_scaled(sum, Real(1), g_[j], width_);
      }
    }
  }
  // f(i, j, factor): D(j, i) for the pairs j <= i of sub-chunk I.
  template <class F>
  void for_each_pair_within(int64_t I, F&& f) const {
    Real sum[kMaxDim], factor[kMaxDim];
    for (int64_t i = first_of(I); i < end_of(I); ++i) {
      std::fill(sum, sum + width_, Real(0));
      for (int64_t j = i; j >= first_of(I); --j) {
        for (int64_t d = 0; d < width_; ++d) factor[d] = std::exp(sum[d]);
        f(i, j, factor);
        add_scaled(sum, Real(1), g_[j], width_);
      }
    }
  }

  // State rows <- Diag(D(-1, n - 1)) state.
  void decay_state(Rows<Real> state, int64_t K) const {
    Real sum[kMaxDim];
    log_between(-1, subs(), sum);
    for (int64_t d = 0; d < K; ++d) decay_by(state[d], sum[d], state.width);
  }

 private:
  int64_t width_, n_ = 0;
  Matrices<Real> matrices_;
  Rows<Real> g_;     // [C, K]
  Rows<Real> span_;  // [C / B, K] log-decay of a whole sub-chunk
};

}  // namespace kl::recurrence
