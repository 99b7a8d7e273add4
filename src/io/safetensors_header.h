// The JSON header of a safetensors file: its grammar and its limits. What the numbers mean for the file's
// bytes (ranges, overlaps, sizes) is checked in safetensors.cc.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"

namespace kl {

constexpr size_t kMaxHeaderBytes = 100'000'000;      // the format's own limit
constexpr size_t kMaxHeaderNames = size_t{1} << 18;  // tensors and metadata of one file; shards have ~1000
constexpr size_t kMaxHeaderRank = 64;                // as many dimensions as any common writer can produce

struct SafetensorsHeader {
  struct Item {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;  // each >= 0
    int64_t begin, end;          // data_offsets, each >= 0, in bytes from the end of the header
  };
  std::vector<Item> tensors;  // in the order of the text
  std::map<std::string, std::string> metadata;
};

// Throws kl::Error that names the file, the tensor, what was found and what was expected. What the format
// leaves open is an error as well: a name that stands twice, a field beside dtype, shape and data_offsets.
SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file);

}  // namespace kl
