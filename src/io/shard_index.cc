#include "io/shard_index.h"

#include <algorithm>
#include <unordered_map>

#include "io/json_sax.h"

namespace kl {

namespace {

constexpr int kMaxDepth = 16;  // of what stands beside weight_map, which nobody reads

// A plain name inside the directory: no separators, nothing hidden ("..", "."), no control characters.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name[0] != '.' && std::none_of(name.begin(), name.end(), [](char c) {
    return c == '/' || c == '\\' || static_cast<unsigned char>(c) < 0x20 || c == 0x7f;
  });
}

//   { "metadata": ..., "weight_map": { tensor: file, ... } }
class IndexHandler : public JsonHandler {
 public:
  IndexHandler(const std::string& file, ShardIndex& index) : JsonHandler(file), index_(index) {}

  bool start_object(size_t) {
    if (in_map()) unexpected("an object");
    if (at_map()) map_depth_ = depth_ + 1;
    return enter();
  }
  bool end_object() { return leave(); }
  bool start_array(size_t) {
    scalar("a list");
    return enter();
  }
  bool end_array() { return leave(); }

  bool key(std::string& text) {
    if (depth_ == 1) {
      KL_CHECK(text != "weight_map" || !map_seen(), file_, ": weight_map stands twice");
      at_map_ = text == "weight_map";
    } else if (in_map()) {
      tensor_ = std::move(text);
    }
    return true;
  }

  bool string(std::string& text) {
    if (!in_map()) return scalar("a string");
    KL_CHECK(is_plain_file_name(text), file_, ": tensor ", in_quotes(tensor_),
             ": expected the name of a file in ", "the same directory, found ", in_quotes(text));
    const auto [at, fresh] = numbers_.try_emplace(text, index_.files.size());
    if (fresh) index_.files.push_back(text);
    index_.places.push_back({std::move(tensor_), at->second});
    return true;
  }

  bool number_unsigned(uint64_t) { return scalar("a number"); }
  bool number_integer(int64_t) { return scalar("a number"); }
  bool number_float(double, const std::string&) { return scalar("a number"); }
  bool boolean(bool) { return scalar("a truth value"); }
  bool null() { return scalar("null"); }

  bool map_seen() const { return map_depth_ != 0; }

 private:
  bool at_map() const { return depth_ == 1 && at_map_; }           // behind the key "weight_map"
  bool in_map() const { return at_map_ && depth_ == map_depth_; }  // inside its object

  bool scalar(std::string_view found) {
    KL_CHECK(depth_ > 0, file_, ": expected an object with a weight_map, found ", found);
    if (in_map() || at_map()) unexpected(found);
    return true;
  }
  bool enter() {
    KL_CHECK(++depth_ <= kMaxDepth, file_, ": nested more than ", kMaxDepth, " deep");
    return true;
  }
  bool leave() {
    --depth_;
    return true;
  }
  [[noreturn]] void unexpected(std::string_view found) const {
    if (in_map()) {
      detail::fail(
          cat(file_, ": tensor ", in_quotes(tensor_), ": expected the name of a file, found ", found));
    }
    detail::fail(cat(file_, ": weight_map: expected an object from tensors to files, found ", found));
  }

  ShardIndex& index_;
  std::unordered_map<std::string, size_t> numbers_;  // of the files
  std::string tensor_;
  int depth_ = 0, map_depth_ = 0;
  bool at_map_ = false;  // the last key of the top level was "weight_map"
};

}  // namespace

ShardIndex parse_shard_index(std::string_view json, const std::string& path) {
  ShardIndex index;
  IndexHandler handler(path, index);
  walk_json(json, handler, path);
  KL_CHECK(handler.map_seen(), path, ": expected an object with a weight_map, found none");
  KL_CHECK(!index.places.empty(), path, ": weight_map is empty");
  std::vector<ShardIndex::Place>& places = index.places;
  std::sort(places.begin(), places.end(), [](const auto& a, const auto& b) { return a.tensor < b.tensor; });
  const auto twice = std::adjacent_find(places.begin(), places.end(),
                                        [](const auto& a, const auto& b) { return a.tensor == b.tensor; });
  KL_CHECK(twice == places.end(), path, ": weight_map names tensor ", in_quotes(twice->tensor), " twice");
  return index;
}

}  // namespace kl
