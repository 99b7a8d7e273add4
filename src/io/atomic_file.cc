#include "io/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>

#include "base/check.h"

namespace kl {

namespace {

std::string folder_of(const std::string& path) { return path.substr(0, path.rfind('/') + 1); }

// A name of its own, not the destination's with an ending: that one may already be as long as names can be.
std::string temporary_name(const std::string& path) {
  static std::atomic<unsigned> count{0};
  return cat(folder_of(path), ".kl-", getpid(), "-", count++, ".tmp");
}

}  // namespace

AtomicFile::AtomicFile(const std::string& path) : path_(path) {
  // A process of the same number may have died here and left its file.
  for (int attempt = 0; attempt < 100 && fd_ < 0; ++attempt) {
    temporary_ = temporary_name(path);
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (fd_ < 0 && errno != EEXIST) break;
  }
  check(fd_ >= 0, "create a file in its folder");
  exists_ = true;
}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) close(fd_);
  if (exists_) unlink(temporary_.c_str());
}

void AtomicFile::check(bool good, const char* step) const {
  if (!good) {
    const int reason = errno;
    detail::fail(
        cat("cannot write ", path_, ": cannot ", step, ": ", std::generic_category().message(reason)));
  }
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* from = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t n = ::write(fd_, from, bytes);
    if (n < 0 && errno == EINTR) continue;
    check(n >= 0, "write to the disk");
    from += n, bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  check(fsync(fd_) == 0, "flush to the disk");
  const int fd = fd_;
  fd_ = -1;
  check(close(fd) == 0, "close the file");
  check(rename(temporary_.c_str(), path_.c_str()) == 0, "rename the finished file");
  exists_ = false;
  // The file is whole under its name by now. Whether the name outlives a power cut is up to the folder, and
  // not every file system can flush one: no reason to report a failure.
  const std::string folder = folder_of(path_);
  const int folder_fd = open(folder.empty() ? "." : folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (folder_fd >= 0) fsync(folder_fd), close(folder_fd);
}

}  // namespace kl
