#include "base/buffer.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace kl {

namespace {
constexpr size_t kAlignment = 64;  // a cache line, and an AVX-512 vector
constexpr size_t kFirstBlock = size_t{1} << 20;

size_t align_up(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Number of bytes of a tensor; throws instead of wrapping around.
size_t checked_bytes(DType dtype, std::initializer_list<int64_t> dims) {
  size_t bytes = static_cast<size_t>(size_of(dtype));
  for (const int64_t n : dims) {
    KL_CHECK(n >= 0 && !__builtin_mul_overflow(bytes, static_cast<size_t>(n), &bytes),
             "tensor size out of range");
  }
  return bytes;
}

// Memory of an arena, on large pages where the system has them: rows of one head lie pages apart, and looking
// up 4 KiB pages takes a quarter of a KDA prefill (Zen 3: 96 -> 74 ms for 1024 tokens of 32 heads).
Buffer arena_block(size_t bytes) {
  Buffer b = Buffer::host(bytes);
  madvise(b.data(), b.size(), MADV_HUGEPAGE);  // a hint: refused where the kernel has none
  return b;
}
}  // namespace

Buffer Buffer::host(size_t bytes) {
  Buffer b;
  if (bytes == 0) return b;
  // NORESERVE: address space now, pages when they are written (state pools reserve a whole context).
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  KL_CHECK(p != MAP_FAILED, "cannot allocate ", bytes, " bytes of memory: ", std::strerror(errno));
  b.data_ = static_cast<std::byte*>(p);
  b.size_ = bytes;
  return b;
}

Buffer Buffer::map_file(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);  // a pipe must not block here
  KL_CHECK(fd >= 0, "cannot open ", path, ": ", std::strerror(errno));
  struct stat info {};
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    detail::fail(cat("cannot read ", path, ": not a regular file"));
  }
  Buffer b;
  if (info.st_size > 0) {
    void* p = mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_SHARED, fd, 0);
    const int reason = errno;
    close(fd);
    KL_CHECK(p != MAP_FAILED, "cannot map ", path, ": ", std::strerror(reason));
    b.data_ = static_cast<std::byte*>(p);
    b.size_ = static_cast<size_t>(info.st_size);
  } else {
    close(fd);
  }
  return b;
}

Buffer::~Buffer() {
  if (data_) munmap(data_, size_);
}

OwnedTensor make_tensor(DType dtype, std::initializer_list<int64_t> dims) {
  OwnedTensor t;
  t.buffer = Buffer::host(std::max<size_t>(checked_bytes(dtype, dims), 1));
  t.tensor = Tensor(t.buffer.data(), dtype, dims);
  return t;
}

Tensor Arena::alloc(DType dtype, std::initializer_list<int64_t> dims) {
  const size_t bytes = std::max(align_up(checked_bytes(dtype, dims)), kAlignment);
  while (block_ < blocks_.size() && blocks_[block_].size() - offset_ < bytes) ++block_, offset_ = 0;
  if (block_ == blocks_.size()) blocks_.push_back(arena_block(std::max({bytes, kFirstBlock, peak_})));
  std::byte* p = blocks_[block_].data() + offset_;
  offset_ += bytes;
  used_ += bytes;
  peak_ = std::max(peak_, used_);
  return Tensor(p, dtype, dims);
}

void Arena::reset() {
  if (blocks_.size() > 1) {
    size_t total = 0;
    for (const Buffer& b : blocks_) total += b.size();
    blocks_.clear();
    blocks_.push_back(arena_block(total));
  }
  block_ = offset_ = used_ = 0;
}

}  // namespace kl
