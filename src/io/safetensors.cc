// Reading safetensors: from a header's numbers to views of the file's bytes. Nothing is handed out before
// every range has been checked; after that no access needs a check. (A file that somebody shortens while it
// is open is outside of this promise: the mapping then has no pages there.)
#include "io/safetensors.h"

#include <algorithm>
#include <bit>

#include "io/quote.h"
#include "io/safetensors_header.h"

namespace kl {

namespace {

using Item = SafetensorsHeader::Item;
static_assert(std::endian::native == std::endian::little, "tensors are little-endian and used in place");

constexpr size_t kLengthBytes = 8;

std::string shape_string(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t d = 0; d < shape.size(); ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + "]";
}

// The header's text. Throws unless all of it is inside the file.
std::string_view header_text(const std::byte* bytes, size_t size, const std::string& file) {
  KL_CHECK(size >= kLengthBytes, file, ": ", size, " bytes long, expected at least ", kLengthBytes,
           " for the length of the header");
  uint64_t length = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) length |= std::to_integer<uint64_t>(bytes[i]) << (8 * i);
  KL_CHECK(length <= kMaxHeaderBytes, file, ": the header claims ", length, " bytes, expected at most ",
           kMaxHeaderBytes, " (is this a safetensors file?)");
  KL_CHECK(length <= size - kLengthBytes, file, ": the header claims ", length, " bytes, but only ",
           size - kLengthBytes, " follow (is the file cut off?)");
  return {reinterpret_cast<const char*>(bytes) + kLengthBytes, static_cast<size_t>(length)};
}

// `tensors` are sorted by name.
void check_names(const std::vector<Item>& tensors, const std::string& file) {
  const auto twice = std::adjacent_find(tensors.begin(), tensors.end(),
                                        [](const Item& a, const Item& b) { return a.name == b.name; });
  KL_CHECK(twice == tensors.end(), file, ": tensor ", in_quotes(twice->name), " stands twice in the header");
}

// Bytes that a tensor must have. A size of 0 counts as 1 in the check for overflow, so that every stride of
// every accepted shape fits in 64 bits as well.
int64_t checked_bytes(const Item& item, const std::string& file) {
  int64_t bytes = size_of(item.dtype);
  bool empty = false;
  for (const int64_t n : item.shape) {
    KL_CHECK(!__builtin_mul_overflow(bytes, std::max<int64_t>(n, 1), &bytes), file, ": tensor ",
             in_quotes(item.name), ": the size of shape ", shape_string(item.shape),
             " does not fit in 64 bits");
    empty = empty || n == 0;
  }
  return empty ? 0 : bytes;
}

// Every tensor lies inside the data and is as long as its shape says; together they cover the data without
// gaps (bytes nobody sees) and without overlaps (bytes seen twice).
void check_layout(const std::vector<Item>& tensors, uint64_t data_size, const std::string& file) {
  std::vector<const Item*> by_offset;
  by_offset.reserve(tensors.size());
  for (const Item& item : tensors) {
    KL_CHECK(item.begin <= item.end && static_cast<uint64_t>(item.end) <= data_size, file, ": tensor ",
             in_quotes(item.name), ": data_offsets [", item.begin, ", ", item.end,
             "], expected a range inside the ", data_size, " bytes of data",
             item.begin <= item.end ? " (is the file cut off?)" : "");
    const int64_t bytes = checked_bytes(item, file);
    KL_CHECK(item.end - item.begin == bytes, file, ": tensor ", in_quotes(item.name), ": data_offsets [",
             item.begin, ", ", item.end, "] hold ", item.end - item.begin, " bytes, expected ", bytes,
             " for ", name_of(item.dtype), " ", shape_string(item.shape));
    by_offset.push_back(&item);
  }
  std::sort(by_offset.begin(), by_offset.end(), [](const Item* a, const Item* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  int64_t covered = 0;
  for (const Item* item : by_offset) {
    KL_CHECK(item->begin == covered, file, ": tensor ", in_quotes(item->name), ": begins at byte ",
             item->begin, " of the data, expected ", covered,
             item->begin < covered ? " (an overlap)" : " (a gap)");
    covered = item->end;
  }
  KL_CHECK(static_cast<uint64_t>(covered) == data_size, file, ": the tensors end at byte ", covered,
           " of the data, expected ", data_size, ", the end of the file");
}

}  // namespace

bool SafetensorsFile::Entry::is_aligned() const {
  return bytes == 0 || reinterpret_cast<uintptr_t>(data) % static_cast<uintptr_t>(size_of(dtype)) == 0;
}

Tensor SafetensorsFile::Entry::tensor() const {
  KL_CHECK(shape.size() <= kMaxRank, "tensor ", in_quotes(name), ": shape ", shape_string(shape),
           " has rank ", shape.size(), ", expected at most ", kMaxRank);
  KL_CHECK(is_aligned(), "tensor ", in_quotes(name), ": does not lie at a multiple of its element size, ",
           size_of(dtype), " bytes; expected an aligned tensor or a copy of it");
  Tensor t;
  t.data = const_cast<std::byte*>(data);  // the mapping is read-only; a weight is never written
  t.dtype = dtype;
  t.rank = static_cast<int>(shape.size());
  int64_t step = 1;
  for (int d = t.rank - 1; d >= 0; --d) {
    t.shape[d] = shape[d];
    t.stride[d] = step;
    step *= shape[d];
  }
  return t;
}

SafetensorsFile SafetensorsFile::open(const std::string& path) {
  Buffer mapping = Buffer::map_file(path);
  SafetensorsFile file = parse(mapping.data(), mapping.size(), path);
  file.mapping_ = std::move(mapping);
  return file;
}

SafetensorsFile SafetensorsFile::parse(const std::byte* bytes, size_t size, const std::string& name) {
  const std::string_view text = header_text(bytes, size, name);
  SafetensorsHeader header = parse_safetensors_header(text, name);
  std::sort(header.tensors.begin(), header.tensors.end(),
            [](const Item& a, const Item& b) { return a.name < b.name; });
  const std::byte* data = bytes + kLengthBytes + text.size();
  check_names(header.tensors, name);
  check_layout(header.tensors, size - kLengthBytes - text.size(), name);

  SafetensorsFile file;
  file.metadata_ = std::move(header.metadata);
  file.entries_.reserve(header.tensors.size());
  for (Item& item : header.tensors) {
    file.entries_.push_back(
        {std::move(item.name), item.dtype, std::move(item.shape), data + item.begin, item.end - item.begin});
  }
  return file;
}

const SafetensorsFile::Entry* SafetensorsFile::find(std::string_view name) const {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), name,
                                   [](const Entry& e, std::string_view n) { return e.name < n; });
  return at != entries_.end() && at->name == name ? &*at : nullptr;
}

}  // namespace kl
