// Buffer: an owner of memory without a shape. Arena: a bump allocator over Buffers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include "base/tensor.h"

namespace kl {

// Owns one block of host memory or one read-only file mapping. Movable, not copyable.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept { swap(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Buffer();

  // 64-byte aligned, zeroed by the system on first touch; large blocks cost nothing until they are written.
  static Buffer host(size_t bytes);
  // A whole file, read-only. Throws kl::Error with the path and the reason.
  static Buffer map_file(const std::string& path);

  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  void swap(Buffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// A contiguous tensor together with the memory that it lives in.
struct OwnedTensor {
  Buffer buffer;
  Tensor tensor;
};
OwnedTensor make_tensor(DType dtype, std::initializer_list<int64_t> dims);  // zeroed

// Bump allocator for the buffers of one forward pass: alloc() ... alloc(), then reset() before the next pass.
// The same sequence of calls gets the same addresses. Grows by blocks; reset() joins them into one, so a
// steady state allocates nothing. Not thread-safe.
class Arena {
 public:
  Tensor alloc(DType dtype, std::initializer_list<int64_t> dims);
  void reset();
  size_t used() const { return used_; }  // bytes handed out since the last reset
  size_t peak() const { return peak_; }  // the most bytes ever handed out between two resets

  // A point to which the arena can be taken back, for scratch inside one layer.
  struct Mark {
    size_t block, offset, used;
  };
  Mark mark() const { return {block_, offset_, used_}; }
  void rewind(const Mark& m) { block_ = m.block, offset_ = m.offset, used_ = m.used; }

 private:
  std::vector<Buffer> blocks_;
  size_t block_ = 0, offset_ = 0;  // next free byte
  size_t used_ = 0, peak_ = 0;
};

// Takes an arena back to where it was at the start of a scope.
class ArenaScope {
 public:
  explicit ArenaScope(Arena& arena) : arena_(arena), mark_(arena.mark()) {}
  ~ArenaScope() { arena_.rewind(mark_); }
  ArenaScope(const ArenaScope&) = delete;
  ArenaScope& operator=(const ArenaScope&) = delete;

 private:
  Arena& arena_;
  Arena::Mark mark_;
};

}  // namespace kl
