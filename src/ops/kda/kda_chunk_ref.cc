// The chunkwise algorithm of Kimi Delta Attention (Kimi Linear, arXiv 2510.26692, section 3) in plain f32
// code: chunks of C = 64 tokens, and inside a chunk sub-chunks of B = 16. It is the CPU's prefill.
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
#include "ops/kda/kda_gate.h"
#include "ops/kda/kda_head.h"

namespace kl {
namespace kda {
namespace {

constexpr int64_t kSub = 16;  // B

struct Rows {
  float* data;
  int64_t width;
  float* operator[](int64_t i) const { return data + i * width; }
  Rows from(int64_t i) const { return {(*this)[i], width}; }
};

// One chunk and the state before it. Key dimensions are padded(K), value dimensions padded(V).
struct Chunk {
  Chunk(const Head& h, int64_t rows) {
    const int64_t K = padded(h.K), V = padded(h.V), subs = (rows + kSub - 1) / kSub;
    Rows* const matrices[] = {&q, &k, &g, &q_in, &k_in, &k_out, &span, &Akk, &Aqk, &u, &o, &S, &S_row};
    const int64_t heights[] = {rows, rows, rows, rows, rows, rows, subs, rows, rows, rows, rows, h.K, h.K};
    const int64_t widths[] = {K, K, K, K, K, K, K, kChunk, kChunk, V, V, V, V};
    int64_t size = 0;
    for (size_t m = 0; m < std::size(matrices); ++m) size += heights[m] * widths[m];
    memory.resize(static_cast<size_t>(size));
    float* next = memory.data();
    for (size_t m = 0; m < std::size(matrices); ++m) {
      *matrices[m] = {next, widths[m]};
      next += heights[m] * widths[m];
    }
  }

  int64_t n = 0;    // rows, at most C
  Rows q, k;        // [C, K] normalised; later decayed from the start or to the end of the chunk
  Rows g;           // [C, K] log-decays
  Rows q_in, k_in;  // [C, K] decayed from the start of their sub-chunk
  Rows k_out;       // [C, K] decayed to the end of their sub-chunk
  Rows span;        // [C / B, K] log-decay of a whole sub-chunk
  Rows Akk, Aqk;    // [C, C] the parts below the diagonal, Aqk with it
  Rows u;           // [C, V] v, then the pseudo values
  Rows o;           // [C, V]
  Rows S, S_row;    // [K, V] the state before the chunk; one inside it, for a checkpoint
  float beta[kChunk];
  std::vector<float> memory;
};

float dot(const float* __restrict a, const float* __restrict b, int64_t n) {
  float sum[kLanes] = {};
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += a[i + lane] * b[i + lane];
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) sum[lane] += sum[lane + half];
  return sum[0];
}

// The left factor of a product: element (i, j) is data[i * row_step + j * step].
struct Factor {
  const float* data;
  int64_t row_step, step;
};
Factor normal(Rows a) { return {a.data, a.width, 1}; }
Factor transposed(Rows a) { return {a.data, 1, a.width}; }

// out_i += sign · sum_{j < depth} a_ij b_j. Sixteen terms at a time are summed on their own: a sum of 256
// then has the rounding error of one of 32.
void add_product(Rows out, float sign, Factor a, Rows b, int64_t rows, int64_t depth) {
  float sum[256];
  for (int64_t first = 0; first < depth; first += 16) {
    const int64_t last = std::min(first + 16, depth);
    for (int64_t i = 0; i < rows; ++i) {
      std::fill(sum, sum + out.width, 0.f);
      for (int64_t j = first; j < last; ++j)
        add_scaled(sum, a.data[i * a.row_step + j * a.step], b[j], out.width);
      add_scaled(out[i], sign, sum, out.width);
    }
  }
}

// factor = exp(log-decay of the whole sub-chunks strictly between `before` and `after`)
void decay_between(const Chunk& c, int64_t before, int64_t after, float* factor) {
  const int64_t K = c.q.width;
  std::fill(factor, factor + K, 0.f);
  for (int64_t M = before + 1; M < after; ++M) add_scaled(factor, 1.f, c.span[M], K);
  for (int64_t d = 0; d < K; ++d) factor[d] = std::exp(factor[d]);
}

void multiply(float* __restrict to, const float* __restrict x, const float* __restrict factor, int64_t n) {
  for (int64_t i = 0; i < n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) to[i + lane] = x[i + lane] * factor[i + lane];
}

void load_chunk(const Head& h, const HeadGate<float>& gate, int64_t begin, Chunk& c) {
  for (int64_t i = 0; i < c.n; ++i) {
    load_qk_row(h, h.args.q, begin + i, c.q[i]);
    load_qk_row(h, h.args.k, begin + i, c.k[i]);
    load_row(h.args.g, begin + i, h.head, c.g[i]);
    gate.apply(c.g[i]);
    load_row(h.args.v, begin + i, h.head, c.u[i]);
    c.beta[i] =
        static_cast<float>(write_strength(h.args.beta_kind, element<double>(h.args.beta, begin + i, h.head)));
  }
}

// q_in, k_in, k_out, span: sums of log-decays start anew at each boundary, in both directions.
void decay_to_boundaries(Chunk& c) {
  const int64_t K = c.q.width;
  float sum[256];
  for (int64_t first = 0; first < c.n; first += kSub) {
    const int64_t last = std::min(first + kSub, c.n);
    std::fill(sum, sum + K, 0.f);
    for (int64_t i = first; i < last; ++i)
      for (int64_t d = 0; d < K; ++d) {
        sum[d] += c.g[i][d];
        const float factor = std::exp(sum[d]);
        c.q_in[i][d] = c.q[i][d] * factor;
        c.k_in[i][d] = c.k[i][d] * factor;
      }
    std::copy(sum, sum + K, c.span[first / kSub]);
    std::fill(sum, sum + K, 0.f);
    for (int64_t j = last - 1; j >= first; --j)
      for (int64_t d = 0; d < K; ++d) {
        c.k_out[j][d] = c.k[j][d] * std::exp(sum[d]);
        sum[d] += c.g[j][d];
      }
  }
}

// Akk, Aqk between sub-chunk I and those before it: D(j, i) = (j to its boundary) · (between) · (boundary to
// i)
void pairs_between(Chunk& c, int64_t I) {
  const int64_t K = c.q.width, first = I * kSub, last = std::min(first + kSub, c.n);
  float between[256], q_i[256], k_i[256];
  for (int64_t J = 0; J < I; ++J) {
    decay_between(c, J, I, between);
    for (int64_t i = first; i < last; ++i) {
      multiply(q_i, c.q_in[i], between, K);
      multiply(k_i, c.k_in[i], between, K);
      for (int64_t j = J * kSub; j < (J + 1) * kSub; ++j) {
        c.Aqk[i][j] = dot(q_i, c.k_out[j], K);
        c.Akk[i][j] = dot(k_i, c.k_out[j], K);
      }
    }
  }
}

// Akk, Aqk inside sub-chunk I: j walks back from i, and the interval grows by one token a step.
void pairs_within(Chunk& c, int64_t I) {
  const int64_t K = c.q.width, first = I * kSub, last = std::min(first + kSub, c.n);
  float sum[256], k_j[256];
  for (int64_t i = first; i < last; ++i) {
    c.Aqk[i][i] = dot(c.q[i], c.k[i], K);
    std::fill(sum, sum + K, 0.f);
    for (int64_t j = i - 1; j >= first; --j) {
      add_scaled(sum, 1.f, c.g[j + 1], K);
      for (int64_t d = 0; d < K; ++d) k_j[d] = c.k[j][d] * std::exp(sum[d]);
      c.Aqk[i][j] = dot(c.q[i], k_j, K);
      c.Akk[i][j] = dot(c.k[i], k_j, K);
    }
  }
}

// u = v - Sᵀ(D(0, i) ⊙ k_i),   o = Sᵀ(D(0, i) ⊙ q_i)
void read_state(Chunk& c, int64_t key_dim) {
  float before[256];
  for (int64_t i = 0; i < c.n; ++i) {
    if (i % kSub == 0) decay_between(c, -1, i / kSub, before);
    multiply(c.q[i], c.q_in[i], before, c.q.width);
    multiply(c.k[i], c.k_in[i], before, c.k.width);
  }
  std::fill(c.o[0], c.o[c.n], 0.f);
  add_product(c.o, 1, normal(c.q), c.S, c.n, key_dim);
  add_product(c.u, -1, normal(c.k), c.S, c.n, key_dim);
}

// Forward substitution: u_i = beta_i (u_i - sum_{j<i} Akk_ij u_j), whole sub-chunks before i first.
void solve(Chunk& c) {
  for (int64_t first = 0; first < c.n; first += kSub) {
    const int64_t last = std::min(first + kSub, c.n);
    add_product(c.u.from(first), -1, normal(c.Akk.from(first)), c.u, last - first, first);
    for (int64_t i = first; i < last; ++i) {
      const Factor row = {c.Akk[i] + first, c.Akk.width, 1};
      add_product(c.u.from(i), -1, row, c.u.from(first), 1, i - first);
      scale_by(c.u[i], c.beta[i], c.u.width);
    }
  }
}

// o_i += sum_{j<=i} Aqk_ij u_j. Row by row: a NaN of a later token stays its own.
void read_chunk(Chunk& c) {
  for (int64_t i = 0; i < c.n; ++i) add_product(c.o.from(i), 1, normal(c.Aqk.from(i)), c.u, 1, i + 1);
}

// S <- Diag(D(0, n)) S + sum_{j<n} (D(j, n) ⊙ k_j) u_jᵀ, for the whole chunk or for its first sub-chunks.
void advance(Chunk& c, Rows S, int64_t n, int64_t key_dim) {
  const int64_t K = c.q.width, subs = (n + kSub - 1) / kSub;
  float factor[256];
  for (int64_t j = 0; j < n; ++j) {
    if (j % kSub == 0) decay_between(c, j / kSub, subs, factor);
    multiply(c.k[j], c.k_out[j], factor, K);
  }
  decay_between(c, -1, subs, factor);
  for (int64_t d = 0; d < key_dim; ++d) scale_by(S[d], factor[d], S.width);
  add_product(S, 1, transposed(c.k), c.u, key_dim, n);
}

}  // namespace

void chunk_head(const Head& h) {
  if (h.begin == h.end && h.read_slot == h.write_slot) return;
  const HeadGate<float> gate(h.args.gate, h.head, h.K);
  Chunk c(h, std::min(kChunk, h.end - h.begin));
  load_state(h, h.read_slot, c.S.data);
  for (int64_t begin = h.begin; begin < h.end; begin += kChunk) {
    c.n = std::min(kChunk, h.end - begin);
    load_chunk(h, gate, begin, c);
    decay_to_boundaries(c);
    for (int64_t I = 0; I * kSub < c.n; ++I) {
      pairs_between(c, I);
      pairs_within(c, I);
    }
    read_state(c, h.K);
    solve(c);
    read_chunk(c);
    for (int64_t i = 0; i < c.n; ++i) {
      scale_by(c.o[i], static_cast<float>(h.scale), c.o.width);
      store_row(c.o[i], h.args.out, begin + i, h.head);
    }
    for_each_checkpoint(h.args, begin, begin + c.n, [&](int64_t row, int64_t slot) {
      std::copy(c.S[0], c.S[h.K], c.S_row[0]);
      advance(c, c.S_row, row - begin, h.K);
      store_state(h, c.S_row.data, slot);
    });
    advance(c, c.S, c.n, h.K);
  }
  store_state(h, c.S.data, h.write_slot);
}

}  // namespace kda

void kda_chunk_ref(const KdaArgs& args) {
  kda_check(args);
  KL_CHECK(args.q.device == Device::cpu, "kda_chunk_ref: expected tensors on the cpu, found ",
           name_of(args.q.device));
  kda::for_each_head(nullptr, args, kda::chunk_head);
}

}  // namespace kl
