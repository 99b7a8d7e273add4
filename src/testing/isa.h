// Tests of CPU kernels run once for each instruction set of this machine.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "simd/isa.h"

namespace kl::testing {

template <class F>
void for_each_isa(F&& body) {
  for (const Isa isa : kIsas) {
    if (!isa_supported(isa)) continue;
    SCOPED_TRACE(std::string(name_of(isa)));
    force_isa(isa);
    body();
  }
  force_isa(best_isa());
}

}  // namespace kl::testing
