// A number that tells models apart: what a session file may only be continued with.
#pragma once

#include <cstdint>

#include "model/model.h"

namespace kl {

// Hash of everything in the configuration that enters the mathematics, of the names, shapes and types of all
// tensors, of the bytes of small tensors (norms, biases, taps) and of a sample of each large one. Costs one
// page of the file per large tensor: milliseconds when the model is in memory. The same for copies of a
// checkpoint, however they are cut into files; another one for any other training of the same shape.
uint64_t fingerprint(const Model&);

}  // namespace kl
