// The chunkwise algorithm of KDA for one head: chunks of C = 16 tokens. The equations are those of
// kda_chunk_ref.cc, with one chunk here for a sub-chunk there.
//
// Decays. Every factor is the exponential of a sum of the log-decays of its own interval, all of them <= 0.
// The pairs of a chunk are found by halving: tokens of the left half of a block decay to its middle, those of
// the right half from there, and their pairs are one small matrix product; the halves do the same for
// themselves. That takes four exponentials per token and channel, where each pair on its own takes 7.5.
//
// Values. All products with the state are done for kColumns of V at a time, so that this part of the state
// comes into the first-level cache once per chunk.
#include "ops/kda/kda_cpu.h"

#include "ops/kda/kda_vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t C = kKdaChunk;
constexpr int64_t kColumns = 64;

// Products keep kRows x kCols registers of sums: with fewer, an FMA waits for the one before.
constexpr int kRows = 4;
#if defined(__AVX512F__)
constexpr int kCols = 4;
#else
constexpr int kCols = 2;
#endif

// Calls f.template operator()<cols>(column) for registers [0, width), kCols of them at a time where possible.
template <class F>
void for_each_column(int64_t width, const F& f) {
  int64_t column = 0;
  for (; column + kCols * kLanes <= width; column += kCols * kLanes) f.template operator()<kCols>(column);
  for (; column < width; column += kLanes) f.template operator()<1>(column);
}

// f(row, register) for all of a tile, unrolled: an index that is known keeps an array in registers.
template <int cols, class F>
inline __attribute__((always_inline)) void for_each_in_tile(const F& f) {
#pragma GCC unroll 16
  for (int x = 0; x < kRows * cols; ++x) f(x / cols, x % cols);
}

// sums_ij = sum_{l < depth} a[i * row_step + l * step] · b_lj: kRows rows of A times `cols` registers of B.
template <int cols>
inline __attribute__((always_inline)) void multiply_tile(const float* a, int64_t row_step, int64_t step,
                                                         const float* b, int64_t b_stride, int64_t depth,
                                                         Vec (&sums)[kRows][cols]) {
  for (int64_t l = 0; l < depth; ++l) {
    Vec bs[cols];
    for (int j = 0; j < cols; ++j) bs[j] = load(b + l * b_stride + j * kLanes);
    for_each_in_tile<cols>([&](int i, int j) __attribute__((always_inline)) {
      sums[i][j] += a[i * row_step + l * step] * bs[j];
    });
  }
}

class Chunk {
 public:
  explicit Chunk(const KdaChunks& c)
      : h_(c.head),
        K_(kda_padded(c.head.K)),
        V_(kda_padded(c.head.V)),
        S_(c.state),
        S_stride_(kda_state_stride(c.head.V)) {
    float* memory = c.memory;
    for (float** rows : {&q_, &k_, &in_, &out_, &q_in_, &k_in_, &k_out_}) *rows = memory, memory += C * K_;
    keep_ = memory, change_ = keep_ + K_, u_ = change_ + K_;
  }

  void run(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    load_rows();
    pairs();
    decay_to_ends();
    for (int64_t first = 0; first < h_.V; first += kColumns) columns(first, min(kColumns, h_.V - first));
  }

 private:
  void load_rows();
  void load_beta();
  void pairs();
  void decay_from(int64_t first, int64_t last);
  void decay_until(int64_t first, int64_t last);
  template <int count>
  void dot_pairs(int64_t i, int64_t j);
  void dot_block(int64_t first, int64_t middle, int64_t last);
  void decay_to_ends();
  void columns(int64_t first, int64_t width);
  void read_state(const float* S, float* u, int64_t width);
  void solve(float* u, int64_t width);
  void advance(float* S, const float* u, int64_t width);

  const KdaCpuHead& h_;
  const int64_t K_, V_;  // padded
  float* const S_;
  const int64_t S_stride_;
  int64_t begin_ = 0, n_ = 0;  // rows [begin_, begin_ + n_)

  float *q_, *k_;          // [C, K] normalised
  float* in_;              // [C, K] log-decay from the start of a block through the row
  float* out_;             // [C, K] log-decay after the row to the end of its block
  float *q_in_, *k_in_;    // [C, K] decayed by `in`
  float* k_out_;           // [C, K] decayed by `out`
  float* u_;               // [C, V] v, then the pseudo values
  float *keep_, *change_;  // [K] decay of the state over the chunk
  float Akk_[C][C];        // below the diagonal
  float Aqk_[C][C];        // on it too
  float beta_[C];
  alignas(64) float o_[C][kColumns];
};

// The rows of a token lie far from those of the next one. All of them are copied before the arithmetic
// begins, so that many of these reads are under way at the same time.
void Chunk::load_rows() {
  for (int64_t i = 0; i < n_; ++i) {
    load_columns(h_.q, begin_ + i, 0, h_.K, q_ + i * K_);
    load_columns(h_.k, begin_ + i, 0, h_.K, k_ + i * K_);
    load_columns(h_.g, begin_ + i, 0, h_.K, in_ + i * K_);
    load_columns(h_.v, begin_ + i, 0, h_.V, u_ + i * V_);
  }
  for (int64_t i = 0; i < n_; ++i) {
    normalise(h_, h_.scale, q_ + i * K_);
    normalise(h_, 1, k_ + i * K_);
    apply_gate(h_, in_ + i * K_);
  }
  for (int64_t x = 0; x < n_ * K_; x += kLanes) store(out_ + x, Vec{});
  load_beta();
}

void Chunk::load_beta() {
  alignas(64) float padded[16];
  for (int64_t i = 0; i < C; ++i) {
    beta_[i] = 0;
    if (i >= n_) continue;
    load_columns(h_.beta, begin_ + i, 0, 1, padded);
    beta_[i] = padded[0];
  }
  for (int64_t i = 0; i < C; i += kLanes) store(beta_ + i, sigmoid(load_bits<Vec>(beta_ + i)));
}

// q_in, k_in of rows [first, last).
void Chunk::decay_from(int64_t first, int64_t last) {
  for (int64_t x = first * K_; x < last * K_; x += kLanes) {
    const Vec factor = exp(load(in_ + x));
    store(q_in_ + x, load(q_ + x) * factor);
    store(k_in_ + x, load(k_ + x) * factor);
  }
}
// k_out
void Chunk::decay_until(int64_t first, int64_t last) {
  for (int64_t x = first * K_; x < last * K_; x += kLanes)
    store(k_out_ + x, load(k_ + x) * exp(load(out_ + x)));
}

// Akk, Aqk from row i to rows [j, j + count).
template <int count>
void Chunk::dot_pairs(int64_t i, int64_t j) {
  Vec q[count] = {}, k[count] = {};
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Vec q_i = load(q_in_ + i * K_ + d), k_i = load(k_in_ + i * K_ + d);
    for (int c = 0; c < count; ++c) {
      const Vec k_j = load(k_out_ + (j + c) * K_ + d);
      q[c] += q_i * k_j;
      k[c] += k_i * k_j;
    }
  }
  if constexpr (count == 4) {
    store(Aqk_[i] + j, sum(q[0], q[1], q[2], q[3]));
    store(Akk_[i] + j, sum(k[0], k[1], k[2], k[3]));
  } else {
    for (int c = 0; c < count; ++c) Aqk_[i][j + c] = sum(q[c]), Akk_[i][j + c] = sum(k[c]);
  }
}

// Rows [middle, last) with all of [first, middle).
void Chunk::dot_block(int64_t first, int64_t middle, int64_t last) {
  for (int64_t i = middle; i < last; ++i) {
    if (middle - first == 1) dot_pairs<1>(i, first);
    if (middle - first == 2) dot_pairs<2>(i, first);
    for (int64_t j = first; j + 4 <= middle; j += 4) dot_pairs<4>(i, j);
  }
}

// Akk, Aqk; then `in` and `out` are those of the chunk. Blocks of 2, 4, 8, 16 tokens, each of two halves.
void Chunk::pairs() {
  for (int64_t i = 0; i < n_; ++i) {
    Vec total{};
    for (int64_t d = i * K_; d < (i + 1) * K_; d += kLanes) total += load(q_ + d) * load(k_ + d);
    Aqk_[i][i] = sum(total);
  }
  for (int64_t half = 1; half < C; half *= 2)
    for (int64_t first = 0; first + half < n_; first += 2 * half) {
      const int64_t middle = first + half, last = min(middle + half, n_);
      decay_until(first, middle);
      decay_from(middle, last);
      dot_block(first, middle, last);
      for (int64_t d = 0; d < K_; d += kLanes) {
        const Vec left = load(in_ + (middle - 1) * K_ + d), right = load(in_ + (last - 1) * K_ + d);
        for (int64_t j = first; j < middle; ++j) {
          float* const sum = out_ + j * K_ + d;
          store(sum, load(sum) + right);
        }
        for (int64_t i = middle; i < last; ++i) {
          float* const sum = in_ + i * K_ + d;
          store(sum, load(sum) + left);
        }
      }
    }
}

// Of the chunk as one block: what enters it from the state, and what leaves it.
void Chunk::decay_to_ends() {
  decay_from(0, n_);
  decay_until(0, n_);
  const int64_t tiles_end = (n_ + kRows - 1) / kRows * kRows;
  for (int64_t x = n_ * K_; x < tiles_end * K_; x += kLanes) store(q_in_ + x, Vec{}), store(k_in_ + x, Vec{});
  for (int64_t d = 0; d < K_; d += kLanes) {
    const Decay decay = decay_of(load(in_ + (n_ - 1) * K_ + d));
    store(keep_ + d, decay.keep);
    store(change_ + d, decay.change);
  }
}

// Everything else, for columns [first, first + width) of V.
void Chunk::columns(int64_t first, int64_t width) {
  const int64_t padded = kda_padded(width);
  read_state(S_ + first, u_ + first, padded);
  solve(u_ + first, padded);
  for (int64_t i = 0; i < n_; ++i) store_columns(o_[i], h_.out, begin_ + i, first, width);
  advance(S_ + first, u_ + first, padded);
}

// o_i = Sᵀ q_in_i,   u_i = v_i - Sᵀ k_in_i
void Chunk::read_state(const float* S, float* u, int64_t width) {
  const int64_t K = h_.K, row_step = K_, S_stride = S_stride_;
  for_each_column(width, [=, this]<int cols>(int64_t column) {
    for (int64_t i = 0; i < n_; i += kRows) {
      Vec q[kRows][cols] = {};
      multiply_tile(q_in_ + i * row_step, row_step, 1, S + column, S_stride, K, q);
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
        store(o_[i + r] + column + c * kLanes, q[r][c]);
      });
      Vec k[kRows][cols] = {};
      multiply_tile(k_in_ + i * row_step, row_step, 1, S + column, S_stride, K, k);
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
        float* const v = u + (i + r) * V_ + column + c * kLanes;
        store(v, load(v) - k[r][c]);
      });
    }
  });
}

// u_i <- beta_i (u_i - sum_{j<i} Akk_ij u_j),   o_i += sum_{j<=i} Aqk_ij u_j. Row by row, so that a NaN of a
// later token stays its own.
void Chunk::solve(float* u, int64_t width) {
  for_each_column(width, [&]<int cols>(int64_t column) {
    for (int64_t i = 0; i < n_; ++i) {
      Vec written[cols] = {}, read[cols] = {};
      for (int64_t j = 0; j < i; ++j)
        for (int c = 0; c < cols; ++c) {
          const Vec u_j = load(u + j * V_ + column + c * kLanes);
          written[c] += Akk_[i][j] * u_j;
          read[c] += Aqk_[i][j] * u_j;
        }
      for (int c = 0; c < cols; ++c) {
        float *const row = u + i * V_ + column + c * kLanes, *const o = o_[i] + column + c * kLanes;
        const Vec u_i = beta_[i] * (load(row) - written[c]);
        store(row, u_i);
        store(o, load(o) + (read[c] + Aqk_[i][i] * u_i));
      }
    }
  });
}

// S <- Diag(decay) S + sum_j k_out_j u_jᵀ
void Chunk::advance(float* S, const float* u, int64_t width) {
  const float *const keep = keep_, *const change = change_, *const k = k_out_;
  const int64_t S_stride = S_stride_, n = n_, step = K_, u_stride = V_;
  for (int64_t d = 0; d < h_.K; d += kRows)
    for_each_column(width, [=, this]<int cols>(int64_t column) {
      Vec sums[kRows][cols] = {};
      multiply_tile(k + d, 1, step, u + column, u_stride, n, sums);
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
        float* const to = S + (d + r) * S_stride + column + c * kLanes;
        const Vec s = load(to);
        store(to, keep[d + r] * s + (change[d + r] * s + sums[r][c]));
      });
    });
}

}  // namespace

void kda_chunks(const KdaChunks& c) {
  Chunk chunk(c);
  for (int64_t begin = c.begin; begin < c.end; begin += C) chunk.run(begin, min(C, c.end - begin));
}

}  // namespace kl::KL_ISA
