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

struct View {  // row i at data + i * row
  float* data;
  int64_t row, width;
};

class TiledHead {
 public:
  explicit TiledHead(const KdaChunks& c)
      : h_(c.head),
        end_(c.end),
        K_(kda_padded(c.head.K)),
        depth_(kda_tile_depth(c.head.K)),
        S_(c.state),
        panel_(kda_panel_stride(c.head.K)),
        records_(c.memory),
        rest_(c.memory + kBlock * kda_tile_record(c.head.K)),
        f_(c.head.K, rest_),
        pairs_(reinterpret_cast<uint32_t*>(rest_)) {
    __builtin_memset(f_.Aqk, 0, sizeof f_.Aqk);  // above the diagonal nothing else is written
    __builtin_memset(pairs_, 0, sizeof(uint32_t) * kPanels * depth_ * kTile);  // behind K too
  }

  // Up to kBlock chunks, before rows [end, next).
  void run(int64_t begin, int64_t end, int64_t next) {
    const int64_t chunks = (end - begin + C - 1) / C, panels = kda_padded(h_.V) / kKdaPanel;
    RowsAhead ahead(h_, end, next, chunks * (kKdaFactorSteps + (panels + 1) / kPanels * K_ / 16));
    for (int64_t i = 0; i < chunks; ++i)
      prepare(begin + i * C, min(C, end - begin - i * C), record(i), ahead);
    for (int64_t first = 0; first < h_.V; first += kPanels * kKdaPanel) {
      const bool two = h_.V - first > kKdaPanel;
      two ? round_state<2>(first) : round_state<1>(first);
      for (int64_t i = 0; i < chunks; ++i) {
        const int64_t at = begin + i * C, n = min(C, end - at);
        two ? columns<2>(record(i), at, n, first, ahead) : columns<1>(record(i), at, n, first, ahead);
      }
    }
  }

 private:
  static constexpr int kPanels = 2;                 // of the state, at a time
  static constexpr int kVecs = kKdaPanel / kLanes;  // of a panel's row

  void prepare(int64_t begin, int64_t n, const ChunkTiles&, RowsAhead&);
  template <int panels>
  void round_state(int64_t first);
  template <int panels>
  void columns(const ChunkTiles&, int64_t begin, int64_t n, int64_t first, RowsAhead&);
  template <int panels>
  void read_state(const ChunkTiles&);
  template <int panels>
  bool solve(const ChunkTiles&, int64_t begin, int64_t n, int64_t first);
  template <int panels>
  void read_chunk(const ChunkTiles&, int64_t begin, int64_t n, int64_t first, bool finite);
  template <int panels>
  void add_chunk_by_rows(const ChunkTiles&, int64_t n, const View& o);
  template <int panels>
  void advance(const ChunkTiles&, int64_t first, RowsAhead&);
  template <int panels>
  void add_written(const ChunkTiles&, int64_t first, int64_t d);

  // Columns [first, first + 16 · panels) of the chunk's rows: where they lie, if all of them exist and are
  // f32, or in `buffer`.
  View view(const KdaHeadRows& rows, int64_t begin, int64_t n, int64_t first, int panels,
            float* buffer) const {
    const int64_t width = min(panels * kKdaPanel, h_.V - first);
    if (rows.dtype != DType::f32 || n < C || width < panels * kKdaPanel)
      return {buffer, kPanels * kKdaPanel, width};
    return {reinterpret_cast<float*>(rows.data + begin * rows.stride) + first, rows.stride / 4, width};
  }

  ChunkTiles record(int64_t i) const { return {h_.K, records_ + i * kda_tile_record(h_.K)}; }
  float* state(int64_t first, int p) const { return S_ + (first / kKdaPanel + p) * panel_; }
  uint32_t* pairs(int p) const { return pairs_ + p * depth_ * kTile; }

  const KdaCpuHead& h_;
  const int64_t end_;
  const int64_t K_, depth_;  // channels in whole panels; tiles of 32 channels
  float* const S_;
  const int64_t panel_;  // floats from panel to panel of S
  float* const records_;
  float* rest_;
  KdaFactors f_;
  uint32_t* const pairs_;                          // [kPanels][32 depth_ / 2][16] the state, rounded
  alignas(64) float read_[kPanels][C][kKdaPanel];  // Sᵀ k_in
  alignas(64) float v_[C][kPanels * kKdaPanel];
  alignas(64) float o_[C][kPanels * kKdaPanel];
  alignas(64) uint32_t u_[kPanels][3 * kHalf][16];  // pairs of tokens of the pseudo values: high, low, high
  alignas(64) float written_[2][kPanels][16][16];   // k_out u, of two times 16 channels
};

// Norms, gates and pairs of a chunk, and its factors as tiles.
void TiledHead::prepare(int64_t begin, int64_t n, const ChunkTiles& to, RowsAhead& ahead) {
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

// Columns [first, first + 16 · panels) of V in one chunk.
template <int panels>
void TiledHead::columns(const ChunkTiles& r, int64_t begin, int64_t n, int64_t first, RowsAhead& ahead) {
  read_state<panels>(r);
  const bool finite = solve<panels>(r, begin, n, first);
  if (h_.out.data) read_chunk<panels>(r, begin, n, first, finite);
  advance<panels>(r, first, ahead);
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
bool TiledHead::solve(const ChunkTiles& r, int64_t begin, int64_t n, int64_t first) {
  const View v = view(h_.v, begin, n, first, panels, v_[0]);
  if (v.data == v_[0]) {
    for (int64_t i = 0; i < n; ++i) load_columns(h_.v, begin + i, first, v.width, v_[i]);
    __builtin_memset(v_[n], 0, sizeof v_[0] * static_cast<size_t>(C - n));
  }
  const float *const Akk = r.Akk, *const beta = r.beta;
  Vec zeros{};
  for (int p = 0; p < panels; ++p)
    for (int64_t column = 0; column < kKdaPanel; column += kLanes) {
      Vec u[C];
#pragma GCC unroll 16
      for (int i = 0; i < C; ++i)
        u[i] = beta[i] * (load(v.data + i * v.row + p * kKdaPanel + column) - load(read_[p][i] + column));
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
void TiledHead::read_chunk(const ChunkTiles& r, int64_t begin, int64_t n, int64_t first, bool finite) {
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
  const View o = view(h_.out, begin, n, first, panels, o_[0]);
  tile_store<0>(o.data, o.row * 4);
  if constexpr (panels > 1) tile_store<1>(o.data + kKdaPanel, o.row * 4);
  if (!finite) add_chunk_by_rows<panels>(r, n, o);
  if (o.data == o_[0])
    for (int64_t i = 0; i < n; ++i) store_columns(o_[i], h_.out, begin + i, first, o.width);
}

template <int panels>
void TiledHead::add_chunk_by_rows(const ChunkTiles& r, int64_t n, const View& o) {
  const auto sum_of_terms = [](BitVec high, BitVec low, int64_t j) {
    return half_of(high, j % 2) + half_of(low, j % 2);
  };
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const uint32_t* const A = r.Aqk + i * kTilePairs + j / 2;
      const Vec a = sum_of_terms(BitVec{} + A[0], BitVec{} + A[kHalf], j);
      for (int p = 0; p < panels; ++p)
        for (int64_t column = 0; column < kKdaPanel; column += kLanes) {
          const uint32_t* const u = u_[p][j / 2] + column;
          float* const to = o.data + i * o.row + p * kKdaPanel + column;
          const BitVec high = load_bits<BitVec>(u), low = load_bits<BitVec>(u + kHalf * 16);
          store(to, load(to) + a * sum_of_terms(high, low, j));
        }
    }
}

// S <- Diag(decay) S + sum_j k_out_j u_jᵀ, and its pairs. 16 channels are multiplied while those before are
// added to the state.
template <int panels>
void TiledHead::advance(const ChunkTiles& r, int64_t first, RowsAhead& ahead) {
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
    ahead.step();
  }
  add_written<panels>(r, first, K_ - 16);
}

// To channels [d, d + 16) of the state.
template <int panels>
inline void TiledHead::add_written(const ChunkTiles& r, int64_t first, int64_t d) {
  const float *const keep = r.keep + d, *const change = r.change + d;
  for (int p = 0; p < panels; ++p) {
    float* const S = state(first, p) + d * kKdaPanel;
    uint32_t* const to = pairs(p) + d / 2 * kKdaPanel;
    const float(&written)[16][16] = written_[d / 16 % 2][p];
#pragma GCC unroll 8
    for (int x = 0; x < 16; x += 2)
      for (int64_t j = 0; j < kKdaPanel; j += kLanes) {
        Vec s[2];
        for (int i = 0; i < 2; ++i) {
          float* const row = S + (x + i) * kKdaPanel + j;
          const Vec before = load(row);
          s[i] = keep[x + i] * before + (change[x + i] * before + load(written[x + i] + j));
          store(row, s[i]);
        }
        store(to + x / 2 * kKdaPanel + j, pairs_of(s[0], s[1]));
      }
  }
}

}  // namespace

void kda_chunks_tiles(const KdaChunks& c) {
  TiledHead head(c);
  tile_begin();
  // From one chunk to whole blocks: all rows but those of the first chunk have been asked for before.
  int64_t begin = c.begin, end = min(begin + C, c.end);
  for (int64_t length = 2 * C; begin < c.end; length = min(2 * length, kBlock * C)) {
    const int64_t next = min(end + length, c.end);
    head.run(begin, end, next);
    begin = end, end = next;
  }
  tile_end();
}

}  // namespace kl::KL_ISA
