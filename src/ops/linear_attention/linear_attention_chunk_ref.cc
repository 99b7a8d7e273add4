// The chunkwise algorithm of linear attention in plain f32 code, chunks of C = 64 tokens. With S the state
// before a chunk, rows i, j of the chunk and D of recurrence/decay.h,
//
//   o_i = scale · (Sᵀ(D(-1, i) ⊙ q_i) + sum_{j<=i} A_ij v_j)        A_ij = q_iᵀ (D(j, i) ⊙ k_j)
//   S  <- Diag(D(-1, n-1)) S + sum_j (D(j, n-1) ⊙ k_j) v_jᵀ
//
// A decay per head is a number per pair of tokens, and A is q kᵀ times that; a decay per channel cuts the
// chunk into sub-chunks.
#include "ops/linear_attention/linear_attention_head.h"
#include "recurrence/decay.h"

namespace kl::linear_attention {
namespace {

using namespace recurrence;

// One head, chunk after chunk.
class Chunkwise {
 public:
  Chunkwise(const LinearAttentionArgs& args, const Head& h)
      : args_(args),
        h_(h),
        K_(padded(h.K)),
        by_channel_(args.g && args.g.rank == 3),
        channels_(by_channel_ ? std::min(kChunk, h.end - h.begin) : 0, K_) {
    const int64_t C = std::min(kChunk, h.end - h.begin), V = padded(h.V);
    matrices_.allocate({{q_, C, K_}, {k_, C, K_}, {v_, C, V}, {o_, C, V}, {A_, C, kChunk}, {S_, h.K, V}});
  }

  void run() {
    load_state(h_, h_.read_slot, S_.data);
    for (int64_t begin = h_.begin; begin < h_.end; begin += kChunk) {
      n_ = std::min(kChunk, h_.end - begin);
      load(begin);
      by_channel_ ? decay_channels() : decay_tokens();
      std::fill(o_[0], o_[n_], 0.f);
      add_product(o_, 1.f, normal(q_), S_, n_, h_.K);
      add_lower_product(o_, 1.f, A_, v_, n_);
      store_out(begin);
      by_channel_ ? channels_.decay_state(S_, h_.K) : decay_by(S_.data, tokens_.log_total(), h_.K * S_.width);
      add_product(S_, 1.f, transposed(k_), v_, h_.K, n_);
    }
    store_state(h_, S_.data, h_.write_slot);
  }

 private:
  void load(int64_t begin) {
    double g[kChunk] = {};
    for (int64_t i = 0; i < n_; ++i) {
      load_row(args_.q, begin + i, h_.qk_head, q_[i]);
      load_row(args_.k, begin + i, h_.qk_head, k_[i]);
      load_row(args_.v, begin + i, h_.head, v_[i]);
      if (by_channel_)
        load_row(args_.g, begin + i, h_.head, channels_.g()[i]);
      else if (args_.g)
        g[i] = element(args_.g, begin + i, h_.head);
    }
    by_channel_ ? channels_.set(n_) : tokens_.set(g, n_);
  }

  // A; then q decayed from the chunk's start and k to its end.
  void decay_tokens() {
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j <= i; ++j) A_[i][j] = dot(q_[i], k_[j], K_) * tokens_.between(j, i);
    for (int64_t i = 0; i < n_; ++i) {
      scale_by(q_[i], tokens_.from_start(i), K_);
      scale_by(k_[i], tokens_.to_end(i), K_);
    }
  }

  void decay_channels() {
    float factor[kMaxDim], row[kMaxDim];
    for (int64_t I = 0; I < channels_.subs(); ++I)
      channels_.for_each_pair_within(I, [&](int64_t i, int64_t j, const float* decay) {
        multiply(row, k_[j], decay, K_);
        A_[i][j] = dot(q_[i], row, K_);
      });
    channels_.for_each_from_boundary([&](int64_t i, const float* decay) { multiply_by(q_[i], decay); });
    channels_.for_each_to_boundary([&](int64_t j, const float* decay) { multiply_by(k_[j], decay); });
    for (int64_t I = 1; I < channels_.subs(); ++I)
      for (int64_t J = 0; J < I; ++J) {
        channels_.between(J, I, factor);
        for (int64_t i = channels_.first_of(I); i < channels_.end_of(I); ++i) {
          multiply(row, q_[i], factor, K_);
          for (int64_t j = channels_.first_of(J); j < channels_.end_of(J); ++j)
            A_[i][j] = dot(row, k_[j], K_);
        }
      }
    for (int64_t i = 0; i < n_; ++i) {
      if (i % kSub == 0) {
        channels_.between(-1, i / kSub, factor);
        channels_.between(i / kSub, channels_.subs(), row);
      }
      multiply_by(q_[i], factor);
      multiply_by(k_[i], row);
    }
  }

  void multiply_by(float* x, const float* factor) const {
    for (int64_t d = 0; d < K_; ++d) x[d] *= factor[d];
  }

  void store_out(int64_t begin) {
    for (int64_t i = 0; i < n_; ++i) {
      scale_by(o_[i], static_cast<float>(h_.scale), o_.width);
      store_row(o_[i], args_.out, begin + i, h_.head);
    }
  }

  const LinearAttentionArgs& args_;
  const Head& h_;
  const int64_t K_;  // padded
  const bool by_channel_;
  int64_t n_ = 0;  // tokens of this chunk
  TokenDecay<float> tokens_;
  ChannelDecay<float> channels_;
  Matrices<float> matrices_;
  Rows<float> q_, k_;  // [C, K]
  Rows<float> v_, o_;  // [C, V]
  Rows<float> A_;      // [C, C] with the diagonal
  Rows<float> S_;      // [K, V] the state before the chunk
};

}  // namespace

void chunk_head(const LinearAttentionArgs& args, const Head& h) {
  if (!h.idle()) Chunkwise(args, h).run();
}

}  // namespace kl::linear_attention
