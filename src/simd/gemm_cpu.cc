// gemm_nt and gemm_nn: tiles of C in registers. B is widened to f32 as it is loaded, for many rows of A once.
// All sums are in f32: avx512_bf16 takes avx512's.
#if !defined(__AVX512BF16__)
#include "simd/gemm.h"

#include "simd/gemm_order.h"

namespace kl::KL_ISA {
namespace {

// A tile has up to kTileRows rows of A times kTileCols rows (nt) or vectors (nn) of B: as many sums as leave
// registers for the operands (32 with AVX-512, else 16).
#if defined(__AVX512F__)
constexpr int kTileRows = 6;
#elif defined(__AVX2__)
constexpr int kTileRows = 3;
#else
constexpr int kTileRows = 2;
#endif
constexpr int kTileCols = 4;
// With one or two rows gemm_nt waits for memory, and more rows of B at once keep more requests in flight.
constexpr int kWideTileCols = 8;
constexpr int tile_cols_nt(int rows) { return rows <= 2 ? kWideTileCols : kTileCols; }

// How far ahead gemm_nt asks for the rows of B: each is a stream of its own, too short for the hardware to
// find its pace. At the end of a row the next tile's is asked for: rows are 2 to 18 KiB, so that their starts
// matter. With one row of A on two Zen 3 cores that read 23.2 GB/s: 20.2 GB/s with 1024 bytes inside rows
// alone, 22.1 with the next ones too, 23.1 with 512 bytes.
constexpr int64_t kPrefetchBytes = 512;

// Calls f.template operator()<rows>() for 1 <= rows <= kRows: tiles of any height are unrolled.
template <int kRows = kTileRows, class F>
inline void with_rows(int64_t rows, const F& f) {
  if (rows == kRows) return f.template operator()<kRows>();
  if constexpr (kRows > 1) with_rows<kRows - 1>(rows, f);
}

// Rows of B where they lie. Asks ahead for each: kPrefetchBytes in its row, from element `turn` on `jump`
// elements.
template <class B>
struct RowsInPlace {
  static constexpr int64_t kAhead = kPrefetchBytes / static_cast<int64_t>(sizeof(B));
  const B* b;
  int64_t ldb;
  int64_t turn = INT64_MAX, jump = 0;

  // Rows of k elements from element l on; `next` rows further down stand the ones that follow.
  static RowsInPlace from(const B* b, int64_t ldb, int64_t k, int64_t l, int next) {
    const int64_t turn = k > kAhead ? k - kAhead : 0;
    return {b + l, ldb, turn > l ? turn - l : 0, next * ldb - turn};
  }
  Vec load_at(int j, int64_t l) const {
    const B* const at = b + j * ldb + l;
    __builtin_prefetch(at + (l < turn ? kAhead : jump));
    return load(at);
  }
  Vec load_last(int j, int64_t l, int64_t n) const { return load_part(b + j * ldb + l, n); }
};

// kTileCols rows of B, widened once for many rows of A: one register of each row after the other. (Rows of a
// matrix often lie a multiple of 4 KiB apart, where they would compete for the same few places of the cache.)
struct WidenedRows {
  const float* data;

  Vec load_at(int j, int64_t l) const { return load(data + l * kTileCols + j * kLanes); }
  Vec load_last(int j, int64_t l, int64_t) const { return load_at(j, l); }
};

// The same, asking for the rows that come next while these are multiplied.
template <class B>
struct WidenedAndNext : WidenedRows {
  RowsInPlace<B> next;

  Vec load_at(int j, int64_t l) const {
    __builtin_prefetch(next.b + j * next.ldb + l);
    return WidenedRows::load_at(j, l);
  }
};

struct WidenedCopy {
  alignas(64) float data[kTileCols * kDepth];  // 16 KiB

  template <class B>
  WidenedRows fill(const B* b, int64_t ldb, int64_t depth) {
    for (int j = 0; j < kTileCols; ++j) {
      const B* const row = b + j * ldb;
      float* to = data + j * kLanes;
      int64_t l = 0;
      for (; l + kLanes <= depth; l += kLanes, to += kTileCols * kLanes) store(to, load(row + l));
      if (l < depth) store(to, load_part(row + l, depth - l));
    }
    return {data};
  }
};

// kRows x kCols elements of C: every sum runs over l in kLanes interleaved parts, which are then added.
template <int kRows, int kCols, class Rows>
void tile_nt(const float* a, int64_t lda, const Rows& b, float* c, int64_t ldc, int64_t k, bool accumulate) {
  Vec sums[kRows][kCols] = {};
  const auto step = [&](const auto& load_a, const auto& load_b) __attribute__((always_inline)) {
    Vec bs[kCols];
    for (int j = 0; j < kCols; ++j) bs[j] = load_b(j);
    for (int i = 0; i < kRows; ++i) {
      const Vec as = load_a(a + i * lda);
      for (int j = 0; j < kCols; ++j) sums[i][j] += as * bs[j];
    }
  };
  int64_t l = 0;
  for (; l + kLanes <= k; l += kLanes)
    step([l](const float* row) { return load(row + l); }, [&](int j) { return b.load_at(j, l); });
  if (l < k)
    step([l, k](const float* row) { return load_part(row + l, k - l); },
         [&](int j) { return b.load_last(j, l, k - l); });
  for (int i = 0; i < kRows; ++i) {
    float* const row = c + i * ldc;
    if constexpr (kCols == 1) {
      const float total = sum(sums[i][0]);
      row[0] = accumulate ? row[0] + total : total;
    } else {
      for (int j = 0; j < kCols; j += 4) {
        const Quad total = sum(sums[i][j], sums[i][j + 1], sums[i][j + 2], sums[i][j + 3]);
        store(row + j, accumulate ? load_bits<Quad>(row + j) + total : total);
      }
    }
  }
}

// Up to this many rows, columns are finished over all of k one after the other: B, which comes from memory,
// is read front to back. With more, A's blocks of k have to stay in the second-level cache.
constexpr int64_t kFewRows = 32;

// More than one tile of rows: kTileCols rows of B at a time are widened for all of them.
template <class B>
void many_rows_nt(const Gemm& g) {
  const B* const b = static_cast<const B*>(g.b);
  WidenedCopy copy;
  const auto block = [&](int64_t j, int64_t l) __attribute__((always_inline)) {
    const int64_t depth = g.k - l < kDepth ? g.k - l : kDepth;
    const auto tile = [&]<int kCols>(const auto& rows, int64_t i, int64_t column) {
      with_rows(g.m - i < kTileRows ? g.m - i : kTileRows, [&]<int kRows>() {
        tile_nt<kRows, kCols>(g.a + i * g.lda + l, g.lda, rows, g.c + i * g.ldc + column, g.ldc, depth,
                              g.accumulate || l > 0);
      });
    };
    if (j + kTileCols > g.n) {
      for (int64_t column = j; column < g.n; ++column)
        for (int64_t i = 0; i < g.m; i += kTileRows)
          tile.template operator()<1>(RowsInPlace<B>{b + column * g.ldb + l, g.ldb}, i, column);
      return;
    }
    const WidenedRows rows = copy.fill(b + j * g.ldb + l, g.ldb, depth);
    // What follows in memory: the next block of k of these rows, or the first of the next ones.
    const bool goes_on = g.m <= kFewRows && l + depth < g.k;
    const B* const next =
        goes_on ? b + j * g.ldb + l + depth : b + (j + kTileCols) * g.ldb + (g.m <= kFewRows ? 0 : l);
    tile.template operator()<kTileCols>(WidenedAndNext<B>{rows, {next, g.ldb}}, 0, j);
    for (int64_t i = kTileRows; i < g.m; i += kTileRows) tile.template operator()<kTileCols>(rows, i, j);
  };
  // At least one block of k, also of no elements: C is written.
  if (g.m <= kFewRows) {
    for (int64_t j = 0; j < g.n; j += kTileCols) {
      int64_t l = 0;
      do block(j, l);
      while ((l += kDepth) < g.k);
    }
    return;
  }
  int64_t l = 0;
  do {
    for (int64_t j = 0; j < g.n; j += kTileCols) block(j, l);
  } while ((l += kDepth) < g.k);
}

// One tile of rows: some columns over all of k before the next, so that B is read front to back.
template <class B>
void few_rows_nt(const Gemm& g) {
  const B* const b = static_cast<const B*>(g.b);
  with_rows(g.m, [&]<int kRows>() {
    constexpr int kCols = tile_cols_nt(kRows);
    const auto columns = [&]<int kTile>(int64_t j) __attribute__((always_inline)) {
      int64_t l = 0;
      do {
        tile_nt<kRows, kTile>(g.a + l, g.lda, RowsInPlace<B>::from(b + j * g.ldb, g.ldb, g.k, l, kTile),
                              g.c + j, g.ldc, g.k - l < kDepth ? g.k - l : kDepth, g.accumulate || l > 0);
      } while ((l += kDepth) < g.k);
    };
    int64_t j = 0;
    for (; j + kCols <= g.n; j += kCols) columns.template operator()<kCols>(j);
    for (; j < g.n; ++j) columns.template operator()<1>(j);
  });
}

template <class B>
void run_nt(const Gemm& g) {
  if (g.m == 0) return;
  g.m <= kTileRows ? few_rows_nt<B>(g) : many_rows_nt<B>(g);
}

// kRows rows times kCols vectors of C; lanes >= 0 says how many elements of a single vector exist.
template <int kRows, int kCols, class B>
void tile_nn(const float* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
             bool accumulate, int64_t lanes = kLanes) {
  Vec sums[kRows][kCols] = {};
  const bool whole = kCols > 1 || lanes == kLanes;
  const auto load_at = [&](const auto* p) { return whole ? load(p) : load_part(p, lanes); };
  if (accumulate)
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) sums[i][j] = load_at(c + i * ldc + j * kLanes);
  for (int64_t l = 0; l < k; ++l) {
    Vec bs[kCols];
    for (int j = 0; j < kCols; ++j) bs[j] = load_at(b + l * ldb + j * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kCols; ++j) sums[i][j] += a[i * lda + l] * bs[j];
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kCols; ++j) {
      float* const out = c + i * ldc + j * kLanes;
      whole ? store(out, sums[i][j]) : store_part(out, sums[i][j], lanes);
    }
}

template <class B>
void run_nn(const Gemm& g) {
  const B* const b = static_cast<const B*>(g.b);
  constexpr int64_t kWide = kTileCols * kLanes;
  for (int64_t i = 0; i < g.m; i += kTileRows) {
    const float* const a = g.a + i * g.lda;
    float* const c = g.c + i * g.ldc;
    with_rows(g.m - i < kTileRows ? g.m - i : kTileRows, [&]<int kRows>() {
      int64_t j = 0;
      for (; j + kWide <= g.n; j += kWide)
        tile_nn<kRows, kTileCols>(a, g.lda, b + j, g.ldb, c + j, g.ldc, g.k, g.accumulate);
      for (; j < g.n; j += kLanes)
        tile_nn<kRows, 1>(a, g.lda, b + j, g.ldb, c + j, g.ldc, g.k, g.accumulate,
                          g.n - j < kLanes ? g.n - j : kLanes);
    });
  }
}

}  // namespace

void gemm_nt(const Gemm& g) {
#if defined(KL_GEMM_PANELS)
  if (g.m >= kGemmPanelRows) return gemm_nt_panels(g);
#endif
  switch (g.b_dtype) {
    case DType::f32: return run_nt<float>(g);
    case DType::bf16: return run_nt<bf16>(g);
    case DType::f16: return run_nt<f16>(g);
    default: __builtin_unreachable();
  }
}

void gemm_nn(const Gemm& g) {
  switch (g.b_dtype) {
    case DType::f32: return run_nn<float>(g);
    case DType::bf16: return run_nn<bf16>(g);
    case DType::f16: return run_nn<f16>(g);
    default: __builtin_unreachable();
  }
}

}  // namespace kl::KL_ISA
#endif
