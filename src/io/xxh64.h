// XXH64, the well-known fast 64-bit hash (seed 0): checksums of files and fingerprints of models. Finds
// accidents; it is no protection against somebody who wants to be taken for someone else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kl {

class Xxh64 {
 public:
  void update(const void* data, size_t bytes);
  void update(std::string_view text) { update(text.data(), text.size()); }
  uint64_t digest() const;  // of everything so far; more may follow

 private:
  uint64_t lanes_[4] = {0x60ea27eeadc0b5d6u, 0xc2b2ae3d27d4eb4fu, 0, 0x61c8864e7a143579u};
  unsigned char block_[32];  // bytes that do not fill a block yet
  size_t filled_ = 0;
  uint64_t total_ = 0;
};

uint64_t xxh64(const void* data, size_t bytes);

}  // namespace kl
