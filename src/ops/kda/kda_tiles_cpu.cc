// The chunkwise algorithm of kda_cpu.cc with its products on tiles of bf16 (simd/tiles.h). What a tile takes
// in 16 cycles keeps the registers busy for 256, so that what is left is the work between the products:
//
// * Chunks are prepared a block at a time (kda_factors_cpu.cc), their factors laid down as tiles. Then some
//   columns of V go through all chunks of the block, while their part of the state stays in the first-level
//   cache.
// * A product over the 16 tokens of a chunk leaves half of a tile's depth free. There the factors of what is
//   written are in two terms, x = high + low, as good as 16 bits: only what reads the state (q_in, k_in and
//   the state itself, which is f32 between chunks) is rounded to bf16.
#include "ops/kda/kda_cpu.h"
#include "ops/kda/kda_factors.h"
#include "ops/kda/kda_rows_ahead.h"
#include "ops/kda/kda_vec.h"
#include "simd/tiles.h"
#include "simd/transpose.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t C = kKdaChunk;
constexpr int64_t kBlock = kKdaTileBlock;
constexpr int64_t kTile = kTileRows * kTilePairs;  // words of a tile
constexpr int64_t kHalf = kTilePairs / 2;          // pairs of tokens in a chunk
static_assert(C == kTileRows && kKdaPanel == 16);

// One chunk as its products take it, [rows][words] of tiles:
struct ChunkTiles {
  uint32_t *q_in, *k_in;  // [K / 32][tokens][pairs of channels]
  uint32_t* k_out;        // [K / 16][channels][pairs of tokens: high, then low]
  uint32_t* Aqk;          // [tokens][pairs of tokens: high, then low], zero above the diagonal
  float* Akk;             // [tokens][tokens] times -beta of the row, below the diagonal
  float* beta;            // [tokens]
  float *keep, *change;   // [K] a Decay

  ChunkTiles(int64_t K, float* memory) {
    auto* words = reinterpret_cast<uint32_t*>(memory);
    const auto take = [&](int64_t n) { return (words += n) - n; };
    q_in = take(kda_tile_depth(K) * kTile), k_in = take(kda_tile_depth(K) * kTile);
    k_out = take(kda_padded(K) / 16 * kTile), Aqk = take(kTile);
    Akk = reinterpret_cast<float*>(take(C * C)), beta = reinterpret_cast<float*>(take(C));
    for (float** const row : {&keep, &change}) *row = reinterpret_cast<float*>(take(kda_padded(K)));
  }
};

inline Vec half_of(BitVec pairs, bool second) { return (Vec)(second ? pairs & 0xffff0000u : pairs << 16); }

// x = high + low in bf16, for two rows: pairs of what belongs together.
struct SplitPairs {
  BitVec high, low;
};
inline SplitPairs split(Vec first, Vec second) {
  const BitVec high = pairs_of(first, second);
  return {high, pairs_of(first - half_of(high, false), second - half_of(high, true))};
}

class TiledHead {
 public:
  explicit TiledHead(const KdaChunks& c)
      : h_(c.head),
        end_(c.end),
        K_(kda_padded(c.head.K)),
        V_(kda_padded(c.head.V)),
        depth_(kda_tile_depth(c.head.K)),
        S_(c.state),
        panel_(kda_panel_stride(c.head.K)),
        records_(c.memory),
        values_(c.memory + kBlock * kda_tile_record(c.head.K)),
        rest_(values_ + kBlock * C * V_),
        f_(c.head.K, rest_),
        pairs_(reinterpret_cast<uint32_t*>(rest_)) {
    __builtin_memset(f_.Aqk, 0, sizeof f_.Aqk);  // above the diagonal nothing else is written
    __builtin_memset(pairs_, 0, sizeof(uint32_t) * kPanels * depth_ * kTile);  // behind K too
  }

  // Up to kBlock chunks.
  void run(int64_t begin, int64_t end) {
    const int64_t chunks = (end - begin + C - 1) / C;
    for (int64_t i = 0; i < chunks; ++i) {
      const int64_t at = begin + i * C, next = min(at + C, end_);
      const int64_t asked = min(at + 2 * C, end);  // the first two chunks were asked for by the block before
      RowsAhead ahead(h_, RowsAhead::kInputs, asked, min(asked + C, end), kKdaFactorSteps);
      prepare(at, next - at, i, ahead);
    }
    RowsAhead next(h_, RowsAhead::kInputs, end, min(end + 2 * C, end_), chunks * (V_ + 31) / 32 * K_ / 16);
    for (int64_t first = 0; first < h_.V; first += kPanels * kKdaPanel) {
      const bool two = h_.V - first > kKdaPanel, last = first + kPanels * kKdaPanel >= h_.V;
      const bool writes = last && h_.out.data;
      two ? round_state<2>(first) : round_state<1>(first);
      RowsAhead out(h_, RowsAhead::kOutput, begin, writes ? end : begin, chunks * K_ / 16);
      for (int64_t i = 0; i < chunks; ++i) {
        two ? columns<2>(i, first, next, out) : columns<1>(i, first, next, out);
        for (int64_t t = 0; writes && t < min(C, end - begin - i * C); ++t)
          store_columns(values(i, 0) + t * V_, h_.out, begin + i * C + t, 0, h_.V);
      }
    }
  }

 private:
  static constexpr int kPanels = 2;  // of the state, at a time

  void prepare(int64_t begin, int64_t n, int64_t i, RowsAhead&);
  template <int panels>
  void round_state(int64_t first);
  template <int panels>
  void columns(int64_t i, int64_t first, RowsAhead& next, RowsAhead& out);
  template <int panels>
  void read_state(const ChunkTiles&);
  template <int panels>
  bool solve(const ChunkTiles&, const float* v);
  template <int panels>
  void read_chunk(const ChunkTiles&, float* o, bool finite);
  template <int panels>
  void add_chunk_by_rows(const ChunkTiles&, float* o);
  template <int panels>
  void advance(const ChunkTiles&, int64_t first, RowsAhead& next, RowsAhead& out);
  template <int panels>
  void add_written(const ChunkTiles&, int64_t first, int64_t d);

  ChunkTiles record(int64_t i) const { return {h_.K, records_ + i * kda_tile_record(h_.K)}; }
  // [C, V_] of chunk i: v until its columns come, then the outputs.
  float* values(int64_t i, int64_t first) const { return values_ + i * C * V_ + first; }
  float* state(int64_t first, int p) const { return S_ + (first / kKdaPanel + p) * panel_; }
  uint32_t* pairs(int p) const { return pairs_ + p * depth_ * kTile; }

  const KdaCpuHead& h_;
  const int64_t end_;
  const int64_t K_, V_, depth_;  // padded; tiles of 32 channels
  float* const S_;
  const int64_t panel_;   // floats from panel to panel of S
  float* const records_;  // [kBlock] ChunkTiles
  float* const values_;   // [kBlock][C, V_]
  float* rest_;
  KdaFactors f_;
  uint32_t* const pairs_;                           // [kPanels][32 depth_ / 2][16] the state, rounded
  alignas(64) float read_[kPanels][C][kKdaPanel];   // Sᵀ k_in
  alignas(64) uint32_t u_[kPanels][3 * kHalf][16];  // pairs of tokens of the pseudo values: high, low, high
  alignas(64) float written_[2][kPanels][16][16];   // k_out u, of two times 16 channels
};

// Norms, gates and pairs of a chunk, and its factors as tiles; its values out of rows that lie far apart.
void TiledHead::prepare(int64_t begin, int64_t n, int64_t i, RowsAhead& ahead) {
  for (int64_t t = 0; t < n; ++t) load_columns(h_.v, begin + t, 0, h_.V, values(i, 0) + t * V_);
  __builtin_memset(values(i, 0) + n * V_, 0, sizeof(float) * static_cast<size_t>((C - n) * V_));
  const ChunkTiles to = record(i);
  f_.keep = to.keep, f_.change = to.change;
  kda_factors(h_, begin, n, true, ahead, f_);
  const auto row_tiles = [&](const float* from, uint32_t* tiles) {
    for (int64_t i = 0; i < C; ++i)
      for (int64_t d = 0; d < 32 * depth_; d += 2 * kLanes) {
        const float* const x = from + i * K_ + d;
        const Vec low = d < K_ ? load(x) : Vec{}, high = d + kLanes < K_ ? load(x + kLanes) : Vec{};
        store(tiles + d / 32 * kTile + i * kTilePairs + d % 32 / 2, neighbours(low, high));
      }
  };
  row_tiles(f_.q_in, to.q_in);
  row_tiles(f_.k_in, to.k_in);
  for (int64_t d = 0; d < K_; d += 16) {
    Words t[16];
    for (int64_t p = 0; p < kHalf; ++p)
      for (int64_t j = 0; j < 16; j += kLanes) {
        const float* const k = f_.k_out + 2 * p * K_ + d + j;
        const SplitPairs both = split(load(k), load(k + K_));
        __builtin_memcpy(reinterpret_cast<uint32_t*>(&t[p]) + j, &both.high, sizeof both.high);
        __builtin_memcpy(reinterpret_cast<uint32_t*>(&t[kHalf + p]) + j, &both.low, sizeof both.low);
      }
    transpose(t);
    __builtin_memcpy(to.k_out + d / 16 * kTile, t, sizeof t);
  }
  for (int64_t i = 0; i < C; ++i)
    for (int64_t j = 0; j < C; j += kLanes) {
      const Vec x = load(f_.Aqk[i] + j);
      const HalfVec high = narrow_bf16(x), low = narrow_bf16(x - widen_bf16(high));
      uint32_t* const row = to.Aqk + i * kTilePairs + j / 2;
      __builtin_memcpy(row, &high, sizeof high);
      __builtin_memcpy(row + kHalf, &low, sizeof low);
      store(to.Akk + i * C + j, -f_.beta[i] * load(f_.Akk[i] + j));
    }
  __builtin_memcpy(to.beta, f_.beta, sizeof f_.beta);
}

// Rows d, d + 1 of a panel, the state itself -> its pairs.
template <int panels>
void TiledHead::round_state(int64_t first) {
  for (int p = 0; p < panels; ++p) {
    const float* const S = state(first, p);
    uint32_t* const to = pairs(p);
    for (int64_t d = 0; d < K_; d += 2)
      for (int64_t j = 0; j < kKdaPanel; j += kLanes)
        store(to + d / 2 * kKdaPanel + j,
              pairs_of(load(S + d * kKdaPanel + j), load(S + (d + 1) * kKdaPanel + j)));
  }
}

// Columns [first, first + 16 · panels) of V in chunk i.
template <int panels>
void TiledHead::columns(int64_t i, int64_t first, RowsAhead& next, RowsAhead& out) {
  const ChunkTiles r = record(i);
  float* const v = values(i, first);
  read_state<panels>(r);
  const bool finite = solve<panels>(r, v);
  if (h_.out.data) read_chunk<panels>(r, v, finite);
  advance<panels>(r, first, next, out);
}

// Sᵀ q_in into tiles 0 and 1, Sᵀ k_in through 2 and 3 into read_.
template <int panels>
void TiledHead::read_state(const ChunkTiles& r) {
  tile_zero<0>(), tile_zero<2>();
  if constexpr (panels > 1) tile_zero<1>(), tile_zero<3>();
  for (int64_t l = 0; l < depth_; ++l) {
    tile_load<4>(r.q_in + l * kTile, 64);
    tile_load<5>(r.k_in + l * kTile, 64);
    tile_load<6>(pairs(0) + l * kTile, 64);
    if constexpr (panels > 1) tile_load<7>(pairs(1) + l * kTile, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<2, 5, 6>();
    if constexpr (panels > 1) tile_multiply<1, 4, 7>(), tile_multiply<3, 5, 7>();
  }
  tile_store<2>(read_[0][0]);
  if constexpr (panels > 1) tile_store<3>(read_[1][0]);
}

// u_i = beta_i (v_i - Sᵀ k_in_i - sum_{j<i} Akk_ij u_j), in two terms. False if some of them are not finite.
template <int panels>
bool TiledHead::solve(const ChunkTiles& r, const float* v) {
  const float *const Akk = r.Akk, *const beta = r.beta;
  Vec zeros{};
  for (int p = 0; p < panels; ++p)
    for (int64_t column = 0; column < kKdaPanel; column += kLanes) {
      Vec u[C];
#pragma GCC unroll 16
      for (int i = 0; i < C; ++i)
        u[i] = beta[i] * (load(v + i * V_ + p * kKdaPanel + column) - load(read_[p][i] + column));
#pragma GCC unroll 16
      for (int j = 0; j < C; ++j)
#pragma GCC unroll 16
        for (int i = j + 1; i < C; ++i) u[i] += Akk[i * C + j] * u[j];
#pragma GCC unroll 8
      for (int x = 0; x < kHalf; ++x) {
        zeros += 0.f * u[2 * x];
        zeros += 0.f * u[2 * x + 1];
        const SplitPairs both = split(u[2 * x], u[2 * x + 1]);
        store(u_[p][x] + column, both.high);
        store(u_[p][kHalf + x] + column, both.low);
        store(u_[p][2 * kHalf + x] + column, both.high);
      }
    }
  return sum(zeros) == 0;
}

// o_i = Sᵀ q_in_i + sum_{j<=i} Aqk_ij u_j: as a product of all rows; where that would spread a NaN to the
// tokens before it, row by row.
template <int panels>
void TiledHead::read_chunk(const ChunkTiles& r, float* o, bool finite) {
  if (finite) {
    tile_load<4>(r.Aqk, 64);
    tile_load<6>(u_[0][0], 64);
    tile_load<7>(u_[0][kHalf], 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<0, 4, 7>();
    if constexpr (panels > 1) {
      tile_load<2>(u_[1][0], 64);
      tile_load<3>(u_[1][kHalf], 64);
      tile_multiply<1, 4, 2>();
      tile_multiply<1, 4, 3>();
    }
  }
  tile_store<0>(o, V_ * 4);
  if constexpr (panels > 1) tile_store<1>(o + kKdaPanel, V_ * 4);
  if (!finite) add_chunk_by_rows<panels>(r, o);
}

template <int panels>
void TiledHead::add_chunk_by_rows(const ChunkTiles& r, float* o) {
  const auto sum_of_terms = [](BitVec high, BitVec low, int64_t j) {
    return half_of(high, j % 2) + half_of(low, j % 2);
  };
  for (int64_t i = 0; i < C; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const uint32_t* const A = r.Aqk + i * kTilePairs + j / 2;
      const Vec a = sum_of_terms(BitVec{} + A[0], BitVec{} + A[kHalf], j);
      for (int p = 0; p < panels; ++p)
        for (int64_t column = 0; column < kKdaPanel; column += kLanes) {
          const uint32_t* const u = u_[p][j / 2] + column;
          float* const to = o + i * V_ + p * kKdaPanel + column;
          const BitVec high = load_bits<BitVec>(u), low = load_bits<BitVec>(u + kHalf * 16);
          store(to, load(to) + a * sum_of_terms(high, low, j));
        }
    }
}

// S <- Diag(decay) S + sum_j k_out_j u_jᵀ, and its pairs. 16 channels are multiplied while those before are
// added to the state.
template <int panels>
void TiledHead::advance(const ChunkTiles& r, int64_t first, RowsAhead& next, RowsAhead& out) {
  tile_load<2>(u_[0][0], 64);
  tile_load<3>(u_[0][kHalf], 64);
  if constexpr (panels > 1) {
    tile_load<6>(u_[1][0], 64);
    tile_load<7>(u_[1][kHalf], 64);
  }
  for (int64_t d = 0; d < K_; d += 16) {
    tile_load<4>(r.k_out + d * kTilePairs, 64);
    float(&to)[kPanels][16][16] = written_[d / 16 % 2];
    tile_zero<0>();
    if constexpr (panels > 1) tile_zero<1>();
    tile_multiply<0, 4, 2>();
    if constexpr (panels > 1) tile_multiply<1, 4, 6>();
    tile_multiply<0, 4, 3>();
    if constexpr (panels > 1) tile_multiply<1, 4, 7>();
    tile_store<0>(to[0][0]);
    if constexpr (panels > 1) tile_store<1>(to[1][0]);
    if (d > 0) add_written<panels>(r, first, d - 16);
    next.step();
    out.step();
  }
  add_written<panels>(r, first, K_ - 16);
}

// To channels [d, d + 16) of the state.
template <int panels>
inline void TiledHead::add_written(const ChunkTiles& r, int64_t first, int64_t d) {
  const float *const keep = r.keep + d, *const change = r.change + d;
  float* const S = state(first, 0) + d * kKdaPanel;
  uint32_t* const to = pairs(0) + d / 2 * kKdaPanel;
  const int64_t panel = panel_, panel_pairs = depth_ * kTile;
  const float(&written)[kPanels][16][16] = written_[d / 16 % 2];
#pragma GCC unroll 8
  for (int x = 0; x < 16; x += 2) {
    const Vec k[2] = {broadcast(keep[x]), broadcast(keep[x + 1])},
              c[2] = {broadcast(change[x]), broadcast(change[x + 1])};
    for (int p = 0; p < panels; ++p)
      for (int64_t j = 0; j < kKdaPanel; j += kLanes) {
        Vec s[2];
        for (int i = 0; i < 2; ++i) {
          float* const row = S + p * panel + (x + i) * kKdaPanel + j;
          const Vec before = load(row);
          s[i] = k[i] * before + (c[i] * before + load(written[p][x + i] + j));
          store(row, s[i]);
        }
        store(to + p * panel_pairs + x / 2 * kKdaPanel + j, pairs_of(s[0], s[1]));
      }
  }
}

}  // namespace

void kda_chunks_tiles(const KdaChunks& c) {
  TiledHead head(c);
  tile_begin();
  for (int64_t begin = c.begin; begin < c.end; begin += kBlock * C)
    head.run(begin, min(begin + kBlock * C, c.end));
  tile_end();
}

}  // namespace kl::KL_ISA
