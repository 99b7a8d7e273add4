// Probabilities as integers: 2^-x in units of 2^-44. Integer arithmetic gives the same bits on every machine
// and with every compiler (a library's exp and fused multiplications do not), and sums do not depend on their
// order. What is less probable than 2^-44 of the most probable token (30 nats below it) gets weight 0.
#pragma once

#include <array>
#include <cstdint>

namespace kl {

constexpr int kWeightBits = 44;
constexpr uint64_t kMaxWeight = uint64_t{1} << kWeightBits;      // of probability 1, relative to the largest
constexpr int64_t kMaxVocab = int64_t{1} << (63 - kWeightBits);  // so that no sum of weights overflows

// The upper half of a product. One operand counts in 2^-64, the result in the units of the other.
constexpr uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
}

namespace detail {
constexpr int kTableBits = 10;
constexpr uint64_t kOne = uint64_t{1} << 63;          // 1, in units of 2^-63
constexpr uint64_t kLn2 = 0xb17217f7d1cf79acu;        // ln 2, in units of 2^-64
constexpr uint64_t kTableStep = 0xffd3a751c0f7e10cu;  // 2^(-1/1024), in units of 2^-64

// 2^(-i/1024) in units of 2^-63. The error of a thousand truncated products is below 2^-53.
constexpr std::array<uint64_t, 1 << kTableBits> make_powers() {
  std::array<uint64_t, 1 << kTableBits> powers{};
  uint64_t power = kOne;
  for (uint64_t& p : powers) p = power, power = multiply_high(power, kTableStep);
  return powers;
}
inline constexpr auto kPowers = make_powers();
}  // namespace detail

// kMaxWeight · 2^-x, rounded down, for x >= 0: whole octaves are a shift, the next ten bits a table entry and
// the rest three terms of the exponential series, whose fourth is below 2^-46.
inline uint64_t weight_at(double x) {
  using namespace detail;
  if (!(x < kWeightBits + 1)) return 0;
  const uint64_t fixed = static_cast<uint64_t>(x * 0x1p48);
  const uint64_t octaves = fixed >> 48, entry = fixed >> (48 - kTableBits) & (kPowers.size() - 1);
  const uint64_t rest = fixed << (16 + kTableBits) >> kTableBits;  // below 2^-10, in units of 2^-64
  const uint64_t y = multiply_high(rest, kLn2);
  uint64_t series = kOne - y / 6;                // e^-y = 1 - y (1 - y/2 (1 - y/3)); y/2 is y in units
  series = kOne - multiply_high(y, series) / 2;  // of 2^-63
  series = kOne - multiply_high(y, series);
  return multiply_high(kPowers[entry], series) >> (62 - kWeightBits + octaves);
}

}  // namespace kl
