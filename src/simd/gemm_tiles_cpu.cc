// The product of gemm_bf16.h on AMX tiles. A tile of weights is 16 rows of B as they lie, 32 elements each; a
// tile of activations is 16 rows of A, pair by pair. So B needs no other layout, C comes out transposed, and
// every sum runs over k in order, whatever a row is computed together with.
#include "simd/gemm_tiles.h"

#include "simd/tiles.h"
#include "simd/transpose.h"
#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int64_t kGroup = kTileGroup, kStep = kBf16Step;
constexpr int64_t kTile = kGroup * kStep;  // elements of a tile of bf16
constexpr int64_t kTileSums = kGroup * kGroup;

// Two tiles of B times two of A keep four tiles of sums; the other four hold the factors.
constexpr int64_t kRowsOfB = 32, kGroups = 2;

// Many rows of A: k is taken in blocks of this size, so that 32 rows of B (32 KiB) stay in the first-level
// cache while the rows of A pass; sums wait in memory meanwhile.
constexpr int64_t kDepth = 512;
constexpr int64_t kGroupsAtOnce = 8;  // of A, whose sums wait: 16 KiB

// 32 f32 -> 16 pairs of bf16, to the nearest, ties to even; a NaN stays one.
inline void round_pairs(const float* x, Words& pairs) {
  Words half[2];  // bf16 in the upper halves
  for (int i = 0; i < 2; ++i) {
    Words u;
    __builtin_memcpy(&u, x + 16 * i, sizeof u);
    const Words nan = (Words)((u & 0x7fffffffu) > 0x7f800000u);
    half[i] = (nan & (u | 0x400000u)) | (~nan & (u + 0x7fffu + ((u >> 16) & 1u)));
  }
  const Words first = __builtin_shufflevector(half[0], half[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24,
                                              26, 28, 30),
              second = __builtin_shufflevector(half[0], half[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23,
                                               25, 27, 29, 31);
  pairs = first >> 16 | (second & 0xffff0000u);
}

// Which rows of B a pass takes: kTiles tiles of them, of which `rows` rows exist.
struct RowsOfB {
  const bf16* data;
  int64_t ldb, rows;
};

// The tile of B at element l of rows [first, first + 16): where it lies, or a copy in `edge` that is filled
// up with zeros where rows or elements are missing.
template <int tile>
inline void load_b(const RowsOfB& b, int64_t first, int64_t l, int64_t k, bf16* edge) {
  const bf16* const from = b.data + first * b.ldb + l;
  if (first + kGroup <= b.rows && l + kStep <= k) return tile_load<tile>(from, b.ldb * 2);
  __builtin_memset(edge, 0, kTile * sizeof(bf16));
  const int64_t rows = b.rows - first < kGroup ? b.rows - first : kGroup, n = k - l < kStep ? k - l : kStep;
  for (int64_t i = 0; i < rows; ++i)
    __builtin_memcpy(edge + i * kStep, from + i * b.ldb, static_cast<size_t>(n) * sizeof(bf16));
  tile_load<tile>(edge, kStep * 2);
}

// sums (+)= B · A^T over elements [l, end) of k for kTiles tiles of B and kCount groups of A, a_stride
// elements apart. Tiles 0-3 are the sums, 4-5 B, 6-7 A. load(tile, l) loads one of B.
template <int kTiles, int kCount, class LoadB>
inline void multiply(const LoadB& load, const bf16* a, int64_t a_stride, int64_t l, int64_t end, bool first,
                     float* sums) {
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    f.template operator()<0>(0);
    if constexpr (kTiles > 1) f.template operator()<1>(1);
    if constexpr (kCount > 1) f.template operator()<2>(kTiles);
    if constexpr (kTiles > 1 && kCount > 1) f.template operator()<3>(kTiles + 1);
  };
  each([&]<int t>(int64_t place) __attribute__((always_inline)) {
    first ? tile_zero<t>() : tile_load<t>(sums + place * kTileSums, kGroup * 4);
  });
  for (; l < end; l += kStep) {
    load.template operator()<4>(0, l);
    if constexpr (kTiles > 1) load.template operator()<5>(1, l);
    tile_load<6>(a + l * kGroup, 64);
    if constexpr (kCount > 1) tile_load<7>(a + a_stride + l * kGroup, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (kTiles > 1) tile_multiply<1, 5, 6>();
    if constexpr (kCount > 1) tile_multiply<2, 4, 7>();
    if constexpr (kTiles > 1 && kCount > 1) tile_multiply<3, 5, 7>();
  }
  each([&]<int t>(int64_t place) __attribute__((always_inline)) { tile_store<t>(sums + place * kTileSums); });
}

// One tile of sums [columns of C][rows of C] -> C.
inline void write(const float* sums, const GemmBf16& g, int64_t i, int64_t j) {
  Words t[16];
  __builtin_memcpy(t, sums, sizeof t);
  transpose(t);
  const int64_t rows = g.m - i < kGroup ? g.m - i : kGroup, columns = g.n - j < 16 ? g.n - j : 16;
  for (int64_t r = 0; r < rows; ++r) {
    float* const to = g.c + (i + r) * g.ldc + j;
    float row[16];
    __builtin_memcpy(row, &t[r], sizeof row);
    if (columns == 16)
      for (int64_t x = 0; x < 16; ++x) to[x] = g.accumulate ? to[x] + row[x] : row[x];
    else
      for (int64_t x = 0; x < columns; ++x) to[x] = g.accumulate ? to[x] + row[x] : row[x];
  }
}

// Columns [j, j + 16 · kTiles) of rows [i, i + 16 · kGroupsAtOnce) of C.
template <int kTiles>
void panel(const GemmBf16& g, int64_t i, int64_t j) {
  alignas(64) float sums[kGroupsAtOnce * kTiles * kTileSums];
  alignas(64) bf16 edge[kTile];
  const RowsOfB b = {g.b + j * g.ldb, g.ldb, g.n - j < kTiles * kGroup ? g.n - j : kTiles * kGroup};
  const int64_t a_stride = kGroup * packed_bf16_columns(g.k);
  const bf16* const a = g.a + i / kGroup * a_stride;
  const int64_t left = (g.m - i + kGroup - 1) / kGroup, groups = left < kGroupsAtOnce ? left : kGroupsAtOnce;
  const auto all_groups = [&](const auto& load, int64_t l, int64_t end, bool first) {
    for (int64_t at = 0; at < groups; at += kGroups) {
      float* const to = sums + at * kTiles * kTileSums;
      if (at + 1 < groups)
        multiply<kTiles, 2>(load, a + at * a_stride, a_stride, l, end, first, to);
      else
        multiply<kTiles, 1>(load, a + at * a_stride, a_stride, l, end, first, to);
    }
  };
  const auto in_place = [&]<int tile>(int t, int64_t l) { load_b<tile>(b, t * kGroup, l, g.k, edge); };
  if (groups <= kGroups) {
    all_groups(in_place, 0, g.k, true);
  } else {
    // Copied tile by tile: rows of a matrix often lie a multiple of 4 KiB apart, where they would compete for
    // the same few places of the cache.
    alignas(64) bf16 copy[kTiles * kGroup * kDepth];
    int64_t l = 0;
    do {
      const int64_t end = g.k - l < kDepth ? g.k : l + kDepth;
      const auto place = [&](int t, int64_t at) { return copy + (at - l) * kTiles * kGroup + t * kTile; };
      for (int64_t at = l; at < end; at += kStep)
        for (int t = 0; t < kTiles; ++t) {
          const int64_t row = t * kGroup, n = end - at < kStep ? end - at : kStep;
          bf16* const to = place(t, at);
          if (row + kGroup > b.rows || n < kStep) __builtin_memset(to, 0, kTile * sizeof(bf16));
          for (int64_t r = 0; r < kGroup && row + r < b.rows; ++r)
            __builtin_memcpy(to + r * kStep, b.data + (row + r) * b.ldb + at,
                             static_cast<size_t>(n) * sizeof(bf16));
        }
      all_groups([&]<int tile>(int t, int64_t at) { tile_load<tile>(place(t, at), 64); }, l, end, l == 0);
      l = end;
    } while (l < g.k);
  }
  for (int64_t at = 0; at < groups; ++at)
    for (int t = 0; t < kTiles; ++t)
      if (j + t * kGroup < g.n)
        write(sums + (at * kTiles + t) * kTileSums, g, i + at * kGroup, j + t * kGroup);
}

}  // namespace

void gemm_nt_tiles(const GemmBf16& g) {
  tile_begin();
  for (int64_t i = 0; i < g.m; i += kGroupsAtOnce * kGroup)
    for (int64_t j = 0; j < g.n; j += kRowsOfB) g.n - j > kGroup ? panel<2>(g, i, j) : panel<1>(g, i, j);
  tile_end();
}

void pack_tiles(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed) {
  for (int64_t i = 0; i < m; i += kGroup)
    for (int64_t l = 0; l < k; l += kStep, packed += kTile) {
      Words rows[16] = {};
      for (int64_t r = 0; r < kGroup && i + r < m; ++r) {
        const float* const from = x + (i + r) * ldx + l;
        float part[kStep] = {};
        if (l + kStep > k) __builtin_memcpy(part, from, static_cast<size_t>(k - l) * sizeof(float));
        round_pairs(l + kStep > k ? part : from, rows[r]);
      }
      transpose(rows);
      __builtin_memcpy(packed, rows, sizeof rows);
    }
}

}  // namespace kl::KL_ISA
