// A session file, read for a small model whose weights are written when the program starts. What is refused
// leaves the state as it was; what is accepted is written again byte for byte, because the format has one
// form only.
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "fuzz.h"
#include "model/fingerprint.h"
#include "model/session_file.h"
#include "testing/tiny_checkpoint.h"

namespace kl::fuzz {
namespace {

constexpr size_t kFingerprintAt = 16, kSmallestFile = 72;

struct Fixture {
  Fixture() {
    const testing::TinyModel shape = {.layers = "KM",
                                      .vocab_size = 6,
                                      .hidden_size = 4,
                                      .intermediate_size = 4,
                                      .kda_heads = 1,
                                      .kda_head_dim = 2,
                                      .conv = 2,
                                      .mla_heads = 1,
                                      .kv_lora_rank = 2,
                                      .nope = 2,
                                      .rope = 1,
                                      .v_head_dim = 2,
                                      .experts = 0};
    testing::write_checkpoint(folder.path(), shape, testing::tiny_tensors(shape));
    model = load_model(folder.path());
    print = fingerprint(model);
    // Pages for less than every slot's whole context, as somebody may configure it.
    state.emplace(model.config,
                  StateOptions{.slots = 2, .max_tokens = 40, .pages = 6, .page_size = 4, .poison = 0x55});
    other = state->open();
    state->reserve(other, 5), state->advance(other, 5);
    slot = state->open();
  }
  void fill() {  // the sequence that a refused file has to leave alone
    state->reset(slot);
    state->reserve(slot, 3), state->advance(slot, 3);
    uint8_t next = 1;
    for (const auto part : state->memory(slot))
      for (std::byte& b : part) b = std::byte{next++};
  }
  std::vector<std::byte> bytes(int of) const {
    std::vector<std::byte> all;
    for (const auto part : state->memory(of)) all.insert(all.end(), part.begin(), part.end());
    return all;
  }
  testing::TempDir folder;
  Model model;
  uint64_t print = 0;
  std::optional<State> state;
  int other = 0, slot = 0;
};

void check(std::span<const std::byte> file, bool write) {
  static Fixture f;
  f.fill();
  const std::vector<std::byte> before = f.bytes(f.slot), neighbour = f.bytes(f.other);
  std::optional<SavedSequence> saved;
  if (!accepted([&] { saved = parse_session(file, "session", f.model, *f.state, f.slot); })) {
    FUZZ_REQUIRE(f.state->length(f.slot) == 3, f.state->length(f.slot), " tokens after a file was refused");
    FUZZ_REQUIRE(f.bytes(f.slot) == before);
  }
  FUZZ_REQUIRE(f.bytes(f.other) == neighbour);
  if (!saved) return;
  FUZZ_REQUIRE(f.state->length(f.slot) == static_cast<int64_t>(saved->tokens.size()));
  for (const int32_t id : saved->tokens) FUZZ_REQUIRE(id >= 0 && id < f.model.config.vocab_size, id);
  if (!write) return;
  static const std::string path = f.folder / "again.session";
  write_session_file(path, f.model, *f.state, f.slot, saved->tokens, saved->logits, saved->draws);
  const Buffer again = Buffer::map_file(path);
  FUZZ_REQUIRE(again.size() == file.size() && std::memcmp(again.data(), file.data(), file.size()) == 0);
}

// What only somebody who knows the model could write: a fitting fingerprint and checksum.
std::vector<std::byte> repaired(std::span<const std::byte> file) {
  static const uint64_t print = Fixture().print;
  std::vector<std::byte> out(file.begin(), file.end());
  if (out.size() < kSmallestFile) return out;
  std::memcpy(out.data() + kFingerprintAt, &print, sizeof print);
  const uint64_t sum = xxh64(out.data(), out.size() - sizeof sum);
  std::memcpy(out.data() + out.size() - sizeof sum, &sum, sizeof sum);
  return out;
}

}  // namespace
}  // namespace kl::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace kl::fuzz;
  const auto file = std::as_bytes(std::span(data, size));
  check(file, false);
  check(repaired(file), one_in(16, data, size));
  return 0;
}
