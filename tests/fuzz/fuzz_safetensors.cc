// A safetensors file, and the index of several. What is read and written again reads the same.
#include <cstring>
#include <map>

#include "fuzz.h"
#include "io/safetensors.h"
#include "io/shard_index.h"
#include "testing/files.h"

namespace kl::fuzz {
namespace {

void check_entries(const SafetensorsFile& file, const std::byte* bytes, size_t size) {
  const SafetensorsFile::Entry* last = nullptr;
  int64_t total = 0;
  for (const SafetensorsFile::Entry& e : file.entries()) {
    FUZZ_REQUIRE(!last || last->name < e.name, last->name, " before ", e.name);
    FUZZ_REQUIRE(file.find(e.name) == &e, e.name);
    FUZZ_REQUIRE(e.bytes >= 0);
    FUZZ_REQUIRE(e.bytes == 0 || (e.data >= bytes && e.data + e.bytes <= bytes + size), e.name);
    total += e.bytes;
    accepted([&] {
      const Tensor t = e.tensor();
      FUZZ_REQUIRE(t.bytes() == e.bytes, e.name, ": ", t.bytes(), " and ", e.bytes);
    });
    last = &e;
  }
  FUZZ_REQUIRE(static_cast<size_t>(total) <= size, total, " bytes of tensors in a file of ", size);
}

// Tensors that a view can show. Others are not ours to write.
void check_written(const SafetensorsFile& file) {
  static const testing::TempDir folder;
  static const std::string path = folder / "again.safetensors";
  std::map<std::string, Tensor> tensors;
  for (const SafetensorsFile::Entry& e : file.entries()) {
    accepted([&] { tensors[e.name] = e.tensor(); });
  }
  if (!accepted([&] { write_safetensors(path, tensors, file.metadata()); })) return;
  const SafetensorsFile again = SafetensorsFile::open(path);  // must not throw
  FUZZ_REQUIRE(again.metadata() == file.metadata());
  FUZZ_REQUIRE(again.entries().size() == tensors.size());
  for (const SafetensorsFile::Entry& e : again.entries()) {
    const SafetensorsFile::Entry* first = file.find(e.name);
    FUZZ_REQUIRE(first && first->dtype == e.dtype && first->shape == e.shape && first->bytes == e.bytes,
                 e.name);
    FUZZ_REQUIRE(e.bytes == 0 || std::memcmp(first->data, e.data, static_cast<size_t>(e.bytes)) == 0, e.name);
  }
}

void check_index(std::string_view text) {
  accepted([&] {
    const ShardIndex index = parse_shard_index(text, "index");
    for (size_t i = 0; i < index.places.size(); ++i) {
      FUZZ_REQUIRE(index.places[i].file < index.files.size());
      FUZZ_REQUIRE(i == 0 || index.places[i - 1].tensor < index.places[i].tensor);
    }
    for (const std::string& name : index.files) {
      FUZZ_REQUIRE(!name.empty() && name != "." && name != ".." && name.find('/') == std::string::npos, name);
    }
  });
}

}  // namespace
}  // namespace kl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kl;
  using namespace kl::fuzz;
  const auto* bytes = reinterpret_cast<const std::byte*>(data);
  accepted([&] {
    const SafetensorsFile file = SafetensorsFile::parse(bytes, size, "file");
    check_entries(file, bytes, size);
    if (one_in(16, data, size)) check_written(file);  // a file on the disk each
  });
  check_index(as_text(data, size));
  return 0;
}
