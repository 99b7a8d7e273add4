// The chunkwise algorithm of KDA for one head: chunks of C = 16 tokens. The equations are those of
// kda_chunk_ref.cc, with one chunk here for a sub-chunk there. What a chunk brings with it is prepared by
// kda_factors_cpu.cc; here are its products with the state and with its own values.
//
// Products go tile by tile: a tile of columns of the state is read by all rows of the chunk, then the next.
// All tiles of kColumns of V have been read before their values are solved for and written.
#include "ops/kda/kda_cpu.h"

#include <type_traits>

#include "ops/kda/kda_factors.h"
#include "ops/kda/kda_rows_ahead.h"
#include "ops/kda/kda_vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t C = kKdaChunk;
constexpr int64_t kColumns = 128;

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
  if constexpr (kCols > 2)
    for (; column + 2 * kLanes <= width; column += 2 * kLanes) f.template operator()<2>(column);
  for (; column < width; column += kLanes) f.template operator()<1>(column);
}

// f(row, register) for all of a tile, unrolled: an index that is known keeps an array in registers.
template <int cols, class F>
inline __attribute__((always_inline)) void for_each_in_tile(const F& f) {
#pragma GCC unroll 16
  for (int x = 0; x < kRows * cols; ++x) f(x / cols, x % cols);
}

// An operand is a matrix of f32, or of pairs of bf16 from two neighbours along the sum.
inline Vec load_operand(const float* p) { return load(p); }
inline BitVec load_operand(const uint32_t* p) { return load_bits<BitVec>(p); }
inline Vec multiply_add(float a, Vec b, Vec sum) { return sum + a * b; }
inline Vec multiply_add(uint32_t a, BitVec b, Vec sum) { return dot_pairs(sum, BitVec{} + a, b); }

template <class T>
struct Left {  // element (i, l) at data + i * row + l * step
  const T* data;
  int64_t row, step;
};

template <class T>
struct Columns {  // 16 columns of row l at data + l * row, the next 16 columns `panel` further
  T* data;
  int64_t row, panel;

  T* at(int64_t l, int j) const {
    return data + l * row + j * kLanes / kKdaPanel * panel + j * kLanes % kKdaPanel;
  }
};

// sums_ij = sum_{l < depth} a_il · b_lj: kRows rows of A times `cols` registers of B.
template <int cols, class T, class B>
inline __attribute__((always_inline)) void multiply_tile(const Left<T>& a, const Columns<B>& b, int64_t depth,
                                                         Vec (&sums)[kRows][cols]) {
#pragma GCC unroll 2
  for (int64_t l = 0; l < depth; ++l) {
    decltype(load_operand(b.data)) bs[cols];
    for (int j = 0; j < cols; ++j) bs[j] = load_operand(b.at(l, j));
    for_each_in_tile<cols>([&](int i, int j) __attribute__((always_inline)) {
      sums[i][j] = multiply_add(a.data[i * a.row + l * a.step], bs[j], sums[i][j]);
    });
  }
}

// What the products that read the state are made of: f32, or pairs of bf16 that are rounded from it.
//
// The product that writes is f32 in both cases: a token writes the difference of its value and a prediction,
// and where the state does not decay and is overwritten all the time (beta near 1) operands of bf16 there too
// leave it off by 4.1e-3. So the worst is 3.0e-3.
struct F32Operands {
  typedef float T;
  float *q_in, *k_in;  // [C, K]
  float* S;            // panels of [K]
};
struct PairOperands {
  typedef uint32_t T;
  uint32_t *q_in, *k_in;  // [C, K / 2]
  uint32_t* S;            // panels of [K / 2], half as far apart
};

template <bool bf16>
class Chunk {
 public:
  explicit Chunk(const KdaChunks& c)
      : h_(c.head),
        end_(c.end),
        K_(kda_padded(c.head.K)),
        V_(kda_padded(c.head.V)),
        S_(c.state),
        panel_(kda_panel_stride(c.head.K)),
        u_(c.memory),
        rest_(u_ + C * V_),
        f_(c.head.K, rest_) {
    if constexpr (bf16) {
      auto* memory = reinterpret_cast<uint32_t*>(rest_);
      const auto take = [&](int64_t n) { return (memory += n) - n; };
      x_ = {take(C * K_ / 2), take(C * K_ / 2), take(kda_panels_size(h_.K, h_.V) / 2)};
      for (int64_t column = 0; column < V_; column += kKdaPanel)
        for (int64_t d = 0; d < K_; d += 2) round_state(column, d);
    } else {
      x_ = {f_.q_in, f_.k_in, S_};
    }
  }

  void run(int64_t begin, int64_t n) {
    begin_ = begin, n_ = n;
    for (int64_t i = 0; i < n_; ++i) load_columns(h_.v, begin_ + i, 0, h_.V, u_ + i * V_);
    for (int64_t x = n_ * V_; x < C * V_; x += kLanes) store(u_ + x, Vec{});
    const int64_t next = begin + n, tiles = (n_ + kRows - 1) / kRows * (V_ / (kCols * kLanes) + 1);
    RowsAhead ahead(h_, RowsAhead::kAll, next, min(next + C, end_), kKdaFactorSteps + tiles);
    kda_factors(h_, begin_, n_, bf16, ahead, f_);
    if constexpr (bf16) round_factors();
    for (int64_t first = 0; first < h_.V; first += kColumns)
      columns(first, min(kColumns, h_.V - first), ahead);
  }

 private:
  typedef std::conditional_t<bf16, PairOperands, F32Operands> Operands;
  typedef typename Operands::T T;
  static constexpr int kPair = bf16 ? 2 : 1;  // values of one operand

  void columns(int64_t first, int64_t width, RowsAhead&);
  void read_state(int64_t first, int64_t width, RowsAhead&);
  void solve(float* u, int64_t width);
  void advance(int64_t first, int64_t width);
  void round_factors();
  void round_state(int64_t column, int64_t d);

  // A panel's columns of the state, as f32 and as an operand.
  Columns<float> state(int64_t column) const {
    return {S_ + column / kKdaPanel * panel_ + column % kKdaPanel, kKdaPanel, panel_};
  }
  Columns<T> operand(int64_t column) const {
    const int64_t panel = panel_ / kPair;
    return {x_.S + column / kKdaPanel * panel + column % kKdaPanel, kKdaPanel, panel};
  }

  const KdaCpuHead& h_;
  const int64_t end_;
  const int64_t K_, V_;  // padded
  float* const S_;
  const int64_t panel_;        // floats from panel to panel of S
  int64_t begin_ = 0, n_ = 0;  // rows [begin_, begin_ + n_)

  float* u_;  // [C, V] v, then the pseudo values
  float* rest_;
  KdaFactors f_;
  Operands x_;
  alignas(64) float o_[C][kColumns];
};

template <bool bf16>
void Chunk<bf16>::round_factors() {
  if constexpr (bf16) {
    for (int64_t i = 0; i < C; ++i)
      for (int64_t d = 0; d < K_; d += kLanes) {
        const HalfVec q = narrow_bf16(load(f_.q_in + i * K_ + d)),
                      k = narrow_bf16(load(f_.k_in + i * K_ + d));
        __builtin_memcpy(x_.q_in + (i * K_ + d) / 2, &q, sizeof q);
        __builtin_memcpy(x_.k_in + (i * K_ + d) / 2, &k, sizeof k);
      }
  }
}

// Rows d, d + 1 of a panel.
template <bool bf16>
void Chunk<bf16>::round_state(int64_t column, int64_t d) {
  if constexpr (bf16)
    for (int j = 0; j < kKdaPanel / kLanes; ++j)
      store(operand(column).at(d / 2, j),
            pairs_of(load(state(column).at(d, j)), load(state(column).at(d + 1, j))));
}

// Everything else, for columns [first, first + width) of V.
template <bool bf16>
void Chunk<bf16>::columns(int64_t first, int64_t width, RowsAhead& ahead) {
  const int64_t padded = kda_padded(width);
  read_state(first, padded, ahead);
  solve(u_ + first, padded);
  for (int64_t i = 0; h_.out.data && i < n_; ++i) store_columns(o_[i], h_.out, begin_ + i, first, width);
  advance(first, padded);
}

// o_i = Sᵀ q_in_i,   u_i = v_i - Sᵀ k_in_i
template <bool bf16>
void Chunk<bf16>::read_state(int64_t first, int64_t width, RowsAhead& ahead) {
  const int64_t row = K_ / kPair, depth = (h_.K + kPair - 1) / kPair;
  const bool writes = h_.out.data != nullptr;
  for_each_column(width, [=, this, &ahead]<int cols>(int64_t column) {
    const Columns<T> S = operand(first + column);
    for (int64_t i = 0; i < n_; i += kRows) {
      if (writes) {
        Vec q[kRows][cols] = {};
        multiply_tile(Left<T>{x_.q_in + i * row, row, 1}, S, depth, q);
        for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
          store(o_[i + r] + column + c * kLanes, q[r][c]);
        });
      }
      Vec k[kRows][cols] = {};
      multiply_tile(Left<T>{x_.k_in + i * row, row, 1}, S, depth, k);
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
        float* const v = u_ + (i + r) * V_ + first + column + c * kLanes;
        store(v, load(v) - k[r][c]);
      });
      ahead.step();
    }
  });
}

// u_i <- beta_i (u_i - sum_{j<i} Akk_ij u_j),   o_i += sum_{j<=i} Aqk_ij u_j. Only sums of earlier rows, so
// that a NaN of a later token stays its own: of the rows before a tile as one product, inside it row by row.
template <bool bf16>
void Chunk<bf16>::solve(float* u, int64_t width) {
  for_each_column(width, [&]<int cols>(int64_t column) {
    const Columns<float> earlier = {u + column, V_, kKdaPanel};
    for (int64_t i = 0; i < n_; i += kRows) {
      Vec u_i[kRows][cols], sums[kRows][cols] = {};
      multiply_tile(Left<float>{f_.Akk[i], C, 1}, earlier, i, sums);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* const row = u + (i + r) * V_ + column;
#pragma GCC unroll 4
        for (int c = 0; c < cols; ++c) {
          Vec written = sums[r][c];
#pragma GCC unroll 4
          for (int j = 0; j < r; ++j) written += f_.Akk[i + r][i + j] * u_i[j][c];
          u_i[r][c] = f_.beta[i + r] * (load(row + c * kLanes) - written);
          store(row + c * kLanes, u_i[r][c]);
        }
      }
      if (!h_.out.data) continue;
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) { sums[r][c] = Vec{}; });
      multiply_tile(Left<float>{f_.Aqk[i], C, 1}, earlier, i, sums);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        float* const o = o_[i + r] + column;
#pragma GCC unroll 4
        for (int c = 0; c < cols; ++c) {
          Vec read = sums[r][c];
#pragma GCC unroll 4
          for (int j = 0; j <= r; ++j) read += f_.Aqk[i + r][i + j] * u_i[j][c];
          store(o + c * kLanes, load(o + c * kLanes) + read);
        }
      }
    }
  });
}

// S <- Diag(decay) S + sum_j k_out_j u_jᵀ
template <bool bf16>
void Chunk<bf16>::advance(int64_t first, int64_t width) {
  const float *const keep = f_.keep, *const change = f_.change, *const k_out = f_.k_out;
  const int64_t K = h_.K, n = n_, step = K_;
  for_each_column(width, [=, this]<int cols>(int64_t column) {
    const Columns<float> S = state(first + column), u = {u_ + first + column, V_, kKdaPanel};
    for (int64_t d = 0; d < K; d += kRows) {
      Vec sums[kRows][cols] = {};
      multiply_tile(Left<float>{k_out + d, 1, step}, u, n, sums);
      for_each_in_tile<cols>([&](int r, int c) __attribute__((always_inline)) {
        float* const to = S.at(d + r, c);
        const Vec s = load(to);
        sums[r][c] = keep[d + r] * s + (change[d + r] * s + sums[r][c]);
        store(to, sums[r][c]);
      });
      if constexpr (bf16)
        for (int r = 0; r < kRows; r += 2)
          for (int c = 0; c < cols; ++c)
            store(operand(first + column).at((d + r) / 2, c), pairs_of(sums[r][c], sums[r + 1][c]));
    }
  });
}

template <bool bf16>
void run_chunks(const KdaChunks& c) {
  Chunk<bf16> chunk(c);
  for (int64_t begin = c.begin; begin < c.end; begin += C) chunk.run(begin, min(C, c.end - begin));
}

}  // namespace

void kda_chunks(const KdaChunks& c) { c.bf16 ? run_chunks<true>(c) : run_chunks<false>(c); }

}  // namespace kl::KL_ISA
