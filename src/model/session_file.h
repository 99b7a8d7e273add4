// Session files: one sequence, as it is between two forward passes, on disk.
//
//   header       magic, version, type of the latents, fingerprint of the model, sizes, draws made so far
//   tokens       i32 each
//   logits       after the last token, f32 [vocab]
//   state        layer by layer: KDA states and convolution states f32, or the latent rows in use
//   checksum     XXH64 of all bytes before it
//
// All numbers little-endian. A file is written atomically and belongs to one model and one type of latent
// cache; page size, context and number of threads may differ when it is read.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "model/model.h"
#include "model/state.h"

namespace kl {

// Writes the sequence in `slot` of `state`: `tokens` have been through the model, `logits` are those after
// the last, `draws` is the position in the stream of random draws. The seed is not in the file: whoever goes
// on chooses it, and the same one goes on with the same draws. Throws kl::Error with the path and the reason.
void write_session_file(const std::string& path, const Model&, const State& state, int slot,
                        std::span<const int32_t> tokens, std::span<const float> logits, uint64_t draws);

struct SavedSequence {
  std::vector<int32_t> tokens;
  std::vector<float> logits;
  uint64_t draws = 0;
};

// Makes the sequence of a file that of `slot`. Throws kl::Error that names what was found and expected if the
// file is not a session file, of another version, cut, changed, of another model or another type of latents,
// or too long for the context or for the pages that are free; `state` is
// untouched then.
SavedSequence read_session_file(const std::string& path, const Model&, State& state, int slot);
// The same for bytes in memory (tests, fuzzing).
SavedSequence parse_session(std::span<const std::byte> bytes, const std::string& name, const Model&,
                            State& state, int slot);

}  // namespace kl
