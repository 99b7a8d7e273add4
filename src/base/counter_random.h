// Random numbers as a pure function of (seed, stream, index): any part of a stream can be made by any thread
// in any order, and is the same on every machine.
#pragma once

#include <cstdint>
#include <string_view>

namespace kl {

class CounterRandom {
 public:
  CounterRandom(uint64_t seed, uint64_t stream) : key_(mix(mix(seed + kStep) ^ stream)) {}
  // A stream of its own for a name.
  CounterRandom(uint64_t seed, std::string_view name) : CounterRandom(seed, hash(name)) {}

  // Two rounds of the finaliser of splitmix64 (Steele, Lea, Flood 2014) over key and index.
  uint64_t bits(uint64_t index) const { return mix(mix(index * kStep + key_) + key_); }
  // [0, 1): 53 bits.
  double uniform(uint64_t index) const { return static_cast<double>(bits(index) >> 11) * 0x1p-53; }
  // 0 .. n - 1; n far below 2^32, so that the bias does not matter.
  uint32_t below(uint64_t index, uint32_t n) const {
    return static_cast<uint32_t>(((bits(index) >> 32) * n) >> 32);
  }

 private:
  static constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;  // 2^64 / golden ratio
  static uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  static uint64_t hash(std::string_view name) {  // FNV-1a
    uint64_t h = 0xcbf29ce484222325u;
    for (const char c : name) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
    return h;
  }

  uint64_t key_;
};

}  // namespace kl
