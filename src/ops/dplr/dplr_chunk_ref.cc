// The chunkwise algorithm of DPLR in plain f32 code: chunks of C = 64 tokens, and inside a chunk sub-chunks
// of B = 16. With S the state before a chunk, rows i, j of the chunk, D of recurrence/decay.h, and p_i =
// S_{i-1}ᵀ b_i what token i reads of the state before it, the state after row i is Diag(D(-1, i)) S +
// sum_{j<=i} D(j, i) ⊙ (k_j v_jᵀ - a_j p_jᵀ), hence
//
//   p_i = Sᵀ(D(-1, i-1) ⊙ b_i) + sum_{j<i} (Abk_ij v_j - Aba_ij p_j)
//   o_i = scale · (Sᵀ(D(-1, i) ⊙ q_i) + sum_{j<=i} (Aqk_ij v_j - Aqa_ij p_j))
//   S  <- Diag(D(-1, n-1)) S + sum_j D(j, n-1) ⊙ (k_j v_jᵀ - a_j p_jᵀ)
//
//   Axy_ij = x_iᵀ (D(j, i) ⊙ y_j) for x = q,    x_iᵀ (D(j, i-1) ⊙ y_j) for x = b
//
// Four second-level matrices against the two of Kimi Delta Attention, where one vector both erases and
// writes; and for the same reason two products instead of one in every line. The factors D are computed once
// for all four. p comes from forward substitution on its own right side, as this is one thread per head: no
// inverse.
#include "ops/dplr/dplr_head.h"
#include "recurrence/decay.h"

namespace kl::dplr {
namespace {

using namespace recurrence;

// One head, chunk after chunk.
class Chunkwise {
 public:
  Chunkwise(const DplrArgs& args, const Head& h);
  void run();

 private:
  void load(int64_t begin);
  void pairs_within();
  void decay_to_boundaries();
  void pairs_between();
  void decay_to_chunk();
  void solve();
  void store_out(int64_t begin);

  const DplrArgs& args_;
  const Head& h_;
  const int64_t K_;  // padded
  int64_t n_ = 0;    // tokens of this chunk
  ChannelDecay<float> decay_;
  Matrices<float> matrices_;
  Rows<float> q_, b_, k_, a_;          // [C, K] later decayed from the start (q, b) or to the end (k, a)
  Rows<float> v_, p_, o_;              // [C, V]
  Rows<float> Aqk_, Aqa_, Abk_, Aba_;  // [C, C] below the diagonal; of Aqk and Aqa the diagonal too
  Rows<float> S_;                      // [K, V] the state before the chunk
};

Chunkwise::Chunkwise(const DplrArgs& args, const Head& h)
    : args_(args), h_(h), K_(padded(h.K)), decay_(std::min(kChunk, h.end - h.begin), K_) {
  const int64_t C = std::min(kChunk, h.end - h.begin), V = padded(h.V);
  matrices_.allocate({{q_, C, K_},
                      {b_, C, K_},
                      {k_, C, K_},
                      {a_, C, K_},
                      {v_, C, V},
                      {p_, C, V},
                      {o_, C, V},
                      {Aqk_, C, kChunk},
                      {Aqa_, C, kChunk},
                      {Abk_, C, kChunk},
                      {Aba_, C, kChunk},
                      {S_, h.K, V}});
}

void Chunkwise::run() {
  load_state(h_, h_.read_slot, S_.data);
  for (int64_t begin = h_.begin; begin < h_.end; begin += kChunk) {
    n_ = std::min(kChunk, h_.end - begin);
    load(begin);
    pairs_within();
    decay_to_boundaries();
    pairs_between();
    decay_to_chunk();
    std::fill(p_[0], p_[n_], 0.f);
    std::fill(o_[0], o_[n_], 0.f);
    add_product(p_, 1.f, normal(b_), S_, n_, h_.K);
    add_product(o_, 1.f, normal(q_), S_, n_, h_.K);
    solve();
    add_lower_product(o_, 1.f, Aqk_, v_, n_);
    add_lower_product(o_, -1.f, Aqa_, p_, n_);
    store_out(begin);
    decay_.decay_state(S_, h_.K);
    add_product(S_, 1.f, transposed(k_), v_, h_.K, n_);
    add_product(S_, -1.f, transposed(a_), p_, h_.K, n_);
  }
  store_state(h_, S_.data, h_.write_slot);
}

void Chunkwise::load(int64_t begin) {
  for (int64_t i = 0; i < n_; ++i) {
    load_row(args_.q, begin + i, h_.head, q_[i]);
    load_row(args_.k, begin + i, h_.head, k_[i]);
    load_row(args_.a, begin + i, h_.head, a_[i]);
    load_row(args_.b, begin + i, h_.head, b_[i]);
    load_row(args_.v, begin + i, h_.head, v_[i]);
    load_row(args_.g, begin + i, h_.head, decay_.g()[i]);
  }
  decay_.set(n_);
}

// D(j, i) decays y_j for q of token i and for b of token i + 1.
void Chunkwise::pairs_within() {
  float k_j[kMaxDim], a_j[kMaxDim];
  for (int64_t I = 0; I < decay_.subs(); ++I)
    decay_.for_each_pair_within(I, [&](int64_t i, int64_t j, const float* factor) {
      multiply(k_j, k_[j], factor, K_);
      multiply(a_j, a_[j], factor, K_);
      Aqk_[i][j] = dot(q_[i], k_j, K_);
      Aqa_[i][j] = dot(q_[i], a_j, K_);
      if (i + 1 == decay_.end_of(I)) return;
      Abk_[i + 1][j] = dot(b_[i + 1], k_j, K_);
      Aba_[i + 1][j] = dot(b_[i + 1], a_j, K_);
    });
}

// q and b from the start of their sub-chunk (b of its first token: not at all), k and a to its end.
void Chunkwise::decay_to_boundaries() {
  const auto decay = [&](float* x, const float* factor) {
    for (int64_t d = 0; d < K_; ++d) x[d] *= factor[d];
  };
  decay_.for_each_from_boundary([&](int64_t i, const float* factor) {
    decay(q_[i], factor);
    if (i + 1 < decay_.end_of(i / kSub)) decay(b_[i + 1], factor);
  });
  decay_.for_each_to_boundary([&](int64_t j, const float* factor) {
    decay(k_[j], factor);
    decay(a_[j], factor);
  });
}

void Chunkwise::pairs_between() {
  float between[kMaxDim], q_i[kMaxDim], b_i[kMaxDim];
  for (int64_t I = 1; I < decay_.subs(); ++I)
    for (int64_t J = 0; J < I; ++J) {
      decay_.between(J, I, between);
      for (int64_t i = decay_.first_of(I); i < decay_.end_of(I); ++i) {
        multiply(q_i, q_[i], between, K_);
        multiply(b_i, b_[i], between, K_);
        for (int64_t j = decay_.first_of(J); j < decay_.end_of(J); ++j) {
          Aqk_[i][j] = dot(q_i, k_[j], K_);
          Aqa_[i][j] = dot(q_i, a_[j], K_);
          Abk_[i][j] = dot(b_i, k_[j], K_);
          Aba_[i][j] = dot(b_i, a_[j], K_);
        }
      }
    }
}

// The rest of the way: q and b from the chunk's start, k and a to its end.
void Chunkwise::decay_to_chunk() {
  float before[kMaxDim], after[kMaxDim];
  for (int64_t i = 0; i < n_; ++i) {
    if (i % kSub == 0) {
      decay_.between(-1, i / kSub, before);
      decay_.between(i / kSub, decay_.subs(), after);
    }
    for (int64_t d = 0; d < K_; ++d) {
      q_[i][d] *= before[d], b_[i][d] *= before[d];
      k_[i][d] *= after[d], a_[i][d] *= after[d];
    }
  }
}

// p_i <- p_i + sum_{j<i} (Abk_ij v_j - Aba_ij p_j), whole sub-chunks before i first.
void Chunkwise::solve() {
  for (int64_t first = 0; first < n_; first += kSub) {
    const int64_t last = std::min(first + kSub, n_);
    add_product(p_.from(first), 1.f, normal(Abk_.from(first)), v_, last - first, first);
    add_product(p_.from(first), -1.f, normal(Aba_.from(first)), p_, last - first, first);
    for (int64_t i = first; i < last; ++i) {
      const Factor<float> bk = {Abk_[i] + first, kChunk, 1}, ba = {Aba_[i] + first, kChunk, 1};
      add_product(p_.from(i), 1.f, bk, v_.from(first), 1, i - first);
      add_product(p_.from(i), -1.f, ba, p_.from(first), 1, i - first);
    }
  }
}

void Chunkwise::store_out(int64_t begin) {
  for (int64_t i = 0; i < n_; ++i) {
    scale_by(o_[i], static_cast<float>(h_.scale), o_.width);
    store_row(o_[i], args_.out, begin + i, h_.head);
  }
}

}  // namespace

void chunk_head(const DplrArgs& args, const Head& h) {
  if (!h.idle()) Chunkwise(args, h).run();
}

}  // namespace kl::dplr
