// Session files: what is written comes back; anything else is refused and changes nothing.
#include "model/session_file.h"

#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <cstring>
#include <optional>

#include "io/xxh64.h"
#include "model/fingerprint.h"
#include "testing/tiny_checkpoint.h"

namespace kl {
namespace {

using testing::TinyModel;

Model tiny(const testing::TempDir& folder, const TinyModel& m) {
  testing::write_checkpoint(folder.path(), m, testing::tiny_tensors(m));
  return load_model(folder.path());
}

std::vector<std::byte> bytes_of_file(const std::string& path) {
  const Buffer file = Buffer::map_file(path);
  return {file.data(), file.data() + file.size()};
}

std::vector<std::byte> bytes_of_state(const State& state, int slot) {
  std::vector<std::byte> all;
  for (const auto part : state.memory(slot)) all.insert(all.end(), part.begin(), part.end());
  return all;
}

// A sequence whose state is random bytes: what a session file holds does not depend on how it came about.
struct Sequence {
  Sequence(const Config& c, const StateOptions& options, int64_t tokens, uint64_t seed) : state(c, options) {
    testing::Random random(seed);
    slot = state.open();
    state.reserve(slot, tokens);
    state.advance(slot, tokens);
    for (const auto part : state.memory(slot)) {
      for (std::byte& b : part) b = static_cast<std::byte>(random.bits());
    }
    for (int64_t i = 0; i < tokens; ++i) {
      ids.push_back(static_cast<int32_t>(random.integer(0, c.vocab_size - 1)));
    }
    for (int i = 0; i < c.vocab_size; ++i) logits.push_back(static_cast<float>(random.normal()));
  }
  State state;
  int slot;
  std::vector<int32_t> ids;
  std::vector<float> logits;
};

class SessionFile : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 21;
  static constexpr uint64_t kDraws = 0x0102030405060708u;
  SessionFile() : model(tiny(folder, {})), saved(model.config, options, kTokens, 1) {
    write_session_file(path, model, saved.state, saved.slot, saved.ids, saved.logits, kDraws);
    file = bytes_of_file(path);
  }
  // The message with which these bytes are refused; "" if they are taken. Checks that a refusal changes
  // nothing.
  std::string refusal(std::span<const std::byte> bytes, const Model& by) {
    if (!target) target.emplace(model.config, options, 5, 2);
    const std::vector<std::byte> before = bytes_of_state(target->state, target->slot);
    try {
      parse_session(bytes, "test", by, target->state, target->slot);
      target.reset();
      return "";
    } catch (const Error& e) {
      EXPECT_EQ(target->state.length(target->slot), 5);
      EXPECT_EQ(bytes_of_state(target->state, target->slot), before);
      return e.what();
    }
  }
  // With a checksum that fits, as somebody who means harm would write it.
  std::string refusal_with_checksum(std::vector<std::byte> bytes) {
    const uint64_t sum = xxh64(bytes.data(), bytes.size() - sizeof sum);
    std::memcpy(bytes.data() + bytes.size() - sizeof sum, &sum, sizeof sum);
    return refusal(bytes, model);
  }
  template <class T>
  std::vector<std::byte> with(size_t offset, T value) const {
    std::vector<std::byte> changed = file;
    std::memcpy(changed.data() + offset, &value, sizeof value);
    return changed;
  }

  testing::TempDir folder;
  Model model;
  StateOptions options = {.slots = 2, .max_tokens = 64, .page_size = 8, .poison = 0x55};
  Sequence saved;
  std::optional<Sequence> target;  // what refused files leave as it is
  std::string path = folder.path() + "/a.session";
  std::vector<std::byte> file;
};

TEST_F(SessionFile, ComesBackAsItWas) {
  for (const int page_size : {8, 3, 64}) {  // pages are not part of the format
    State state(model.config, {.slots = 3, .max_tokens = 40, .page_size = page_size, .poison = 0x7f});
    state.open();
    const int slot = state.open();
    const SavedSequence read = read_session_file(path, model, state, slot);
    EXPECT_EQ(read.tokens, saved.ids);
    EXPECT_EQ(read.logits, saved.logits);
    EXPECT_EQ(read.draws, kDraws);
    EXPECT_EQ(state.length(slot), kTokens);
    EXPECT_EQ(bytes_of_state(state, slot), bytes_of_state(saved.state, saved.slot));
  }
}

TEST_F(SessionFile, HoldsOnlyTheRowsInUse) {
  const StateOptions rows = {.page_size = 1};
  const auto state = static_cast<size_t>(state_bytes(model.config, kTokens, rows).total());
  EXPECT_EQ(file.size(), 64 + 4 * kTokens + 4 * saved.logits.size() + state + 8);
}

TEST_F(SessionFile, HalfPrecisionLatentsComeBackAndDoNotMix) {
  StateOptions half = options;
  half.latent_dtype = DType::bf16;
  Sequence sequence(model.config, half, kTokens, 3), other(model.config, half, 2, 4);
  write_session_file(path, model, sequence.state, sequence.slot, sequence.ids, sequence.logits, 0);
  read_session_file(path, model, other.state, other.slot);
  EXPECT_EQ(bytes_of_state(other.state, other.slot), bytes_of_state(sequence.state, sequence.slot));
  EXPECT_NE(refusal(bytes_of_file(path), model).find("16 bits a value, expected 32"), std::string::npos);
}

TEST_F(SessionFile, EveryTruncationIsRefused) {
  for (size_t n = 0; n < file.size(); ++n) {
    // In a block of exactly this size, so that AddressSanitizer sees the first byte beyond.
    const std::vector<std::byte> cut(file.begin(), file.begin() + static_cast<ptrdiff_t>(n));
    const std::string message = refusal(cut, model);
    ASSERT_NE(message.find(n < 8 ? "not a session file" : "cut"), std::string::npos) << n << ": " << message;
  }
  std::vector<std::byte> longer = file;
  longer.push_back(std::byte{0});
  EXPECT_NE(refusal(longer, model), "");
}

TEST_F(SessionFile, EveryChangedByteIsRefused) {
  for (size_t i = 0; i < file.size(); ++i) {
    file[i] ^= std::byte{0x10};
    ASSERT_NE(refusal(file, model), "") << "byte " << i;
    file[i] ^= std::byte{0x10};
  }
  EXPECT_EQ(refusal(file, model), "");
}

TEST_F(SessionFile, NumbersAreCheckedEvenIfTheChecksumFits) {
  const auto found = [](const std::string& message, const char* part) {
    return message.find(part) != std::string::npos;
  };
  EXPECT_TRUE(found(refusal_with_checksum(with(8, uint32_t{1})), "version 1, expected 2"));
  EXPECT_TRUE(found(refusal_with_checksum(with(12, uint32_t{16})), "16 bits a value, expected 32"));
  EXPECT_TRUE(found(refusal_with_checksum(with(16, uint64_t{1})), "another model"));
  EXPECT_TRUE(found(refusal_with_checksum(with(24, uint64_t{1})), "cut or damaged"));
  for (const uint64_t tokens : {uint64_t{0}, uint64_t{65}, ~uint64_t{0}, uint64_t{1} << 62}) {
    EXPECT_TRUE(found(refusal_with_checksum(with(32, tokens)), "expected 1 to 64"));
  }
  EXPECT_TRUE(found(refusal_with_checksum(with(32, uint64_t{kTokens + 1})), "bytes of state"));
  EXPECT_TRUE(found(refusal_with_checksum(with(40, ~uint64_t{0})), "logits of"));
  EXPECT_TRUE(found(refusal_with_checksum(with(48, uint64_t{7})), "bytes of state"));
  EXPECT_TRUE(found(refusal_with_checksum(with(64, int32_t{-1})), "token id -1"));
  EXPECT_TRUE(found(refusal_with_checksum(with(68, int32_t{50})), "token id 50"));
  EXPECT_EQ(refusal_with_checksum(with(68, int32_t{49})), "");   // the change itself is fine
  EXPECT_EQ(refusal_with_checksum(with(56, ~uint64_t{0})), "");  // any number of draws is one
}

RC_GTEST_FIXTURE_PROP(SessionFile, RandomBytesAreRefused, (std::vector<uint8_t> bytes, bool magic)) {
  if (magic) bytes.insert(bytes.begin(), {'K', 'L', 'S', 'E', 'S', 'S', '\r', '\n', 2, 0, 0, 0, 32, 0, 0, 0});
  RC_ASSERT(refusal(std::as_bytes(std::span(bytes)), model) != "");
}

// Found by fuzz_session: the sequence that was there was gone when the pages did not suffice.
TEST_F(SessionFile, AFileThatTheFreePagesDoNotHoldChangesNothing) {
  StateOptions few = options;
  few.pages = 2;  // of 8 tokens; the file has 21
  target.emplace(model.config, few, 5, 2);
  EXPECT_NE(refusal(file, model).find("3 pages of 8 tokens are needed, 2 are free"), std::string::npos);
}

TEST_F(SessionFile, OtherModelsAreRefused) {
  const testing::TempDir other;
  for (const TinyModel& m : {TinyModel{.seed = 2}, TinyModel{.layers = "KMKK"}, TinyModel{.scaling = 2.4}}) {
    EXPECT_NE(refusal(file, tiny(other, m)).find("another model"), std::string::npos);
  }
  Model compat = tiny(other, {});
  EXPECT_EQ(refusal(file, compat), "");  // a copy elsewhere is the same model
  compat.config.hf_compat_router = true;
  EXPECT_NE(refusal(file, compat).find("another model"), std::string::npos);
}

TEST_F(SessionFile, AModelInSeveralFilesIsTheSame) {
  const testing::TempDir other;
  EXPECT_EQ(fingerprint(tiny(other, {.shards = 3})), fingerprint(model));
}

TEST_F(SessionFile, OnlyWholeSequencesAreWritten) {
  const std::span<const int32_t> ids(saved.ids);
  const auto write = [&](std::span<const int32_t> tokens, std::span<const float> logits) {
    write_session_file(path, model, saved.state, saved.slot, tokens, logits, 0);
  };
  EXPECT_THROW(write({}, saved.logits), Error);
  EXPECT_THROW(write(ids.first(5), saved.logits), Error);
  EXPECT_THROW(write(ids, {}), Error);
  EXPECT_EQ(bytes_of_file(path), file);  // the old file is still there
  EXPECT_THROW(read_session_file(folder.path() + "/none", model, saved.state, saved.slot), Error);
  EXPECT_THROW(read_session_file(folder.path(), model, saved.state, saved.slot), Error);
}

}  // namespace
}  // namespace kl
