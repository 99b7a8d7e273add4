// The product of gemm_bf16.h on AMX tiles. A tile of weights is 16 rows of B as they lie, 32 elements each; a
// tile of activations is 16 rows of A, pair by pair. So B needs no other layout, C comes out transposed, and
// every sum runs over k in order, whatever a row is computed together with.
#include "simd/gemm_tiles.h"

#include "simd/bf16_pairs.h"
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
// cache while all rows of A pass. A block of those (512 KiB), the next one, and the sums of kColumnsAtOnce
// columns (384 KiB) stay in the second-level cache meanwhile.
constexpr int64_t kDepth = 512, kRowsAtOnce = kTileTaskRows, kColumnsAtOnce = kGemmBf16TaskColumns;
constexpr int64_t kGroupsAtOnce = kRowsAtOnce / kGroup, kPanelsAtOnce = kColumnsAtOnce / kRowsOfB;
static_assert(kRowsAtOnce % kGroup == 0 && kColumnsAtOnce % kRowsOfB == 0);

constexpr int64_t kLine = 32;  // elements of bf16 in a line of the cache

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline void ask_for(const bf16* p) { __builtin_prefetch(p, 0, 2); }  // into the second-level cache

// kRowsOfB rows of B, of which `rows` exist.
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
  const int64_t rows = min(b.rows - first, kGroup), n = min(k - l, kStep);
  for (int64_t i = 0; i < rows; ++i)
    __builtin_memcpy(edge + i * kStep, from + i * b.ldb, static_cast<size_t>(n) * sizeof(bf16));
  tile_load<tile>(edge, kStep * 2);
}

// sums (+)= B · A^T over elements [l, end) of k for two tiles of B and kCount groups of A, a_stride elements
// apart. Tiles 0-3 are the sums, 4-5 B, 6-7 A. load(tile, l) loads one of B; ahead() asks for what comes.
template <int kCount, class LoadB, class Ahead>
inline void multiply(const LoadB& load, const bf16* a, int64_t a_stride, int64_t l, int64_t end, bool first,
                     float* sums, const Ahead& ahead) {
  const auto each = [&](const auto& f) __attribute__((always_inline)) {
    f.template operator()<0>();
    f.template operator()<1>();
    if constexpr (kCount > 1) f.template operator()<2>(), f.template operator()<3>();
  };
  each([&]<int t>() __attribute__((always_inline)) {
    first ? tile_zero<t>() : tile_load<t>(sums + t * kTileSums, kGroup * 4);
  });
  for (; l < end; l += kStep) {
    load.template operator()<4>(0, l);
    load.template operator()<5>(1, l);
    tile_load<6>(a + l * kGroup, 64);
    if constexpr (kCount > 1) tile_load<7>(a + a_stride + l * kGroup, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 5, 6>();
    ahead();
    if constexpr (kCount > 1) tile_multiply<2, 4, 7>(), tile_multiply<3, 5, 7>();
  }
  each([&]<int t>() __attribute__((always_inline)) { tile_store<t>(sums + t * kTileSums); });
}

// One tile of sums [columns of C][rows of C] -> C.
inline void write(const float* sums, const GemmBf16& g, int64_t i, int64_t j) {
  Words t[16];
  __builtin_memcpy(t, sums, sizeof t);
  transpose(t);
  const int64_t rows = min(g.m - i, kGroup), columns = min(g.n - j, 16);
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

// Both tiles of sums of a group.
inline void write_panel(const float* sums, const GemmBf16& g, int64_t i, int64_t j) {
  write(sums, g, i, j);
  if (j + kGroup < g.n) write(sums + kTileSums, g, i, j + kGroup);
}

// Up to kGroups groups of A: nothing of B is used twice, so its tiles are loaded where they lie.
void few_rows(const GemmBf16& g, int64_t i) {
  alignas(64) float sums[kGroups * 2 * kTileSums];
  alignas(64) bf16 edge[kTile];
  const int64_t a_stride = kGroup * packed_tile_columns(g.k);
  const bf16* const a = g.a + i / kGroup * a_stride;
  for (int64_t j = 0; j < g.n; j += kRowsOfB) {
    const RowsOfB b = {g.b + j * g.ldb, g.ldb, min(g.n - j, kRowsOfB)};
    const auto load = [&]<int tile>(int t, int64_t l) { load_b<tile>(b, t * kGroup, l, g.k, edge); };
    const auto nothing = [] {};
    const bool two = g.m - i > kGroup;
    two ? multiply<2>(load, a, a_stride, 0, g.k, true, sums, nothing)
        : multiply<1>(load, a, a_stride, 0, g.k, true, sums, nothing);
    write_panel(sums, g, i, j);
    if (two) write_panel(sums + 2 * kTileSums, g, i + kGroup, j);
  }
}

// Asks for rows of B that are copied next, some lines at every step: without it, they would come from memory
// while nothing is multiplied.
class Ahead {
 public:
  Ahead(const RowsOfB& b, int64_t depth, int64_t steps)
      : row_(b.data),
        ldb_(b.ldb),
        rows_(b.rows),
        width_((depth + kLine - 1) / kLine * kLine),
        per_step_(steps > 0 ? (rows_ * width_ / kLine + steps - 1) / steps : 0) {}

  void step() {
    for (int64_t i = 0; i < per_step_ && rows_ > 0; ++i) {
      ask_for(row_ + at_);
      at_ += kLine;
      if (at_ == width_) at_ = 0, row_ += ldb_, --rows_;
    }
  }

 private:
  const bf16* row_;
  const int64_t ldb_;
  int64_t rows_, at_ = 0;
  const int64_t width_, per_step_;
};

// Columns [j, j + kColumnsAtOnce) of rows [i, i + kRowsAtOnce) of C.
class ManyRows {
 public:
  ManyRows(const GemmBf16& g, int64_t i, int64_t j)
      : g_(g),
        i_(i),
        j_(j),
        panels_(min((g.n - j + kRowsOfB - 1) / kRowsOfB, kPanelsAtOnce)),
        groups_(min((g.m - i + kGroup - 1) / kGroup, kGroupsAtOnce)),
        a_stride_(kGroup * packed_tile_columns(g.k)),
        a_(g.a + i / kGroup * a_stride_) {}

  void run() {
    int64_t l = 0;
    do {
      for (int64_t p = 0; p < panels_; ++p) {
        copy(p, l);
        multiply_panel(p, l);
      }
      l += kDepth;
    } while (l < g_.k);
    for (int64_t at = 0; at < groups_; ++at)
      for (int64_t p = 0; p < panels_; ++p)
        write_panel(sums_[p][at][0], g_, i_ + at * kGroup, j_ + p * kRowsOfB);
  }

 private:
  RowsOfB rows_of_b(int64_t p, int64_t l) const {
    const int64_t j = j_ + p * kRowsOfB;
    return {g_.b + j * g_.ldb + l, g_.ldb, min(g_.n - j, kRowsOfB)};
  }
  int64_t depth(int64_t l) const { return min(g_.k - l, kDepth); }

  // Tile by tile: rows of a matrix often lie a multiple of 4 KiB apart, where they would compete for the same
  // few places of the cache.
  void copy(int64_t p, int64_t l) {
    const RowsOfB b = rows_of_b(p, l);
    const int64_t n = depth(l);
    for (int64_t r = 0; r < kRowsOfB; ++r) {
      const bf16* const from = b.data + r * b.ldb;
      bf16* const to = copy_ + r * kStep;
      const int64_t exist = r < b.rows ? n : 0;
      int64_t at = 0;
      for (; at + kStep <= exist; at += kStep) {
        Words line;
        __builtin_memcpy(&line, from + at, sizeof line);
        __builtin_memcpy(to + at * kRowsOfB, &line, sizeof line);
      }
      for (; at < n; at += kStep) {
        __builtin_memset(to + at * kRowsOfB, 0, kStep * sizeof(bf16));
        if (at < exist)
          __builtin_memcpy(to + at * kRowsOfB, from + at, static_cast<size_t>(exist - at) * sizeof(bf16));
      }
    }
  }

  void multiply_panel(int64_t p, int64_t l) {
    const int64_t next_l = l + kDepth < g_.k ? l + kDepth : 0;  // the first again: of the next columns
    const bool more = p + 1 < panels_;
    const int64_t steps = (depth(l) + kStep - 1) / kStep, pairs = (groups_ + 1) / 2;
    const RowsOfB next = more ? rows_of_b(p + 1, l) : rows_of_b(0, next_l);
    Ahead ahead(next, depth(more ? l : next_l), steps * pairs);
    const auto load = [&]<int tile>(int t, int64_t at) {
      tile_load<tile>(copy_ + (at - l) * kRowsOfB + t * kTile, 64);
    };
    for (int64_t at = 0; at < groups_; at += kGroups) {
      const bf16* const a = a_ + at * a_stride_;
      const auto step = [&] { ahead.step(); };
      float* const sums = sums_[p][at][0];
      at + 1 < groups_ ? multiply<2>(load, a, a_stride_, l, l + depth(l), l == 0, sums, step)
                       : multiply<1>(load, a, a_stride_, l, l + depth(l), l == 0, sums, step);
    }
  }

  const GemmBf16& g_;
  const int64_t i_, j_, panels_, groups_;
  const int64_t a_stride_;  // elements from group to group
  const bf16* const a_;
  alignas(64) bf16 copy_[kRowsOfB * kDepth];
  alignas(64) float sums_[kPanelsAtOnce][kGroupsAtOnce][2][kTileSums];
};

}  // namespace

void gemm_nt_tiles(const GemmBf16& g) {
  tile_begin();
  for (int64_t i = 0; i < g.m; i += kRowsAtOnce) {
    if (g.m - i <= kGroups * kGroup) {
      few_rows(g, i);
      continue;
    }
    for (int64_t j = 0; j < g.n; j += kColumnsAtOnce) ManyRows(g, i, j).run();
  }
  tile_end();
}

void pack_tiles(const float* x, int64_t ldx, int64_t m, int64_t k, bf16* packed) {
  for (int64_t i = 0; i < m; i += kGroup)
    for (int64_t l = 0; l < k; l += kStep) {
      Words rows[16] = {};
      for (int64_t r = 0; r < kGroup && i + r < m; ++r) {
        const float* from = x + (i + r) * ldx + l;
        float part[kStep] = {};
        if (l + kStep > k) {
          __builtin_memcpy(part, from, static_cast<size_t>(k - l) * sizeof(float));
          from = part;
        }
        for (int64_t at = 0; at < kStep; at += 2 * kLanes) {
          const BitVec pairs = neighbours(load(from + at), load(from + at + kLanes));
          __builtin_memcpy(reinterpret_cast<uint32_t*>(&rows[r]) + at / 2, &pairs, sizeof pairs);
        }
      }
      transpose(rows);
      __builtin_memcpy(packed + i * packed_tile_columns(k) + l * kGroup, rows, sizeof rows);
    }
}

}  // namespace kl::KL_ISA
