// Random checkpoints in the published format: Moonshot's names, initialised like a model before training. The
// bytes depend on the configuration and the seed alone.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/dtype.h"
#include "base/parallel.h"
#include "model/config.h"

namespace kl {

// The text of a config.json that says what `c` says, under the keys that Moonshot uses.
std::string config_json(const Config& c, DType matrices);

// How the values of a tensor are drawn. Uniform and normal numbers are sums of integers times a power of two
// or a rounded deviation, and logarithms are rounded coarsely, so that no two machines disagree.
enum class SynthInit {
  normal,   // deviation `spread` around 0 (a sum of four uniforms: no tails beyond 3.5 deviations)
  norm,     // the same around 1
  uniform,  // -spread .. spread
  A_log,    // log U(1, 16)
  dt_bias,  // inverse softplus of a time step that is log-uniform in 0.001 .. 0.1
};

struct SynthTensor {
  std::string name;
  DType dtype;
  std::vector<int64_t> shape;
  SynthInit init;
  float spread = 0;
  int64_t numel() const;
  int64_t bytes() const { return numel() * size_of(dtype); }
};
// All tensors of a checkpoint, in the order of the layers.
std::vector<SynthTensor> synth_tensors(const Config&, DType matrices);

// Elements [first, first + count) of a tensor as they stand in the file; `out` has room for them.
void synth_fill(const SynthTensor&, uint64_t seed, int64_t first, int64_t count, void* out);

struct SynthFileOptions {
  uint64_t seed = 1;
  DType matrices = DType::bf16;      // bf16, f16 or f32; A_log and dt_bias are f32
  int64_t shard_bytes = 5000000000;  // tensors go to the next file past this
  ThreadPool* pool = nullptr;
  std::function<void(int64_t bytes, int64_t total)> on_progress;  // may throw to stop
};
struct SynthResult {
  int64_t tensors = 0, parameters = 0, bytes = 0, files = 0;
};
// Writes config.json, generation_config.json and the weights into `directory`, which must be empty or not
// exist. Memory stays at a few megabytes. The configuration comes last, so that an unfinished directory is no
// checkpoint; after an error nothing is left behind but the directory.
SynthResult write_synthetic_checkpoint(const std::string& directory, const Config&, const SynthFileOptions&);

}  // namespace kl
