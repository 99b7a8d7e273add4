#include "io/safetensors_header.h"

#include <algorithm>
#include <limits>
#include <optional>

#include "io/json_sax.h"

namespace kl {

namespace {

constexpr std::string_view kMetadata = "__metadata__";

std::optional<DType> dtype_named(std::string_view name) {
  for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
    if (name_of(static_cast<DType>(i)) == name) return static_cast<DType>(i);
  }
  return std::nullopt;
}

//   { "__metadata__": { name: string, ... }, tensor: { "dtype": "BF16", "shape": [...], "data_offsets": [b,
//   e] },
//   ... }
// Place says inside what the walk stands; nothing else may be nested, so the depth is bounded by the grammar.
class HeaderHandler : public JsonHandler {
 public:
  HeaderHandler(const std::string& file, SafetensorsHeader& header) : JsonHandler(file), header_(header) {}

  bool start_object(size_t) {
    if (place_ == Place::document) return go(Place::header);
    if (place_ != Place::header) unexpected("an object");
    if (name_ == kMetadata) return go(Place::metadata);
    item_ = {}, seen_ = 0;
    return go(Place::tensor);
  }

  bool key(std::string& text) {
    if (place_ == Place::tensor) return field(text);
    KL_CHECK(++names_ <= kMaxHeaderNames, file_, ": the header has more than ", kMaxHeaderNames,
             " names, which is the limit");
    if (place_ == Place::metadata) {
      metadata_key_ = std::move(text);
    } else {
      name_ = std::move(text);
      if (name_ == kMetadata) {
        KL_CHECK(!metadata_seen_, file_, ": __metadata__ stands twice in the header");
        metadata_seen_ = true;
      }
    }
    return true;
  }

  bool string(std::string& text) {
    if (place_ == Place::metadata) {
      const bool fresh = header_.metadata.emplace(metadata_key_, std::move(text)).second;
      KL_CHECK(fresh, file_, ": __metadata__ names ", in_quotes(metadata_key_), " twice");
    } else if (place_ == Place::tensor && field_ == kDType) {
      const std::optional<DType> dtype = dtype_named(text);
      if (!dtype) fail(cat("unknown dtype ", in_quotes(text), ", expected one of ", known_dtypes()));
      item_.dtype = *dtype;
    } else {
      unexpected("a string");
    }
    return true;
  }

  bool start_array(size_t) {
    if (place_ == Place::tensor && field_ == kShape) return go(Place::shape);
    if (place_ == Place::tensor && field_ == kOffsets) return offsets_.clear(), go(Place::offsets);
    unexpected("a list");
  }

  bool number_unsigned(uint64_t number) {
    if (place_ != Place::shape && place_ != Place::offsets) unexpected("a number");
    if (number > uint64_t{std::numeric_limits<int64_t>::max()}) unexpected(cat(number));
    std::vector<int64_t>& list = place_ == Place::shape ? item_.shape : offsets_;
    const size_t limit = place_ == Place::shape ? kMaxHeaderRank : 2;
    if (list.size() == limit) fail(cat("more than ", limit, " numbers in ", field_name()));
    list.push_back(static_cast<int64_t>(number));
    return true;
  }
  bool number_integer(int64_t number) {  // only called for numbers with a minus sign
    unexpected(number == 0 ? "-0" : cat(number));
  }
  bool number_float(double, const std::string& text) { unexpected(printable(text, 40)); }
  bool boolean(bool value) { unexpected(cat(value)); }
  bool null() { unexpected("null"); }

  bool end_array() {
    if (place_ == Place::offsets) {
      if (offsets_.size() != 2) fail(cat("data_offsets has ", offsets_.size(), " numbers, expected 2"));
      item_.begin = offsets_[0], item_.end = offsets_[1];
    }
    return go(Place::tensor);
  }

  bool end_object() {
    if (place_ == Place::header) return go(Place::document);
    if (place_ == Place::tensor) {
      for (const Field f : {kDType, kShape, kOffsets}) {
        if (!(seen_ & f)) fail(cat("the field ", name_of_field(f), " is missing"));
      }
      item_.name = std::move(name_);
      header_.tensors.push_back(std::move(item_));
    }
    return go(Place::header);
  }

 private:
  enum class Place { document, header, metadata, tensor, shape, offsets };
  enum Field : unsigned { kDType = 1, kShape = 2, kOffsets = 4 };

  static std::string_view name_of_field(Field f) {
    return f == kDType ? "dtype" : f == kShape ? "shape" : "data_offsets";
  }
  std::string_view field_name() const { return name_of_field(field_); }

  bool go(Place place) {
    place_ = place;
    return true;
  }

  bool field(const std::string& text) {
    const auto known = {kDType, kShape, kOffsets};
    const auto f =
        std::find_if(known.begin(), known.end(), [&](Field k) { return name_of_field(k) == text; });
    if (f == known.end())
      fail(cat("unknown field ", in_quotes(text), ", expected dtype, shape and data_offsets"));
    if (seen_ & *f) fail(cat("the field ", text, " stands twice"));
    field_ = *f, seen_ |= *f;
    return true;
  }

  static std::string known_dtypes() {
    std::string all;
    for (int i = 0; i <= static_cast<int>(DType::boolean); ++i) {
      all += (i ? ", " : "") + std::string(name_of(static_cast<DType>(i)));
    }
    return all;
  }

  [[noreturn]] void fail(const std::string& problem) const {
    detail::fail(cat(file_, ": tensor ", in_quotes(name_), ": ", problem));
  }

  [[noreturn]] void unexpected(std::string_view found) const {
    switch (place_) {
      case Place::document: detail::fail(cat(file_, ": expected a header that is an object, found ", found));
      case Place::header:
        if (name_ == kMetadata) {
          detail::fail(cat(file_, ": __metadata__: expected an object of strings, found ", found));
        }
        fail(cat("expected an object with dtype, shape and data_offsets, found ", found));
      case Place::metadata:
        detail::fail(
            cat(file_, ": __metadata__: ", in_quotes(metadata_key_), ": expected a string, found ", found));
      case Place::tensor:
        fail(cat("field ", field_name(), ": expected ",
                 field_ == kDType   ? "a string"
                 : field_ == kShape ? "a list of whole numbers"
                                    : "a list of two whole numbers",
                 ", found ", found));
      case Place::shape:
      case Place::offsets:
        fail(cat("field ", field_name(), ": expected a whole number from 0 to 2^63 - 1, found ", found));
    }
    __builtin_unreachable();
  }

  SafetensorsHeader& header_;
  Place place_ = Place::document;
  std::string name_;          // key of the top level that the walk stands behind
  std::string metadata_key_;  // key inside __metadata__
  Field field_ = kDType;      // key inside a tensor
  unsigned seen_ = 0;         // fields of this tensor so far
  bool metadata_seen_ = false;
  size_t names_ = 0;
  SafetensorsHeader::Item item_;
  std::vector<int64_t> offsets_;
};

}  // namespace

SafetensorsHeader parse_safetensors_header(std::string_view json, const std::string& file) {
  // Also turns away a byte order mark and leading spaces, which the format does not allow.
  KL_CHECK(!json.empty() && json[0] == '{', file, ": the header starts with ", in_quotes(json.substr(0, 8)),
           ", expected {");
  SafetensorsHeader header;
  HeaderHandler handler(file, header);
  walk_json(json, handler, file);
  return header;
}

}  // namespace kl
