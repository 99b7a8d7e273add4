// Vec: one register of f32 and what kernels do with it, on GCC's vector extensions. Only for x_cpu.cc files:
// everything lives in the namespace of the instruction set that the file is being compiled for, because the
// linker keeps one copy of an inline function, and a copy made for AVX-512 must not be the one that another
// machine runs. For the same reason these files call nothing inline of std:: or base/.
//
// a * b + c becomes one FMA where the instruction set has it.
#pragma once

#include <cstdint>

#include "base/dtype.h"

#if !defined(KL_ISA)
#error "simd/vec.h is for x_cpu.cc files, which the build compiles once per instruction set"
#endif

namespace kl::KL_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t BitVec __attribute__((vector_size(4 * kLanes)));
typedef float Quad __attribute__((vector_size(16)));
typedef uint16_t HalfVec __attribute__((vector_size(2 * kLanes)));  // the bits of bf16 or f16

inline Vec broadcast(float x) { return x - Vec{}; }

template <class V>
inline V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
// The first n < kLanes elements of `size` bytes; the others are zero.
template <class V>
inline V load_part_bits(const void* p, int64_t n, int size) {
  V v{};
  __builtin_memcpy(&v, p, static_cast<size_t>(n * size));
  return v;
}

inline Vec widen_bf16(HalfVec h) { return (Vec)(__builtin_convertvector(h, BitVec) << 16); }

// Exponents move from bias 15 to 127 by a multiplication, which also normalises subnormals; infinity and NaN
// come out as 2^16 or more and get the exponent that they need.
inline Vec widen_f16(HalfVec h) {
  const BitVec u = __builtin_convertvector(h, BitVec);
  const Vec magnitude = (Vec)((u & 0x7fffu) << 13) * 0x1p112f;
  const BitVec special = (BitVec)(magnitude >= 65536.f) & 0x7f800000u;
  return (Vec)((BitVec)magnitude | special | (u & 0x8000u) << 16);
}

inline Vec load(const float* p) { return load_bits<Vec>(p); }
inline Vec load(const bf16* p) { return widen_bf16(load_bits<HalfVec>(p)); }
inline Vec load(const f16* p) { return widen_f16(load_bits<HalfVec>(p)); }
inline Vec load_part(const float* p, int64_t n) { return load_part_bits<Vec>(p, n, 4); }
inline Vec load_part(const float* p, int64_t n, float other) {  // the other lanes hold `other`
  Vec v = broadcast(other);
  __builtin_memcpy(&v, p, static_cast<size_t>(4 * n));
  return v;
}
inline Vec load_part(const bf16* p, int64_t n) { return widen_bf16(load_part_bits<HalfVec>(p, n, 2)); }
inline Vec load_part(const f16* p, int64_t n) { return widen_f16(load_part_bits<HalfVec>(p, n, 2)); }

template <class V, class T>
inline void store(T* p, V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
inline void store_part(float* p, Vec v, int64_t n) { __builtin_memcpy(p, &v, static_cast<size_t>(4 * n)); }

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

// The sum of the lanes, always along the same tree: lanes half a vector apart first, neighbours last.
inline float sum(Vec v) {
#if defined(__AVX512F__)
  v += __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif defined(__AVX2__)
  v += __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1);
#endif
  return v[0] + v[1];
}

// {sum(a), sum(b), sum(c), sum(d)}, the same bits for a third of the work: after each step the remaining
// parts of several vectors share one.
inline Quad sum(Vec a, Vec b, Vec c, Vec d) {
#if defined(__AVX512F__)
  const auto halves = [](Vec x, Vec y) {  // eight lanes of x, eight of y
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  };
  const Vec ab = halves(a, b), cd = halves(c, d);
  Vec v = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
          __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  v += __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return __builtin_shufflevector(v, v, 0, 4, 8, 12);
#elif defined(__AVX2__)
  const auto halves = [](Vec x, Vec y) {  // four lanes of x, four of y
    return __builtin_shufflevector(x, y, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(x, y, 4, 5, 6, 7, 12, 13, 14, 15);
  };
  const Vec ab = halves(a, b), cd = halves(c, d);
  Vec v = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
          __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
  v += __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6);
  return __builtin_shufflevector(v, v, 0, 4, 2, 6);
#else
  const auto halves = [](Vec x, Vec y) {  // two lanes of x, two of y
    return __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
  };
  const Vec ab = halves(a, b), cd = halves(c, d);
  return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) + __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
#endif
}

inline float max(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// e^x to about 2 ulp; 0 where the result would not be a normal number, infinity above 2^127.5, NaN stays NaN.
inline Vec exp(Vec x) {
  // x = n ln 2 + r, |r| <= ln 2 / 2. Adding 1.5 · 2^23 rounds to an integer, which then sits in the low bits.
  constexpr float kRound = 0x1.8p23f, kLog2e = 0x1.715476p0f, kLn2High = 0x1.62ep-1f,
                  kLn2Low = 0x1.0bfbe8p-15f;
  const Vec shifted = x * kLog2e + kRound;
  const Vec n = shifted - kRound;
  const Vec r = (x - n * kLn2High) - n * kLn2Low;
  Vec p = r * (1.f / 5040) + 1.f / 720;  // Taylor; the next term is below 1e-8 at |r| = 0.347
  p = p * r + 1.f / 120;
  p = p * r + 1.f / 24;
  p = p * r + 1.f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  const Vec power = (Vec)(((BitVec)shifted << 23) + 0x3f800000u);  // 2^n
  const Vec high = x > 88.37f ? broadcast(__builtin_inff()) : p * power;
  return x < -87.33f ? Vec{} : high;
}

// x · sigmoid(x)
inline Vec silu(Vec x) { return x / (1.f + exp(-x)); }

}  // namespace kl::KL_ISA
