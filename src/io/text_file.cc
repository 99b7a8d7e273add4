// Small files of a checkpoint directory (declared in checkpoint.h).
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "io/checkpoint.h"

namespace kl {

namespace {

struct Descriptor {
  int fd;
  ~Descriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

bool file_exists(const std::string& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

std::string read_text_file(const std::string& path, size_t limit) {
  const auto reason = [] { return std::generic_category().message(errno); };
  // Without O_NONBLOCK opening a named pipe would wait for somebody to write.
  const Descriptor file{open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)};
  KL_CHECK(file.fd >= 0, "cannot open ", path, ": ", reason());
  struct stat info {};
  KL_CHECK(fstat(file.fd, &info) == 0, "cannot read ", path, ": ", reason());
  KL_CHECK(S_ISREG(info.st_mode), "cannot read ", path, ": not a regular file");

  // The size is a hint only: what counts against the limit are bytes that were read.
  std::string text;
  size_t used = 0;
  text.resize(std::min(static_cast<size_t>(info.st_size), limit) + 1);
  while (true) {
    const ssize_t n = read(file.fd, text.data() + used, text.size() - used);
    if (n < 0 && errno == EINTR) continue;
    KL_CHECK(n >= 0, "cannot read ", path, ": ", reason());
    if (n == 0) break;
    used += static_cast<size_t>(n);
    KL_CHECK(used <= limit, "cannot read ", path, ": larger than ", limit, " bytes, which is the limit");
    if (used == text.size()) text.resize(std::min(2 * used, limit) + 1);
  }
  text.resize(used);
  return text;
}

}  // namespace kl
