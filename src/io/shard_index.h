// model.safetensors.index.json: which file of a checkpoint holds which tensor.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace kl {

struct ShardIndex {
  struct Place {
    std::string tensor;
    size_t file;  // index into files
  };
  std::vector<std::string> files;  // names without a folder, each once, in the order of the text
  std::vector<Place> places;       // sorted by tensor, each once
};

// `path` opens the messages. File names are hostile: one that could lead out of the directory is an error.
ShardIndex parse_shard_index(std::string_view json, const std::string& path);

}  // namespace kl
