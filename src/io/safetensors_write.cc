// Writing safetensors, in the layout of the common writers: tensors by falling element size and then by name,
// so that without any gaps each lies at a multiple of its element size; the header padded with spaces so that
// the data begin at a multiple of 8.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "io/atomic_file.h"
#include "io/quote.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"

namespace kl {

namespace {

using Named = std::map<std::string, Tensor>::value_type;

std::string json_string(const std::string& text, const std::string& path) {
  try {
    return nlohmann::json(text).dump();
  } catch (const nlohmann::json::type_error&) {
    detail::fail(cat("cannot write ", path, ": ", in_quotes(text), ": expected UTF-8"));
  }
}

void check_writable(const Named& named, const std::string& path) {
  const auto& [name, t] = named;
  KL_CHECK(name != "__metadata__", "cannot write ", path, ": a tensor cannot have the name __metadata__");
  KL_CHECK(t.device == Device::cpu, "cannot write ", path, ": tensor ", in_quotes(name),
           ": expected a tensor in CPU memory, found ", name_of(t.device));
  KL_CHECK(t.is_contiguous(), "cannot write ", path, ": tensor ", in_quotes(name),
           ": expected a contiguous tensor, found strides over ", t.shape_string());
  KL_CHECK(t.data || t.numel() == 0, "cannot write ", path, ": tensor ", in_quotes(name), ": has no data");
}

std::vector<const Named*> in_file_order(const std::map<std::string, Tensor>& tensors) {
  std::vector<const Named*> order;
  for (const Named& named : tensors) order.push_back(&named);
  std::stable_sort(order.begin(), order.end(), [](const Named* a, const Named* b) {
    return size_of(a->second.dtype) > size_of(b->second.dtype);  // the map already sorts by name
  });
  return order;
}

std::string header_text(const std::vector<const Named*>& order,
                        const std::map<std::string, std::string>& metadata, const std::string& path) {
  std::string text = "{";
  if (!metadata.empty()) {
    text += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      text += json_string(key, path) + ":" + json_string(value, path) + ",";
    }
    text.back() = '}', text += ',';
  }
  int64_t offset = 0;
  for (const Named* named : order) {
    const Tensor& t = named->second;
    text += json_string(named->first, path) + ":{\"dtype\":\"" + std::string(name_of(t.dtype));
    text += "\",\"shape\":[";
    for (int d = 0; d < t.rank; ++d) text += cat(d ? "," : "", t.shape[d]);
    text += cat("],\"data_offsets\":[", offset, ',', offset + t.bytes(), "]},");
    offset += t.bytes();
  }
  if (text.size() > 1) text.pop_back();
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  for (const Named& named : tensors) check_writable(named, path);
  const std::vector<const Named*> order = in_file_order(tensors);
  const std::string header = header_text(order, metadata, path);
  // What this project writes it can also read.
  KL_CHECK(header.size() <= kMaxHeaderBytes, "cannot write ", path, ": a header of ", header.size(),
           " bytes, expected at most ", kMaxHeaderBytes);
  const size_t names = tensors.size() + metadata.size() + !metadata.empty();
  KL_CHECK(names <= kMaxHeaderNames, "cannot write ", path, ": ", names, " names, expected at most ",
           kMaxHeaderNames);

  AtomicFile file(path);
  const uint64_t length = header.size();  // little-endian, as every machine that this runs on
  file.write(&length, sizeof length);
  file.write(header.data(), header.size());
  for (const Named* named : order) {
    file.write(named->second.data, static_cast<size_t>(named->second.bytes()));
  }
  file.commit();
}

}  // namespace kl
