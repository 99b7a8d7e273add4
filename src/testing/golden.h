// Files of tests/golden and of the shipped model, found from the source tree.
#pragma once

#include <string>

#include "io/checkpoint.h"
#include "io/safetensors.h"

namespace kl::testing {

#ifdef KL_SOURCE_DIR
inline std::string source_path(const std::string& relative) {
  return std::string(KL_SOURCE_DIR) + "/" + relative;
}
inline std::string golden_path(const std::string& name) { return source_path("tests/golden/" + name); }
inline std::string demo_model() { return source_path("models/demo"); }
#endif

}  // namespace kl::testing
