// A loaded model: its configuration, the mapped checkpoint and the weights inside it.
#pragma once

#include <functional>
#include <string>

#include "io/checkpoint.h"
#include "model/config.h"
#include "model/weights.h"

namespace kl {

struct Model {
  Config config;
  Checkpoint checkpoint;
  Weights weights;
};

// Maps a checkpoint directory. Reads headers and vectors only; matrices are paged in when they are first
// used. `on_layer` is called as layers are found: with a cold disk the vectors of a large model take their
// time.
using LoadProgress = std::function<void(int layers_done, int layers)>;
Model load_model(const std::string& directory, const LoadProgress& on_layer = {});

}  // namespace kl
