#include "model/session_file.h"

#include <cstring>

#include "io/atomic_file.h"
#include "io/xxh64.h"
#include "model/fingerprint.h"

namespace kl {

namespace {

constexpr char kMagic[8] = {'K', 'L', 'S', 'E', 'S', 'S', '\r', '\n'};  // a change of line ends breaks it
constexpr uint32_t kVersion = 2;                                        // 1 had no draws

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t latent_bits;  // 32: f32, 16: bf16
  uint64_t fingerprint;
  uint64_t file_bytes;
  uint64_t tokens;
  uint64_t vocab_size;
  uint64_t state_bytes;
  uint64_t draws;
};
static_assert(sizeof(Header) == 64, "the header is written as it lies in memory");

constexpr size_t kChecksumBytes = sizeof(uint64_t);

uint32_t bits_of(DType dtype) { return 8 * static_cast<uint32_t>(size_of(dtype)); }

// Bytes of the state of a sequence: latent rows one by one, not pages.
uint64_t bytes_of_state(const Config& c, uint64_t tokens, DType latent) {
  const StateOptions rows = {.page_size = 1, .latent_dtype = latent};
  return static_cast<uint64_t>(state_bytes(c, static_cast<int64_t>(tokens), rows).total());
}

Header make_header(const Model& model, const State& state, size_t tokens, uint64_t draws) {
  const DType latent = state.options().latent_dtype;
  Header h = {.version = kVersion, .latent_bits = bits_of(latent), .tokens = tokens};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.fingerprint = fingerprint(model);
  h.vocab_size = static_cast<uint64_t>(model.config.vocab_size);
  h.state_bytes = bytes_of_state(model.config, tokens, latent);
  h.draws = draws;
  h.file_bytes = sizeof h + 4 * h.tokens + 4 * h.vocab_size + h.state_bytes + kChecksumBytes;
  return h;
}

std::string hex(uint64_t value) {
  std::string text(16, '0');
  for (size_t i = 16; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
  return text;
}

// Everything that can be said before the sizes are used.
Header check_header(std::span<const std::byte> bytes, const std::string& name, const Model& model,
                    const State& state) {
  Header h;
  KL_CHECK(bytes.size() >= sizeof kMagic && std::memcmp(bytes.data(), kMagic, sizeof kMagic) == 0, name,
           ": not a session file");
  KL_CHECK(bytes.size() >= sizeof h + kChecksumBytes, name, ": the session file is cut: ", bytes.size(),
           " bytes, expected at least ", sizeof h + kChecksumBytes);
  std::memcpy(&h, bytes.data(), sizeof h);
  KL_CHECK(h.version == kVersion, name, ": a session file of version ", h.version, ", expected ", kVersion);
  KL_CHECK(h.file_bytes == bytes.size(), name, ": the session file is cut or damaged: ", bytes.size(),
           " bytes, expected ", h.file_bytes);
  const uint64_t ours = fingerprint(model);
  KL_CHECK(h.fingerprint == ours, name, ": the session belongs to another model: fingerprint ",
           hex(h.fingerprint), ", expected ", hex(ours), " (", model.checkpoint.directory(), ")");
  const uint32_t bits = bits_of(state.options().latent_dtype);
  KL_CHECK(h.latent_bits == bits, name, ": the session has a latent cache of ", h.latent_bits,
           " bits a value, expected ", bits, " (the cache type chosen now)");
  const auto longest = static_cast<uint64_t>(state.options().max_tokens);
  KL_CHECK(h.tokens >= 1 && h.tokens <= longest, name, ": a session of ", h.tokens, " tokens, expected 1 to ",
           longest, " (the context chosen now)");
  return h;
}

void check_contents(std::span<const std::byte> bytes, const std::string& name, const Header& h,
                    const Model& model, const State& state) {
  const auto vocab = static_cast<uint64_t>(model.config.vocab_size);
  KL_CHECK(h.vocab_size == vocab, name, ": logits of ", h.vocab_size, " tokens, expected ", vocab);
  const uint64_t state_size = bytes_of_state(model.config, h.tokens, state.options().latent_dtype);
  KL_CHECK(h.state_bytes == state_size, name, ": ", h.state_bytes, " bytes of state, expected ", state_size);
  const uint64_t total = sizeof h + 4 * h.tokens + 4 * vocab + state_size + kChecksumBytes;
  KL_CHECK(total == bytes.size(), name, ": ", bytes.size(), " bytes, expected ", total);
  uint64_t found;
  std::memcpy(&found, bytes.data() + bytes.size() - sizeof found, sizeof found);
  const uint64_t expected = xxh64(bytes.data(), bytes.size() - sizeof found);
  KL_CHECK(found == expected, name, ": the session file is damaged: checksum ", hex(found), ", expected ",
           hex(expected));
}

}  // namespace

void write_session_file(const std::string& path, const Model& model, const State& state, int slot,
                        std::span<const int32_t> tokens, std::span<const float> logits, uint64_t draws) {
  KL_CHECK(!tokens.empty(), "cannot write ", path, ": the session is empty");
  KL_CHECK(static_cast<int64_t>(tokens.size()) == state.length(slot), "cannot write ", path, ": ",
           tokens.size(), " tokens, but ", state.length(slot), " in the state");
  KL_CHECK(logits.size() == static_cast<size_t>(model.config.vocab_size), "cannot write ", path, ": ",
           logits.size(), " logits, expected ", model.config.vocab_size);
  AtomicFile file(path);
  Xxh64 hash;
  const auto write = [&](const void* data, size_t bytes) {
    hash.update(data, bytes);
    file.write(data, bytes);
  };
  const Header header = make_header(model, state, tokens.size(), draws);
  write(&header, sizeof header);
  write(tokens.data(), tokens.size_bytes());
  write(logits.data(), logits.size_bytes());
  for (const std::span<std::byte> part : state.memory(slot)) write(part.data(), part.size());
  const uint64_t checksum = hash.digest();
  file.write(&checksum, sizeof checksum);
  file.commit();
}

SavedSequence parse_session(std::span<const std::byte> bytes, const std::string& name, const Model& model,
                            State& state, int slot) {
  const Header h = check_header(bytes, name, model, state);
  check_contents(bytes, name, h, model, state);
  const std::byte* from = bytes.data() + sizeof h;
  const auto read = [&](void* to, size_t size) {
    std::memcpy(to, from, size);
    from += size;
  };
  SavedSequence saved;
  saved.draws = h.draws;
  saved.tokens.resize(h.tokens);
  read(saved.tokens.data(), 4 * h.tokens);
  for (const int32_t id : saved.tokens) {
    KL_CHECK(id >= 0 && id < model.config.vocab_size, name, ": token id ", id,
             " is outside the vocabulary of ", model.config.vocab_size);
  }
  saved.logits.resize(h.vocab_size);
  read(saved.logits.data(), 4 * h.vocab_size);
  state.check_fits(slot, static_cast<int64_t>(h.tokens));  // the last thing that can fail
  state.reset(slot);
  state.reserve(slot, static_cast<int64_t>(h.tokens));
  state.advance(slot, static_cast<int64_t>(h.tokens));
  for (const std::span<std::byte> part : state.memory(slot)) read(part.data(), part.size());
  return saved;
}

SavedSequence read_session_file(const std::string& path, const Model& model, State& state, int slot) {
  const Buffer file = Buffer::map_file(path);
  return parse_session({file.data(), file.size()}, path, model, state, slot);
}

}  // namespace kl
