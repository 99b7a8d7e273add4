// The CUDA back-end of the activations, for the switch of act.cc. Shapes and types have been checked.
#pragma once

#include "ops/act/act.h"

namespace kl::cuda {

void silu_mul(const Ctx&, const SiluMulArgs&);

}  // namespace kl::cuda
