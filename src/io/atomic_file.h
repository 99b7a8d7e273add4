// A file that appears whole or not at all: written beside its destination under a temporary name, then
// renamed.
#pragma once

#include <cstddef>
#include <string>

namespace kl {

class AtomicFile {
 public:
  // The functions throw kl::Error with the path and the reason.
  explicit AtomicFile(const std::string& path);
  void write(const void* data, size_t bytes);
  void commit();  // to the disk, then to its name; replaces what had that name

  ~AtomicFile();  // without commit() the temporary file is removed
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

 private:
  void check(bool good, const char* step) const;

  std::string path_, temporary_;
  int fd_ = -1;
  bool exists_ = false;  // the temporary file does
};

}  // namespace kl
