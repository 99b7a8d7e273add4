// gemm_nt for many rows of A: outer products. A panel is as many rows of B as a tile of C is wide, widened
// and transposed, so that a tile multiplies vectors along n with single elements of A: an element of A that
// is loaded serves a whole row of the tile, where the dot products of gemm_cpu.cc use it for four, and A
// hardly loads the second-level cache.
//
// Bits are those of gemm_cpu.cc (gemm_order.h): a tile goes over the terms of one of the kLanes sums after
// the other, whose results then are added along the same tree. The panel and A's block are stored in that
// order.
#include "simd/gemm_order.h"
#include "simd/transpose.h"

#if defined(KL_GEMM_PANELS)

namespace kl::KL_ISA {
namespace {

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// A tile: 6 x 2 vectors of sums, 2 of the panel and one broadcast, of 16 registers.
constexpr int kRows = 6, kVecs = 2;
constexpr int64_t kCols = kVecs * kLanes;
constexpr int64_t kSteps = kDepth / kLanes;  // terms of a sum in a block

static_assert(kGemmPanelBlock % kRows == 0);

// A lane's part of a packed tile. Packing writes whole vectors: what one writes too much is overwritten by
// the next, or at the end of a lane falls into the gap.
constexpr int64_t kLaneStride = kSteps * kRows + kLanes - kRows;
constexpr int64_t kTileSize = kLanes * kLaneStride;

// kCols rows of B over a block of k: element (l, j) at [l % kLanes][l / kLanes][j]. Columns that do not exist
// are zero.
struct Panel {
  alignas(64) float data[kDepth * kCols];  // 64 KiB

  template <class B>
  void fill(const B* b, int64_t ldb, int64_t cols, int64_t depth) {
    for (int64_t v = 0; v < kVecs; ++v)
      for (int64_t l = 0; l < depth; l += kLanes) {
        Vec x[kLanes];
        for (int64_t j = 0; j < kLanes; ++j) {
          const B* const from = b + (v * kLanes + j) * ldb + l;
          x[j] = v * kLanes + j >= cols ? Vec{}
                 : depth - l >= kLanes  ? load(from)
                                        : load_part(from, depth - l);
        }
        transpose(x);
        float* const to = data + l / kLanes * kCols + v * kLanes;
        for (int64_t r = 0; r < kLanes; ++r) store(to + r * (kSteps * kCols), x[r]);
      }
  }
};

// kRows rows of A over a block of k: element (i, l) at [l % kLanes][l / kLanes][i], kTileSize elements. Rows
// that do not exist are zero.
void pack(const float* a, int64_t lda, int64_t rows, int64_t depth, float* to) {
  static_assert(kRows <= kLanes);
  for (int64_t l = 0; l < depth; l += kLanes) {
    Vec x[kLanes] = {};
    for (int64_t i = 0; i < rows; ++i) {
      x[i] = depth - l >= kLanes ? load(a + i * lda + l) : load_part(a + i * lda + l, depth - l);
      __builtin_prefetch(a + (i + kRows) * lda + l);
    }
    transpose(x);
    for (int64_t r = 0; r < kLanes; ++r) store(to + r * kLaneStride + l / kLanes * kRows, x[r]);
  }
}

struct Tile {
  const float* a;  // packed
  const float* panel;
  float* c;
  int64_t ldc, rows, cols, steps;
  bool accumulate;
};

typedef Vec Sums[kRows][kVecs];

constexpr int kLevels = __builtin_ctz(kLanes);

// The lane whose sum comes t-th: t with its bits reversed, so that neighbours in the tree follow each other.
constexpr int lane_at(int t) {
  int lane = 0;
  for (int b = 0; b < kLevels; ++b) lane |= (t >> b & 1) << (kLevels - 1 - b);
  return lane;
}

// The sum of the t-th lane and of the subtrees before it that it completes, which `saved` holds by their
// height.
template <int t>
__attribute__((always_inline)) inline void add_lane(const Tile& tile, Sums (&saved)[kLevels + 1]) {
  const float* a = tile.a + lane_at(t) * kLaneStride;
  const float* panel = tile.panel + lane_at(t) * (kSteps * kCols);
  Sums sums = {};
  for (int64_t step = 0; step < tile.steps; ++step, a += kRows, panel += kCols) {
    Vec bs[kVecs];
    for (int v = 0; v < kVecs; ++v) bs[v] = load(panel + v * kLanes);
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) sums[i][v] += a[i] * bs[v];
  }
  constexpr int kHeight = __builtin_ctz(~t);
  for (int height = 0; height < kHeight; ++height)
    for (int i = 0; i < kRows; ++i)
      for (int v = 0; v < kVecs; ++v) sums[i][v] += saved[height][i][v];
  for (int i = 0; i < kRows; ++i)
    for (int v = 0; v < kVecs; ++v) saved[kHeight][i][v] = sums[i][v];
}

template <int t = 0>
__attribute__((always_inline)) inline void add_lanes(const Tile& tile, Sums (&saved)[kLevels + 1]) {
  add_lane<t>(tile, saved);
  if constexpr (t + 1 < kLanes) add_lanes<t + 1>(tile, saved);
}

void run(const Tile& t) {
  for (int64_t i = 0; i < t.rows; ++i) __builtin_prefetch(t.c + i * t.ldc, 1);
  Sums saved[kLevels + 1];
  add_lanes(t, saved);
  const Sums& sums = saved[kLevels];
  const auto finish = [&](int64_t rows, int64_t cols) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i)
      for (int v = 0; v < kVecs; ++v) {
        float* const out = t.c + i * t.ldc + v * kLanes;
        const int64_t n = cols - v * kLanes;
        if (n >= kLanes)
          store(out, t.accumulate ? load(out) + sums[i][v] : sums[i][v]);
        else if (n > 0)
          store_part(out, t.accumulate ? load_part(out, n) + sums[i][v] : sums[i][v], n);
      }
  };
  t.rows == kRows&& t.cols == kCols ? finish(kRows, kCols) : finish(t.rows, t.cols);
}

struct Block {
  const float* packed;
  int64_t first, rows;  // of A
  int64_t l, depth;     // of k

  int64_t tiles() const { return (rows + kRows - 1) / kRows; }
};

// A block of A times all rows of B, from element l of theirs on.
template <class B>
void multiply(const Gemm& g, const Block& block, Panel& panel) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(B));
  const int64_t lines = kCols * ((block.depth + kLine - 1) / kLine);
  const int64_t lines_per_tile = (lines + block.tiles() - 1) / block.tiles();
  const B* b = static_cast<const B*>(g.b) + block.l;
  for (int64_t j = 0; j < g.n; j += kCols, b += kCols * g.ldb) {
    const int64_t cols = min(kCols, g.n - j);
    panel.fill(b, g.ldb, cols, block.depth);
    // What the next panel reads comes while this one is used.
    const B* next = b + kCols * g.ldb;
    int64_t column = 0;
    for (int64_t t = 0; t < block.tiles(); ++t) {
      for (int64_t n = 0; n < lines_per_tile; ++n) {
        __builtin_prefetch(next + column);
        if ((column += kLine) >= block.depth) column = 0, next += g.ldb;
      }
      const int64_t i = t * kRows;
      run({.a = block.packed + t * kTileSize,
           .panel = panel.data,
           .c = g.c + (block.first + i) * g.ldc + j,
           .ldc = g.ldc,
           .rows = min(kRows, block.rows - i),
           .cols = cols,
           .steps = (block.depth + kLanes - 1) / kLanes,
           .accumulate = g.accumulate || block.l > 0});
    }
  }
}

void multiply(const Gemm& g, const Block& block, Panel& panel) {
  switch (g.b_dtype) {
    case DType::f32: return multiply<float>(g, block, panel);
    case DType::bf16: return multiply<bf16>(g, block, panel);
    case DType::f16: return multiply<f16>(g, block, panel);
    default: __builtin_unreachable();
  }
}

}  // namespace

void gemm_nt_panels(const Gemm& g) {
  Panel panel;
  alignas(64) float packed[kGemmPanelBlock / kRows * kTileSize];
  // Blocks of equal height, of whole tiles.
  const int64_t blocks = (g.m + kGemmPanelBlock - 1) / kGemmPanelBlock;
  const int64_t height = ((g.m + blocks - 1) / blocks + kRows - 1) / kRows * kRows;
  for (int64_t first = 0; first < g.m; first += height) {
    int64_t l = 0;
    do {  // at least once, also for no elements: C is written
      const Block block = {packed, first, min(height, g.m - first), l, min(kDepth, g.k - l)};
      for (int64_t t = 0; t < block.tiles(); ++t)
        pack(g.a + (first + t * kRows) * g.lda + l, g.lda, min(kRows, block.rows - t * kRows), block.depth,
             packed + t * kTileSize);
      multiply(g, block, panel);
    } while ((l += kDepth) < g.k);
  }
}

}  // namespace kl::KL_ISA

#endif
