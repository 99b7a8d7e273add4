// Writing safetensors, in the layout of the common writers: tensors by falling element size and then by name,
// so that without any gaps each lies at a multiple of its element size; the header padded with spaces so that
// the data begin at a multiple of 8.
#include <algorithm>
#include <nlohmann/json.hpp>

#include "io/quote.h"
#include "io/safetensors.h"
#include "io/safetensors_header.h"
#include "io/safetensors_writer.h"

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

std::vector<SafetensorsWriter::Item> in_file_order(std::vector<SafetensorsWriter::Item> items) {
  std::sort(
      items.begin(), items.end(), [](const SafetensorsWriter::Item& a, const SafetensorsWriter::Item& b) {
        return size_of(a.dtype) != size_of(b.dtype) ? size_of(a.dtype) > size_of(b.dtype) : a.name < b.name;
      });
  return items;
}

std::string header_text(const std::vector<SafetensorsWriter::Item>& order,
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
  for (const SafetensorsWriter::Item& item : order) {
    text += json_string(item.name, path) + ":{\"dtype\":\"" + std::string(name_of(item.dtype));
    text += "\",\"shape\":[";
    for (size_t d = 0; d < item.shape.size(); ++d) text += cat(d ? "," : "", item.shape[d]);
    text += cat("],\"data_offsets\":[", offset, ',', offset + item.bytes(), "]},");
    offset += item.bytes();
  }
  if (text.size() > 1) text.pop_back();
  text += '}';
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace

int64_t SafetensorsWriter::Item::bytes() const {
  int64_t n = size_of(dtype);
  for (const int64_t size : shape) {
    KL_CHECK(size >= 0 && !__builtin_mul_overflow(n, size, &n), "tensor ", name, ": size out of range");
  }
  return n;
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<SafetensorsWriter::Item> items,
                                     const std::map<std::string, std::string>& metadata)
    : path_(path), items_(in_file_order(std::move(items))), file_(path) {
  const std::string header = header_text(items_, metadata, path);
  // What this project writes it can also read.
  KL_CHECK(header.size() <= kMaxHeaderBytes, "cannot write ", path, ": a header of ", header.size(),
           " bytes, expected at most ", kMaxHeaderBytes);
  const size_t names = items_.size() + metadata.size() + !metadata.empty();
  KL_CHECK(names <= kMaxHeaderNames, "cannot write ", path, ": ", names, " names, expected at most ",
           kMaxHeaderNames);
  for (const SafetensorsWriter::Item& item : items_) missing_ += item.bytes();
  const uint64_t length = header.size();  // little-endian, as every machine that this runs on
  file_.write(&length, sizeof length);
  file_.write(header.data(), header.size());
}

void SafetensorsWriter::write(const void* data, size_t bytes) {
  KL_CHECK(bytes <= static_cast<size_t>(missing_), "cannot write ", path_, ": ", bytes,
           " bytes of tensors, expected at most ", missing_, " more");
  file_.write(data, bytes);
  missing_ -= static_cast<int64_t>(bytes);
}

void SafetensorsWriter::commit() {
  KL_CHECK(missing_ == 0, "cannot write ", path_, ": ", missing_, " bytes of tensors are missing");
  file_.commit();
}

void write_safetensors(const std::string& path, const std::map<std::string, Tensor>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsWriter::Item> items;
  for (const Named& named : tensors) {
    check_writable(named, path);
    const auto& [name, t] = named;
    items.push_back({name, t.dtype, {t.shape.begin(), t.shape.begin() + t.rank}});
  }
  SafetensorsWriter writer(path, std::move(items), metadata);
  for (const SafetensorsWriter::Item& item : writer.order()) {
    const Tensor& t = tensors.at(item.name);
    writer.write(t.data, static_cast<size_t>(t.bytes()));
  }
  writer.commit();
}

}  // namespace kl
