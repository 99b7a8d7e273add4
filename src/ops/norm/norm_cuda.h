// The CUDA back-end of the norms, for the switch of norm.cc. Shapes and types have been checked.
#pragma once

#include "ops/norm/norm.h"

namespace kl::cuda {

void rms_norm(const Ctx&, const RmsNormArgs&);
void rms_norm_gated(const Ctx&, const RmsNormGatedArgs&);

}  // namespace kl::cuda
