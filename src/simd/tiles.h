// The tile registers of AMX, for x_cpu.cc files: eight tiles of 16 rows of 64 bytes, and the product of bf16
// pairs that they have. Where the file is compiled for avx512_bf16 these are the processor's (which has to
// have them: Isa::amx); for the other instruction sets the same operations in plain code, so that kernels
// written with them are tested on every machine.
//
// Tiles belong to a thread: tile_begin() before the first use, tile_end() after the last.
#pragma once

#include <cstdint>

#include "base/dtype.h"

#if !defined(KL_ISA)
#error "simd/tiles.h is for x_cpu.cc files, which the build compiles once per instruction set"
#endif

namespace kl::KL_ISA {

constexpr int kTileRows = 16;   // of 64 bytes: 16 f32, or 16 pairs of bf16
constexpr int kTilePairs = 16;  // that a row of a factor holds

#if defined(__AVX512BF16__)

inline void tile_begin() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof(Config) == 64);
  asm volatile("ldtilecfg %0" ::"m"(config));
}
inline void tile_end() { asm volatile("tilerelease" ::: "memory"); }

// %c: the number alone, which makes the name of a register. "memory": what was written before is loaded.
template <int t>
inline void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
inline void tile_load(const void* rows, int64_t stride_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(stride_bytes), "i"(t) : "memory");
}
template <int t>
inline void tile_store(float* rows, int64_t stride_bytes = 64) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(stride_bytes), "i"(t) : "memory");
}
// c[i, j] += sum_p a[i, p].first · b[p, j].first + a[i, p].second · b[p, j].second
template <int c, int a, int b>
inline void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

#else

struct Tiles {
  uint32_t words[8][kTileRows][16];
};
inline Tiles& tiles() {
  static thread_local Tiles all;
  return all;
}
inline void tile_begin() { __builtin_memset(&tiles(), 0x7f, sizeof(Tiles)); }  // no kernel may rely on it
inline void tile_end() {}

template <int t>
inline void tile_zero() {
  __builtin_memset(tiles().words[t], 0, sizeof tiles().words[t]);
}
template <int t>
inline void tile_load(const void* rows, int64_t stride_bytes) {
  for (int i = 0; i < kTileRows; ++i)
    __builtin_memcpy(tiles().words[t][i], static_cast<const char*>(rows) + i * stride_bytes, 64);
}
template <int t>
inline void tile_store(float* rows, int64_t stride_bytes = 64) {
  for (int i = 0; i < kTileRows; ++i)
    __builtin_memcpy(reinterpret_cast<char*>(rows) + i * stride_bytes, tiles().words[t][i], 64);
}
template <int c, int a, int b>
inline void tile_multiply() {
  const auto number = [](uint32_t bits) {
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
  };
  Tiles& t = tiles();
  for (int i = 0; i < kTileRows; ++i)
    for (int p = 0; p < kTilePairs; ++p)
      for (int j = 0; j < 16; ++j) {
        const uint32_t x = t.words[a][i][p], y = t.words[b][p][j];
        float sum = number(t.words[c][i][j]);
        sum += number(x << 16) * number(y << 16);
        sum += number(x & 0xffff0000u) * number(y & 0xffff0000u);
        __builtin_memcpy(&t.words[c][i][j], &sum, 4);
      }
}

#endif

}  // namespace kl::KL_ISA
