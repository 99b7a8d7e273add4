// Pairs of bf16 in the lanes of a register, and their dot product: sum + a0 b0 + a1 b1 for every lane. One
// instruction (vdpbf16ps) where the processor has it; elsewhere the same arithmetic on f32 registers, slower
// than f32 itself, so that code written with it can be tested on any machine. Like simd/vec.h, only for
// x_cpu.cc files.
//
// Products are exact, the sums are rounded to f32, a1 b1 first. The instruction counts numbers below 2^-126
// as zero, the stand-in keeps them.
#pragma once

#include "simd/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace kl::KL_ISA {

// To the nearest, ties to even; a NaN stays one. One value in the low half of each lane.
inline BitVec round_bf16(Vec v) {
  const BitVec u = (BitVec)v;
  const BitVec rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const BitVec is_nan = (BitVec)(v != v);
  return (is_nan & (u >> 16 | 0x40u)) | (~is_nan & rounded);
}

// `first` in the low half of a lane, `second` in the high one.
inline BitVec pairs_of(Vec first, Vec second) {
#if defined(__AVX512BF16__)
  typedef uint16_t Halves __attribute__((vector_size(64)));
  const Halves apart = (Halves)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (BitVec)__builtin_shufflevector(apart, apart, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#else
  return round_bf16(first) | round_bf16(second) << 16;
#endif
}

// Neighbours in 2 kLanes values that lie in order, `low` the first of them.
inline BitVec neighbours(Vec low, Vec high) {
#if defined(__AVX512BF16__)
  return (BitVec)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  const HalfVec both[2] = {__builtin_convertvector(round_bf16(low), HalfVec),
                           __builtin_convertvector(round_bf16(high), HalfVec)};
  return load_bits<BitVec>(both);
#endif
}

inline Vec dot_pairs(Vec sum, BitVec a, BitVec b) {
#if defined(__AVX512BF16__)
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += (Vec)(a & 0xffff0000u) * (Vec)(b & 0xffff0000u);
  return sum + (Vec)(a << 16) * (Vec)(b << 16);
#endif
}

}  // namespace kl::KL_ISA
