// A checkpoint directory in the Hugging Face layout: config.json, one or many safetensors files with or
// without an index, tokenizer files. Opening maps the files and reads only their headers.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "io/safetensors.h"

namespace kl {

class Checkpoint {
 public:
  // `directory` holds config.json and *.safetensors. With model.safetensors.index.json, exactly the files it
  // names are opened and each tensor must be where the index says; without it, all *.safetensors files of the
  // directory are.
  static Checkpoint open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  std::optional<Tensor> find(std::string_view name) const;
  const SafetensorsFile::Entry* find_entry(std::string_view name) const;
  std::vector<const SafetensorsFile::Entry*> entries() const;  // of all files, sorted by name
  int64_t bytes() const;                                       // of all tensors
  size_t files() const { return files_.size(); }

 private:
  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::vector<const SafetensorsFile::Entry*> entries_;
};

// What `-m` may name: a directory, or a repository id "org/name" in the Hugging Face cache (HF_HUB_CACHE,
// else HF_HOME/hub, else ~/.cache/huggingface/hub): the snapshot that refs/main names, else the only one.
// Throws kl::Error that lists the places looked at.
struct HubLocations {
  std::string hub_cache;  // value of HF_HUB_CACHE, or empty
  std::string home;       // value of HF_HOME, or empty
  std::string user_home;  // value of HOME, or empty
};
std::string resolve_model(const std::string& directory_or_id, const HubLocations&);

// A whole (small) text file. Throws kl::Error with the path, also when it is larger than `limit` bytes.
std::string read_text_file(const std::string& path, size_t limit = size_t{64} << 20);
bool file_exists(const std::string& path);

}  // namespace kl
