// gemm_nt and gemm_nn: tiles of C in registers, no packing, no copies. B is widened to f32 as it is loaded.
#include "simd/gemm.h"

#include "simd/vec.h"

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

// gemm_nt takes k in blocks of this size and adds their sums one after the other, so that a tile's rows of A
// (24 KiB) stay in the first-level cache while the rows of B pass.
constexpr int64_t kDepth = 1024;

// How far ahead gemm_nt asks for the rows of B: each is a stream of its own, too short for the hardware to
// find its pace. From memory with 1 and 6 rows of A: 20 -> 25 and 13 -> 17 GB/s on a Zen 5 core that reads 31
// GB/s.
constexpr int64_t kPrefetchBytes = 1024;

// Calls f.template operator()<rows>() for 1 <= rows <= kRows: tiles of any height are unrolled.
template <int kRows = kTileRows, class F>
inline void with_rows(int64_t rows, const F& f) {
  if (rows == kRows) return f.template operator()<kRows>();
  if constexpr (kRows > 1) with_rows<kRows - 1>(rows, f);
}

// kRows x kCols elements of C: every sum runs over l in kLanes interleaved parts, which are then added.
template <int kRows, int kCols, class B>
void tile_nt(const float* a, int64_t lda, const B* b, int64_t ldb, float* c, int64_t ldc, int64_t k,
             bool accumulate) {
  Vec sums[kRows][kCols] = {};
  int64_t l = 0;
  const auto step = [&](const auto& load_at) __attribute__((always_inline)) {
    Vec bs[kCols];
    for (int j = 0; j < kCols; ++j) {
      bs[j] = load_at(b + j * ldb);
      __builtin_prefetch(reinterpret_cast<const char*>(b + j * ldb + l) + kPrefetchBytes);
    }
    for (int i = 0; i < kRows; ++i) {
      const Vec as = load_at(a + i * lda);
      for (int j = 0; j < kCols; ++j) sums[i][j] += as * bs[j];
    }
  };
  for (; l + kLanes <= k; l += kLanes) step([l](const auto* row) { return load(row + l); });
  if (l < k) step([l, k](const auto* row) { return load_part(row + l, k - l); });
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

template <class B>
void run_nt(const Gemm& g) {
  const B* const b = static_cast<const B*>(g.b);
  // One tile of rows: finish some columns over all of k before the next, so that B is read front to back.
  const int64_t strip = g.m <= kTileRows ? tile_cols_nt(static_cast<int>(g.m)) : g.n;
  for (int64_t j0 = 0; j0 < g.n; j0 += strip) {
    const int64_t j1 = j0 + strip < g.n ? j0 + strip : g.n;
    int64_t l = 0;
    do {
      const int64_t depth = g.k - l < kDepth ? g.k - l : kDepth;
      const bool accumulate = g.accumulate || l > 0;
      for (int64_t i = 0; i < g.m; i += kTileRows) {
        const float* const a = g.a + i * g.lda + l;
        float* const c = g.c + i * g.ldc;
        with_rows(g.m - i < kTileRows ? g.m - i : kTileRows, [&]<int kRows>() {
          constexpr int kCols = tile_cols_nt(kRows);
          int64_t j = j0;
          for (; j + kCols <= j1; j += kCols)
            tile_nt<kRows, kCols>(a, g.lda, b + j * g.ldb + l, g.ldb, c + j, g.ldc, depth, accumulate);
          for (; j < j1; ++j)
            tile_nt<kRows, 1>(a, g.lda, b + j * g.ldb + l, g.ldb, c + j, g.ldc, depth, accumulate);
        });
      }
      l += depth;
    } while (l < g.k);
  }
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
