// Squares of 16 x 16 words and 8 x 8 floats, transposed in registers. For x_cpu.cc files.
#pragma once

#include <cstdint>

#if !defined(KL_ISA)
#error "simd/transpose.h is for x_cpu.cc files, which the build compiles once per instruction set"
#endif

namespace kl::KL_ISA {

typedef uint32_t Words __attribute__((vector_size(64)));
typedef float EightFloats __attribute__((vector_size(32)));

// Words `distance` apart change places between two rows.
template <unsigned distance>
inline void exchange_words(const Words& low, const Words& high, Words& even, Words& odd) {
  if constexpr (distance == 1) {
    even = __builtin_shufflevector(low, high, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    odd = __builtin_shufflevector(low, high, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  } else if constexpr (distance == 2) {
    even = __builtin_shufflevector(low, high, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    odd = __builtin_shufflevector(low, high, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else if constexpr (distance == 4) {
    even = __builtin_shufflevector(low, high, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    odd = __builtin_shufflevector(low, high, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else {
    even = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    odd = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
}

// The same between all rows that are `distance` apart.
template <unsigned distance>
inline void exchange(const Words (&from)[16], Words (&to)[16]) {
  for (unsigned i = 0; i < 16; ++i)
    if ((i & distance) == 0) exchange_words<distance>(from[i], from[i | distance], to[i], to[i | distance]);
}

// rows[i][j] <-> rows[j][i]
inline void transpose(Words (&rows)[16]) {
  Words t[16];
  exchange<1>(rows, t);
  exchange<2>(t, rows);
  exchange<4>(rows, t);
  exchange<8>(t, rows);
}

// The same for 8 x 8 floats.
inline void transpose(EightFloats (&v)[8]) {
  EightFloats pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = __builtin_shufflevector(v[i], v[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    pairs[i + 1] = __builtin_shufflevector(v[i], v[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; ++j) {
      fours[i + 2 * j] = __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      fours[i + 2 * j + 1] =
          __builtin_shufflevector(pairs[i + j], pairs[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; ++i) {
    v[i] = __builtin_shufflevector(fours[i], fours[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    v[i + 4] = __builtin_shufflevector(fours[i], fours[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

}  // namespace kl::KL_ISA
