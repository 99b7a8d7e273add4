#include "io/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "io/quote.h"
#include "io/shard_index.h"

namespace kl {

namespace {

using Entry = SafetensorsFile::Entry;
namespace fs = std::filesystem;

constexpr std::string_view kIndex = "/model.safetensors.index.json";

// A tensor and the file that holds it.
struct Held {
  const Entry* entry;
  size_t file;
};

// Names of the *.safetensors files, sorted. Hidden ones are not part of a checkpoint: file managers and
// downloads in progress leave such files.
std::vector<std::string> safetensors_in(const std::string& directory) {
  std::error_code problem;
  std::vector<std::string> names;
  fs::directory_iterator it(directory, problem);
  for (; !problem && it != fs::directory_iterator(); it.increment(problem)) {
    const std::string name = it->path().filename().string();
    if (name[0] != '.' && it->path().extension() == ".safetensors") names.push_back(name);
  }
  KL_CHECK(!problem, "cannot read the directory ", directory, ": ", problem.message());
  std::sort(names.begin(), names.end());
  return names;
}

// Throws one message for all files that are not there (or are links to nothing).
void check_present(const std::string& directory, const std::vector<std::string>& names) {
  constexpr size_t kListed = 100;
  size_t missing = 0;
  std::string list;
  for (const std::string& name : names) {
    if (file_exists(directory + "/" + name)) continue;
    if (++missing <= kListed) list += (missing > 1 ? ", " : "") + printable(name);
  }
  if (missing > kListed) list += cat(" and ", missing - kListed, " more");
  KL_CHECK(missing == 0, directory, ": ", missing, " of ", names.size(), " safetensors files missing: ", list,
           " (is the download complete?)");
}

// The tensors of all files, sorted by name.
std::vector<Held> collect(const std::vector<SafetensorsFile>& files, const std::vector<std::string>& names,
                          const std::string& directory) {
  std::vector<Held> all;
  for (size_t f = 0; f < files.size(); ++f) {
    for (const Entry& entry : files[f].entries()) all.push_back({&entry, f});
  }
  std::sort(all.begin(), all.end(),
            [](const Held& a, const Held& b) { return a.entry->name < b.entry->name; });
  const auto twice = std::adjacent_find(
      all.begin(), all.end(), [](const Held& a, const Held& b) { return a.entry->name == b.entry->name; });
  if (twice != all.end()) {
    detail::fail(cat(directory, ": tensor ", in_quotes(twice->entry->name), " stands in two files, ",
                     names[twice[0].file], " and ", names[twice[1].file]));
  }
  return all;
}

// Each tensor of the index is where the index says. Both lists are sorted.
void check_places(const std::vector<Held>& all, const ShardIndex& index, const std::string& directory) {
  auto at = all.begin();
  for (const ShardIndex::Place& place : index.places) {
    while (at != all.end() && at->entry->name < place.tensor) ++at;
    const bool found = at != all.end() && at->entry->name == place.tensor;
    KL_CHECK(found && at->file == place.file, directory, ": tensor ", in_quotes(place.tensor),
             ": the index says that it is in ", index.files[place.file], ", found it in ",
             found ? index.files[at->file] : "no file");
  }
}

}  // namespace

Checkpoint Checkpoint::open(const std::string& directory) {
  std::error_code problem;
  KL_CHECK(fs::is_directory(directory, problem), "cannot open the checkpoint ", directory, ": ",
           problem ? problem.message() : "not a directory");
  KL_CHECK(file_exists(directory + "/config.json"), "cannot open the checkpoint ", directory,
           ": expected a config.json in it, found none");

  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  std::optional<ShardIndex> index;
  const std::string index_path = directory + std::string(kIndex);
  if (file_exists(index_path)) index = parse_shard_index(read_text_file(index_path), index_path);
  const std::vector<std::string> names = index ? index->files : safetensors_in(directory);
  KL_CHECK(!names.empty(), "cannot open the checkpoint ", directory,
           ": expected *.safetensors files in it, found none");
  check_present(directory, names);

  for (const std::string& name : names) {
    checkpoint.files_.push_back(SafetensorsFile::open(directory + "/" + name));
  }
  const std::vector<Held> all = collect(checkpoint.files_, names, directory);
  if (index) check_places(all, *index, directory);
  checkpoint.entries_.reserve(all.size());
  for (const Held& held : all) checkpoint.entries_.push_back(held.entry);
  return checkpoint;
}

const Entry* Checkpoint::find_entry(std::string_view name) const {
  const auto at = std::lower_bound(entries_.begin(), entries_.end(), name,
                                   [](const Entry* e, std::string_view n) { return e->name < n; });
  return at != entries_.end() && (*at)->name == name ? *at : nullptr;
}

std::optional<Tensor> Checkpoint::find(std::string_view name) const {
  const Entry* entry = find_entry(name);
  if (!entry) return std::nullopt;
  if (entry->is_aligned()) return entry->tensor();

  const std::lock_guard lock(copies_->mutex);
  Buffer& copy = copies_->buffers[entry];
  if (!copy) {
    copy = Buffer::host(static_cast<size_t>(entry->bytes));
    std::memcpy(copy.data(), entry->data, copy.size());
  }
  Entry aligned = *entry;
  aligned.data = copy.data();
  return aligned.tensor();
}

std::vector<const Entry*> Checkpoint::entries() const { return entries_; }

int64_t Checkpoint::bytes() const {
  int64_t total = 0;
  for (const Entry* entry : entries_) total += entry->bytes;
  return total;
}

}  // namespace kl
