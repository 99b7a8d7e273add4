// For the tests of this folder: a directory that goes away again, files made byte by byte, expected errors.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "io/checkpoint.h"

namespace kl::testing {

class TempDir {
 public:
  TempDir() {
    std::string pattern = std::filesystem::temp_directory_path() / "kl-io-XXXXXX";
    KL_CHECK(mkdtemp(pattern.data()), "cannot create a temporary directory ", pattern);
    path_ = pattern;
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;

  const std::string& path() const { return path_; }
  std::string operator/(const std::string& name) const { return path_ + "/" + name; }
  std::vector<std::string> names() const {  // of everything inside, sorted
    std::vector<std::string> all;
    for (const auto& item : std::filesystem::directory_iterator(path_)) all.push_back(item.path().filename());
    std::sort(all.begin(), all.end());
    return all;
  }

 private:
  std::string path_;
};

inline void write_file(const std::string& path, const std::string& bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string little_endian(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i) & 255);
  return bytes;
}

// A safetensors file of this header, followed by bytes 0, 1, 2, ...
inline std::string safetensors_bytes(const std::string& header, size_t data_bytes) {
  std::string file = little_endian(header.size()) + header;
  for (size_t i = 0; i < data_bytes; ++i) file += static_cast<char>(i);
  return file;
}

// A file and a block of memory of exactly its size, so that AddressSanitizer sees the first byte beyond.
struct Parsed {
  explicit Parsed(const std::string& bytes) : memory(new std::byte[bytes.size()]) {
    std::copy_n(reinterpret_cast<const std::byte*>(bytes.data()), bytes.size(), memory.get());
    file = SafetensorsFile::parse(memory.get(), bytes.size(), "test.safetensors");
  }
  std::unique_ptr<std::byte[]> memory;
  SafetensorsFile file;
};

// Succeeds if `action` throws kl::Error whose message contains all `parts`.
template <class Action>
::testing::AssertionResult fails_with(Action&& action, const std::vector<std::string>& parts) {
  try {
    action();
  } catch (const Error& e) {
    const std::string message = e.what();
    for (const std::string& part : parts) {
      if (message.find(part) == message.npos) {
        return ::testing::AssertionFailure() << "expected '" << part << "' in: " << message;
      }
    }
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << "no error";
}

}  // namespace kl::testing
