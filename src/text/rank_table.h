// The vocabulary of byte strings: a rank file ("tiktoken.model": a line per token, base64 of its bytes, a
// space, its rank) and the look-up from bytes to rank. The file is hostile: every line is checked.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

namespace kl {

class RankTable {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  // `name` is the file's, for messages. The ranks must be 0 .. n-1, each once, n <= vocab_size, no bytes
  // twice, and every single byte among them, so that any bytes can be encoded.
  static RankTable parse(std::string_view file, const std::string& name, int vocab_size);

  int size() const { return static_cast<int>(tokens_.size()); }
  std::string_view bytes(int32_t rank) const {
    const Token& t = tokens_[static_cast<size_t>(rank)];
    return {pool_.data() + t.offset, t.length};
  }

  // The rank of n > 0 bytes, or kNone.
  uint32_t find(const char* p, size_t n) const {
    if (n > longest_) return kNone;
    const uint64_t key = key_of(p, n), hash = hash_of(key, n);
    if (!may_hold(hash)) return kNone;
    for (size_t i = hash >> shift_;; i = (i + 1) & mask_) {
      const Slot& slot = slots_[i];
      if (slot.length == 0) return kNone;
      if (slot.key != key || slot.length != n) continue;
      if (n <= kKeyBytes || std::memcmp(pool_.data() + tokens_[slot.rank].offset, p, n) == 0)
        return slot.rank;
    }
  }
  uint32_t of_byte(uint8_t byte) const { return of_byte_[byte]; }
  // find() of two bytes, without hashing: every merge begins with these.
  uint32_t of_two_bytes(uint8_t first, uint8_t second) const {
    return of_two_bytes_[static_cast<size_t>(first) << 8 | second];
  }

 private:
  struct Token {
    uint32_t offset, length;  // in pool_
  };
  // Open addressing with linear probing, at most two thirds full. A key of up to 8 bytes is the token itself,
  // so that most look-ups touch one cache line.
  struct Slot {
    uint64_t key;
    uint32_t rank, length;  // length 0: empty
  };
  static constexpr size_t kKeyBytes = 8;

  template <class T>
  static uint64_t load(const char* p) {
    T value;
    std::memcpy(&value, p, sizeof value);
    return value;
  }
  // Up to 8 bytes: the bytes (two overlapping reads, unique for the given n). More: a hash of them.
  static uint64_t key_of(const char* p, size_t n) {
    if (n <= kKeyBytes) {
      if (n >= 4) return load<uint32_t>(p) | load<uint32_t>(p + n - 4) << 32;
      if (n >= 2) return load<uint16_t>(p) | load<uint16_t>(p + n - 2) << 16;
      return static_cast<uint8_t>(*p);
    }
    uint64_t hash = 0;
    for (size_t i = 0; i + 8 < n; i += 8) hash = mix(hash ^ load<uint64_t>(p + i));
    return mix(hash ^ load<uint64_t>(p + n - 8));
  }
  static uint64_t mix(uint64_t x) {
    x *= 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
  }
  static uint64_t hash_of(uint64_t key, size_t n) { return mix(key + n) * 0xbf58476d1ce4e5b9u; }
  bool may_hold(uint64_t hash) const {
    const uint64_t bit = hash >> filter_shift_;
    return filter_[bit / 64] >> (bit % 64) & 1;
  }

  void index(const std::string& name, const std::vector<size_t>& line_of_rank);

  std::vector<Token> tokens_;  // by rank
  std::string pool_;           // the bytes of all tokens
  std::vector<Slot> slots_;
  size_t mask_ = 0, longest_ = 0;
  int shift_ = 0, filter_shift_ = 0;
  // A bit for each hash that a token may have. Merging asks mostly for pairs that are no token; these 256 KiB
  // stay in a core's cache where the slots (4 MiB, for Kimi) do not: Chinese prose 17 -> 22 MB/s.
  std::vector<uint64_t> filter_;
  std::vector<uint32_t> of_byte_, of_two_bytes_;
};

}  // namespace kl
