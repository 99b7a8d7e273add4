// A checkpoint directory in the Hugging Face layout: config.json, one or many safetensors files with or
// without an index, tokenizer files. Opening maps the files and reads only their headers.
#pragma once

#include <map>
#include <memory>
#include <mutex>
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
  // directory are. A tensor that stands in two files is an error. A tensor of these files that the index does
  // not name is found all the same, and the index's total_size is not looked at: writers disagree about what
  // it counts, and the files' own headers are exact.
  static Checkpoint open(const std::string& directory);

  const std::string& directory() const { return directory_; }
  // A view of the file, or, for a tensor whose place in the file does not suit its element type, of a copy
  // that the first call makes and the checkpoint keeps. Throws for a rank above kMaxRank. May be called by
  // several threads at once.
  std::optional<Tensor> find(std::string_view name) const;
  const SafetensorsFile::Entry* find_entry(std::string_view name) const;
  std::vector<const SafetensorsFile::Entry*> entries() const;  // of all files, sorted by name
  int64_t bytes() const;                                       // of all tensors
  size_t files() const { return files_.size(); }

 private:
  struct AlignedCopies {
    std::mutex mutex;
    std::map<const SafetensorsFile::Entry*, Buffer> buffers;
  };

  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::vector<const SafetensorsFile::Entry*> entries_;  // sorted by name
  std::unique_ptr<AlignedCopies> copies_ = std::make_unique<AlignedCopies>();
};

// What `-m` may name: a directory with a config.json, a "models--org--name" directory of the Hugging Face
// cache, or a repository id "org/name" in that cache (HF_HUB_CACHE, else HF_HOME/hub, else
// ~/.cache/huggingface/hub): the snapshot that refs/main names, else, without refs/main, the only one. Throws
// kl::Error that lists the places looked at.
struct HubLocations {
  std::string hub_cache;  // value of HF_HUB_CACHE, or empty
  std::string home;       // value of HF_HOME, or empty
  std::string user_home;  // value of HOME, or empty
};
std::string resolve_model(const std::string& directory_or_id, const HubLocations&);

// A whole (small) text file. Throws kl::Error with the path, also when it is larger than `limit` bytes.
std::string read_text_file(const std::string& path, size_t limit = size_t{64} << 20);
// A regular file, or a link that leads to one.
bool file_exists(const std::string& path);

}  // namespace kl
