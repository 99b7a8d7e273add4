// For the tests of this folder: files made byte by byte, expected errors.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "io/checkpoint.h"
#include "testing/files.h"

namespace kl::testing {

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
