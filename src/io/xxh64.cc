#include "io/xxh64.h"

#include <bit>
#include <cstring>

namespace kl {

namespace {

constexpr uint64_t kPrime1 = 0x9e3779b185ebca87u, kPrime2 = 0xc2b2ae3d27d4eb4fu,
                   kPrime3 = 0x165667b19e3779f9u, kPrime4 = 0x85ebca77c2b2ae63u,
                   kPrime5 = 0x27d4eb2f165667c5u;

template <class T>
T read(const unsigned char* p) {  // little-endian, as every machine that this runs on
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

uint64_t round(uint64_t lane, uint64_t input) { return std::rotl(lane + input * kPrime2, 31) * kPrime1; }

void take_block(uint64_t (&lanes)[4], const unsigned char* p) {
  for (int i = 0; i < 4; ++i) lanes[i] = round(lanes[i], read<uint64_t>(p + 8 * i));
}

}  // namespace

void Xxh64::update(const void* data, size_t bytes) {
  const auto* p = static_cast<const unsigned char*>(data);
  total_ += bytes;
  if (filled_ + bytes < sizeof block_) {
    if (bytes > 0) std::memcpy(block_ + filled_, p, bytes);
    filled_ += bytes;
    return;
  }
  if (filled_ > 0) {
    const size_t missing = sizeof block_ - filled_;
    std::memcpy(block_ + filled_, p, missing);
    take_block(lanes_, block_);
    p += missing, bytes -= missing;
  }
  uint64_t lanes[4] = {lanes_[0], lanes_[1], lanes_[2], lanes_[3]};  // in registers
  for (; bytes >= sizeof block_; p += sizeof block_, bytes -= sizeof block_) take_block(lanes, p);
  std::memcpy(lanes_, lanes, sizeof lanes);
  if (bytes > 0) std::memcpy(block_, p, bytes);
  filled_ = bytes;
}

uint64_t Xxh64::digest() const {
  uint64_t h = kPrime5;  // lane 3 of a hash of seed 0 that saw no whole block
  if (total_ >= sizeof block_) {
    h = std::rotl(lanes_[0], 1) + std::rotl(lanes_[1], 7) + std::rotl(lanes_[2], 12) +
        std::rotl(lanes_[3], 18);
    for (const uint64_t lane : lanes_) h = (h ^ round(0, lane)) * kPrime1 + kPrime4;
  }
  h += total_;
  const unsigned char *p = block_, *const end = block_ + filled_;
  for (; end - p >= 8; p += 8) h = std::rotl(h ^ round(0, read<uint64_t>(p)), 27) * kPrime1 + kPrime4;
  if (end - p >= 4) h = std::rotl(h ^ read<uint32_t>(p) * kPrime1, 23) * kPrime2 + kPrime3, p += 4;
  for (; p < end; ++p) h = std::rotl(h ^ *p * kPrime5, 11) * kPrime1;
  h = (h ^ h >> 33) * kPrime2;
  h = (h ^ h >> 29) * kPrime3;
  return h ^ h >> 32;
}

uint64_t xxh64(const void* data, size_t bytes) {
  Xxh64 hash;
  hash.update(data, bytes);
  return hash.digest();
}

}  // namespace kl
