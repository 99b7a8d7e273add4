// Norms, gates and decays of a chunk, and the products of its tokens with each other.
//
// Decays. No factor is ever above 1, -inf is a value like any other, and no large prefix sums are subtracted.
// The pairs of a chunk are found by doubling: blocks of 2, 4, 8, 16 tokens, each of two halves. Inside a half
// the rows q_in, k_in are decayed from its start and k_out to its end, so the pairs across the middle are one
// small matrix product; then the rows of the right half are multiplied by the decay over the left one, and
// k_out of the left by the decay over the right, and the block is a half of the next.
// The decay over a half is the exponential of the sum of its log-decays (over two tokens: of two factors), so
// that a factor is the product of at most six roundings of exponentials, whatever the gate: an error of
// 5e-7 that no chunk passes on, because the state decays by the sum of the whole chunk. That takes 1.4
// exponentials a token and channel, where an exponential for each block's own interval takes six.
#include "ops/kda/kda_factors.h"

#include <type_traits>

#include "ops/kda/kda_rows_ahead.h"
#include "ops/kda/kda_vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t C = KdaFactors::C;

// `rounded`: exponentials, norms and softplus to a few 1e-6, which is for products of bf16.
template <bool rounded>
class Preparation {
 public:
  Preparation(const KdaCpuHead& h, KdaFactors& f, RowsAhead& ahead)
      : h_(h), f_(f), ahead_(ahead), K_(kda_padded(h.K)) {}

  void run(int64_t begin, int64_t n) {
    load_rows(begin, n);
    load_beta(begin, n);
    for (int64_t first = 0; first < C; first += 2) pairs_of_two(first), ahead_.step();
    for (int64_t first = 0; first < C; first += 4) pairs_of_four(first), ahead_.step();
    for (int64_t half = 4; half < C; half *= 2)
      for (int64_t first = 0; first < C; first += 2 * half) {
        for (int64_t i = first + half; i < first + 2 * half; ++i, ahead_.step())
          for (int64_t j = first; j < first + half; j += 4) dot_four(i, j);
        join(first, half);
      }
    for (int64_t d = 0; d < K_; d += kLanes) {
      const Decay decay = decay_of(load(f_.g + d));
      store(f_.keep + d, decay.keep);
      store(f_.change + d, decay.change);
    }
  }

 private:
  void load_rows(int64_t begin, int64_t n);
  void load_beta(int64_t begin, int64_t n);
  void pairs_of_two(int64_t first);
  void pairs_of_four(int64_t first);
  void dot_four(int64_t i, int64_t j);
  void join(int64_t first, int64_t half);
  static Vec factor(Vec log_decay) { return rounded ? exp_rounded(log_decay) : exp(log_decay); }

  float* q(int64_t i) const { return f_.q_in + i * K_; }
  float* k(int64_t i) const { return f_.k_in + i * K_; }
  float* k_out(int64_t i) const { return f_.k_out + i * K_; }
  // Of the rows of a block, the first one becomes the sum of its log-decays. The second one becomes the decay
  // over the first two tokens.
  float* g(int64_t i) const { return f_.g + i * K_; }

  const KdaCpuHead& h_;
  KdaFactors& f_;
  RowsAhead& ahead_;
  const int64_t K_;  // padded
};

template <bool rounded>
void Preparation<rounded>::load_rows(int64_t begin, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    load_columns(h_.q, begin + i, 0, h_.K, q(i));
    load_columns(h_.k, begin + i, 0, h_.K, k(i));
    load_columns(h_.g, begin + i, 0, h_.K, g(i));
    apply_gate<rounded>(h_, g(i));
  }
  for (int64_t x = n * K_; x < C * K_; x += kLanes)
    for (float* const rows : {f_.q_in, f_.k_in, f_.g}) store(rows + x, Vec{});
}

template <bool rounded>
void Preparation<rounded>::load_beta(int64_t begin, int64_t n) {
  alignas(64) float padded[16];
  for (int64_t i = 0; i < n; ++i) {
    load_columns(h_.beta, begin + i, 0, 1, padded);
    f_.beta[i] = padded[0];
  }
  for (int64_t i = n; i < C; ++i) f_.beta[i] = 0;
  for (int64_t i = 0; i < C; i += kLanes) store(f_.beta + i, sigmoid(load(f_.beta + i)));
}

// Raw rows of q and k -> everything of a block of two; the diagonal of Aqk.
template <bool rounded>
void Preparation<rounded>::pairs_of_two(int64_t first) {
  const int64_t second = first + 1;
  typename std::conditional<rounded, float, RowScale>::type q0_scale, q1_scale, k0_scale, k1_scale;
  if constexpr (rounded) {
    const Quad scales =
        scales_of(h_, Quad{h_.scale, h_.scale, 1, 1}, {q(first), q(second), k(first), k(second)});
    q0_scale = scales[0], q1_scale = scales[1], k0_scale = scales[2], k1_scale = scales[3];
  } else {
    q0_scale = scale_of(h_, h_.scale, q(first)), q1_scale = scale_of(h_, h_.scale, q(second));
    k0_scale = scale_of(h_, 1, k(first)), k1_scale = scale_of(h_, 1, k(second));
  }
  Vec own0{}, own1{}, qk{}, kk{};
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Vec q0 = q0_scale * load(q(first) + d), k0 = k0_scale * load(k(first) + d);
    const Vec q1 = q1_scale * load(q(second) + d), k1 = k1_scale * load(k(second) + d);
    const Vec g0 = load(g(first) + d), g1 = load(g(second) + d);
    const Vec a0 = factor(g0), a1 = factor(g1), q1_in = q1 * a1, k1_in = k1 * a1;
    own0 += q0 * k0, own1 += q1 * k1;
    qk += q1_in * k0, kk += k1_in * k0;
    store(q(first) + d, q0 * a0), store(q(second) + d, q1_in * a0);
    store(k(first) + d, k0 * a0), store(k(second) + d, k1_in * a0);
    store(k_out(first) + d, k0 * a1), store(k_out(second) + d, k1);
    store(g(first) + d, g0 + g1), store(g(second) + d, a0 * a1);
  }
  const Quad sums = sum(own0, own1, qk, kk);
  f_.Aqk[first][first] = sums[0], f_.Aqk[second][second] = sums[1];
  f_.Aqk[second][first] = sums[2], f_.Akk[second][first] = sums[3];
}

// Two blocks of two -> a block of four.
template <bool rounded>
void Preparation<rounded>::pairs_of_four(int64_t first) {
  Vec qk[2][2] = {}, kk[2][2] = {};
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Vec left = load(g(first + 1) + d), right = load(g(first + 3) + d);
    const Vec k_j[2] = {load(k_out(first) + d), load(k_out(first + 1) + d)};
    for (int r = 0; r < 2; ++r) {
      float *const q_row = q(first + 2 + r) + d, *const k_row = k(first + 2 + r) + d;
      const Vec q_i = load(q_row), k_i = load(k_row);
      for (int j = 0; j < 2; ++j) qk[r][j] += q_i * k_j[j], kk[r][j] += k_i * k_j[j];
      store(q_row, q_i * left), store(k_row, k_i * left);
      store(k_out(first + r) + d, k_j[r] * right);
    }
    store(g(first) + d, load(g(first) + d) + load(g(first + 2) + d));
  }
  for (int r = 0; r < 2; ++r) {
    const Quad sums = sum(qk[r][0], qk[r][1], kk[r][0], kk[r][1]);
    for (int j = 0; j < 2; ++j) {
      f_.Aqk[first + 2 + r][first + j] = sums[j];
      f_.Akk[first + 2 + r][first + j] = sums[2 + j];
    }
  }
}

// Row i with rows [j, j + 4) of the other half.
template <bool rounded>
void Preparation<rounded>::dot_four(int64_t i, int64_t j) {
  Vec qk[4] = {}, kk[4] = {};
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Vec q_i = load(q(i) + d), k_i = load(k(i) + d);
    for (int c = 0; c < 4; ++c) {
      const Vec k_j = load(k_out(j + c) + d);
      qk[c] += q_i * k_j;
      kk[c] += k_i * k_j;
    }
  }
  store(f_.Aqk[i] + j, sum(qk[0], qk[1], qk[2], qk[3]));
  store(f_.Akk[i] + j, sum(kk[0], kk[1], kk[2], kk[3]));
}

// Two blocks of `half` tokens -> one.
template <bool rounded>
void Preparation<rounded>::join(int64_t first, int64_t half) {
  const int64_t middle = first + half;
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Vec g_left = load(g(first) + d), g_right = load(g(middle) + d);
    const Vec left = factor(g_left), right = factor(g_right);
    for (int64_t r = 0; r < half; ++r) {
      float *const q_row = q(middle + r) + d, *const k_row = k(middle + r) + d,
                   *const k_out_row = k_out(first + r) + d;
      store(q_row, load(q_row) * left);
      store(k_row, load(k_row) * left);
      store(k_out_row, load(k_out_row) * right);
    }
    store(g(first) + d, g_left + g_right);
  }
}

}  // namespace

void kda_factors(const KdaCpuHead& h, int64_t begin, int64_t n, bool rounded, RowsAhead& ahead,
                 KdaFactors& f) {
  rounded ? Preparation<true>(h, f, ahead).run(begin, n) : Preparation<false>(h, f, ahead).run(begin, n);
}

}  // namespace kl::KL_ISA
