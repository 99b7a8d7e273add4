// A safetensors file written piece by piece: for tensors that do not fit into memory together.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "io/atomic_file.h"

namespace kl {

class SafetensorsWriter {
 public:
  struct Item {
    std::string name;
    DType dtype;
    std::vector<int64_t> shape;
    int64_t bytes() const;
  };
  // Writes the header. The functions throw kl::Error with the path and the reason.
  SafetensorsWriter(const std::string& path, std::vector<Item> items,
                    const std::map<std::string, std::string>& metadata = {});
  // The items in the order in which their bytes have to come: by falling element size, then by name, so that
  // each lies at a multiple of its element size.
  const std::vector<Item>& order() const { return items_; }
  void write(const void* data, size_t bytes);
  void commit();  // when all bytes have come: the file appears under its name

 private:
  std::string path_;
  std::vector<Item> items_;
  AtomicFile file_;
  int64_t missing_ = 0;  // bytes
};

}  // namespace kl
