#include "text/bpe.h"

#include <algorithm>
#include <functional>

namespace kl {
namespace {

constexpr uint32_t kNone = RankTable::kNone;

// Up to this many bytes a scan for the lowest pair beats a heap.
constexpr size_t kShort = 128;

void merge_short(const RankTable& table, std::string_view text, std::vector<int32_t>& ids) {
  struct Part {
    uint32_t start, id, pair;  // as in BpeScratch
  };
  Part parts[kShort + 1];  // the last is the end
  size_t n = text.size();
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  for (size_t i = 0; i < n; ++i)
    parts[i] = {static_cast<uint32_t>(i), table.of_byte(byte(i)),
                i + 1 < n ? table.of_two_bytes(byte(i), byte(i + 1)) : kNone};
  parts[n] = {static_cast<uint32_t>(n), kNone, kNone};
  const auto update = [&](size_t i) {
    parts[i].pair =
        i + 1 < n ? table.find(text.data() + parts[i].start, parts[i + 2].start - parts[i].start) : kNone;
  };
  while (true) {
    uint32_t lowest = kNone;
    size_t where = 0;
    for (size_t i = 0; i < n; ++i)
      if (parts[i].pair < lowest) lowest = parts[i].pair, where = i;
    if (lowest == kNone) break;
    parts[where].id = lowest;
    std::copy(parts + where + 2, parts + n + 1, parts + where + 1);
    --n;
    update(where);
    if (where > 0) update(where - 1);
  }
  for (size_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(parts[i].id));
}

// The same with a linked list of parts and a heap of pairs. An entry is out of date if its part is gone or
// has another pair by now.
void merge_long(const RankTable& table, std::string_view text, std::vector<int32_t>& ids,
                BpeScratch& scratch) {
  auto& parts = scratch.parts;
  auto& heap = scratch.heap;
  const auto n = static_cast<uint32_t>(text.size());
  parts.resize(n + 1);  // the last is the end
  heap.clear();
  const auto byte = [&](uint32_t i) { return static_cast<uint8_t>(text[i]); };
  const auto entry = [&](uint32_t part) { return uint64_t{parts[part].pair} << 32 | part; };
  for (uint32_t i = 0; i < n; ++i) {
    parts[i] = {i, table.of_byte(byte(i)), kNone, i - 1, i + 1};
    if (i + 1 < n) parts[i].pair = table.of_two_bytes(byte(i), byte(i + 1));
    if (parts[i].pair != kNone) heap.push_back(entry(i));
  }
  parts[n] = {n, kNone, kNone, n - 1, n};
  std::make_heap(heap.begin(), heap.end(), std::greater{});

  const auto update = [&](uint32_t i) {
    const uint32_t next = parts[i].next;
    parts[i].pair =
        next == n ? kNone
                  : table.find(text.data() + parts[i].start, parts[parts[next].next].start - parts[i].start);
    if (parts[i].pair == kNone) return;
    heap.push_back(entry(i));
    std::push_heap(heap.begin(), heap.end(), std::greater{});
  };
  while (!heap.empty()) {
    const auto i = static_cast<uint32_t>(heap.front());
    const bool current = heap.front() == entry(i);
    std::pop_heap(heap.begin(), heap.end(), std::greater{});
    heap.pop_back();
    if (!current) continue;
    const uint32_t gone = parts[i].next;
    parts[i].id = parts[i].pair;
    parts[i].next = parts[gone].next;
    parts[parts[gone].next].previous = i;
    parts[gone].pair = kNone;
    update(i);
    if (i > 0) update(parts[i].previous);
  }
  for (uint32_t i = 0; i < n; i = parts[i].next) ids.push_back(static_cast<int32_t>(parts[i].id));
}

}  // namespace

void bpe_encode(const RankTable& table, std::string_view pretoken, std::vector<int32_t>& ids,
                BpeScratch& scratch) {
  // A shortcut for most pre-tokens: a token merges to itself.
  if (const uint32_t whole = table.find(pretoken.data(), pretoken.size()); whole != kNone)
    ids.push_back(static_cast<int32_t>(whole));
  else if (pretoken.size() <= kShort)
    merge_short(table, pretoken, ids);
  else
    merge_long(table, pretoken, ids, scratch);
}

}  // namespace kl
