// gemm_nt_bf16 on the dot instruction vdpbf16ps: 32 products of bf16 and their sums in one step. Tiles of C
// in registers whose sums run over k in 16 interleaved parts, as in gemm_cpu.cc.
#include "simd/gemm_bf16.h"

#if defined(__AVX512BF16__)

#include <immintrin.h>

#include "simd/vec.h"

namespace kl::KL_ISA {
namespace {

constexpr int kStep = 2 * kLanes;  // elements of a register
static_assert(kStep == kBf16Step);

// A tile has the rows of a packed group times kTileCols rows of B: 24 sums, 6 + 1 operands, of 32 registers.
constexpr int kGroup = kBf16Rows, kTileCols = 6;
// One row waits for memory, which streams fewer rows of B slightly faster: 24 to 28 GB/s instead of 24 to 25
// on a busy Zen 5 core that reads 31 to 37.
constexpr int kVectorCols = 4;
// Up to two groups of rows wait for memory too.
constexpr int64_t kStreamedRows = 2 * kGroup;

// k is taken in blocks of this size, whose sums are added one after the other: a group's rows of A (16 KiB)
// and a tile's rows of B (24 KiB) fit into a first-level cache of 48 KiB.
constexpr int64_t kDepth = 2048;

// How far ahead a tile asks for its rows of A, which come from the second-level cache.
constexpr int64_t kPrefetchBytes = 1024;

inline __m512bh load_pairs(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline __m512bh load_pairs_part(const bf16* p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
}

// Rows of B where they lie. Behind the last row that exists stands that row again: computed, not stored.
template <int kCols>
struct RowsInPlace {
  const bf16* row[kCols];

  RowsInPlace(const bf16* b, int64_t ldb, int64_t rows) {
    for (int j = 0; j < kCols; ++j) row[j] = b + (j < rows ? j : rows - 1) * ldb;
  }
  __m512bh load(int j, int64_t l) const { return load_pairs(row[j] + l); }
  __m512bh load_part(int j, int64_t l, int64_t n) const { return load_pairs_part(row[j] + l, n); }
};

// The same, asking for the rows of the next tile in the order in which they lie in memory.
struct StreamedRows : RowsInPlace<kTileCols> {
  const char* next;

  StreamedRows(const bf16* b, int64_t ldb, int64_t rows, const bf16* next_rows)
      : RowsInPlace(b, ldb, rows), next(reinterpret_cast<const char*>(next_rows)) {}
  __m512bh load(int j, int64_t l) const {
    __builtin_prefetch(next + (l * kTileCols + j * kStep) * 2);
    return RowsInPlace::load(j, l);
  }
};

// Rows of B as RowsCopy lays them out.
struct CopiedRows {
  const bf16* copy;

  __m512bh load(int j, int64_t l) const { return load_pairs(copy + l * kTileCols + j * kStep); }
  __m512bh load_part(int j, int64_t l, int64_t) const { return load(j, l); }
};

// A tile's rows of B, aligned and one register of each row after the other: rows of a matrix often lie a
// multiple of 4 KiB apart, where they would compete for the same few places of the cache.
struct RowsCopy {
  alignas(64) bf16 data[kTileCols * kDepth];

  CopiedRows fill(const RowsInPlace<kTileCols>& rows, int64_t depth) {
    bf16* to = data;
    const auto put = [&](__m512bh pairs) {
      _mm512_store_si512(to, (__m512i)pairs);
      to += kStep;
    };
    int64_t l = 0;
    for (; l + kStep <= depth; l += kStep)
      for (int j = 0; j < kTileCols; ++j) put(rows.load(j, l));
    if (l < depth)
      for (int j = 0; j < kTileCols; ++j) put(rows.load_part(j, l, depth - l));
    return {data};
  }
};

struct Target {
  float* c;
  int64_t ldc, rows, cols;  // of the tile, that exist
  bool accumulate;
};

template <int kRows, int kCols>
inline void store_sums(const Vec (&sums)[kRows][kCols], const Target& t) {
  static_assert(kRows * kCols % 4 == 0);
  float all[kRows * kCols];
  const auto at = [&](int i) -> const Vec& { return sums[i / kCols][i % kCols]; };
  for (int i = 0; i < kRows * kCols; i += 4) store(all + i, sum(at(i), at(i + 1), at(i + 2), at(i + 3)));
  const auto write = [&](int64_t rows, int64_t cols) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) {
        float* const out = t.c + i * t.ldc + j;
        *out = t.accumulate ? *out + all[i * kCols + j] : all[i * kCols + j];
      }
  };
  t.rows == kRows&& t.cols == kCols ? write(kRows, kCols) : write(t.rows, t.cols);
}

// The first kRows rows of a packed group times kCols rows of B, over k elements.
template <int kRows, int kCols, class Rows>
inline void tile(const bf16* a, const Rows& b, int64_t k, const Target& target) {
  Vec sums[kRows][kCols] = {};
  const auto step = [&](int64_t l, const auto& load_b) __attribute__((always_inline)) {
    __m512bh bs[kCols];
    for (int j = 0; j < kCols; ++j) bs[j] = load_b(j);
    for (int i = 0; i < kRows; ++i) {
      const bf16* const row = a + l * kGroup + i * kStep;
      const __m512bh as = load_pairs(row);
      __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes);
      for (int j = 0; j < kCols; ++j) sums[i][j] = (Vec)_mm512_dpbf16_ps((__m512)sums[i][j], as, bs[j]);
    }
  };
  int64_t l = 0;
  for (; l + kStep <= k; l += kStep) step(l, [&](int j) { return b.load(j, l); });
  if (l < k) step(l, [&](int j) { return b.load_part(j, l, k - l); });
  store_sums(sums, target);
}

// One block of k and one tile's rows of B, with everything that tiles of a product share.
struct Block {
  const GemmBf16& g;
  int64_t j, l;

  int64_t depth() const { return g.k - l < kDepth ? g.k - l : kDepth; }
  const bf16* a(int64_t i) const { return g.a + i * packed_dot_columns(g.k) + l * kGroup; }
  const bf16* b() const { return g.b + j * g.ldb + l; }
  int64_t cols(int wanted) const { return g.n - j < wanted ? g.n - j : wanted; }
  Target target(int64_t i, int wanted_cols) const {
    return {g.c + i * g.ldc + j, g.ldc, g.m - i < kGroup ? g.m - i : kGroup, cols(wanted_cols),
            g.accumulate || l > 0};
  }
};

void one_row(const Block& block) {
  const RowsInPlace<kVectorCols> rows(block.b(), block.g.ldb, block.cols(kVectorCols));
  tile<1, kVectorCols>(block.a(0), rows, block.depth(), block.target(0, kVectorCols));
}

void few_rows(const Block& block) {
  const GemmBf16& g = block.g;
  const bf16* const next = g.b + (block.j + kTileCols) * g.ldb + block.l * kTileCols;
  const int64_t cols = block.cols(kTileCols);
  const StreamedRows first(block.b(), g.ldb, cols, next);
  tile<kGroup, kTileCols>(block.a(0), first, block.depth(), block.target(0, kTileCols));
  const RowsInPlace<kTileCols> again(block.b(), g.ldb, cols);
  for (int64_t i = kGroup; i < g.m; i += kGroup)
    tile<kGroup, kTileCols>(block.a(i), again, block.depth(), block.target(i, kTileCols));
}

void many_rows(const Block& block, RowsCopy& copy) {
  const GemmBf16& g = block.g;
  const int64_t depth = block.depth();
  const CopiedRows rows = copy.fill({block.b(), g.ldb, block.cols(kTileCols)}, depth);
  for (int64_t i = 0; i < g.m; i += kGroup)
    tile<kGroup, kTileCols>(block.a(i), rows, depth, block.target(i, kTileCols));
}

}  // namespace

void gemm_nt_bf16(const GemmBf16& g) {
  if (g.m == 0) return;
  // At least one block of k, also of no elements: C is written.
  const auto for_each_depth = [&](const auto& body) {
    int64_t l = 0;
    do body(l);
    while ((l += kDepth) < g.k);
  };
  if (g.m <= kStreamedRows) {  // finish some columns over all of k before the next: B is read front to back
    const int cols = g.m == 1 ? kVectorCols : kTileCols;
    for (int64_t j = 0; j < g.n; j += cols)
      for_each_depth([&](int64_t l) { g.m == 1 ? one_row({g, j, l}) : few_rows({g, j, l}); });
    return;
  }
  RowsCopy copy;
  for_each_depth([&](int64_t l) {
    for (int64_t j = 0; j < g.n; j += kTileCols) many_rows({g, j, l}, copy);
  });
}

void pack_bf16(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed) {
  for (int64_t i = 0; i < m; i += kGroup)
    for (int64_t l = 0; l < k; l += kStep)
      for (int r = 0; r < kGroup; ++r, packed += kStep) {
        const float* const from = x + (i + r) * ldx + l;
        const int64_t n = i + r < m ? k - l : 0;  // elements that exist
        const auto half = [&](int64_t at) {
          return (__m512)(n >= at + kLanes ? load(from + at) : n > at ? load_part(from + at, n - at) : Vec{});
        };
        _mm512_storeu_si512(packed, (__m512i)_mm512_cvtne2ps_pbh(half(kLanes), half(0)));
      }
}

}  // namespace kl::KL_ISA

#endif
