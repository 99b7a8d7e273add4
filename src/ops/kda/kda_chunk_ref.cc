// The chunkwise algorithm of Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3) in plain code:
// chunks of C = 64 tokens, and inside a chunk sub-chunks of B = 16. It is the CPU's prefill where beta may
// pass 1; the vectorised one is kda_cpu.cc.
//
// With S the state before a chunk, rows i, j of the chunk, and the decay of an interval
//
//   D(j, i) = exp(sum of g_r over j < r <= i)           per channel; D(0, i) counts from the chunk's start,
//
// the state after row i is  Diag(D(0, i)) S + sum_{j<=i} (D(j, i) ⊙ k_j) u_jᵀ  with pseudo values u, because
// a token writes beta times its prediction error under everything written before it:
//
//   u_i = beta_i (v_i - Sᵀ(D(0, i) ⊙ k_i) - sum_{j<i} Akk_ij u_j)        Akk_ij = k_iᵀ (D(j, i) ⊙ k_j)
//   o_i = scale · (Sᵀ(D(0, i) ⊙ q_i) + sum_{j<=i} Aqk_ij u_j)            Aqk_ij = q_iᵀ (D(j, i) ⊙ k_j)
//   S  <- Diag(D(0, n)) S + sum_j (D(j, n) ⊙ k_j) u_jᵀ
//
// The paper writes the first line as U - W S with M = (I + StrictTril(Diag(beta) Akk))⁻¹ Diag(beta), U = M V
// and W = M (D ⊙ K): the UT transform, which prepares all chunks at once before any state is known. One head
// is one thread here, so the substitution runs on the difference V - (D ⊙ K) S itself. That needs no inverse
// and no W, and it is the more accurate order: U and W S can be far larger than their difference.
//
// Decays. Every factor is the exponential of a sum of the log-decays of its own interval, all of them <= 0:
// no factor overflows, -inf is a value like any other, and no large prefix sums are subtracted (after a step
// of -160 a prefix has lost the bits of the mild steps that follow, and -inf - -inf is NaN). Between two
// sub-chunks the interval is cut at their boundaries, which turns the pair into a matrix product; inside one
// sub-chunk each pair has its own sum.
//
// Precision. f32, as long as beta <= 1: each step then contracts, and errors die out. Towards beta = 2 a step
// is a reflection, which forgets nothing, and the rounding of Akk_ij acts as an error of |k|² that every
// chunk repeats: 1000 tokens with equal keys, beta = 2 and no decay to speak of are off by 2e-4 in f32,
// whatever the order of the sums. So where beta may pass 1 (any KdaBeta but `sigmoid`) Real is double.
#include "ops/kda/kda_head.h"

namespace kl {
namespace kda {
namespace {

constexpr int64_t kSub = 16;  // B

// A matrix in scratch.
template <class Real>
struct Rows {
  Real* data;
  int64_t width;
  Real* operator[](int64_t i) const { return data + i * width; }
  Rows from(int64_t i) const { return {(*this)[i], width}; }
};

// The left factor of a product: element (i, j) is data[i * row_step + j * step].
template <class Real>
struct Factor {
  const Real* data;
  int64_t row_step, step;
};
template <class Real>
Factor<Real> normal(Rows<Real> a) {
  return {a.data, a.width, 1};
}
template <class Real>
Factor<Real> transposed(Rows<Real> a) {
  return {a.data, 1, a.width};
}

// out_i += sign · sum_{j < depth} a_ij b_j. Sixteen terms at a time are summed on their own: a sum of 256
// then has the rounding error of one of 32.
template <class Real>
void add_product(Rows<Real> out, Real sign, Factor<Real> a, Rows<Real> b, int64_t rows, int64_t depth) {
  Real sum[kMaxDim];
  for (int64_t first = 0; first < depth; first += 16) {
    const int64_t last = std::min(first + 16, depth);
    for (int64_t i = 0; i < rows; ++i) {
      std::fill(sum, sum + out.width, Real(0));
      for (int64_t j = first; j < last; ++j)
        add_scaled(sum, a.data[i * a.row_step + j * a.step], b[j], out.width);
      add_scaled(out[i], sign, sum, out.width);
    }
  }
}

template <class Real>
Real dot(const Real* __restrict a, const Real* __restrict b, int64_t n) {
  Real sum[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += a[i + lane] * b[i + lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

// to = x ⊙ factor
template <class Real>
void multiply(Real* __restrict to, const Real* __restrict x, const Real* __restrict factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) to[i + lane] = x[i + lane] * factor[i + lane];
}

// One head, chunk after chunk.
template <class Real>
class Chunkwise {
 public:
  explicit Chunkwise(const Head& h);
  void run();

 private:
  void load(int64_t begin);
  void decay_to_boundaries();
  void pairs_between(int64_t I);
  void pairs_within(int64_t I);
  void read_state();
  void solve();
  void read_chunk();
  void store_out(int64_t begin);
  void advance(Rows<Real> state, int64_t rows);

  int64_t sub_end(int64_t first) const { return std::min(first + kSub, n_); }
  void log_decay_between(int64_t before, int64_t after, Real* sum) const;
  void decay_between(int64_t before, int64_t after, Real* factor) const;

  const Head& h_;
  const HeadGate<Real> gate_;
  const int64_t K_, V_;  // padded: the width of rows
  int64_t n_ = 0;        // tokens of this chunk, at most C

  std::vector<Real> memory_;
  Rows<Real> q_, k_;        // [C, K] normalised; later decayed from the start or to the end of the chunk
  Rows<Real> g_;            // [C, K] log-decays
  Rows<Real> q_in_, k_in_;  // [C, K] decayed from the start of their sub-chunk
  Rows<Real> k_out_;        // [C, K] decayed to the end of their sub-chunk
  Rows<Real> span_;         // [C / B, K] log-decay of a whole sub-chunk
  Rows<Real> Akk_, Aqk_;    // [C, C] below the diagonal; of Aqk the diagonal too
  Rows<Real> u_;            // [C, V] v, then the pseudo values
  Rows<Real> o_;            // [C, V]
  Rows<Real> S_, S_row_;    // [K, V] the state before the chunk; one inside it, for a checkpoint
  Real beta_[kChunk];
};

template <class Real>
Chunkwise<Real>::Chunkwise(const Head& h)
    : h_(h), gate_(h.args.gate, h.head, h.K), K_(padded(h.K)), V_(padded(h.V)) {
  const int64_t C = std::min(kChunk, h.end - h.begin);
  const struct {
    Rows<Real>& matrix;
    int64_t height, width;
  } layout[] = {{q_, C, K_},
                {k_, C, K_},
                {g_, C, K_},
                {q_in_, C, K_},
                {k_in_, C, K_},
                {k_out_, C, K_},
                {span_, (C + kSub - 1) / kSub, K_},
                {u_, C, V_},
                {o_, C, V_},
                {Akk_, C, kChunk},
                {Aqk_, C, kChunk},
                {S_, h.K, V_},
                {S_row_, h.K, V_}};
  int64_t size = 0;
  for (const auto& m : layout) size += m.height * m.width;
  memory_.resize(static_cast<size_t>(size));
  Real* next = memory_.data();
  for (const auto& m : layout) {
    m.matrix = {next, m.width};
    next += m.height * m.width;
  }
}

template <class Real>
void Chunkwise<Real>::run() {
  load_state(h_, h_.read_slot, S_.data);
  for (int64_t begin = h_.begin; begin < h_.end; begin += kChunk) {
    n_ = std::min(kChunk, h_.end - begin);
    load(begin);
    decay_to_boundaries();
    for (int64_t I = 0; I * kSub < n_; ++I) {
      pairs_between(I);
      pairs_within(I);
    }
    read_state();
    solve();
    read_chunk();
    store_out(begin);
    for_each_checkpoint(h_.args, begin, begin + n_, [&](int64_t row, int64_t slot) {
      std::copy(S_[0], S_[h_.K], S_row_[0]);
      advance(S_row_, row - begin);
      store_state(h_, S_row_.data, slot);
    });
    advance(S_, n_);
  }
  store_state(h_, S_.data, h_.write_slot);
}

template <class Real>
void Chunkwise<Real>::load(int64_t begin) {
  const KdaArgs& args = h_.args;
  for (int64_t i = 0; i < n_; ++i) {
    load_qk_row(h_, args.q, begin + i, q_[i]);
    load_qk_row(h_, args.k, begin + i, k_[i]);
    load_row(args.v, begin + i, h_.head, u_[i]);
    load_row(args.g, begin + i, h_.head, g_[i]);
    gate_.apply(g_[i]);
    beta_[i] = load_beta<Real>(h_, begin + i);
  }
}

// sum = log-decay of the whole sub-chunks strictly between `before` and `after`; -1 is the chunk's start.
template <class Real>
void Chunkwise<Real>::log_decay_between(int64_t before, int64_t after, Real* sum) const {
  std::fill(sum, sum + K_, Real(0));
  for (int64_t M = before + 1; M < after; ++M) add_scaled(sum, Real(1), span_[M], K_);
}
template <class Real>
void Chunkwise<Real>::decay_between(int64_t before, int64_t after, Real* factor) const {
  log_decay_between(before, after, factor);
  for (int64_t d = 0; d < K_; ++d) factor[d] = std::exp(factor[d]);
}

// q_in, k_in, k_out, span: the sums of log-decays start anew at each boundary, in both directions.
template <class Real>
void Chunkwise<Real>::decay_to_boundaries() {
  Real sum[kMaxDim];
  for (int64_t first = 0; first < n_; first += kSub) {
    std::fill(sum, sum + K_, Real(0));
    for (int64_t i = first; i < sub_end(first); ++i)
      for (int64_t d = 0; d < K_; ++d) {
        sum[d] += g_[i][d];
        const Real factor = std::exp(sum[d]);
        q_in_[i][d] = q_[i][d] * factor;
        k_in_[i][d] = k_[i][d] * factor;
      }
    std::copy(sum, sum + K_, span_[first / kSub]);
    std::fill(sum, sum + K_, Real(0));
    for (int64_t j = sub_end(first) - 1; j >= first; --j)
      for (int64_t d = 0; d < K_; ++d) {
        k_out_[j][d] = k_[j][d] * std::exp(sum[d]);
        sum[d] += g_[j][d];
      }
  }
}

// Akk, Aqk of sub-chunk I with those before it: D(j, i) = (j to its boundary) · (between) · (boundary to i).
template <class Real>
void Chunkwise<Real>::pairs_between(int64_t I) {
  Real between[kMaxDim], q_i[kMaxDim], k_i[kMaxDim];
  for (int64_t J = 0; J < I; ++J) {
    decay_between(J, I, between);
    for (int64_t i = I * kSub; i < sub_end(I * kSub); ++i) {
      multiply(q_i, q_in_[i], between, K_);
      multiply(k_i, k_in_[i], between, K_);
      for (int64_t j = J * kSub; j < (J + 1) * kSub; ++j) {
        Aqk_[i][j] = dot(q_i, k_out_[j], K_);
        Akk_[i][j] = dot(k_i, k_out_[j], K_);
      }
    }
  }
}

// Akk, Aqk inside sub-chunk I: j walks back from i, and the interval grows by one token a step.
template <class Real>
void Chunkwise<Real>::pairs_within(int64_t I) {
  Real sum[kMaxDim], k_j[kMaxDim];
  for (int64_t i = I * kSub; i < sub_end(I * kSub); ++i) {
    Aqk_[i][i] = dot(q_[i], k_[i], K_);
    std::fill(sum, sum + K_, Real(0));
    for (int64_t j = i - 1; j >= I * kSub; --j) {
      add_scaled(sum, Real(1), g_[j + 1], K_);
      for (int64_t d = 0; d < K_; ++d) k_j[d] = k_[j][d] * std::exp(sum[d]);
      Aqk_[i][j] = dot(q_[i], k_j, K_);
      Akk_[i][j] = dot(k_[i], k_j, K_);
    }
  }
}

// u_i = v_i - Sᵀ(D(0, i) ⊙ k_i),   o_i = Sᵀ(D(0, i) ⊙ q_i)
template <class Real>
void Chunkwise<Real>::read_state() {
  Real before[kMaxDim];
  for (int64_t i = 0; i < n_; ++i) {
    if (i % kSub == 0) decay_between(-1, i / kSub, before);
    multiply(q_[i], q_in_[i], before, K_);
    multiply(k_[i], k_in_[i], before, K_);
  }
  std::fill(o_[0], o_[n_], Real(0));
  add_product(o_, Real(1), normal(q_), S_, n_, h_.K);
  add_product(u_, Real(-1), normal(k_), S_, n_, h_.K);
}

// Forward substitution: u_i <- beta_i (u_i - sum_{j<i} Akk_ij u_j), whole sub-chunks before i first.
template <class Real>
void Chunkwise<Real>::solve() {
  for (int64_t first = 0; first < n_; first += kSub) {
    const int64_t last = sub_end(first);
    add_product(u_.from(first), Real(-1), normal(Akk_.from(first)), u_, last - first, first);
    for (int64_t i = first; i < last; ++i) {
      const Factor<Real> row = {Akk_[i] + first, kChunk, 1};
      add_product(u_.from(i), Real(-1), row, u_.from(first), 1, i - first);
      scale_by(u_[i], beta_[i], V_);
    }
  }
}

// o_i += sum_{j<=i} Aqk_ij u_j. Row by row: a NaN of a later token stays its own.
template <class Real>
void Chunkwise<Real>::read_chunk() {
  for (int64_t i = 0; i < n_; ++i) add_product(o_.from(i), Real(1), normal(Aqk_.from(i)), u_, 1, i + 1);
}

template <class Real>
void Chunkwise<Real>::store_out(int64_t begin) {
  for (int64_t i = 0; i < n_; ++i) {
    scale_by(o_[i], static_cast<Real>(h_.scale), V_);
    store_row(o_[i], h_.args.out, begin + i, h_.head);
  }
}

// S <- Diag(D(0, n)) S + sum_{j<n} (D(j, n) ⊙ k_j) u_jᵀ, for the whole chunk or its first sub-chunks.
template <class Real>
void Chunkwise<Real>::advance(Rows<Real> state, int64_t rows) {
  const int64_t subs = (rows + kSub - 1) / kSub;
  Real decay[kMaxDim];
  for (int64_t j = 0; j < rows; ++j) {
    if (j % kSub == 0) decay_between(j / kSub, subs, decay);
    multiply(k_[j], k_out_[j], decay, K_);
  }
  log_decay_between(-1, subs, decay);
  for (int64_t d = 0; d < h_.K; ++d) decay_by(state[d], decay[d], V_);
  add_product(state, Real(1), transposed(k_), u_, h_.K, rows);
}

}  // namespace

void chunk_head(const Head& h) {
  if (h.begin == h.end && h.read_slot == h.write_slot) return;
  if (h.args.beta_kind == KdaBeta::sigmoid)
    Chunkwise<float>(h).run();
  else
    Chunkwise<double>(h).run();
}

}  // namespace kda

void kda_chunk_ref(const KdaArgs& args) {
  kda_check(args);
  KL_CHECK(args.q.device == Device::cpu, "kda_chunk_ref: expected tensors on the cpu, found ",
           name_of(args.q.device));
  kda::for_each_head(nullptr, args, kda::chunk_head);
}

}  // namespace kl
