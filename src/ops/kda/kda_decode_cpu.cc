// One step of the recurrence of KDA for one head. From memory the state is read once and written once: with
// a = exp g and s the state before the step,
//
//   p = sᵀ (a ⊙ k),   r = sᵀ (a ⊙ q)                     one sweep, two products with the state as it lies
//   delta = beta (v - p)
//   S = Diag(a) s + k deltaᵀ,   o = r + (qᵀ k) delta      a second sweep, which finds the state in a cache
#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_vec.h"

namespace kl::KL_ISA {
namespace {

// Registers of columns at a time, with a sum of p and of r each.
#if defined(__AVX512F__)
constexpr int kCols = 8;
#else
constexpr int kCols = 4;
#endif

struct Operands {
  float *q, *k;          // [K] normalised
  float *q_in, *k_in;    // [K] a ⊙ q, a ⊙ k
  float *keep, *change;  // [K] of Decay
  float *v, *o;          // [V]
  float qk;              // qᵀ k
};

Operands prepare(const KdaDecode& s) {
  const KdaCpuHead& h = s.head;
  const int64_t K = kda_padded(h.K), V = kda_padded(h.V);
  float* memory = s.memory;
  const auto take = [&](int64_t n) { return (memory += n) - n; };
  Operands x = {take(K), take(K), take(K), take(K), take(K), take(K), take(V), take(V), 0};
  float* const g = take(K);
  load_columns(h.q, s.t, 0, h.K, x.q);
  normalise(h, h.scale, x.q);
  load_columns(h.k, s.t, 0, h.K, x.k);
  normalise(h, 1, x.k);
  load_columns(h.v, s.t, 0, h.V, x.v);
  load_columns(h.g, s.t, 0, h.K, g);
  apply_gate(h, g);
  Vec qk{};
  for (int64_t d = 0; d < K; d += kLanes) {
    const Vec log_decay = load(g + d), a = exp(log_decay), q = load(x.q + d), k = load(x.k + d);
    const Decay decay = decay_of(log_decay);
    store(x.q_in + d, q * a);
    store(x.k_in + d, k * a);
    store(x.keep + d, decay.keep);
    store(x.change + d, decay.change);
    qk += q * k;
  }
  x.qk = sum(qk);
  return x;
}

// Columns [column, column + cols * kLanes), of which a single register has only `lanes`.
template <int cols>
void step_columns(const KdaDecode& s, const Operands& x, int64_t column, int64_t lanes = kLanes) {
  const bool whole = cols > 1 || lanes == kLanes;
  const auto load_at = [&](const float* p) { return whole ? load(p) : load_part(p, lanes); };
  Vec p[cols] = {}, r[cols] = {};
  for (int64_t d = 0; d < s.head.K; ++d) {
    const float* const row = s.from + d * s.from_stride + column;
    // The columns that come next: memory gives whole rows, not pieces of them (AVX2: 16 -> 23 GB/s).
    for (int x = 0; x < cols * kLanes; x += 16) __builtin_prefetch(row + cols * kLanes + x);
    for (int c = 0; c < cols; ++c) {
      const Vec before = load_at(row + c * kLanes);
      p[c] += x.k_in[d] * before;
      r[c] += x.q_in[d] * before;
    }
  }
  Vec delta[cols];
  for (int c = 0; c < cols; ++c) {
    delta[c] = s.beta * (load(x.v + column + c * kLanes) - p[c]);
    store(x.o + column + c * kLanes, r[c] + x.qk * delta[c]);
  }
  for (int64_t d = 0; d < s.head.K; ++d) {
    const float* const row = s.from + d * s.from_stride + column;
    float* const to = s.to + d * s.to_stride + column;
    for (int c = 0; c < cols; ++c) {
      const Vec before = load_at(row + c * kLanes);
      const Vec after = x.keep[d] * before + (x.change[d] * before + x.k[d] * delta[c]);
      whole ? store(to + c * kLanes, after) : store_part(to + c * kLanes, after, lanes);
    }
  }
}

}  // namespace

void kda_decode_head(const KdaDecode& s) {
  const Operands x = prepare(s);
  int64_t column = 0;
  for (; column + kCols * kLanes <= s.head.V; column += kCols * kLanes) step_columns<kCols>(s, x, column);
  for (; column < s.head.V; column += kLanes) step_columns<1>(s, x, column, min(s.head.V - column, kLanes));
  store_columns(x.o, s.head.out, s.t, 0, s.head.V);
}

}  // namespace kl::KL_ISA
