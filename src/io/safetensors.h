// The safetensors format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes. Files
// are hostile: every number is checked against the file before use.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/buffer.h"

namespace kl {

// One open file. Tensors are views into its mapping.
class SafetensorsFile {
 public:
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;  // any rank
    const std::byte* data;
    int64_t bytes;

    // Published files place tensors at multiples of their element size, but the format does not ask for it.
    // (Checkpoint::find gives an aligned copy of a tensor that is not. One without elements always is.)
    bool is_aligned() const;
    // A view. Throws for a rank above kMaxRank and for a tensor that is not aligned.
    Tensor tensor() const;
  };

  // Throws kl::Error, naming the file and what is wrong with it.
  static SafetensorsFile open(const std::string& path);
  // The same for bytes in memory (tests, fuzzing); `bytes` must outlive the result.
  static SafetensorsFile parse(const std::byte* bytes, size_t size, const std::string& name);

  const std::vector<Entry>& entries() const { return entries_; }  // sorted by name
  const Entry* find(std::string_view name) const;                 // null if absent
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  Buffer mapping_;
  std::vector<Entry> entries_;
  std::map<std::string, std::string> metadata_;
};

// Writes a file atomically (a temporary file beside it, then a rename). Tensors must be contiguous CPU
// tensors. Throws kl::Error with the path and the reason; then what was at `path` before is still there.
void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace kl
