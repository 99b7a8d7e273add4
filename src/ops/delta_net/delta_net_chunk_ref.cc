// The chunkwise algorithm of the gated delta rule in plain code, chunks of C = 64 tokens. With S the state
// before a chunk, rows i, j of the chunk, and D(j, i) the decay between two tokens (recurrence/decay.h), the
// state after row i is  D(-1, i) S + sum_{j<=i} D(j, i) k_j u_jᵀ  with pseudo values u, because a token
// writes beta times its prediction error under everything written before it:
//
//   u_i = beta_i (v_i - D(-1, i) Sᵀk_i - sum_{j<i} Akk_ij u_j)        Akk_ij = D(j, i) k_iᵀk_j
//   o_i = scale · (D(-1, i) Sᵀq_i + sum_{j<=i} Aqk_ij u_j)            Aqk_ij = D(j, i) q_iᵀk_j
//   S  <- D(-1, n-1) S + sum_j D(j, n-1) k_j u_jᵀ
//
// The UT transform writes the first line as U - W S with M = (I + StrictTril(Diag(beta) Akk))⁻¹ Diag(beta),
// U = M V and W = M Diag(D(-1, i)) K, which prepares all chunks at once before any state is known. One head
// is one thread here, so the substitution runs on the difference V - Diag(D(-1, i)) K S itself: it needs
// neither inverse nor W, and rounds less, as U and W S can be far larger than their difference.
//
// f32 as long as beta <= 1. Towards 2 a step is a reflection, which forgets no rounding error: where beta may
// pass 1 (any DeltaNetBeta but `sigmoid`) Real is double.
#include "ops/delta_net/delta_net_head.h"
#include "recurrence/decay.h"

namespace kl::delta_net {
namespace {

using namespace recurrence;

// One head, chunk after chunk.
template <class Real>
class Chunkwise {
 public:
  Chunkwise(const DeltaNetArgs& args, const Head& h) : args_(args), h_(h), K_(padded(h.K)) {
    const int64_t C = std::min(kChunk, h.end - h.begin), V = padded(h.V);
    matrices_.allocate({{q_, C, K_},
                        {k_, C, K_},
                        {k_in_, C, K_},
                        {u_, C, V},
                        {o_, C, V},
                        {Akk_, C, kChunk},
                        {Aqk_, C, kChunk},
                        {S_, h.K, V}});
  }

  void run() {
    load_state(h_, h_.read_slot, S_.data);
    for (int64_t begin = h_.begin; begin < h_.end; begin += kChunk) {
      n_ = std::min(kChunk, h_.end - begin);
      load(begin);
      pairs();
      decay_rows();
      std::fill(o_[0], o_[n_], Real(0));
      add_product(o_, Real(1), normal(q_), S_, n_, h_.K);
      add_product(u_, Real(-1), normal(k_in_), S_, n_, h_.K);
      solve();
      add_lower_product(o_, Real(1), Aqk_, u_, n_);
      store_out(begin);
      decay_by(S_.data, decay_.log_total(), h_.K * S_.width);
      add_product(S_, Real(1), transposed(k_), u_, h_.K, n_);
    }
    store_state(h_, S_.data, h_.write_slot);
  }

 private:
  void load(int64_t begin) {
    double g[kChunk];
    for (int64_t i = 0; i < n_; ++i) {
      load_qk_row(args_, h_, args_.q, begin + i, q_[i]);
      load_qk_row(args_, h_, args_.k, begin + i, k_[i]);
      load_row(args_.v, begin + i, h_.head, u_[i]);
      beta_[i] = static_cast<Real>(write_strength(args_, h_, begin + i));
      g[i] = log_decay(args_, h_, begin + i);
    }
    decay_.set(g, n_);
  }

  void pairs() {
    for (int64_t i = 0; i < n_; ++i)
      for (int64_t j = 0; j <= i; ++j) {
        Akk_[i][j] = dot(k_[i], k_[j], K_) * decay_.between(j, i);
        Aqk_[i][j] = dot(q_[i], k_[j], K_) * decay_.between(j, i);
      }
  }

  // q and k_in decayed from the chunk's start, k to its end.
  void decay_rows() {
    std::copy(k_[0], k_[n_], k_in_[0]);
    for (int64_t i = 0; i < n_; ++i) {
      scale_by(q_[i], decay_.from_start(i), K_);
      scale_by(k_in_[i], decay_.from_start(i), K_);
      scale_by(k_[i], decay_.to_end(i), K_);
    }
  }

  // Forward substitution: u_i <- beta_i (u_i - sum_{j<i} Akk_ij u_j), whole blocks before i first.
  void solve() {
    for (int64_t first = 0; first < n_; first += kSub) {
      const int64_t last = std::min(first + kSub, n_);
      add_product(u_.from(first), Real(-1), normal(Akk_.from(first)), u_, last - first, first);
      for (int64_t i = first; i < last; ++i) {
        const Factor<Real> row = {Akk_[i] + first, kChunk, 1};
        add_product(u_.from(i), Real(-1), row, u_.from(first), 1, i - first);
        scale_by(u_[i], beta_[i], u_.width);
      }
    }
  }

  void store_out(int64_t begin) {
    for (int64_t i = 0; i < n_; ++i) {
      scale_by(o_[i], static_cast<Real>(h_.scale), o_.width);
      store_row(o_[i], args_.out, begin + i, h_.head);
    }
  }

  const DeltaNetArgs& args_;
  const Head& h_;
  const int64_t K_;  // padded
  int64_t n_ = 0;    // tokens of this chunk
  TokenDecay<Real> decay_;
  Matrices<Real> matrices_;
  Rows<Real> q_, k_, k_in_;  // [C, K]
  Rows<Real> u_, o_;         // [C, V] v, then the pseudo values; the output
  Rows<Real> Akk_, Aqk_;     // [C, C] with the diagonal, which only Aqk needs
  Rows<Real> S_;             // [K, V] the state before the chunk
  Real beta_[kChunk];
};

}  // namespace

void chunk_head(const DeltaNetArgs& args, const Head& h) {
  if (h.idle()) return;
  if (args.beta_kind == DeltaNetBeta::sigmoid)
    Chunkwise<float>(args, h).run();
  else
    Chunkwise<double>(args, h).run();
}

}  // namespace kl::delta_net
