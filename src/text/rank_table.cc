#include "text/rank_table.h"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>

#include "base/check.h"

namespace kl {
namespace {

constexpr std::array<int8_t, 256> base64_values() {
  std::array<int8_t, 256> values{};
  values.fill(-1);
  constexpr std::string_view kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  for (size_t i = 0; i < kAlphabet.size(); ++i)
    values[static_cast<uint8_t>(kAlphabet[i])] = static_cast<int8_t>(i);
  return values;
}
constexpr auto kBase64 = base64_values();

// Appends the decoded bytes; false if `text` is not base64 with padding.
bool decode_base64(std::string_view text, std::string& out) {
  if (text.empty() || text.size() % 4 != 0) return false;
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  const size_t digits = text.size() - padding;
  uint32_t bits = 0;
  for (size_t i = 0; i < digits; ++i) {
    const int8_t value = kBase64[static_cast<uint8_t>(text[i])];
    if (value < 0) return false;
    bits = bits << 6 | static_cast<uint32_t>(value);
    if (i % 4 == 3)
      for (const int shift : {16, 8, 0}) out += static_cast<char>(bits >> shift & 0xFF);
  }
  // The last group of 2 or 3 digits: one or two bytes and left-over bits, which are zero.
  if (padding == 2) out += static_cast<char>(bits >> 4 & 0xFF);
  if (padding == 1)
    for (const int shift : {10, 2}) out += static_cast<char>(bits >> shift & 0xFF);
  return padding == 0 || (bits & ((1u << 2 * padding) - 1)) == 0;
}

// Lines of `file` in order, their endings taken off.
template <class F>
void for_each_line(std::string_view file, F&& f) {
  for (size_t number = 1, at = 0; at < file.size(); ++number) {
    const size_t newline = std::min(file.find('\n', at), file.size());
    std::string_view line = file.substr(at, newline - at);
    if (line.ends_with('\r')) line.remove_suffix(1);
    f(number, line);
    at = newline + 1;
  }
}

}  // namespace

RankTable RankTable::parse(std::string_view file, const std::string& name, int vocab_size) {
  KL_CHECK(file.size() < UINT32_MAX, name, ": ", file.size(), " bytes, expected less than 4 GiB");
  size_t count = 0;
  for_each_line(file, [&](size_t, std::string_view line) { count += !line.empty(); });
  KL_CHECK(count <= static_cast<size_t>(std::max(vocab_size, 0)), name, ": ", count,
           " ranks, expected at most vocab_size = ", vocab_size);
  RankTable table;
  table.tokens_.resize(count);
  table.pool_.reserve(file.size());
  std::vector<size_t> line_of_rank(count, 0);
  for_each_line(file, [&](size_t number, std::string_view line) {
    if (line.empty()) return;
    const size_t space = line.find(' ');
    KL_CHECK(space != std::string_view::npos, name, ":", number, ": expected \"base64 rank\"");
    const size_t offset = table.pool_.size();
    KL_CHECK(decode_base64(line.substr(0, space), table.pool_), name, ":", number, ": not base64");
    const std::string_view digits = line.substr(space + 1);
    size_t rank = 0;
    const auto [stop, error] = std::from_chars(digits.data(), digits.data() + digits.size(), rank);
    KL_CHECK(error == std::errc{} && stop == digits.data() + digits.size(), name, ":", number,
             ": the rank is not a number");
    KL_CHECK(rank < count, name, ":", number, ": rank ", rank, ", but the ", count,
             " lines should have the ranks 0 to ", count - 1, ", each once");
    KL_CHECK(line_of_rank[rank] == 0, name, ":", number, ": rank ", rank, " again, first in line ",
             line_of_rank[rank]);
    line_of_rank[rank] = number;
    table.tokens_[rank] = {static_cast<uint32_t>(offset), static_cast<uint32_t>(table.pool_.size() - offset)};
  });
  table.index(name, line_of_rank);
  return table;
}

void RankTable::index(const std::string& name, const std::vector<size_t>& line_of_rank) {
  const size_t slots = std::bit_ceil(std::max<size_t>(tokens_.size() + tokens_.size() / 2, 2));
  mask_ = slots - 1;
  shift_ = 64 - std::countr_zero(slots);
  slots_.assign(slots, Slot{});
  const size_t filter_bits = std::max<size_t>(8 * slots, 64);
  filter_shift_ = 64 - std::countr_zero(filter_bits);
  filter_.assign(filter_bits / 64, 0);
  of_byte_.assign(1 << 8, kNone);
  of_two_bytes_.assign(1 << 16, kNone);
  for (uint32_t rank = 0; rank < tokens_.size(); ++rank) {
    const std::string_view token = bytes(static_cast<int32_t>(rank));
    longest_ = std::max(longest_, token.size());
    const uint64_t key = key_of(token.data(), token.size());
    const uint64_t hash = hash_of(key, token.size()), bit = hash >> filter_shift_;
    filter_[bit / 64] |= uint64_t{1} << (bit % 64);
    size_t i = hash >> shift_;
    for (; slots_[i].length != 0; i = (i + 1) & mask_) {
      KL_CHECK(slots_[i].key != key || bytes(static_cast<int32_t>(slots_[i].rank)) != token, name, ":",
               line_of_rank[rank], ": the bytes of line ", line_of_rank[slots_[i].rank], " again");
    }
    slots_[i] = {key, rank, static_cast<uint32_t>(token.size())};
    const auto byte = [&](size_t k) { return static_cast<uint8_t>(token[k]); };
    if (token.size() == 1) of_byte_[byte(0)] = rank;
    if (token.size() == 2) of_two_bytes_[static_cast<size_t>(byte(0)) << 8 | byte(1)] = rank;
  }
  for (size_t byte = 0; byte < of_byte_.size(); ++byte)
    KL_CHECK(of_byte_[byte] != kNone, name, ": no line for the single byte ", byte,
             ", without which some texts cannot be encoded");
}

}  // namespace kl
